"""A bundle on disk: checked byte by byte against its manifest, its weights found, one of its variants selected."""

import hashlib
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from himap_export.engines.checkpoint_files import stored_tensors
from himap_export.engines.layout import how_many
from himap_export.engines.manifest import (
    FILE_NAME,
    FileRecord,
    GraphRecord,
    ImageSpec,
    Manifest,
    Variant,
    entries,
    read_manifest,
)
from himap_export.engines.weight_file import StoredTensor, as_held, check_finite, find_tensor, find_tensors, read_header
from himap_export.graphs.errors import Exit, HimapError, suggestion
from himap_export.graphs.plan import PruningPlan, TokenBudget
from himap_export.graphs.ports import WeightSpec

if TYPE_CHECKING:
    from himap_export.engines.session import Session


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder and manifest; `external`: its weights, where they were brought from `weight_folders`."""

    folder: Path
    manifest: Manifest
    external: Mapping[str, StoredTensor] | None = None
    weight_folders: tuple[Path, ...] = ()

    @classmethod
    def open(cls, folder: Path | str, *, verify: bool = True, expected_digest: str | None = None) -> Self:
        """Returns the bundle in `folder`, checked.

        It holds plain files, those that its manifest lists and no others; with `verify`, the length and sha256 of each
        are checked first. HimapError (failure) for one that is not as it was exported, or whose digest is not
        `expected_digest`.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if expected_digest is not None and manifest.digest != expected_digest.lower():
            hint = "it is another export, or was changed and given a new digest"
            raise HimapError(f"{folder} is not the bundle expected", f"its sha256 is {manifest.digest}", hint)
        _check_files(folder, manifest)
        if verify:
            _verify(folder, manifest)
        return cls(folder, manifest)

    def session(
        self,
        *,
        plan: str | None = None,
        text_budget: int | None = None,
        image_size: tuple[int, int] | None = None,
        backend: str | None = None,
        device: str | None = None,
        threads: int | None = None,
    ) -> "Session":
        """Returns a session: `with bundle.session() as s: s.ask("photo.jpg", "What is this?")`.

        `plan` (by its name or its policy's), `text_budget` and `image_size` (height, width) hold it to one of the
        bundle's; else it takes the first plan, and what fits each prompt. `backend`: the bundle's first that opens
        here; `device`: cpu or cuda for onnxruntime, cpu, gpu or npu for openvino; CPU `threads`: as many as gain
        anything.
        """
        from himap_export.engines.backends import Opening
        from himap_export.engines.session import Session

        return Session(
            self, plan=plan, text_budget=text_budget, image_size=image_size, backend=backend,
            opening=Opening(threads, device),
        )  # fmt: skip

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every stored weight by its checkpoint name; HimapError (missing) for a bundle of engines only."""
        if self.external is not None:
            return self.external
        if self.manifest.weight_form == "absent":
            details, hint = "it was exported with `engines_only`", "give the checkpoint's folder with `weights`"
            raise HimapError(f"{self.folder} holds no weights", details, hint, Exit.MISSING)
        return {name: t for file in self.manifest.weights for name, t in read_header(self.folder / file).items()}

    def weights(self, constants: bool = True) -> dict[str, StoredTensor]:
        """Returns those of `tensors` that its graphs read, the parts of quantised weights only with `constants`.
        HimapError if one is not what the manifest says."""
        wanted = self.manifest.wanted()
        for name, spec in wanted.items() if self.manifest.weight_form == "shared" else ():
            if problem := _misfit(name, find_tensor(self.tensors, name, spec.rows), spec):
                hint = "copy or export the bundle again"
                raise HimapError(f"the weights of {self.folder} are not its manifest's", problem, hint)
        return find_tensors(self.tensors, {n: spec for n, spec in wanted.items() if constants or not spec.constant})

    def with_weights(self, folders: Sequence[Path], verify: bool = True) -> Self:
        """Returns this bundle of engines only, with the weights of the checkpoint in `folders`: its own, and its
        tower's if that lies elsewhere.

        Headers decide whether they fit; with `verify`, the weights are read once, to see that they are numbers.
        HimapError (usage) if a name is missing, or a shape or dtype is not what the engines take; (failure) for NaN
        and infinity.
        """
        if self.manifest.weight_form != "absent":
            raise HimapError(f"{self.folder} has its own weights", hint="leave `weights` out", code=Exit.USAGE)
        stored = stored_tensors(folders, Exit.USAGE)
        wanted = self.manifest.wanted()
        problems = [_misfit(name, find_tensor(stored, name, spec.rows), spec) for name, spec in wanted.items()]
        if problems := [problem for problem in problems if problem]:
            more = f"; {len(problems) - 1} more of {len(wanted)} do not fit" if len(problems) > 1 else ""
            hint, named = f"the engines were made for {self.manifest.model.source}", " and ".join(map(str, folders))
            raise HimapError(f"{named} does not hold this bundle's weights", problems[0] + more, hint, Exit.USAGE)
        found = find_tensors(stored, wanted)
        if verify:
            check_finite(found.values())
        return replace(self, external=found, weight_folders=tuple(folders))

    def path(self, file: str) -> Path:
        return self.folder / file

    def plan_name(self, asked: str) -> str:
        """Returns the name of the plan whose name or policy is `asked`; HimapError (usage) if there is none."""
        policies = {v.plan_name: v.plan.policy for v in self.manifest.variants}
        found = asked if asked in policies else next((n for n, policy in policies.items() if policy == asked), None)
        if found is None:
            held = ", ".join(name if name == policy else f"{name} ({policy})" for name, policy in policies.items())
            held += suggestion(asked, [*policies, *policies.values()])
            raise HimapError(f"{self.folder} holds no plan {asked}", f"it holds {held}", code=Exit.USAGE)
        return found

    def variants(self, plan: str | None = None, images: int | None = None, film: bool | None = None) -> list[Variant]:
        """Returns those of `plan` (its own name or its policy's; the first one's if None) that take prompts of so many
        `images`, or of one `film`; None: of what the first variant takes.

        Where none is for exactly so many images, those are for the next larger number that cut nothing: there, and only
        there, the result is that of the prompt alone. HimapError (usage) for a plan, a film or a number that the bundle
        does not hold.
        """
        m, first = self.manifest, self.manifest.variants[0]
        name = self.plan_name(plan) if plan else first.plan_name
        film = m.images[first.image].film is not None if film is None else film
        found = [v for v in m.variants if v.plan_name == name and (m.images[v.image].film is not None) == film]
        if not found:
            what, hint = ("films", "export with `frames`") if film else ("images", "export without `frames`")
            raise HimapError(f"{self.folder} is for no {what}", hint=hint, code=Exit.USAGE)
        count = found[0].budget.images if images is None else images
        held = sorted({v.budget.images for v in found})
        larger = [n for n in held if n > count]
        if count not in held and larger:
            able = [v for v in found if v.budget.images == larger[0] and not v.budget.prunes]
            if able and not (count == 1 and m.images[able[0].image].several):
                return able
        if count not in held:
            numbers = f"{', '.join(map(str, held[:-1]))} or {held[-1]}" if len(held) > 1 else str(held[0])
            why = "where tokens are cut, fewer images would be cut otherwise" if larger else ""
            details = f"its plan {name} is for {numbers}" + (f": {why}" if why else "")
            hint = f"give as many, or export with `images` {count}"
            raise HimapError(f"{self.folder} takes no prompt of {how_many(count)}", details, hint, Exit.USAGE)
        return [v for v in found if v.budget.images == count]

    def select(
        self,
        plan: str | None = None,
        text_budget: int | None = None,
        *,
        text_tokens: int = 0,
        image_size: tuple[int, int] | None = None,
        images: int | None = None,
        film: bool | None = None,
    ) -> "RunSpec":
        """Returns what to run, chosen once and whole: one of `variants`, for images of `image_size` (height, width), of
        the first one's if None; at `text_budget` or, if None, at the smallest budget that fits `text_tokens`, else at
        the largest. HimapError (usage) for what the bundle does not hold."""
        held = self.variants(plan, images, film)
        sizes = {v.image: self.manifest.images[v.image].size for v in held}
        size = sizes[held[0].image] if image_size is None else image_size
        found = sorted((v for v in held if sizes[v.image] == size), key=lambda v: v.budget.text)
        if not found:
            raise self.no_graph(size, list(dict.fromkeys(sizes.values())))
        if text_budget is None:
            return RunSpec(self, next((v for v in found if v.budget.text >= text_tokens), found[-1]))
        for v in found:
            if v.budget.text == text_budget:
                return RunSpec(self, v)
        texts = ", ".join(str(v.budget.text) for v in found)
        raise HimapError(f"{self.folder} holds no text budget of {text_budget}", f"it holds {texts}", code=Exit.USAGE)

    def no_graph(self, size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> HimapError:
        """Returns the error for images of `size` (height, width), where there are graphs for `sizes`."""
        held = ", ".join(f"{width}x{height}" for height, width in sizes)
        summary = f"{self.folder} holds no graph for images of {size[1]}x{size[0]} pixels"
        return HimapError(summary, f"it holds {held}", "give one of these, or export with `image_size`", Exit.USAGE)


@dataclass(frozen=True)
class RunSpec:
    """One variant of a bundle: a plan at a text budget for images of one size. A pipeline opens it."""

    bundle: Bundle
    variant: Variant

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def plan(self) -> PruningPlan:
        return self.variant.plan

    @property
    def plan_name(self) -> str:
        return self.variant.plan_name

    @property
    def budget(self) -> TokenBudget:
        return self.variant.budget

    @property
    def image(self) -> ImageSpec:
        """What this variant's vision graph sees."""
        return self.manifest.images[self.variant.image]

    def graph_name(self, stage: str) -> str:
        """Returns the graph that plays `stage` (vision, prefix, k1, .. or decode)."""
        return self.variant.graphs[stage]

    def graph(self, stage: str) -> GraphRecord:
        return self.manifest.graphs[self.graph_name(stage)]


