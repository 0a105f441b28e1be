"""Conversations through the session and `himap-run --chat`, against the reference and Hugging Face's own `generate`.

Each later question is appended to the caches of the first one: what follows must be what the reference says behind the
same ids, with the image tokens that the first question kept.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from commands import OPENVINO, ORT, Workshop, call
from families import FAMILIES, hugging_face_answer, tokenizer_of
from msgspec.structs import replace as changed
from PIL import Image
from tiny import Inputs
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

import himap_export as hx
from himap_export.engines.cli import main as run_main
from himap_export.engines.prompt import encode, tokenize_behind
from himap_export.exporter.prompts import told_prompt
from himap_export.exporter.registry import find_family
from himap_export.validate.reference.criteria import reference_himap
from himap_export.validate.reference.reference import Reference

CUTS = reference_himap(2, 4, 0.5, 0.5)
PLANS = {"himap": CUTS, "none": ()}
FLAGS = ("--policy", "himap", "--policy", "none", "--k1", 2, "--k2", 4, "--r1", 0.5, "--r2", 0.5)
ASKED = ("What differs?", "And at the top?", "Why?")
NEW, TEXT = 6, 120


def bundle_of(work: Workshop, name: str = "llava", backend: Sequence[str] = ORT) -> hx.Bundle:
    """Of prompts with two pictures, cut or not; 16 new tokens."""
    return hx.Bundle.open(work.family_bundle(name, "--images", 2, *FLAGS, *backend, text_budget=TEXT))


def pictures(name: str = "llava", count: int = 2) -> list[Image.Image]:
    """Of the size that the family sees as it is."""
    random, (height, width) = np.random.default_rng(count), FAMILIES[name].size
    return [Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8)) for _ in range(count)]


def ids_of(answers: Sequence[hx.Answer], stop: Sequence[int]) -> list[np.ndarray]:
    """What stands in the caches behind the first prompt before each answer, and behind the last one."""
    behind, found = np.zeros(0, np.int64), list[np.ndarray]()
    for n, answer in enumerate(answers):
        processor, said = answer.request.processor, answer.tokens[0]
        assert processor is not None
        behind = np.concatenate([behind, processor.turn(answer.request.prompt)]) if n else behind
        found.append(behind)
        behind = np.concatenate([behind, said[~np.isin(said, stop)]])
    return [*found, behind]


def check(work: Workshop, name: str, plan: str, answers: Sequence[hx.Answer]) -> None:
    """Greedy answers are the reference's, behind the same ids; without cuts Hugging Face's, asked all at once."""
    inputs, stop = answers[0].request.inputs, answers[0].request.spec.manifest.model.eos_tokens
    reference = Reference(work.family(name))
    start = reference.prefill(inputs.input_ids, inputs.pixel_values, None, PLANS[plan])
    *before, whole = ids_of(answers, stop)
    _, logits = reference.answer(start, len(whole) + 1, np.append(whole, 0)[None])
    for ids, answer in zip(before, answers, strict=True):
        np.testing.assert_allclose(answer.outputs["logits"], logits[:, len(ids)], rtol=0, atol=1e-3)
        said = answer.tokens[0]
        np.testing.assert_array_equal(said, logits[0, len(ids) : len(ids) + len(said)].argmax(1))
        if plan == "none":
            chat = np.concatenate([inputs.input_ids, ids[None]], axis=1)
            asked = Inputs(chat, np.ones_like(chat), inputs.pixel_values)
            wanted = hugging_face_answer(work.family(name), name, asked, len(said))
            np.testing.assert_array_equal(said, wanted[0])


@pytest.mark.parametrize(
    ("name", "plan", "backend"),
    [
        ("llava", "himap", ORT),
        ("qwen3-vl", "himap", ORT),
        pytest.param("llava", "none", ORT, marks=pytest.mark.slow),
        ("qwen3-vl", "none", ORT),
        *(pytest.param(*case, OPENVINO, marks=pytest.mark.slow) for case in product(("llava", "qwen3-vl"), PLANS)),
    ],
)  # fmt: skip
def test_each_answer_is_the_references(work: Workshop, name: str, plan: str, backend: Sequence[str]) -> None:
    with bundle_of(work, name, backend).session(plan=plan, threads=1) as session:
        talk = session.converse(pictures(name))
        assert talk.left is None
        answers = [talk.ask(question, max_new_tokens=NEW) for question in ASKED]
        assert talk.appended == len(ids_of(answers, ())[2]) - len(ids_of(answers, ())[1]) - NEW + 1
        alone = session.ask(pictures(name), ASKED[0], max_new_tokens=NEW)
    assert answers[0].text == alone.text and [a.request.prompt for a in answers] == list(ASKED)
    check(work, name, plan, answers)


def longest(bundle: hx.Bundle, tokens: int) -> str:
    """A question that takes so many tokens behind an answer; each letter is one."""
    assert bundle.manifest.prompt is not None
    return "?" * (tokens - len(bundle.manifest.prompt.next_turn("")))


def test_a_question_fits_or_nothing_is_written(work: Workshop) -> None:
    """The last question takes all slots but those of an answer, which then ends early; or all, for one token."""
    bundle = bundle_of(work)
    with bundle.session(threads=1) as session:
        talk = session.converse(pictures())
        answers = [talk.ask(ASKED[0], max_new_tokens=NEW)]
        budget, length = answers[0].request.spec.budget, answers[0].request.inputs.input_ids.shape[1]
        left = talk.left
        assert left == budget.visual[0] + TEXT + budget.new - length - NEW
        for more in (1, 9):
            hint = f"--max-new-tokens {budget.new + more}|`max_new_tokens` {budget.new + more}"
            with pytest.raises(hx.HimapError, match=rf"takes {left + more} tokens, {left} slots .*({hint})"):
                talk.ask(longest(bundle, left + more))
        with pytest.raises(hx.HimapError, match="`max_new_tokens` 17 is outside"):
            talk.ask("?", max_new_tokens=budget.new + 1)
        assert talk.left == left
        answers.append(talk.ask(longest(bundle, left - 3)))
        assert answers[1].tokens.shape == (1, 4) and talk.left == 0  # three in slots, and one that needs none
        with pytest.raises(
            hx.HimapError, match=f"0 slots .*`max_new_tokens` {budget.new + 1 + len('USER:  ASSISTANT:')}"
        ):
            talk.ask("")
    check(work, "llava", "himap", answers)
    with bundle.session(threads=1) as session:
        talk = session.converse(pictures())
        talk.ask(ASKED[0], max_new_tokens=NEW)
        answer = talk.ask(longest(bundle, left))
    assert answer.tokens.shape == (1, 1) and talk.left == 0


def test_a_stop_token_is_left_out_and_the_last_token_of_a_cut_answer_is_not(work: Workshop) -> None:
    """The same answer, once ended by its third token, and once by length behind that."""
    bundle = bundle_of(work)
    with bundle.session(threads=1) as session:
        said = session.ask(pictures(), ASKED[0], max_new_tokens=3).tokens[0]
    assert said[2] not in said[:2]
    model = changed(bundle.manifest.model, eos_tokens=(int(said[2]),))
    stopping = replace(bundle, manifest=changed(bundle.manifest, model=model))
    lefts = []
    for each in (stopping, bundle):
        with each.session(threads=1) as session:
            talk = session.converse(pictures())
            answers = [talk.ask(ASKED[0], max_new_tokens=3)]
            lefts.append(talk.left)
            answers.append(talk.ask(ASKED[1], max_new_tokens=1))
        np.testing.assert_array_equal(answers[0].tokens[0], said)
        check(work, "llava", "himap", answers)
    assert lefts[0] == lefts[1] + 1


def test_an_answer_that_nobody_read_to_its_end_is_gone_on_from(work: Workshop) -> None:
    with bundle_of(work).session(threads=1) as session:
        talk = session.converse(pictures())
        whole = talk.ask(ASKED[0], max_new_tokens=NEW)
        behind = talk.left
        talk = session.converse(pictures())
        stream = talk.stream(ASKED[0], max_new_tokens=NEW)
        next(stream)
        with pytest.raises(hx.HimapError, match="in the middle of an answer"):
            talk.ask(ASKED[1])
        del stream
        heard = NEW - (talk.left - behind)
        assert 0 < heard < NEW
        answer = talk.ask(ASKED[1], max_new_tokens=NEW)
    part = replace(whole, outputs={**whole.outputs, "tokens": whole.tokens[:, :heard]})
    check(work, "llava", "himap", [part, answer])


def test_another_question_ends_a_conversation(work: Workshop) -> None:
    with bundle_of(work).session(threads=1) as session:
        talk = session.converse(pictures())
        talk.ask(ASKED[0], max_new_tokens=1)
        other = session.converse(pictures())
        other.ask(ASKED[0], max_new_tokens=1)
        with pytest.raises(hx.HimapError, match="the conversation is over"):
            talk.ask(ASKED[1])
        other.ask(ASKED[1], max_new_tokens=1)
        session.ask(pictures(), ASKED[0], max_new_tokens=1)
        with pytest.raises(hx.HimapError, match="the conversation is over"):
            other.ask(ASKED[1])
        last = session.converse(pictures())
        last.ask(ASKED[0], max_new_tokens=1)
    with pytest.raises(hx.HimapError, match="the conversation is over"):
        last.ask(ASKED[1])


def test_what_no_conversation_can_be(work: Workshop) -> None:
    bundle = bundle_of(work)
    assert bundle.manifest.prompt is not None
    once = replace(bundle, manifest=changed(bundle.manifest, prompt=changed(bundle.manifest.prompt, turn="")))
    with once.session(threads=1) as session, pytest.raises(hx.HimapError, match="one question at a time"):
        session.converse(pictures())
    with bundle.session(threads=1) as session:
        talk = session.converse(pictures())
        with pytest.raises(hx.HimapError, match="takes no prompt of 3 images"):
            session.converse(pictures(count=3)).ask(ASKED[0])
        talk.ask("<image> or <image>?", max_new_tokens=1)
        left = talk.left
        with pytest.raises(hx.HimapError, match="the question contains <image>"):
            talk.ask("Is <image> the same?")
        with pytest.raises(hx.HimapError, match="not valid Unicode"):
            talk.ask("\udcff")
        assert talk.left == left


@pytest.mark.slow
def test_a_bundle_of_batches_holds_no_conversation(work: Workshop) -> None:
    bundle = hx.Bundle.open(work.family_bundle("llava", "--policy", "none", "--batch", 3, text_budget=TEXT))
    with bundle.session(threads=1) as session, pytest.raises(hx.HimapError, match="answers 3 prompts together"):
        session.converse(pictures(count=1)).ask(ASKED[0])


def test_every_question_draws_anew(work: Workshop) -> None:
    """At a temperature; the same seed draws the same conversation, and first what it draws alone."""
    with bundle_of(work).session(threads=1) as session:
        said = []
        for _ in range(2):
            talk = session.converse(pictures())
            said.append([talk.ask("?", temperature=9.0, seed=5).tokens.tolist() for _ in range(2)])
        alone = session.ask(pictures(), "?", temperature=9.0, seed=5).tokens.tolist()
    assert said[0] == said[1] and said[0][0] == alone != said[0][1]


@pytest.mark.parametrize("name", [name for name, row in FAMILIES.items() if not row.frames])
def test_turns_are_the_chat_templates(name: str) -> None:
    """The first question's ids, an answer's, and what is appended are the ids of the whole chat."""
    tokenizer, config = tokenizer_of(name), FAMILIES[name].config()
    told = config.to_dict() | {"architectures": [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].__name__]}
    rules = find_family(told, name).parse(told).prompt()
    how, ours = told_prompt(tokenizer.chat_template, tokenizer.special_tokens_map, rules), tokenizer.backend_tokenizer
    said = [
        ("user", ({"type": "image"}, text("What?"))),
        ("assistant", (text("yes, é"),)),
        ("user", (text("<this>?"),)),
    ]
    chat = [{"role": role, "content": list(content)} for role, content in said]
    whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    around = {ours.token_to_id(each) for each in rules.surround if each}  # the processor's, no template's
    first = [token for token in encode(ours, how, "What?", [how.picture.token]).tolist() if token not in around]
    turn = tokenize_behind(ours, how.next_turn("<this>?")).tolist()
    assert whole[: len(first)] == first and whole[-len(turn) :] == turn
    assert ours.decode(whole[len(first) : -len(turn)]).strip() == "yes, é"


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize("legacy", [True, False])
def test_no_space_is_put_in_front_of_what_goes_on(legacy: bool) -> None:
    """SentencePiece's goes in front of a text: as Llama's tokenizers write it, legacy and not."""
    words = ["<unk>", "▁", "▁a", "▁yes", "▁USER", "▁what", "▁ASSISTANT", ":", *"aUSERwhtSIN"]
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.Unigram([(word, -float(len(words) - len(word))) for word in vocabulary], unk_id=0))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    said, turn = "yes", " USER: what ASSISTANT:"
    whole, alone = (tokenizer.encode(text, add_special_tokens=False).ids for text in (said + turn, turn))
    found = tokenize_behind(tokenizer, turn).tolist()
    assert (found != alone) == legacy and whole == tokenizer.encode(said, add_special_tokens=False).ids + found


def test_a_turn_that_grows_into_the_answer_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    with pytest.raises(hx.HimapError, match="the tokenizer joins 'b' to the word before it"):
        tokenize_behind(tokenizer, "b")


class Typed(io.StringIO):
    """Lines of standard input, as a person types them, or not."""

    person = False

    def isatty(self) -> bool:
        return self.person


def spoken(work: Workshop, folder: Path, monkeypatch: pytest.MonkeyPatch, lines: str, *flags: object) -> int:
    """The exit code of `himap-run --chat` about two pictures."""
    files = [folder / f"{n}.png" for n in range(2)]
    for file, picture in zip(files, pictures(), strict=True):
        picture.save(file)
    monkeypatch.setattr("sys.stdin", Typed(lines))
    shown = [word for file in files for word in ("--image", file)]
    return call(run_main, bundle_of(work).folder, *shown, "--chat", "--max-new-tokens", NEW, "--threads", 1, *flags)


def test_questions_are_read_line_by_line(
    work: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with bundle_of(work).session(threads=1) as session:
        talk, kept = session.converse(pictures()), tmp_path / "kept.png"
        answers = [talk.ask(question, max_new_tokens=NEW) for question in ASKED[:2]]
    capsys.readouterr()
    lines = f"{ASKED[1]}\n\nnobody asks this\n"
    assert spoken(work, tmp_path, monkeypatch, lines, "--prompt", ASKED[0], "--show-kept", kept) == 0
    said, told = capsys.readouterr()
    assert said == "".join(f"{answer.text}\n" for answer in answers)
    assert [line.split(",")[0] for line in told.splitlines()] == [
        "[image tokens 32 -> 16 -> 8", f"[{talk.appended} tokens appended",
    ]  # fmt: skip
    assert told.rstrip().endswith(f"{talk.left} slots left]") and Image.open(kept).size[0] > 0
    assert spoken(work, tmp_path, monkeypatch, "\n".join(ASKED[:2]), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [turn["tokens"] for turn in found["turns"]] == [answer.tokens[0].tolist() for answer in answers]
    assert [turn["appended_tokens"] for turn in found["turns"]] == [0, talk.appended]
    assert (found["turns"][1]["slots_left"], found["image_tokens"]) == (talk.left, [32, 16, 8])
    assert spoken(work, tmp_path, monkeypatch, "", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"turns": []}


def test_a_line_that_cannot_be_asked(
    work: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends what a file asks, after the answers so far; a person may go on."""
    lines = f"{ASKED[0]}\n<image>?\n{ASKED[1]}\n"
    capsys.readouterr()
    assert spoken(work, tmp_path, monkeypatch, lines, "--json") == 2
    said, told = capsys.readouterr()
    assert len(json.loads(said)["turns"]) == 1 and "error: the question contains <image>" in told
    monkeypatch.setattr(Typed, "person", True)
    assert spoken(work, tmp_path, monkeypatch, lines) == 0
    said, told = capsys.readouterr()
    assert [line[:2] for line in told.splitlines()] == ["> "] * 4
    assert "error: the question contains <image>" in told
    with bundle_of(work).session(threads=1) as session:
        talk = session.converse(pictures())
        answers = [talk.ask(question, max_new_tokens=NEW).text for question in ASKED[:2]]
    assert said == "".join(f"{answer}\n" for answer in answers)


def test_a_chat_ends_when_the_caches_are_full(
    work: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bundle_of(work)
    with bundle.session(threads=1) as session:
        talk = session.converse(pictures())
        talk.ask(ASKED[0], max_new_tokens=NEW)
    lines = f"{longest(bundle, talk.left)}\nnobody asks this\n"
    capsys.readouterr()
    assert spoken(work, tmp_path, monkeypatch, lines, "--prompt", ASKED[0]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "himap-run: the caches are full, the conversation ends"
    assert spoken(work, tmp_path, monkeypatch, f"{ASKED[0]}\n{'?' * 200}\n") == 2
    assert "export with --max-new-tokens" in capsys.readouterr().err
    for flags in (("--load-inputs", tmp_path / "in.npz"), ("--save-outputs", tmp_path / "out.npz")):
        assert spoken(work, tmp_path, monkeypatch, "", *flags) == 2
