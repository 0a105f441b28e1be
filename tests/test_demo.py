"""What `make demo` ends with and its page, made of what one run of it found; and, slow, a run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import demo
import pytest
from demo import PLANS, QUESTIONS, Found, Rtx, ending, text_budget
from demo_page import demo_page
from msgspec import convert
from pages import Seen, picture

from himap_export.engines.image import load_image
from himap_export.engines.questions import read_dataset
from himap_export.exporter.plans import named_plans
from himap_export.validate.accuracy.prompter import prompter_of_checkpoint
from himap_export.validate.report.page import render

ROOT = Path(__file__).parents[1]
GATES = [{"name": name, "value": 1.0, "limit": 0.5, "passed": name != "k1"} for name in ("vision", "k1", "logits")]


def recorded() -> Found:
    return convert(json.loads((ROOT / "tests" / "fixtures" / "demo.json").read_text()), Found)


def changed(**speed: Any) -> Found:
    """The recorded run with pruned engines so many times faster, by phase: median, lowest, highest."""
    found = recorded()
    before = found.validation["speed"]
    over = before["over"] | {"unpruned": before["over"]["unpruned"] | speed}
    return replace(found, validation=found.validation | {"speed": before | {"over": over}})


def told(found: Found) -> dict[str, str]:
    """The lines of the ending by their names; lines without one belong to that above."""
    lines, width = dict[str, str](), len("prefill of it  ")
    for line in ending(found):
        name = line[:width].strip() or [*lines][-1]
        lines[name] = "\n".join([*([lines[name]] if name in lines else []), line[width:]])
    return lines


def test_the_ending_says_all_in_a_few_aligned_lines() -> None:
    found = recorded()
    lines = ending(found)
    assert len(lines) <= 15 and max(map(len, lines)) <= 120
    assert all(line[13:15] == "  " and line[15] != " " for line in lines)  # one column
    said = told(found)
    assert said["question"] == "what letter is in the yellow box?  (examples/shapes/images/letter.png; right: 'C')"
    assert said["answer"] == "pruned 'C', unpruned 'C', reference 'C'"
    assert said["image tokens"] == "64 -> 32 -> 8, chosen by himap before layer 2 and 8"
    assert said["parity"] == "12 of 12 gates ok, against PyTorch in fp32"
    assert said["measured on"].startswith("openvino bf16 on cpu, 2 threads") and "10 interleaved" in said["measured on"]
    assert said["TensorRT-RTX"].startswith("7 engines built, 23.4 MiB, fp16, for SM 8.0 to 12.1; not run: ")
    assert said["page"].startswith("demo/index.html") and said["next"].split("\n") == list(found.next_commands)


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ((1.62, 1.55, 1.7), "1.62x (1.55 to 1.70)"),
        ((1.02, 0.95, 1.1), "no difference measurable here (0.95 to 1.10)"),
        ((1.2, 1.0, 1.3), "no difference measurable here (1.00 to 1.30)"),
        ((0.8, 0.7, 0.9), "0.80x (0.70 to 0.90)"),
    ],
)
def test_an_interval_that_holds_1_is_no_difference(over: tuple[float, float, float], words: str) -> None:
    found = changed(prefill=over, first_token=(3.0, 2.9, 3.1))
    said, speed = told(found), found.validation["speed"]
    assert said["prefill of it"].endswith(f": {words}; FLOPs allow {speed['ceiling']:.2f}x")
    assert said["first token"].endswith(f": 3.00x (2.90 to 3.10); FLOPs allow {speed['first_token_ceiling']:.2f}x")
    for phase, line in (("prefill", "prefill of it"), ("first_token", "first token")):
        for name in ("pruned", "unpruned"):
            assert f"{name} {1e3 * speed['systems'][name][phase]:5.1f} ms" in said[line]
    shown = " ".join(Seen(render(demo_page(found, picture().png))).texts)
    assert words.replace(" to ", " to ") in shown.replace("\u00a0", " ")
    assert ("≈ 1x" in shown) == ("no difference" in words)


def test_a_gate_that_fails_is_named() -> None:
    found = recorded()
    found = replace(found, validation=found.validation | {"gates": GATES})
    assert found.failed == ("k1",) and told(found)["parity"].startswith("2 of 3 (failed: k1) gates ok")
    seen = Seen(render(demo_page(found, picture().png)))
    assert ("tr", {"class": "strong"}) in seen.tags and "FAIL" in seen.texts


@pytest.mark.parametrize(
    ("rtx", "words"),
    [
        (Rtx("fp16", {}, problem="tensorrt-rtx is not installed"), "not built: tensorrt-rtx is not installed"),
        (
            Rtx("fp16", {"k1": 2**20, "k2": 2**19}, (80, 89), answer="C"),
            "2 engines built, 1.5 MiB, fp16, for SM 8.0 to 8.9; answer 'C'",
        ),
    ],
)
def test_what_became_of_tensorrt_rtx(rtx: Rtx, words: str) -> None:
    found = replace(recorded(), rtx=rtx)
    assert told(found)["TensorRT-RTX"] == words
    seen = Seen(render(demo_page(found, picture().png)))
    assert words in seen.texts and ("table-engines" in seen.values("id")) == bool(rtx.engines)


def test_the_page_shows_all_and_needs_nothing_else() -> None:
    found, kept = recorded(), picture().png
    seen = Seen(render(demo_page(found, kept)))
    shown = " ".join(seen.texts)
    for words in (
        found.question,
        "64 → 32 → 8",
        "12 of 12",
        found.rtx.told(),
        "of 64, from layer 8 on",
        "right: C; unpruned: C",
    ):
        assert words in shown, words
    for command in found.next_commands:
        assert command in " ".join(shown.split())
    ids = seen.values("id")
    assert {"table-gates", "figure-speed", "table-speed-ups", "table-engines", "table-made"} <= set(ids)
    (chart,) = [json.loads(s) for s in seen.scripts if '"$schema"' in s]
    rows = [row for values in chart["datasets"].values() for row in values]
    systems = {row["series"] for row in rows}
    assert {"pruned", "unpruned"} < systems == set(found.validation["speed"]["systems"])
    assert all(row["low"] <= row["y"] <= row["high"] for row in rows)
    links = [*seen.values("href"), *seen.values("src")]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert seen.values("alt")[0] == f"The patches behind each cut of “{found.question}”: C."


def test_the_plans_are_one_that_cuts_and_one_that_does_not() -> None:
    first, *others = named_plans([PLANS]).items()
    assert first[1].cuts and [name for name, plan in others if not plan.cuts] == ["unpruned"]


def test_the_budget_is_the_least_that_holds_the_questions() -> None:
    examples = read_dataset(QUESTIONS).examples
    prompter = prompter_of_checkpoint(Path(demo.ALIASES["shapes"].source))
    processor = prompter.processor
    longest = max(
        processor.inputs([load_image(e.image)], e.question).input_ids.size - processor.spec.tokens for e in examples
    )
    assert longest <= text_budget(examples) < longest + 8 and text_budget(examples) % 8 == 0


@pytest.mark.slow
def test_a_run_of_it(tmp_path: Path) -> None:
    script = ROOT / "examples" / "shapes" / "demo.py"
    done = subprocess.run([sys.executable, script, "--out", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = convert(json.loads((tmp_path / "index.json").read_text()), Found)
    assert done.stdout.endswith("\n".join(["", *ending(found), ""]))
    assert {answer.lower() for answer in found.answers.values()} == {found.expected.lower()}
    assert found.rtx.engines and (tmp_path / "report" / "report.html").exists()
    assert (tmp_path / "kept.png").read_bytes() and found.question in (tmp_path / "index.html").read_text()
