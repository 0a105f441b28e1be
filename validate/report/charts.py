"""The charts of a report, as Altair builds them: values on hover, as wide as the window.

Series differ in colour and in marker, dashes or opacity, for every kind of colour vision. Altair is loaded when the
first chart is made (`check_libraries`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any

from himap_export.validate.report.page import Figure, finite
from himap_export.validate.report.theme import SERIES

Value = float | None
SHAPES = ("circle", "square", "diamond", "cross", "triangle-up", "triangle-down", "triangle-left", "triangle-right")
DASHES = ([1, 0], [5, 2], [2, 2], [7, 2, 2, 2], [3, 1, 1, 1, 1, 1])  # with 8 colours: 40 series, no two alike
# Pixels between a chart's axes. `width` itself changes while Vega lays out a chart, which then cuts off what grew; here
# it only says that the window has changed.
ROOM = "((containerSize()[0] || width) - 60 + 0 * width)"
FADED = tuple(level for level in (1.0, 0.6, 0.35) for _ in SERIES)  # of bars, whose colours come again


@dataclass(frozen=True)
class Datum:
    """One value of a series; `low` and `high` bound it. None: unknown, a gap."""

    series: str
    x: float | str
    y: Value
    low: Value = None
    high: Value = None


@dataclass(frozen=True)
class Point(Datum):
    """One trade-off, named."""

    x: float
    y: float
    label: str = ""
    on_front: bool = False


def lines(name: str, title: str, how: str, data: Sequence[Datum], x_label: str, y_label: str) -> Figure:
    """Returns a figure of each series over x, with a band from low to high. The axes' labels include units."""
    import altair as alt

    names, whole = [d.series for d in data], all(float(d.x).is_integer() for d in data)
    x, y = alt.X("x:Q", **_axis(x_label), axis=alt.Axis(tickMinStep=int(whole))), alt.Y("y:Q", **_axis(y_label))
    base = _chart(data).encode(x, color=alt.Color("series:N", **_key(names, symbolOpacity=1)))
    band = base.mark_area(opacity=0.16, invalid="break-paths-show-domains").encode(alt.Y("low:Q"), alt.Y2("high:Q"))
    dashes, shape = (alt.StrokeDash("series:N", **_key(names, DASHES)), alt.Shape("series:N", **_key(names, SHAPES)))
    line = base.mark_line(invalid="break-paths-show-domains").encode(y, strokeDash=dashes)
    point = base.mark_point(filled=True, size=55, opacity=1, invalid="filter").encode(
        y, shape=shape, tooltip=_tooltip("series", alt.Tooltip("x:Q", title=x_label), y_label)
    )
    return _figure(name, title, how=how, chart=band + line + point, data=data, head={"x": x_label, "y": y_label})


def bars(name: str, title: str, how: str, data: Sequence[Datum], x_label: str, y_label: str) -> Figure:
    """Returns a figure of a group of bars for each x, in each one bar per series from 0 up, with a line from low to
    high. `y_label` includes the unit."""
    import altair as alt

    names, groups = [d.series for d in data], list(dict.fromkeys(str(d.x) for d in data))
    longest = 7 * max(map(len, groups), default=0)  # pixels, about
    slanted = alt.ExprRef(f"{ROOM} / {len(groups) or 1} < {longest} ? -35 : 0")
    base = _chart(data).encode(
        alt.X("x:N", sort=groups, title=None, axis=alt.Axis(labelAngle=slanted)),
        xOffset=alt.XOffset("series:N", sort=list(dict.fromkeys(names)), scale=alt.Scale(paddingInner=0.12)),
        tooltip=_tooltip("series", alt.Tooltip("x:N", title=x_label), y_label),
    )
    color, faded = alt.Color("series:N", **_key(names)), alt.Opacity("series:O", **_key(names, FADED))
    bar = base.mark_bar().encode(alt.Y("y:Q", title=y_label), color=color, opacity=faded)
    rule = base.mark_rule(strokeWidth=1.3).encode(alt.Y("low:Q", title=y_label), alt.Y2("high:Q"))
    return _figure(name, title, how=how, chart=bar + rule, data=data, head={"x": x_label, "y": y_label})


