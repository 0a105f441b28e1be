"""Which variant of a bundle prompts fit that come as arrays, and how they fall into its batches."""

from collections.abc import Iterator

from himap_export.engines.arrays import Inputs
from himap_export.engines.bundle import Bundle, RunSpec
from himap_export.engines.layout import count_image_tokens, count_images, text_tokens
from himap_export.engines.manifest import ImageSpec
from himap_export.graphs.errors import HimapError


def fitting_variant(bundle: Bundle, inputs: Inputs, plan: str | None = None, text_budget: int | None = None) -> RunSpec:
    """Returns the variant whose pictures become as many image tokens as the prompts hold, and as many tiles as there
    are pixels; the next one that fits where none does, which then says what is wrong with them. HimapError (usage) for
    pixels of a size that no graph takes, or a number of images that the bundle is not for."""
    m = bundle.manifest
    name = bundle.plan_name(plan) if plan else m.variants[0].plan_name
    views = {v.image: m.images[v.image].view for v in m.variants if v.plan_name == name}
    able = [image for image, view in views.items() if view == inputs.view]
    if not able:
        raise bundle.no_graph(inputs.view, list(dict.fromkeys(views.values())))
    exact = [image for image in able if _fits(bundle, inputs, m.images[image])]
    spec = m.images[(exact or able)[0]]
    counts = count_images(inputs.input_ids, inputs.attention_mask, m.model.image, spec.tokens)
    needed = text_tokens(inputs.input_ids, inputs.attention_mask, m.model.image)
    images = int(counts.max()) if exact else None
    run = bundle.select(
        plan, text_budget, text_tokens=needed, image_size=spec.size, images=images, film=spec.film is not None
    )
    if run.image != spec:  # several pictures are seen in another way than one
        raise HimapError(f"{bundle.folder} takes no such images", f"{images} in a prompt")
    return run


def _fits(bundle: Bundle, inputs: Inputs, spec: ImageSpec) -> bool:
    """Whether prompts hold whole pictures of `spec`, with their pixels."""
    tokens = count_image_tokens(inputs.input_ids, inputs.attention_mask, bundle.manifest.model.image)
    counts = tokens // spec.tokens
    whole = not (tokens % spec.tokens).any() and counts.min() > 0
    return whole and counts.sum() * spec.tiles == len(inputs.pixel_values)


def batches(inputs: Inputs, spec: RunSpec) -> Iterator[Inputs]:
    """Yields the prompts with their pixels, up to B at a time."""
    counts = count_images(inputs.input_ids, inputs.attention_mask, spec.manifest.model.image, spec.image.tokens)
    yield from inputs.batches(spec.budget.batch, (counts * spec.image.tiles).tolist())
