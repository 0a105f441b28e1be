"""A plan as people read it and as programs do."""

from collections.abc import Sequence
from math import prod
from typing import Any

from msgspec.structs import asdict, replace

from himap_export.exporter.planning import Planned, PlannedVariant
from himap_export.graphs.flops import BYTES, stage_costs
from himap_export.graphs.plan import PruningPlan
from himap_export.graphs.quantization import linear_shapes, stored_bytes


def plan_json(p: Planned) -> dict[str, Any]:
    """Returns the model, and the first variant's plan, budget, flops, stages; `variants` lists these for all."""
    variants = [_variant_json(p, v) for v in p.variants]
    head = {"model": p.model.name, "source": p.model.source, "dtype": p.dtype, "backends": list(p.asked.backends)}
    quantised = {role: asdict(form) for role, form in p.forms.items()}
    chosen = {"backend_chosen_because": p.why or None, "quantised": quantised}
    return {**head, **chosen, **variants[0], "variants": variants}


def _variant_json(p: Planned, v: PlannedVariant) -> dict[str, Any]:
    (paper, true), costs = p.ratios(v), p.costs(v)
    return {
        "plan": _plan_json(v),
        "image": _medium_json(v),
        "budget": {
            "visual": list(v.budget.visual),
            "total": list(v.budget.total),
            "capacity": list(v.budget.capacity),
            "text": v.budget.text,
            "max_new_tokens": v.budget.new,
            "batch": v.budget.batch,
            "slots": v.budget.slots,
            "align": p.asked.align,
        },
        "flops": {
            "paper_ratio": round(paper, 3),
            "ratio": round(true, 3),
            "prefill": sum(c.flops for c in costs),
            "scoring": [share if share is None else round(share, 6) for share in p.scoring(v)],
        },
        "kv_cache": dict(zip(("unpruned", "bytes"), _caches(p, v), strict=True)),
        "stages": [vars(c) | {"layers": [c.layers.start, c.layers.stop]} for c in costs],
    }


def _medium_json(v: PlannedVariant) -> dict[str, Any]:
    """Returns what one picture or film of a prompt is, and how many `images` it holds; `film` says what is sampled."""
    seen, film = v.vision, v.vision.film
    found = {"size": list(seen.size), "tiles": seen.tiles, "tokens": seen.tokens, "images": v.budget.images}
    return found | {"film": film and asdict(film)}


def _caches(p: Planned, v: PlannedVariant) -> tuple[int, int]:
    """Returns the bytes of the KV caches: without the cuts, and as planned."""
    whole = replace(v.budget, visual=v.budget.visual[:1])
    unpruned, planned = stage_costs(p.decoder, PruningPlan(), whole, p.dtype), p.costs(v)
    return sum(c.kv_bytes for c in unpruned), sum(c.kv_bytes for c in planned)


def _plan_json(v: PlannedVariant) -> dict[str, Any]:
    """Returns the cuts in full, and by the parameters that name them: k1, r1, .."""
    flags: dict[str, float] = {f"k{n}": cut.layer for n, cut in enumerate(v.plan.cuts, 1)}
    flags |= {f"r{n}": cut.remove for n, cut in enumerate(v.plan.cuts, 1) if cut.remove is not None}
    return {"name": v.plan_name, "policy": v.plan.policy, **flags, "cuts": [asdict(cut) for cut in v.plan.cuts]}


def plan_table(p: Planned) -> str:
    """Returns the plan as a table: one row per stage, or one per variant where there are several."""
    budget = p.variants[0].budget
    slots = f"  {budget.slots} slots" if budget.slots else ""
    head = f"{p.model.name} ({p.model.source})  {p.dtype}  batch {budget.batch}{slots}"
    engines = f"engines for {', '.join(p.asked.backends)}" + (f" ({p.why})" if p.why else "")
    return "\n".join(
        [head, engines, *_quantised(p), *(_stages(p, p.variants[0]) if len(p.variants) == 1 else _variants(p))]
    )


def _quantised(p: Planned) -> list[str]:
    """Returns "224 of 225 linear layers in int4, blocks of 32: 3.4 GiB of 12.1 GiB", if any are."""
    if p.model.quantised is not None:
        return [f"linear layers as {p.model.quantised.method} has them"]
    if not p.forms:
        return []
    shapes, form = linear_shapes(p.decoder), next(iter(p.forms.values()))
    whole = sum(BYTES[p.dtype] * prod(shapes[role]) for role in p.forms)
    held = sum(stored_bytes(form, shapes[role], p.dtype) for role, form in p.forms.items())
    blocks = f", blocks of {form.block}" if form.block else ""
    return [f"{len(p.forms)} of {len(shapes)} linear layers in {form.kind}{blocks}: {_bytes(held)} of {_bytes(whole)}"]