def pareto(name: str, title: str, how: str, data: Sequence[Point], x_label: str, y_label: str) -> Figure:
    """Returns a figure of the points, each with a line from low to high; those on the front, if there is one, are
    joined, numbered and listed, the others are dimmed."""
    import altair as alt

    names, front = [d.series for d in data], sorted((d for d in data if d.on_front), key=lambda d: d.x)
    entries = [f"{n}  {d.label}" for n, d in enumerate(front, 1)]
    chosen = _chart(front, [{"number": n, "entry": entry} for n, entry in enumerate(entries, 1)])
    x, y = alt.X("x:Q", **_axis(x_label)), alt.Y("y:Q", **_axis(y_label))
    base = _chart(data).encode(
        x, color=alt.Color("series:N", **_key(names)),
        opacity=alt.when("datum.on_front").then(alt.value(1)).otherwise(alt.value(0.4 if front else 1)),
        tooltip=_tooltip("label", alt.Tooltip("x:Q", title=x_label, format=".4~g"), y_label),
    )  # fmt: skip
    rule = base.mark_rule(strokeWidth=1.3).encode(alt.Y("low:Q", **_axis(y_label)), alt.Y2("high:Q"))
    point = base.mark_point(filled=True, size=90).encode(y, shape=alt.Shape("series:N", **_key(names, SHAPES)))
    head = {"x": x_label, "y": y_label, "on_front": "on the front"}
    if not front:
        return _figure(name, title, how=how, chart=rule + point, data=data, head=head)
    joined = chosen.mark_line(strokeWidth=1.4, color="gray").encode(x, y)
    listed = alt.Opacity("entry:O", **_key(entries, (1,), orient="bottom", symbolSize=0, offset=8))
    text = chosen.mark_text(fontWeight="bold", align="right", dx=-6, dy=-9)
    number = text.encode(x, y, text="number:N", opacity=listed)
    return _figure(name, title, how=how, chart=joined + rule + point + number, data=data, head=head)


def _chart(data: Sequence[Datum], more: Sequence[dict[str, Any]] = ()) -> Any:
    """Returns an Altair chart of the data, each with what `more` says of it."""
    import altair as alt

    rows = [asdict(d) | extra for d, extra in zip(data, more or [{}] * len(data), strict=True)]
    return alt.Chart({"values": finite(rows)})


def _key(names: Sequence[str], looks: Sequence[Any] = (), **legend: Any) -> dict[str, Any]:
    """Returns scale and legend of a channel that tells names apart: by colours, unless `looks` are given."""
    import altair as alt

    domain = list(dict.fromkeys(names))
    scale: dict[str, Any] = {"type": "ordinal", "range": list(islice(cycle(looks), len(domain)))} if looks else {}
    entry = 40 + 7 * max(map(len, domain), default=0)  # pixels; the legend has as many columns as the window allows
    columns = alt.ExprRef(f"max(1, floor({ROOM} / {entry}))")
    return {"scale": alt.Scale(domain=domain, **scale), "legend": alt.Legend(columns=columns, **legend)}


def _axis(label: str) -> dict[str, Any]:
    """Returns title and scale of a quantity that need not start at 0."""
    import altair as alt

    return {"title": label, "scale": alt.Scale(zero=False, nice=False, padding=16)}


def _tooltip(name: str, x: Any, y_label: str) -> list[Any]:
    """Returns what is shown of a value under the pointer."""
    import altair as alt

    titles = {"y": y_label, "low": "low", "high": "high"}
    return [alt.Tooltip(f"{name}:N"), x, *(alt.Tooltip(f"{f}:Q", title=t, format=".4~g") for f, t in titles.items())]


def _figure(name: str, title: str, how: str, chart: Any, data: Sequence[Datum], head: dict[str, str]) -> Figure:
    """Returns the figure of a chart as wide as its place; `head` renames the columns of its data."""
    fit = {"type": "fit-x", "contains": "padding", "resize": True}  # a legend may need more rows in a narrower window
    spec = chart.properties(width="container", autosize=fit, description=title).to_dict()
    rows = [asdict(d) for d in data]
    columns = tuple(head.get(key, key) for key in rows[0]) if rows else ()
    return Figure(
        name, title, how=how, spec=spec, head=columns, rows=tuple(tuple(finite(list(row.values()))) for row in rows)
    )
