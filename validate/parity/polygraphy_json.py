"""What each graph of the chain read and wrote, as polygraphy's JSON: `polygraphy run` then repeats any graph alone.

    captured = capture(pipeline, inputs)
    save_inputs(Path("in"), captured)                       # polygraphy run BUNDLE/k1.onnx --load-inputs in/k1.json
    save_outputs(Path("out"), captured, "himap-validate")   # --load-outputs out/k1.json, and the rest of its flags

The files are written by polygraphy itself, so its own version reads them. docs/polygraphy.md has the commands.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy.typing as npt

from himap_export.engines.arrays import Inputs
from himap_export.engines.bundle import RunSpec
from himap_export.engines.extras import required
from himap_export.engines.files import check_report, write_file
from himap_export.engines.fitting import batches
from himap_export.engines.pipeline import Pipeline
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import Port

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Captured:
    """One run of one graph, under its own tensor names, weights left out: `inputs` as they were before it ran,
    `outputs` after. Caches are updated in place: `past_*` are the values before, `present_*` those after."""

    inputs: Arrays
    outputs: Arrays


def check_folders(run: RunSpec, *folders: Path) -> None:
    """Checks that what the graphs of `run` read or write can be saved in `folders`; called before anything runs.

    HimapError: usage for a bf16 bundle, or a folder in which their files cannot be; missing without polygraphy.
    """
    required("polygraphy.json")
    for stage in run.variant.graphs:
        record = run.graph(stage)
        for name, spec in {**record.inputs, **record.outputs}.items():
            if spec.dtype == "bf16":
                details = f"NumPy, which it stores, has no such type, and {name} of {stage} is one"
                hint = "export with `dtype` fp16 or fp32"
                raise HimapError("polygraphy's JSON cannot hold bf16 tensors", details, hint, Exit.USAGE)
    for folder in folders:
        check_report(folder, tuple(f"{graph}.json" for graph in run.variant.graphs.values()))


def capture(pipeline: Pipeline, arrays: Inputs) -> dict[str, Captured]:
    """Runs vision, every stage of prefill and one decode step on the first batch [b <= B], and keeps what each read and
    wrote, by graph name: the name of its ONNX file.

    Decode takes the most likely token. HimapError as `check_folders`.
    """
    check_folders(pipeline.spec)
    first = next(batches(arrays, pipeline.spec))
    layout = pipeline.load(first.input_ids, first.pixel_values, first.attention_mask, seconds=first.seconds)
    captured = {}
    for stage, graph in pipeline.spec.variant.graphs.items():
        if stage == "decode":
            pipeline.feed(pipeline.read("logits").argmax(axis=-1), layout.lengths)
        record = pipeline.spec.graph(stage)
        inputs = _read(pipeline, record.inputs)
        pipeline.run(stage)
        captured[graph] = Captured(inputs, _read(pipeline, record.outputs))
    return captured


def save_inputs(folder: Path, captured: Mapping[str, Captured]) -> None:
    """Writes FOLDER/<graph>.json for `polygraphy run --load-inputs`: a list of one feed dict, of exactly what the graph
    read. HimapError if polygraphy is not installed, or a file cannot be written."""
    _write(folder, {graph: [dict(run.inputs)] for graph, run in captured.items()})


def save_outputs(folder: Path, captured: Mapping[str, Captured], runner_name: str) -> None:
    """Writes FOLDER/<graph>.json for `polygraphy run --load-outputs`: RunResults of one iteration of the runner
    `runner_name`. HimapError as `save_inputs`."""
    made = required("polygraphy.comparator").RunResults
    results = {graph: made() for graph in captured}
    for graph, run in captured.items():
        results[graph].add([dict(run.outputs)], runner_name=runner_name)
    _write(folder, results)


def _read(pipeline: Pipeline, ports: Mapping[str, Port]) -> Arrays:
    return {name: pipeline.tensors[port.place].read() for name, port in ports.items()}


def _write(folder: Path, contents: Mapping[str, object]) -> None:
    """Each file whole or not at all; polygraphy's log, which would go to stdout, is silenced."""
    to_json, logger = required("polygraphy.json").to_json, required("polygraphy.logger").G_LOGGER
    check_report(folder, tuple(f"{graph}.json" for graph in contents))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise HimapError(f"cannot write {folder}", problem.strerror or str(problem)) from None
    for graph, content in contents.items():
        with logger.verbosity(logger.CRITICAL):
            text: str = to_json(content)
        write_file(folder / f"{graph}.json", methodcaller("write", text.encode()))
