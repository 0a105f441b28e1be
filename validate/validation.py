"""One validation: a bundle's parity with the PyTorch reference, and its speed beside the ceiling."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
from PIL import Image

from himap_export.engines.answer import Request
from himap_export.engines.arrays import Inputs, save_outputs
from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle, RunSpec
from himap_export.engines.files import check_output, check_report
from himap_export.engines.pipeline import Pipeline
from himap_export.engines.processor import Processor
from himap_export.engines.session import Pictures, Session, open_pipeline
from himap_export.exporter.registry import resolve
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.spec import Dtype
from himap_export.validate.checkpoint import Source, load_reference, quantised_roles, source_of
from himap_export.validate.dequantised import check_held, has_original, judge_of
from himap_export.validate.parity import polygraphy_json
from himap_export.validate.parity.compare import Load, Parity, compare
from himap_export.validate.parity.limits import ParityOptions
from himap_export.validate.parity.pixels import PixelParity, compare_pixels, with_pixels
from himap_export.validate.parity.prompts import drawn_inputs
from himap_export.validate.parity.quantised import (
    EXACT,
    FreeRun,
    Quantised,
    other_runs,
    quantisation_cost,
    quantised_json,
    quantised_lines,
)
from himap_export.validate.parity.results import gates_json, parity_json, parity_lines
from himap_export.validate.parity.runs import UNDRAWN
from himap_export.validate.parity.weights import weight_errors, with_weights
from himap_export.validate.reference.activations import round_activations, rounds
from himap_export.validate.reference.reference import Reference
from himap_export.validate.report.page import check_libraries, finite, write_report
from himap_export.validate.speed.measure import Speed, ceiling, measure, uncut_variant
from himap_export.validate.speed.results import speed_json, speed_lines

Lines = Callable[[Sequence[str]], None]
Progress = Callable[[str], None]
ANSWER = 32  # tokens that are compared unless asked otherwise


@dataclass(frozen=True)
class Report:
    """What a validation found; `speed` is None where it was not measured, `quantised` where no weights are,
    `processor` where nothing was asked in words."""

    run: RunSpec
    backend: str
    device: str
    parity: Parity
    quantised: Quantised | None = None
    speed: Speed | None = None
    processor: Processor | None = None

    @property
    def answer(self) -> dict[str, str] | None:
        """The answer to the question in words, by who gives it: "engine" and "reference". Behind a tie, where the
        reference's tokens were kept, the engines' is the one that they give with these."""
        if self.processor is None:
            return None
        stop, found = {*self.run.manifest.model.eos_tokens, UNDRAWN}, self.parity.outputs
        tokens = {"engine": found["tokens"], "reference": found["reference_tokens"]}
        return {who: self.processor.text(rows[0].tolist(), stop) for who, rows in tokens.items()}

    @property
    def passed(self) -> bool:
        """Whether every gate of parity did."""
        return self.parity.passed

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the gates that did not pass."""
        return tuple(gate.name for gate in self.parity.gates if not gate.passed)

    def parity_lines(self) -> list[str]:
        """Returns what parity found, and the answer in words, for people."""
        said = self.answer
        answer = [f"      {'answer':10}  {said['engine']!r}, the reference's {said['reference']!r}"] if said else []
        return parity_lines(self.parity, self.run.bundle, self.backend) + answer

    def lines(self) -> list[str]:
        """Returns what was found, for people."""
        cost = quantised_lines(self.quantised) if self.quantised else []
        speed = speed_lines(self.speed) if self.speed else []
        return self.parity_lines() + cost + speed

    def to_json(self) -> dict[str, Any]:
        """Returns what was found, for programs; NaN and infinity are None."""
        found: dict[str, Any] = {
            "bundle": str(self.run.bundle.folder), "backend": self.backend, "device": self.device,
            "dtype": self.run.manifest.dtype, "plan": self.run.plan_name, "text_budget": self.run.budget.text,
            "image_tokens": list(self.run.budget.visual), "answer": self.answer,
            "passed": self.passed, "parity": parity_json(self.parity), "gates": gates_json(self.parity),
        }  # fmt: skip
        if self.quantised is not None:
            found["quantised"] = quantised_json(self.quantised)
        if self.speed is not None:
            found["speed"] = speed_json(self.speed)
        return finite(found)  # type: ignore[no-any-return]

    def write(self, folder: Path | str, command: Sequence[str] = ()) -> Path:
        """Writes report.html, report.json and the charts into `folder`, with the `command` that made them; returns the
        HTML's path. HimapError (missing) without the libraries of reports, or as `write_report`."""
        from himap_export.validate.parity.page import parity_page
        from himap_export.validate.report.machine import provenance

        check_libraries()
        facts = {"bundle's digest": self.run.manifest.digest, "device": self.device}
        page = parity_page(
            self.parity, self.run, self.backend, quantised=self.quantised, speed=self.speed,
            made=provenance(command, facts),
        )  # fmt: skip
        return write_report(Path(folder), page, self.to_json())


