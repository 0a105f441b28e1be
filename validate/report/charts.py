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
FADED = (*[1.0] * len(SERIES), *[0.6] * len(SERIES), *[0.35] * len(SERIES))  # of bars, whose colours come again


@dataclass(frozen=True)
class Datum:
    """One value of a series; `low` and `high` bound it. None: unknown, a gap."""

    series: str
    x: float | str
    y: Value
    low: Value = None
    high: Value = None


@dataclass(frozen=True)
class Point:
    """One trade-off: `low` and `high` bound y, None if unknown; points of one `group` look alike."""

    label: str
    group: str
    x: float
    y: float
    low: Value
    high: Value
    on_front: bool


def lines(name: str, title: str, how: str, data: Sequence[Datum], x_label: str, y_label: str) -> Figure:
    """Returns a figure of each series over x, with a band from low to high. The axes' labels include units."""
    import altair as alt

    values, names = [asdict(d) for d in data], [d.series for d in data]
    color = alt.Color("series:N", **_key(names, symbolOpacity=1))
    base = alt.Chart({"values": finite(values)}).encode(alt.X("x:Q", **_axis(x_label, data)), color=color)
    y = alt.Y("y:Q", **_axis(y_label))
    band = base.mark_area(opacity=0.16, invalid="break-paths-show-domains").encode(
        alt.Y("low:Q", **_axis(y_label)), alt.Y2("high:Q")
    )
    line = base.mark_line(invalid="break-paths-show-domains").encode(
        y, strokeDash=alt.StrokeDash("series:N", **_key(names, DASHES))
    )
    shape, tooltip = alt.Shape("series:N", **_key(names, SHAPES)), _tooltip("series", x_label, "Q", y_label)
    point = base.mark_point(filled=True, size=55, opacity=1, invalid="filter").encode(y, shape=shape, tooltip=tooltip)
    return _figure(
        name, title, how, (band + line if _bounded(data) else line) + point, {"x": x_label, "y": y_label}, values
    )


def bars(name: str, title: str, how: str, data: Sequence[Datum], x_label: str, y_label: str) -> Figure:
    """Returns a figure of a group of bars for each x, in each one bar per series from 0 up, with a line from low to
    high. `y_label` includes the unit."""
    import altair as alt

    values, names = [asdict(d) for d in data], [d.series for d in data]
    groups = list(dict.fromkeys(str(d.x) for d in data))
    room = 7 * max(map(len, groups), default=0)  # pixels of the longest name
    angle = alt.ExprRef(f"width / {len(groups) or 1} < {room} ? -35 : 0")
    base = alt.Chart({"values": finite(values)}).encode(
        alt.X("x:N", sort=groups, title=None, axis=alt.Axis(labelAngle=angle)),
        xOffset=alt.XOffset("series:N", sort=list(dict.fromkeys(names)), scale=alt.Scale(paddingInner=0.12)),
        tooltip=_tooltip("series", x_label, "N", y_label),
    )
    color, faded = alt.Color("series:N", **_key(names)), alt.Opacity("series:O", **_key(names, FADED))
    bar = base.mark_bar().encode(alt.Y("y:Q", title=y_label), color=color, opacity=faded)
    rule = base.mark_rule(strokeWidth=1.3).encode(alt.Y("low:Q", title=y_label), alt.Y2("high:Q"))
    return _figure(name, title, how, bar + rule if _bounded(data) else bar, {"x": x_label, "y": y_label}, values)


