"""The checkpoint that a bundle is judged by: there, complete, of the bundle's sizes; and PyTorch's model of it."""

from dataclasses import dataclass
from os.path import isdir
from pathlib import Path
from typing import TYPE_CHECKING, Any

from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import ImageSpec, QuantisedWeight
from himap_export.exporter.bind import WeightNames
from himap_export.exporter.checkpoint import open_checkpoint
from himap_export.exporter.family import Family, ImageOptions
from himap_export.exporter.planning import describe
from himap_export.exporter.registry import Model, resolve
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.quantization import linear_shapes
from himap_export.graphs.spec import Dtype
from himap_export.validate.registration import require_references

if TYPE_CHECKING:
    from himap_export.validate.reference.adapter import Media
    from himap_export.validate.reference.reference import Reference

SIZES = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "deepstack")


@dataclass(frozen=True)
class Source:
    """A checkpoint's folder, and that of its vision tower if it lies apart. `own_image`: the release prepares pictures
    by code of its own, whatever a processor's file in the folder says."""

    folder: Path
    tower: Path | None
    own_image: bool


def checkpoint_folder(model: str, vision_tower: Path | None = None) -> Path:
    """Returns the folder of an alias, a Hugging Face id or a folder, with unquantised weights; `vision_tower` as for
    `resolve`. HimapError as `resolve`, usage for quantised ones."""
    found, folder = _complete(model, vision_tower)
    if found.quantised is not None:
        details = "analysis and tuning need the unquantised checkpoint"
        raise HimapError(f"{model} comes quantised", details, code=Exit.USAGE)
    return folder


def source_of(bundle: Bundle, named: str | None, vision_tower: Path | None = None) -> Source:
    """Returns the checkpoint `named`, else the one that the bundle says it was made from.

    HimapError: missing if it is not there or lacks weights, usage as `resolve`, or if the bundle is not of its sizes.
    """
    source = bundle.manifest.model.source if named is None else named
    try:
        model, folder = _complete(source, vision_tower)
    except HimapError as problem:
        if named is not None or problem.code == Exit.MISSING or isdir(source):  # noqa: PTH112  # which raises for no name
            raise
        hint = "give it with `model`"
        raise HimapError(f"the model of {bundle.folder} is not at {source}", hint=hint, code=Exit.MISSING) from None
    _check_sizes(bundle, model)
    criteria = (cut.criterion for variant in bundle.manifest.variants for cut in variant.plan.cuts)
    require_references(str(bundle.folder), criteria)
    return Source(folder, model.tower, model.family.own_image)


def quantised_roles(bundle: Bundle, family: Family[Any]) -> dict[str, QuantisedWeight]:
    """Returns the quantised weights of a bundle by their roles in the decoder of `family`."""
    quantised = bundle.manifest.quantised()
    names = WeightNames({name.partition("[")[0] for name in (*bundle.tensors, *quantised)}, family)
    found = {role: quantised.get(names(role).name) for role in linear_shapes(bundle.manifest.decoder)}
    return {role: weight for role, weight in found.items() if weight is not None}


def load_reference(
    checkpoint: Path,
    dtype: Dtype,
    threads: int,
    attention: str = "eager",
    device: str = "cpu",
    vision_tower: Path | None = None,
    image: ImageSpec | None = None,
) -> "Reference":
    """Returns PyTorch's model on `device`, with `threads` CPU threads; its vision tower in `vision_tower` or where it
    says. It sees pictures or films as `image` says. HimapError if transformers cannot load it."""
    import torch
    from transformers.utils import logging

    from himap_export.validate.reference import reference

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return reference.Reference(
            checkpoint, reference.DTYPES[dtype], attn_implementation=attention, device=device,
            vision_tower=vision_tower, media=media_of(image),
        )  # fmt: skip
    except (MemoryError, ImportError):
        raise
    except Exception as problem:  # transformers checks configurations and weights with errors of many kinds
        details = " ".join(str(problem).split())[:500] or type(problem).__name__
        raise HimapError(f"PyTorch cannot load {checkpoint}", details) from None


def media_of(image: ImageSpec | None) -> "Media":
    """Returns what pixels are to the reference; pictures of their own size, if no image spec says."""
    from himap_export.validate.reference.adapter import Media

    if image is None:
        return Media()
    return Media(image.size, image.tiles, frames=image.film.frames if image.film else 0, several=image.several)


def asked_as(image: ImageSpec) -> "ImageOptions":
    """Returns what an export was asked for, to make such images."""
    tiles = None if image.film else image.tiles
    return ImageOptions(image.size, tiles, image.film.frames if image.film else None, image.several)


def _complete(model: str, vision_tower: Path | None) -> tuple[Model, Path]:
    """The model, and its folder, in which every weight is."""
    found = resolve(model, vision_tower=vision_tower)
    assert found.folder is not None  # `resolve` fetches weights unless told not to
    open_checkpoint(found.folder, tower=found.tower, quantised=found.quantised)
    return found, found.folder


def _check_sizes(bundle: Bundle, model: Model) -> None:
    first = bundle.manifest.variants[0]
    own = bundle.manifest.images[first.image]
    try:
        decoder, (vision,) = describe(model, asked_as(own))
        rules = model.family.prompt()
    except HimapError as problem:
        raise _misfit(bundle, model, str(problem)) from None
    actual, expected = ({name: getattr(spec, name) for name in SIZES} for spec in (bundle.manifest.decoder, decoder))
    image = bundle.manifest.model.image
    actual |= {"image tokens": own.tokens, "an image token's id": image.token, "between": image.between}
    expected |= {"image tokens": vision.tokens, "an image token's id": rules.image_token, "between": rules.between}
    for name, size in actual.items():
        if expected[name] != size:
            raise _misfit(bundle, model, f"{name}: {expected[name]}, in the bundle {size}")


def _misfit(bundle: Bundle, model: Model, details: str) -> HimapError:
    hint = "`model` takes the one that it was made from"
    return HimapError(f"{model.name} is not the model of {bundle.folder}", details, hint, Exit.USAGE)
