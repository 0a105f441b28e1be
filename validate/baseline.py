"""A bundle for a comparison: the same checkpoint with other plans, in a folder that lasts as long as the comparison."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import ImageSpec
from himap_export.graphs.plan import PruningPlan, TokenBudget, Visual
from himap_export.graphs.spec import Dtype

Kept = tuple[PruningPlan, Visual]  # a plan, and how many image tokens its bundle keeps: --align may have raised them


def export_baseline(
    checkpoint: Path,
    like: TokenBudget,
    *,
    dtype: Dtype,
    backend: str,
    plans: Mapping[str, Kept],
    out: Path,
    image: ImageSpec | None = None,
    vision_tower: Path | None = None,
    beside: Bundle | None = None,
) -> Bundle:
    """Exports and returns a bundle of `plans`, by name, at the text budget, new tokens and batch of `like`, for
    images as `image` or, if None, the model's own.

    Its weights are the checkpoint's; if either is quantised, those of `beside`. Weights that overflow are saturated:
    the user has allowed it, or the bundle that is compared would not be there. `vision_tower`: the folder of the tower,
    if the checkpoint lacks it.
    """
    from himap_export.exporter.export import write_bundle
    from himap_export.exporter.family import ImageOptions
    from himap_export.exporter.planning import Planned, PlannedVariant, Request, describe
    from himap_export.exporter.registry import resolve
    from himap_export.validate.checkpoint import asked_as, quantised_roles

    model = resolve(str(checkpoint), vision_tower=vision_tower)
    decoder, (vision,) = describe(model, asked_as(image) if image else ImageOptions())
    variants = tuple(
        PlannedVariant(name, plan, budget=replace(like, visual=visual), asked=visual, vision=vision)
        for name, (plan, visual) in plans.items()
    )
    planned = Planned(
        model, decoder, variants=variants, dtype=dtype, asked=Request(backends=(backend,), allow_overflow=True)
    )
    roles = quantised_roles(beside, model.family) if beside is not None else {}
    if beside is not None and (roles or model.quantised is not None):
        form = beside.manifest.weight_form
        planned = dataclasses.replace(planned, forms=roles, weights_of=beside, weight_form=form)
    return write_bundle(planned, out, command=("himap-validate",), overwrite=False, progress=lambda line: None)