def skipped_checks(manifest: Manifest) -> str:
    """Says what `verify=False` leaves out, in words."""
    count, size = len(manifest.files), sum(record.bytes for record in manifest.files.values())
    return f"not verified: the content of {count} files, {size / 1e6:.1f} MB, engines and weights among them"


def _misfit(name: str, found: StoredTensor | None, wanted: WeightSpec) -> str:
    if found is None:
        return f"no tensor {name}"
    kind, shape = as_held(wanted)
    if found.shape != shape:
        return f"{name} is {list(found.shape)}, the engines take {list(shape)}"
    if found.dtype not in (kind, wanted.dtype):
        return f"{name} is {found.dtype}, the engines take {wanted.dtype}"
    return ""


def digest(path: Path) -> FileRecord:
    with path.open("rb") as f:
        return FileRecord(hashlib.file_digest(f, "sha256").hexdigest(), path.stat().st_size)


def digests(folder: Path) -> dict[str, FileRecord]:
    """Returns a record of every file under `folder` but the manifest, by relative path."""
    names = sorted(name for name in entries(folder) if name != FILE_NAME)
    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
        return dict(zip(names, pool.map(lambda name: digest(folder / name), names), strict=True))


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Checks that the folder holds what the manifest lists: an engine may read any file beside it."""
    found = set(entries(folder)) - {FILE_NAME}
    for name in sorted(found - manifest.files.keys()):
        hint = "move it out of the bundle"
        raise HimapError(f"{folder} holds {name}, which its manifest does not list", hint=hint)
    for name in manifest.files:
        if name not in found:
            raise HimapError(f"{folder} lacks {name}", hint="the bundle is incomplete: copy or export it again")
        if not stat.S_ISREG((folder / name).lstat().st_mode):
            hint = "copy or export the bundle again"
            raise HimapError(f"{folder / name} is not a plain file", "a bundle holds no links", hint)


def _verify(folder: Path, manifest: Manifest) -> None:
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: digest(folder / name), manifest.files)
        for (name, expected), actual in zip(manifest.files.items(), found, strict=True):
            if actual != expected:
                what = f"sha256 {actual.sha256[:12]}, the manifest says {expected.sha256[:12]}"
                raise HimapError(f"{folder / name} has changed since export", what, "copy or export the bundle again")