def _stages(p: Planned, v: PlannedVariant) -> list[str]:
    costs, (paper, true) = p.costs(v), p.ratios(v)
    rows = [("stage", "layers", "tokens", "image tokens", "KV cache", "prefill FLOPs")]
    for c in costs:
        layers = f"{c.layers.start}..{c.layers.stop - 1}"
        rows.append((c.name, layers, f"{c.tokens}", f"{c.image_tokens}", _bytes(c.kv_bytes), _flops(c.flops)))
    (whole, kv), flops = _caches(p, v), sum(c.flops for c in costs)
    rows.append(("total", f"{p.decoder.layers}", "", "", _bytes(kv), _flops(flops)))
    return [
        _medium(v),
        f"{_cuts(v)}; {v.budget.text} text slots, up to {v.budget.new} new tokens",
        "",
        *_table(rows),
        "",
        f"FLOPs kept, as the paper counts (image tokens only): {paper:6.1%}",
        f"FLOPs kept, text and every matrix included:          {true:6.1%}   at most {1 / true:.2f}x faster prefill",
        f"KV cache:                                            {kv / whole:6.1%}   {_bytes(whole)} -> {_bytes(kv)}",
        *_scoring(p, v),
        *_alignment(p, v),
    ]


def _medium(v: PlannedVariant) -> str:
    """Returns "image 336x336: 576 tokens", "2 images 336x336: 576 tokens each", or "film of 16 frames 448x448: 128
    tokens a frame, 256 tokens a second of film at 2 frames a second"."""
    seen, images, film = v.vision, v.budget.images, v.vision.film
    if film is None:
        head, each = ("image", "") if images == 1 else (f"{images} images", " each")
        return f"{head} {v.image}: {seen.tokens} tokens{each}"
    (height, width), tokens = seen.size, seen.tokens / film.frames
    rate = f"{tokens * film.fps:.4g} tokens a second of film at {film.fps:g} frames a second"
    return f"film of {film.frames} frames {width}x{height}: {tokens:.4g} tokens a frame, {rate}"


def _scoring(p: Planned, v: PlannedVariant) -> list[str]:
    """Returns "ranking takes, of the prefill's FLOPs: 0.028% (instruction), 0.034% (image)", if there are cuts."""
    shares = zip(p.scoring(v), v.plan.cuts, strict=True)
    told = [f"{'?' if share is None else f'{100 * share:.2g}%'} ({cut.criterion})" for share, cut in shares]
    return [f"ranking takes, of the prefill's FLOPs:               {', '.join(told)}"] if told else []


def _cuts(v: PlannedVariant) -> str:
    """Returns "policy himap: cuts at k1=2 (instruction, remove 50%) and k2=8 (image, remove 75% of the rest)"."""
    if not v.plan.cuts:
        return f"policy {v.plan.policy}: no cuts"
    found = []
    for n, cut in enumerate(v.plan.cuts, 1):
        share = f"remove {cut.remove:.0%}{' of the rest' if n > 1 else ''}" if cut.keep is None else f"keep {cut.keep}"
        found.append(f"k{n}={cut.layer} ({cut.criterion}, {share})")
    return f"policy {v.plan.policy}: cut{'s' * (len(found) > 1)} at {' and '.join(found)}"


def _alignment(p: Planned, v: PlannedVariant) -> list[str]:
    """Returns what `--align` cost and gained: FLOPs, and image tokens that the same tiles of rows now hold."""
    if p.asked.align is None:
        return []
    before, after = p.ratios(v, v.asked)[1], p.ratios(v)[1]
    tokens = ", ".join(
        f"{name} {old + v.budget.text} -> {new + v.budget.text}"
        for name, old, new in zip(v.plan.stages[1:], v.asked[1:], v.budget.visual[1:], strict=True)
    )
    gained = " and ".join(f"{new - old}" for old, new in zip(v.asked[1:], v.budget.visual[1:], strict=True))
    return [
        f"aligned to {p.asked.align}: tokens {tokens}; {before:.1%} -> {after:.1%} of the FLOPs for {gained} image "
        f"tokens more in as many tiles of {p.asked.align} rows"
    ]


def _variants(p: Planned) -> list[str]:
    head = ("plan", "policy", "image", "images", "cuts", "text slots", "tokens", "image tokens", "KV cache")
    rows = [(*head, "FLOPs kept", "at most")]
    for v in p.variants:
        costs, (_, true) = p.costs(v), p.ratios(v)
        total, visual = (" ".join(f"{n:>4}" for n in numbers) for numbers in (v.budget.total, v.budget.visual))
        kv = _bytes(sum(c.kv_bytes for c in costs))
        cuts = " ".join(f"{c.layer}:{c.keep if c.remove is None else f'{c.remove:.0%}'}" for c in v.plan.cuts) or "-"
        counts, kept = (f"{v.budget.images}", cuts, f"{v.budget.text}"), (f"{true:.1%}", f"{1 / true:.2f}x")
        rows.append((v.plan_name, v.plan.policy, v.image, *counts, total, visual, kv, *kept))
    new = p.variants[0].budget.new
    return [f"{len(p.variants)} variants over one copy of the weights; up to {new} new tokens", "", *_table(rows)]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns the lines of a table: the first row is its head; the first column stands left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _scaled(n: float, base: int, *units: str) -> str:
    for unit in units[:-1]:
        if n < base:
            return f"{n:.1f} {unit}"
        n /= base
    return f"{n:.2f} {units[-1]}"


def _bytes(n: int) -> str:
    return _scaled(n, 1024, "B", "KiB", "MiB", "GiB")


def _flops(n: int) -> str:
    return _scaled(n, 1000, "", "k", "M", "G", "T")
