"""The checkpoint that a bundle is judged by: there, complete, and of the bundle's sizes."""

from dataclasses import dataclass
from os.path import isdir
from pathlib import Path

from himap_export.engines.bundle import Bundle
from himap_export.exporter.checkpoint import open_checkpoint
from himap_export.exporter.family import ImageOptions
from himap_export.exporter.planning import describe
from himap_export.exporter.registry import Model, resolve
from himap_export.graphs.errors import Exit, HimapError

SIZES = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "deepstack")


@dataclass(frozen=True)
class Source:
    """A checkpoint's folder, and that of its vision tower if it lies apart. `own_image`: the release prepares pictures
    by code of its own, whatever a processor's file in the folder says."""

    folder: Path
    tower: Path | None
    own_image: bool


def source_of(bundle: Bundle, named: str | None, vision_tower: Path | None = None) -> Source:
    """The checkpoint `named`, else the one that the bundle says it was made from.

    HimapError: missing if it is not there or lacks weights, usage as `resolve`, or if the bundle is not of its sizes.
    """
    source = bundle.manifest.model.source if named is None else named
    try:
        model = resolve(source, vision_tower=vision_tower)
        assert model.folder is not None  # `resolve` fetches weights unless told not to
        open_checkpoint(model.folder, tower=model.tower)
    except HimapError as problem:
        if named is not None or problem.code == Exit.MISSING or isdir(source):  # noqa: PTH112  # which raises for no name
            raise
        hint = "give it with --model"
        raise HimapError(f"the model of {bundle.folder} is not at {source}", hint=hint, code=Exit.MISSING) from None
    _check_sizes(bundle, model)
    _check_criteria(bundle)
    return Source(model.folder, model.tower, model.family.own_image)


def _check_criteria(bundle: Bundle) -> None:
    from himap_export.validate.reference.criteria import CRITERIA  # torch: seconds to import

    for variant in bundle.manifest.variants:
        for cut in variant.plan.cuts:
            if cut.criterion not in CRITERIA:
                details, hint = (
                    f"known: {', '.join(CRITERIA)}",
                    "one of your own is registered with its reference before",
                )
                summary = f"{bundle.folder} is cut by {cut.criterion}, which no reference ranks by"
                raise HimapError(summary, details, hint, Exit.USAGE)


def _check_sizes(bundle: Bundle, model: Model) -> None:
    own = bundle.manifest.images[bundle.image_name()]
    try:
        decoder, (vision,) = describe(model, ImageOptions(own.size, own.tiles))
        rules = model.family.prompt()
    except HimapError as problem:
        raise _misfit(bundle, model, str(problem)) from None
    mine, his = ({name: getattr(spec, name) for name in SIZES} for spec in (bundle.manifest.decoder, decoder))
    image = bundle.manifest.model.image
    mine |= {"image tokens": own.tokens, "an image token's id": image.token, "between": image.between}
    his |= {"image tokens": vision.tokens, "an image token's id": rules.image_token, "between": rules.between}
    for name, size in mine.items():
        if his[name] != size:
            raise _misfit(bundle, model, f"{name}: {his[name]}, in the bundle {size}")


def _misfit(bundle: Bundle, model: Model, details: str) -> HimapError:
    hint = "--model takes the one that it was made from"
    return HimapError(f"{model.name} is not the model of {bundle.folder}", details, hint, Exit.USAGE)
