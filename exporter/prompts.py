"""How a checkpoint's prompts look, as data: its chat template, rendered once with questions that show what goes where.

Chats with one picture and with two tell what each of them adds; one with a picture between texts, what stands there;
one with an answer, how a conversation goes on. What a template does not know is left to the family's rules.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from himap_export.engines.prompt import MEDIUM, PICTURES, QUESTION, Medium, PromptFormat
from himap_export.exporter.family import PromptRules
from himap_export.exporter.template import Chat, render
from himap_export.graphs.errors import HimapError

SENTINEL: Final = "himap-export asks 7c41"
ANSWER: Final = "himap-export answers 88e0"
LATER: Final = "himap-export goes on 2f9b"
PROBE: Final = '  Is "5 < 6" & {true}?\n\tÆther  '  # what a template might strip or escape
_PICTURE, _FILM = {"type": "image"}, {"type": "video"}


def default_prompt(rules: PromptRules) -> PromptFormat:
    """Returns the prompts of a family whose checkpoint does not say."""
    lead = _marked(rules.lead, rules.image_text)
    picture = Medium(rules.image_text, lead, lead.strip(" \n"))  # within a question no lines begin with pictures
    return PromptFormat(
        template=rules.template,
        interleaved=rules.interleaved or rules.template.replace(PICTURES, ""),
        picture=_with_id(picture, rules.image_token),
        film=_film(rules, rules.film_lead) if rules.film_lead else None,
        turn=rules.turn,
    )


def told_prompt(template: str, special: Mapping[str, Any], rules: PromptRules) -> PromptFormat:
    """Returns the prompts of a chat `template` that sees the tokenizer's `special` tokens. HimapError for one that has
    not one image and one question, or changes the question's text."""
    bos, token = str(special.get("bos_token") or ""), rules.image_text
    texts = render(template, _chats(), special)
    one, probed, two, alone, mixed, film, turns = texts
    assert one is not None
    if one.count(SENTINEL) != 1 or one.count(token) != 1 or QUESTION in one or PICTURES in one:
        details = f"expected one {token} and the question once in {one[:500]!r}"
        raise HimapError("unsupported chat template", details)
    before, after = one.split(SENTINEL)
    if token not in before:
        raise HimapError("unsupported chat template", f"the image stands behind the question in {one[:500]!r}")
    first, lead, rest = _lead(before, two, token)
    inline = token if mixed is None else _between(mixed, SENTINEL, LATER)
    inline = inline if inline.count(token) == 1 else token  # images that were put in front: as if typed by hand
    for strip in (False, True):
        how = PromptFormat(
            template=first + PICTURES + rest + QUESTION + after,
            interleaved=_template(alone, first + rest + QUESTION + after, token),
            picture=_with_id(_medium(token, lead, inline, rules.surround), rules.image_token),
            film=_told_film(film, first, rest, rules),
            turn=_turn(turns, rules),
            add_special_tokens=not (bos and one.startswith(bos)),
            strip=strip,
        )
        if how.render(PROBE, [token]) == (probed or "").replace(token, token.join(rules.surround)):
            return how
    raise HimapError("unsupported chat template", "it changes the text of the question")


def _chats() -> Sequence[Chat]:
    """One picture and a question; the same asked awkwardly; two pictures; none; one between texts; a film; two
    turns."""

    def user(*content: Any) -> dict[str, Any]:
        texts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        return {"role": "user", "content": texts}

    said = {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}
    return (
        [user(_PICTURE, SENTINEL)],
        [user(_PICTURE, PROBE)],
        [user(_PICTURE, _PICTURE, SENTINEL)],
        [user(SENTINEL)],
        [user(SENTINEL, _PICTURE, LATER)],
        [user(_FILM, SENTINEL)],
        [user(_PICTURE, SENTINEL), said, user(LATER)],
    )


def _lead(before: str, two: str | None, token: str) -> tuple[str, str, str]:
    """Returns what stands in front of pictures, what each adds, and what stands behind them, from the text in front of
    a question with one and with two."""
    head, tail = before.split(token)
    if two is None or (whole := two.partition(SENTINEL)[0]).count(token) != 2:
        return head, token, tail
    _, between, _ = whole.split(token)
    for cut in range(len(between) + 1):  # the text between is the end of one picture's and the beginning of the next's
        end, begin = between[:cut], between[cut:]
        if head.endswith(begin) and tail.startswith(end) and whole == head + token + between + token + tail:
            return head[: len(head) - len(begin)], begin + token + end, tail[len(end) :]
    return head, token, tail


def _between(text: str, start: str, end: str) -> str:
    found = text.partition(start)[2].partition(end)
    return found[0] if found[1] else ""


def _template(alone: str | None, otherwise: str, token: str) -> str:
    """Returns the template of a question that places its pictures itself: as one without any is rendered."""
    if alone is None or alone.count(SENTINEL) != 1 or token in alone:
        return otherwise
    return alone.replace(SENTINEL, QUESTION)


def _medium(token: str, lead: str, inline: str, surround: tuple[str, str]) -> Medium:
    around = token.join(surround)
    return Medium(token, _marked(lead.replace(token, around), token), _marked(inline.replace(token, around), token))


def _marked(text: str, token: str) -> str:
    return text.replace(token, MEDIUM)


def _with_id(medium: Medium, token_id: int) -> Medium:
    return Medium(medium.token, medium.lead, medium.inline, token_id)


def _film(rules: PromptRules, lead: str) -> Medium:
    """Returns how a film stands in prompts. Where it has no token of its own, its frames are pictures."""
    token, own = rules.image_text, rules.image_token
    if rules.film_token is not None:
        token, own = rules.film_text, rules.film_token
    marked = _marked(lead, rules.film_text)
    return Medium(token, marked, marked.strip(" \n"), own)


def _told_film(told: str | None, first: str, rest: str, rules: PromptRules) -> Medium | None:
    """Returns how a film stands in a template's prompts, None if the model knows none; as the family says, where the
    template does not."""
    if not rules.film_lead:
        return None
    before = "" if told is None else told.partition(SENTINEL)[0]
    known = before.count(rules.film_text) == 1 and before.startswith(first) and before.endswith(rest)
    lead = before[len(first) : len(before) - len(rest)] if known else rules.film_lead
    return _film(rules, lead)


def _turn(told: str | None, rules: PromptRules) -> str:
    """Returns what goes on behind an answer; as the family says, where the template does not."""
    if told is None or told.count(ANSWER) != 1 or told.count(LATER) != 1:
        return rules.turn
    behind = told.partition(ANSWER)[2]
    return rules.turn if rules.image_text in behind else behind.replace(LATER, QUESTION)
