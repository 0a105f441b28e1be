"""`himap-run --chat`: questions line by line from standard input about the same pictures or film, answered in turn."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from himap_export.engines.command import as_options, shortened
from himap_export.engines.documents import MEGABYTE
from himap_export.graphs.errors import Exit, HimapError

if TYPE_CHECKING:
    from himap_export.engines.answer import Answer, Generation
    from himap_export.engines.conversation import Conversation
    from himap_export.engines.session import Session


def chat(session: "Session", args: argparse.Namespace, how: "Generation") -> None:
    """Answers `--prompt`, if it is given, then each line of standard input, up to an empty one, its end, or full
    caches.

    A question that cannot be asked ends it with HimapError (usage); at a terminal it is told, and the next one heard.
    """
    talk = session.converse(args.image) if args.video is None else session.converse_film(args.video)
    said: dict[str, object] = {}
    turns = list[dict[str, object]]()
    try:
        for answer in _answers(talk, args, how):
            if not turns and args.show_kept is not None:
                answer.draw_kept(args.show_kept)
            said, turns = _facts(answer), [*turns, _as_turn(answer, talk)]
    except HimapError:
        if args.json and turns:  # what was answered is not lost
            print(json.dumps({"turns": turns, **said}))
        raise
    if args.json:
        print(json.dumps({"turns": turns, **said}))


def _answers(talk: "Conversation", args: argparse.Namespace, how: "Generation") -> Iterator["Answer"]:
    """Yields an answer for each question; what is said of them is printed."""
    for question in _questions(args.prompt):
        try:
            answer = _said(talk, question, how, quiet=args.json)
        except HimapError as problem:
            if problem.code != Exit.USAGE or not sys.stdin.isatty():
                raise
            _tell(f"himap-run: error: {as_options(str(problem))}")
            continue
        if not args.json:
            _tell(_as_line(answer, talk))
        yield answer
        if not talk.left:
            _tell("himap-run: the caches are full, the conversation ends")
            return


def _questions(first: str | None) -> Iterator[str]:
    """Yields questions, asked for at a terminal."""
    if first is not None:
        yield first
    while line := _line().strip("\r\n"):
        yield line


def _line() -> str:
    """Reads a line of standard input; "" at its end."""
    if typed := sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline(MEGABYTE + 1)
    except UnicodeDecodeError as problem:
        raise HimapError("standard input is no text", str(problem), code=Exit.USAGE) from problem
    if len(line) > MEGABYTE:
        raise HimapError("a line of standard input is too long", f"{MEGABYTE} characters are read", code=Exit.USAGE)
    if typed and not line:
        print(file=sys.stderr)  # the shell goes on in a line of its own
    return line


def _said(talk: "Conversation", question: str, how: "Generation", quiet: bool) -> "Answer":
    """Returns the answer; prints it as it comes, unless it is to be `quiet`."""
    stream = talk.stream(question, **how)
    if not quiet:
        for piece in stream:
            print(piece, end="", flush=True)
        print()
    return stream.answer


def _tell(line: str) -> None:
    print(shortened(line), file=sys.stderr, flush=True)


def _as_turn(answer: "Answer", talk: "Conversation") -> dict[str, object]:
    rate = answer.tokens_per_s
    return {
        "prompt": answer.request.prompt,
        "text": answer.text,
        "tokens": answer.tokens[0].tolist(),
        "appended_tokens": talk.appended,
        "first_token_s": round(answer.first_token_s, 4),
        "tokens_per_s": None if rate is None else round(rate, 1),
        "slots_left": talk.left,
    }


def _facts(answer: "Answer") -> dict[str, object]:
    """Returns what is the same of all turns."""
    spec = answer.request.spec
    return {
        "device": answer.device, "image_tokens": list(spec.budget.visual), "plan": spec.plan_name,
        "text_budget": spec.budget.text,
    }  # fmt: skip


def _as_line(answer: "Answer", talk: "Conversation") -> str:
    rate = answer.tokens_per_s
    speed = f"{answer.steps + 1} tokens" if rate is None else f"{rate:.0f} tokens/s"
    seen = " -> ".join(map(str, answer.request.spec.budget.visual))
    given = f"{talk.appended} tokens appended" if talk.appended else f"image tokens {seen}"
    return f"[{given}, first token {answer.first_token_s * 1e3:.0f} ms, {speed}, {talk.left} slots left]"
