"""polygraphy itself judges what we save: it runs each ONNX file of a bundle alone, on our inputs, and compares."""

import itertools
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from commands import Workshop, blocked_python, golden_inputs, spawn
from msgspec import structs
from oracle_criteria import coefficients
from tiny import make_inputs

from himap_export.engines.arrays import Inputs
from himap_export.engines.bundle import Bundle
from himap_export.engines.pipeline import Pipeline
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.importance import SCORES
from himap_export.validate.parity.polygraphy_json import Captured, capture, check_folders, save_inputs, save_outputs

PAGE = Path(__file__).parents[2] / "docs" / "polygraphy.md"
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.S) for line in block.splitlines()]


@dataclass(frozen=True)
class Saved:
    """A bundle, what its graphs read and wrote, and the folder that holds both as in/ and out/."""

    bundle: Path
    captured: Mapping[str, Captured]
    folder: Path

    def run(self, command: str, graph: str) -> subprocess.CompletedProcess[str]:
        """A command of the page, on this bundle's `graph` in the place of k1."""
        words = re.sub(r"\bk1\b", graph, command).replace("BUNDLE", str(self.bundle)).split()
        variables = dict(word.split("=", 1) for word in itertools.takewhile(str.isupper, words))
        return spawn(*words[len(variables) :], folder=self.folder, COLUMNS="1000", **variables)


def of_the_page(*words: str) -> str:
    """The one command that holds all of `words`."""
    (found,) = [line for line in COMMANDS if all(word in line for word in words)]
    return found


def save(bundle: Path, captured: Mapping[str, Captured], folder: Path) -> Saved:
    save_inputs(folder / "in", captured)
    save_outputs(folder / "out", captured, "himap-validate")
    return Saved(bundle, captured, folder)


