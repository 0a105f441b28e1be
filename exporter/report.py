"""A plan as people read it and as programs do."""

from typing import Any

from himap_export.exporter.planning import Planned


def plan_json(p: Planned) -> dict[str, Any]:
    """One object: model, plan, budget, flops, stages."""
    paper, true = p.ratios
    return {
        "model": p.model.name,
        "source": p.model.source,
        "dtype": p.dtype,
        "plan": {"k1": p.plan.k1, "k2": p.plan.k2, "r1": p.plan.r1, "r2": p.plan.r2},
        "budget": {
            "visual": list(p.budget.visual),
            "total": list(p.budget.total),
            "capacity": list(p.budget.capacity),
            "text": p.budget.text,
            "max_new_tokens": p.budget.new,
            "batch": p.budget.batch,
        },
        "flops": {"paper_ratio": round(paper, 3), "ratio": round(true, 3), "prefill": sum(c.flops for c in p.costs)},
        "stages": [
            {
                "name": c.name,
                "layers": [c.layers.start, c.layers.stop],
                "tokens": c.tokens,
                "image_tokens": c.image_tokens,
                "kv_bytes": c.kv_bytes,
                "flops": c.flops,
            }
            for c in p.costs
        ],
    }


def plan_table(p: Planned) -> str:
    """The plan as a table, one row per stage, and the two FLOPs ratios."""
    rows = [("stage", "layers", "tokens", "image tokens", "KV cache", "prefill FLOPs")]
    for c in p.costs:
        layers = f"{c.layers.start}..{c.layers.stop - 1}"
        rows.append((c.name, layers, f"{c.tokens}", f"{c.image_tokens}", _bytes(c.kv_bytes), _flops(c.flops)))
    kv, flops = sum(c.kv_bytes for c in p.costs), sum(c.flops for c in p.costs)
    rows.append(("total", f"{p.decoder.layers}", "", "", _bytes(kv), _flops(flops)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    paper, true = p.ratios
    return "\n".join(
        [
            f"{p.model.name} ({p.model.source})  {p.dtype}  batch {p.budget.batch}",
            f"cuts at k1={p.plan.k1} (remove {p.plan.r1:.0%}) and k2={p.plan.k2} (remove {p.plan.r2:.0%} of the rest); "
            f"{p.budget.text} text slots, up to {p.budget.new} new tokens",
            "",
            *lines[:1],
            "-" * len(lines[0]),
            *lines[1:],
            "",
            f"FLOPs kept, as the paper counts (image tokens only): {paper:6.1%}",
            f"FLOPs kept, text and every matrix included:          {true:6.1%}   "
            f"at most {1 / true:.2f}x faster prefill",
        ]
    )


def _bytes(n: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.1f} {unit}"
        n /= 1024  # type: ignore[assignment]
    return f"{n:.2f} GiB"


def _flops(n: float) -> str:
    for unit in ("", "k", "M", "G"):
        if n < 1000:
            return f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} T"