def validate(
    bundle: Bundle,
    *,
    model: str | None = None,
    vision_tower: Path | None = None,
    plan: str | None = None,
    text_budget: int | None = None,
    image_size: tuple[int, int] | None = None,
    image: Pictures | None = None,
    video: Path | str | None = None,
    prompt: str | None = None,
    inputs: Inputs | Mapping[str, npt.NDArray[Any]] | None = None,
    prompts: int = 4,
    seed: int = 0,
    max_new_tokens: int | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    speed: bool = True,
    iterations: int = 10,
    warm_up: int = 2,
    backend: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    outputs: Path | None = None,
    captures: Mapping[str, Path] | None = None,
    tell: Lines = lambda lines: None,
    progress: Progress = lambda line: None,
) -> Report:
    """Compares a bundle with PyTorch's model of the checkpoint it was made from, and returns what it found.

    The checkpoint is `model`, as for an export, with its `vision_tower`; if not given, the one the bundle names. What
    is run is chosen as for a session: `plan`, `text_budget`, `image_size`, `backend`, `device`, CPU `threads`. Both are
    asked the `prompt` about the `image`, or several, or the film `video`, or `inputs` as arrays, or as many `prompts`
    as drawn from `seed`; answers of `max_new_tokens` (32) are compared. `atol` and `rtol` replace the tolerance of
    logits. `speed`: whether prefill and decode are timed beside the unpruned model and PyTorch, `iterations` times
    after `warm_up`. All arrays are saved to the .npz `outputs`, what each graph read and wrote into the folders
    `captures`["inputs" and "outputs"], as polygraphy's JSON. `tell` hears of results as they come, `progress` of what
    goes on.

    HimapError: usage for what does not fit the bundle, missing for what is not there; a gate that fails is no error.
    """
    bundle, source = judged_bundle(bundle, model, vision_tower)
    session = bundle.session(plan=plan, text_budget=text_budget, image_size=image_size)
    request = _request(session, image, video, prompt=prompt, inputs=inputs)
    run = request.spec if request else bundle.select(plan, text_budget, image_size=image_size)
    given = request.inputs if request else drawn_inputs(run, prompts, seed)
    files = (
        [] if image is None or isinstance(image, Image.Image) else [image] if isinstance(image, Path | str) else image
    )
    named = [Path(file) for file in files if isinstance(file, Path | str)]
    pixels = compare_pixels(given.pixel_values, named, run.image, source) if named else None
    opening = Opening(threads or len(os.sched_getaffinity(0)), device)
    processor = request.processor if request else None
    kept = outputs is not None or processor is not None
    options = ParityOptions(min(max_new_tokens or ANSWER, run.budget.new), atol, rtol, outputs=kept)
    asked = _Asked(
        run, source, given, options, pixels=pixels, processor=processor, opening=opening, tell=tell, progress=progress
    )
    return asked.report(backend, outputs, captures or {}, (iterations, warm_up) if speed else None)