def pareto(name: str, title: str, how: str, points: Sequence[Point], x_label: str, y_label: str) -> Figure:
    """Returns a figure of the points, each with a line from low to high; those on the front are joined, numbered and
    listed, the others are dimmed."""
    import altair as alt

    front = sorted((p for p in points if p.on_front), key=lambda p: p.x)
    values = [asdict(p) for p in points]
    numbered = [asdict(p) | {"number": n, "entry": f"{n}  {p.label}"} for n, p in enumerate(front, 1)]
    every, chosen = (alt.Chart({"values": finite(rows)}) for rows in (values, numbered))
    groups = [p.group for p in points]
    x, y = alt.X("x:Q", **_axis(x_label)), alt.Y("y:Q", **_axis(y_label))
    base = every.encode(
        x, color=alt.Color("group:N", **_key(groups)), tooltip=_tooltip("label", x_label, "Q", y_label),
        opacity=alt.when("datum.on_front").then(alt.value(1)).otherwise(alt.value(0.4)),
    )  # fmt: skip
    joined = chosen.mark_line(strokeWidth=1.4, color="gray").encode(x, y)
    rule = base.mark_rule(strokeWidth=1.3).encode(alt.Y("low:Q", **_axis(y_label)), alt.Y2("high:Q"))
    point = base.mark_point(filled=True, size=90).encode(y, shape=alt.Shape("group:N", **_key(groups, SHAPES)))
    listed = _key([row["entry"] for row in numbered], (1,), orient="bottom", symbolSize=0, offset=8)
    number = chosen.mark_text(fontWeight="bold", align="right", dx=-6, dy=-9).encode(
        x, y, text="number:N", opacity=alt.Opacity("entry:O", **listed)
    )
    head = {"x": x_label, "y": y_label, "on_front": "on the front"}
    return _figure(name, title, how, (joined + rule if _bounded(points) else joined) + point + number, head, values)


def _bounded(data: Sequence[Datum | Point]) -> bool:
    """Returns whether a value has bounds: of none at all Vega would warn in the browser's console."""
    return any(d.low is not None for d in data)


def _key(names: Sequence[str], range_: Sequence[Any] = (), **legend: Any) -> dict[str, Any]:
    """Returns scale and legend of a channel that tells series apart: those of colours, unless a range is given."""
    import altair as alt

    domain = list(dict.fromkeys(names))
    scale: dict[str, Any] = {"type": "ordinal", "range": list(islice(cycle(range_), len(domain)))} if range_ else {}
    entry = 40 + 7 * max(map(len, domain), default=0)  # pixels; the legend has as many columns as the window allows
    columns = alt.ExprRef(f"max(1, floor(width / {entry}))")
    return {"scale": alt.Scale(domain=domain, **scale), "legend": alt.Legend(columns=columns, **legend)}


def _axis(label: str, whole: Sequence[Datum] = ()) -> dict[str, Any]:
    """Returns title and scale of a quantity that need not start at 0; a tick is a whole number where all x are."""
    import altair as alt

    steps: dict[str, Any] = {"tickMinStep": 1} if whole and all(float(d.x).is_integer() for d in whole) else {}
    return {"title": label, "scale": alt.Scale(zero=False, nice=False, padding=16), "axis": alt.Axis(**steps)}


def _tooltip(of: str, x_label: str, x_type: str, y_label: str) -> list[Any]:
    """Returns what is shown of a value under the pointer."""
    import altair as alt

    number: dict[str, Any] = {"format": ".4~g"}
    x = alt.Tooltip(f"x:{x_type}", title=x_label, **(number if x_type == "Q" else {}))
    bounds = [alt.Tooltip(f"{bound}:Q", title=bound, **number) for bound in ("low", "high")]
    return [alt.Tooltip(f"{of}:N"), x, alt.Tooltip("y:Q", title=y_label, **number), *bounds]


def _figure(
    name: str, title: str, how: str, chart: Any, head: dict[str, str], values: Sequence[dict[str, Any]]
) -> Figure:
    """Returns the figure of a chart as wide as its place; `head` renames the columns of its data."""
    spec = chart.properties(width="container").to_dict() | {"description": title}
    columns = tuple(head.get(key, key) for key in values[0]) if values else ()
    return Figure(name, title, how, spec, columns, tuple(tuple(finite(list(row.values()))) for row in values))