@pytest.fixture(scope="module")
def golden(work: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    bundle = work.bundle("golden")
    inputs = golden_inputs()
    captured = capture(work.pipeline(bundle), Inputs(inputs.input_ids, inputs.pixel_values))
    return save(bundle, captured, tmp_path_factory.mktemp("polygraphy"))


def test_all_commands_of_the_page_are_known_here() -> None:
    words = ("himap-validate", "inspect", "--onnxrt", "convert", "--trt")
    assert sorted(map(of_the_page, words)) == sorted(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", SCORES)
def test_polygraphy_finds_every_ranking_to_do_what_the_chain_did(
    work: Workshop, tmp_path: Path, criterion: str
) -> None:
    """The graph that ends with the score, alone."""
    numbers = list(coefficients(criterion, 4))
    cut = f'{{layer = 2, criterion = "{criterion}", keep = 9, coefficients = {numbers}}}'
    (tmp_path / "plan.toml").write_text(f"[{criterion}]\ncuts = [{cut}]\n")
    bundle, inputs = work.bundle("golden", "--plan", tmp_path / "plan.toml"), golden_inputs()
    captured = capture(work.pipeline(bundle), Inputs(inputs.input_ids, inputs.pixel_values))
    done = save(bundle, captured, tmp_path).run(of_the_page("--onnxrt"), "prefix")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED | Output: 'score_k1'" in done.stdout


def test_polygraphy_finds_every_graph_to_do_what_the_chain_did(golden: Saved) -> None:
    graphs = Bundle.open(golden.bundle).select().variant.graphs.values()
    assert list(golden.captured) == list(graphs) and len(golden.captured) >= 4
    for graph in golden.captured:
        done = golden.run(of_the_page("--onnxrt"), graph)
        assert done.returncode == 0, done.stdout + done.stderr
        for name in golden.captured[graph].outputs:
            assert f"PASSED | Output: '{name}'" in done.stdout, (graph, name)


def test_himap_validate_writes_both(work: Workshop, tmp_path: Path) -> None:
    saved = Saved(work.bundle("golden", "--policy", "random"), {}, tmp_path)
    done = saved.run(of_the_page("himap-validate") + " --prompts 2 --threads 1", "k1")
    assert done.returncode == 0, done.stderr
    graphs = list(Bundle.open(saved.bundle).select().variant.graphs.values())
    for side in ("in", "out"):
        assert {path.stem for path in (tmp_path / side).iterdir()} == set(graphs)
    done = saved.run(of_the_page("--onnxrt"), graphs[-2])
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_lists_every_tensor(golden: Saved) -> None:
    for graph, run in golden.captured.items():
        done = golden.run(of_the_page("inspect"), graph)
        assert done.returncode == 0, done.stdout + done.stderr
        assert all(f"{name} [dtype=" in done.stdout for name in (*run.inputs, *run.outputs))


def test_a_wrong_output_is_found(golden: Saved, tmp_path: Path) -> None:
    graph, name = next((g, n) for g, run in golden.captured.items() for n in run.outputs if n.startswith("kept_"))
    right = golden.captured[graph]
    wrong = right.outputs[name].copy()
    wrong[0, -1] += 1
    changed = save(golden.bundle, {graph: replace(right, outputs={**right.outputs, name: wrong})}, tmp_path)
    done = changed.run(of_the_page("--onnxrt"), graph)
    assert done.returncode == 1 and f"FAILED | Output: '{name}'" in done.stdout
    assert done.stdout.count("FAILED | Output:") == 1


def test_a_wrong_input_is_found(golden: Saved, tmp_path: Path) -> None:
    decode = list(golden.captured)[-1]
    right = golden.captured[decode]
    token = (right.inputs["input_ids"] + 1) % 250
    changed = save(golden.bundle, {decode: replace(right, inputs={**right.inputs, "input_ids": token})}, tmp_path)
    done = changed.run(of_the_page("--onnxrt"), decode)
    assert done.returncode == 1 and "FAILED | Output: 'logits'" in done.stdout


def test_what_one_graph_wrote_the_next_ones_read(golden: Saved) -> None:
    written: dict[str, np.ndarray] = {}
    handed_on: list[str] = []
    for run in golden.captured.values():
        for name, array in run.inputs.items():
            source = written.get(name.replace("past_", "present_"))
            if source is not None:
                np.testing.assert_array_equal(array, source)
                handed_on.append(name)
        written.update(run.outputs)
    cuts = len(golden.captured) - 3  # vision, prefix and decode are the others
    assert "image_features" in handed_on and sum(name.startswith("past_") for name in handed_on) == 2 * 10
    assert sum(name.startswith("hidden_") for name in handed_on) == cuts
    assert sum(name.startswith("score_") for name in handed_on) == cuts


def test_caches_are_as_they_were_before_and_after(golden: Saved) -> None:
    """Past and present are one tensor: read at the wrong moment they would be equal. Decode writes one slot of each."""
    for stage, run in zip(Bundle.open(golden.bundle).select().variant.graphs, golden.captured.values(), strict=True):
        for name, before in run.inputs.items():
            if name.startswith("past_"):
                after = run.outputs[name.replace("past_", "present_")]
                changed = int((after != before).any(axis=(0, 1, 3)).sum())
                assert changed == 1 if stage == "decode" else changed > 1, (stage, name)


def test_the_first_batch_of_many_prompts(work: Workshop, tmp_path: Path) -> None:
    tiny = work.tiny("golden")
    inputs = make_inputs(tiny, text_lengths=[9, 4, 6], system_lengths=[5, 2, 1], seed=1)
    bundle = work.bundle("golden", "--batch", 2)
    arrays = Inputs(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
    saved = save(bundle, capture(work.pipeline(bundle), arrays), tmp_path)
    vision, *_, decode = saved.captured
    np.testing.assert_array_equal(saved.captured[vision].inputs["pixel_values"], inputs.pixel_values[1:2])  # the last
    assert [len(a) for a in saved.captured[vision].outputs.values()] == [1]
    expected = [[5 + tiny.image_tokens + 9], [2 + tiny.image_tokens + 4]]
    np.testing.assert_array_equal(saved.captured[decode].inputs["position_ids"], expected)
    done = saved.run(of_the_page("--onnxrt"), decode)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tensorrt_rtx_engines_without_a_gpu(work: Workshop, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = work.bundle("golden", "--dtype", "fp16")
    saved = Saved(bundle, {}, tmp_path)
    for graph in list(Bundle.open(bundle).select().variant.graphs.values())[-2:]:  # one behind a gather, and decode
        done = saved.run(of_the_page("convert"), graph)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / f"{graph}.engine").stat().st_size > 10_000


def test_polygraphy_reads_the_flags_that_need_a_gpu(golden: Saved) -> None:
    done = golden.run(of_the_page("--trt") + " --gen-script run.py", list(golden.captured)[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TrtRunner" in (golden.folder / "run.py").read_text()


def test_nothing_but_files_is_written(golden: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(golden.bundle, golden.captured, tmp_path)
    assert capsys.readouterr() == ("", "")
    for side in ("in", "out"):
        assert {path.name for path in (tmp_path / side).iterdir()} == {f"{graph}.json" for graph in golden.captured}


def test_nothing_of_the_users_is_written_over(golden: Saved, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("mine")
    link = tmp_path / "out" / f"{next(iter(golden.captured))}.json"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "in")
    run = Bundle.open(golden.bundle, verify=False).select()
    before = sorted(golden.bundle.rglob("*"))
    for folder, words in (
        (tmp_path / "in", "it is no folder"),
        (tmp_path / "out", "is not a plain file"),
        (golden.bundle, "is a bundle"),
        (golden.bundle / "weights", "is a bundle"),
    ):
        for write in (
            lambda: check_folders(run, folder),  # noqa: B023  # called at once
            lambda: save_inputs(folder, golden.captured),  # noqa: B023
            lambda: save_outputs(folder, golden.captured, "us"),  # noqa: B023
        ):
            with pytest.raises(HimapError, match=words) as refused:
                write()
            assert refused.value.code == Exit.USAGE
    assert (tmp_path / "in").read_text() == "mine" and sorted(golden.bundle.rglob("*")) == before


def test_bf16_is_refused(golden: Saved) -> None:
    run = Bundle.open(golden.bundle).select()
    graph, bundle = run.graph_name("vision"), run.bundle
    record = run.graph("vision")
    record = structs.replace(
        record, outputs={name: structs.replace(port, dtype="bf16") for name, port in record.outputs.items()}
    )
    manifest = structs.replace(bundle.manifest, graphs={**bundle.manifest.graphs, graph: record})
    pipeline = cast(Pipeline, SimpleNamespace(spec=replace(run, bundle=replace(bundle, manifest=manifest))))
    inputs = golden_inputs()
    with pytest.raises(HimapError, match="cannot hold bf16") as refused:
        capture(pipeline, Inputs(inputs.input_ids, inputs.pixel_values))
    assert refused.value.code == Exit.USAGE and "image_features" in str(refused.value)


def test_without_polygraphy(tmp_path: Path) -> None:
    code = """
from pathlib import Path
from himap_export.graphs.errors import HimapError
from himap_export.validate.parity.polygraphy_json import save_inputs, save_outputs
for save in (lambda: save_inputs(Path(sys.argv[1]), {}), lambda: save_outputs(Path(sys.argv[1]), {}, "us")):
    try:
        save()
    except HimapError as problem:
        print(int(problem.code), problem)
"""
    done = blocked_python(code, ["polygraphy"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split(" (")[0] for line in done.stdout.splitlines()] == ["4 polygraphy is not installed"] * 2
    assert done.stdout.count("pip install 'himap-export[polygraphy]'") == 2
