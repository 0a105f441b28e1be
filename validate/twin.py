"""A bundle for a comparison: the same checkpoint with other plans, in a folder that lasts as long as the comparison."""

from collections.abc import Mapping
from pathlib import Path

from himap_export.engines.bundle import Bundle, open_bundle
from himap_export.graphs.plan import PruningPlan, TokenBudget, Visual
from himap_export.graphs.spec import Dtype

Kept = tuple[PruningPlan, Visual]  # a plan, and how many image tokens its bundle keeps: --align may have raised them


def export_twin(
    checkpoint: Path, like: TokenBudget, dtype: Dtype, backend: str, plans: Mapping[str, Kept], out: Path
) -> Bundle:
    """A bundle of `plans`, by name, at the text budget, new tokens and batch of `like`."""
    from himap_export.exporter.export import export
    from himap_export.exporter.llava import decoder_spec, vision_spec
    from himap_export.exporter.planning import Planned, PlannedVariant
    from himap_export.exporter.registry import resolve

    model = resolve(str(checkpoint))
    variants = tuple(
        PlannedVariant(name, plan, TokenBudget(visual, like.text, like.new, like.batch), visual)
        for name, (plan, visual) in plans.items()
    )
    planned = Planned(model, decoder_spec(model.config), vision_spec(model.config), variants, dtype, (backend,))
    export(planned, out, ("himap-validate",), False, lambda line: None)
    return open_bundle(out, verify=False)
