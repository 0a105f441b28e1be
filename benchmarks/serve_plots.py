"""The figures of the serving benchmark: pruned beside unpruned under load, and what the admission setting trades."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from serve_results import Closed, Point

from himap_export.validate.report.theme import chart_config

NAMES = {"himap": "pruned", "none": "unpruned"}


def plot_load(closed: Closed, title: str, file: Path) -> None:
    """Draws for each number of answer tokens requests/s, time to first token and between tokens over clients, a line
    for each plan; bands are from p50 to p95, of requests/s from the lowest round to the highest."""
    import altair as alt

    rows = [row for (tokens, clients, _), point in closed.items() for row in _rows(tokens, clients, point)]
    panels = []
    for tokens in dict.fromkeys(tokens for tokens, _, _ in closed):
        base = alt.Chart({"values": [row for row in rows if row["tokens"] == tokens]}).encode(
            alt.X("clients:O", title="clients", axis=alt.Axis(labelAngle=0)),
            color=alt.Color("plan:N", title=None, legend=alt.Legend(symbolOpacity=1)),
        )
        line = base.mark_line(point=True).encode(
            alt.Y("middle:Q", title=None, scale=alt.Scale(zero=True)), strokeDash=alt.StrokeDash("plan:N", legend=None)
        )
        band = base.mark_area(opacity=0.16).encode(alt.Y("low:Q", title=None), alt.Y2("high:Q"))
        drawn = (band + line).properties(width=230, height=180)
        labels = alt.Column("what:N", title=f"answers of {tokens} tokens", sort=[row["what"] for row in rows[:3]])
        panels.append(drawn.facet(labels).resolve_scale(y="independent"))
    _save(alt.vconcat(*panels, title=title), file)


def _rows(tokens: int, clients: int, point: Point) -> Iterator[dict[str, Any]]:
    head = {"tokens": tokens, "clients": clients, "plan": NAMES[point.plan]}
    rates = [loaded.rate for loaded in point.rounds]
    yield head | {"what": "requests/s", "middle": point.rate, "low": min(rates), "high": max(rates)}
    for what, seconds in (("to the first token, s", point.first_s), ("between tokens, s", point.between_s)):
        low, high = (float(q) for q in np.percentile(seconds, (50, 95)))
        yield head | {"what": what, "middle": low, "low": low, "high": high}


def plot_admission(points: Mapping[int, Sequence[Point]], title: str, file: Path) -> None:
    """Draws time to first token against time between tokens, p50 and p95, a point for each number of prefills between
    two steps, a panel for each load."""
    import altair as alt

    rows = [
        {"load": point.load, "prefills": prefills, "quantile": f"p{q}", "first": float(np.percentile(point.first_s, q)),
         "between": float(np.percentile(point.between_s, q))}
        for prefills, found in points.items() for point in found for q in (50, 95)
    ]  # fmt: skip
    base = alt.Chart({"values": rows}).encode(
        alt.X("between:Q", title="between tokens, s", scale=alt.Scale(zero=True)),
        alt.Y("first:Q", title="to the first token, s", scale=alt.Scale(zero=True)),
        color=alt.Color("quantile:N", title=None, legend=alt.Legend(symbolOpacity=1)),
    )
    line = base.mark_line(opacity=0.5).encode(order="prefills:Q")
    point = base.mark_point(filled=True, size=60).encode(shape=alt.Shape("quantile:N", legend=None))
    text = base.mark_text(dy=-10).encode(text="prefills:N")
    drawn = (line + point + text).properties(width=330, height=260)
    faceted = drawn.facet(alt.Column("load:N", title="prefills between two decode steps"))
    _save(faceted.resolve_scale(x="independent", y="independent").properties(title=title), file)


def _save(chart: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    chart.configure(**chart_config(variables=False)).save(str(file), scale_factor=2)