@dataclass(frozen=True)
class _Asked:
    """What a variant is compared on: prompts `given`, with the checkpoint that its bundle was made from, `source`;
    `pixels` and `processor`, if an image was given. `opening`: how engines are deployed."""

    run: RunSpec
    source: Source
    given: Inputs
    options: ParityOptions
    pixels: PixelParity | None
    processor: Processor | None
    opening: Opening
    tell: Lines
    progress: Progress

    def report(
        self, backend: str | None, outputs: Path | None, captures: Mapping[str, Path], timing: tuple[int, int] | None
    ) -> Report:
        """Returns parity; of a quantised bundle what quantising cost; and, with `timing`, iterations and those to warm
        up, speed. Engines and PyTorch's models are in memory while they are asked, and no longer."""
        if captures:
            polygraphy_json.check_folders(self.run, *captures.values())
        pipeline = open_pipeline(self.run, backend, replace(self.opening, exact=bool(self._kinds())))
        if captures:
            _save_captures(pipeline, self.given, captures)
        with judge_of(self.run.bundle, self.source) as judge:
            parity = self._parity(judge, pipeline)
            found = Report(self.run, pipeline.backend, pipeline.engines.device, parity, processor=self.processor)
            self.tell(found.parity_lines())
            if outputs is not None:
                save_outputs(outputs, parity.outputs)
            if self._kinds():
                others = self._others(pipeline)
                if EXACT in others:  # else opening it exact has changed nothing
                    del pipeline
                    pipeline = open_pipeline(self.run, found.backend, self.opening)
                found = replace(found, quantised=self._cost(pipeline, others))
            del pipeline
            return found if timing is None else self._timed(found, judge, *timing)

    def _parity(self, judge: Source, pipeline: Pipeline) -> Parity:
        """Returns the parity of `pipeline` with the `judge`; of quantised weights, with the source's, too."""
        own = ", with the weights that the bundle made of its" if judge != self.source else ""
        self.progress(f"judged by the checkpoint in {self.source.folder}{own}")
        bundle, load, load_rounding = self.run.bundle, self._load(judge), None
        if rounds(self._kinds()):
            family = resolve(str(self.source.folder), vision_tower=self.source.tower).family
            by_role = {role: weight.kind for role, weight in quantised_roles(bundle, family).items()}
            load_rounding = partial(_rounding_reference, load, by_role)
        parity = compare(pipeline, load, self.given, self.options, progress=self.progress, load_rounding=load_rounding)
        if self._kinds() and has_original(self.source):
            parity = with_weights(parity, weight_errors(bundle, self.source, judge))
        return with_pixels(parity, self.pixels) if self.pixels else parity

    def _others(self, pipeline: Pipeline) -> dict[str, list[FreeRun]]:
        original = self._load(self.source) if has_original(self.source) else None
        exact, asked = not rounds(self._kinds()), (self.given, self.options.new_tokens)
        return other_runs(pipeline, original, exact, *asked, progress=self.progress)

    def _cost(self, deployed: Pipeline, others: Mapping[str, Sequence[FreeRun]]) -> Quantised:
        found = quantisation_cost(deployed, others, self.given, self.options.new_tokens)
        self.tell(quantised_lines(found))
        return found

    def _timed(self, report: Report, judge: Source, iterations: int, warm_up: int) -> Report:
        """Returns `report` with the speed of its bundle beside others'."""
        self.tell(["", f"speed: FLOPs allow {ceiling(self.run):.2f}x over the unpruned decoder prefill"])
        exporting = "" if uncut_variant(self.run) else "exporting the unpruned baseline; then "
        repetitions = f"{warm_up} + {iterations} repetitions"
        self.progress(f"{exporting}{repetitions}, a process for each system, on {report.device}")
        speed = measure(
            self.run, self.source.folder, report.backend, report.device, judge=judge.folder,
            asked=self.opening.device, iterations=iterations, warm_up=warm_up, threads=self._threads(),
            vision_tower=self.source.tower,
        )  # fmt: skip
        self.tell(speed_lines(speed))
        return replace(report, speed=speed)

    def _kinds(self) -> set[str]:
        return {weight.kind for weight in self.run.manifest.quantised().values()}

    def _threads(self) -> int:
        assert self.opening.threads is not None  # `validate` settles it
        return self.opening.threads

    def _load(self, checkpoint: Source) -> Load:
        threads, tower = self._threads(), checkpoint.tower
        return partial(load_reference, checkpoint.folder, threads=threads, vision_tower=tower, image=self.run.image)


def _rounding_reference(load: Load, kinds: Mapping[str, str], dtype: Dtype) -> Reference:
    found = load(dtype)
    round_activations(found.decoder, found.adapter.head, kinds)
    return found


def _request(
    session: Session,
    image: Pictures | None,
    video: Path | str | None,
    *,
    prompt: str | None,
    inputs: Inputs | Mapping[str, npt.NDArray[Any]] | None,
) -> Request | None:
    """What the caller asks, and the variant that it fits; None if prompts are to be drawn."""
    if image is not None and video is not None:
        raise HimapError("`image` excludes `video`", code=Exit.USAGE)
    if (image is None and video is None) != (prompt is None):
        raise HimapError("`image` or `video`, and `prompt` go together", code=Exit.USAGE)
    if inputs is not None and prompt is not None:
        raise HimapError("`inputs` excludes `image`, `video` and `prompt`", code=Exit.USAGE)
    if video is not None and prompt is not None:
        return session.prepare_film(video, prompt)
    if image is not None and prompt is not None:
        return session.prepare(image, prompt)
    return None if inputs is None else session.prepare_arrays(inputs)


def judged_bundle(bundle: Bundle, model: str | None, vision_tower: Path | None) -> tuple[Bundle, Source]:
    """Returns the bundle with its weights, and the checkpoint that it is judged by. HimapError as `source_of`, and as
    `check_held`."""
    source = source_of(bundle, model, vision_tower)
    check_held(bundle, source)
    if bundle.manifest.weight_form == "absent":
        bundle = bundle.with_weights([folder for folder in (source.folder, source.tower) if folder is not None])
    return bundle, source


def check_places(report: Path | None, outputs: Path | None, captures: Mapping[str, Path], *read: Path | None) -> None:
    """Checks what can be known of a validation's outputs before a bundle is opened; `read`: files that it reads.
    HimapError (usage) if one cannot be written, (missing) without the libraries of reports."""
    if report is not None:
        check_report(report, ("report.html", "report.json", "speed.png"))
        check_libraries()
    if outputs is not None:
        check_output(outputs, ".npz", *read)
    for folder in captures.values():
        check_report(folder, ())


def _save_captures(pipeline: Pipeline, inputs: Inputs, captures: Mapping[str, Path]) -> None:
    captured = polygraphy_json.capture(pipeline, inputs)
    if (folder := captures.get("inputs")) is not None:
        polygraphy_json.save_inputs(folder, captured)
    if (folder := captures.get("outputs")) is not None:
        polygraphy_json.save_outputs(folder, captured, "himap-validate")
