"""The plots of a report. Each is drawn for wide and narrow windows, in the page's colours and font, and as a PNG.

Series differ in colour and in marker, dashes or place, for every kind of colour vision. The same arguments give the
same bytes. HimapError (Exit.MISSING) if Matplotlib is not installed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from himap_export.validate.html.drawing import INK, MINUS, Sheet, figure, look, text_width, wrapped
from himap_export.validate.html.labels import Box, place, spread, stagger
from himap_export.validate.html.page import Figure
from himap_export.validate.html.theme import SERIES

Floats = NDArray[np.float64]
Value = float | None
CROWDED = 15.0  # square pixels that a label may cover: the width of one bound's line


@dataclass(frozen=True)
class Series:
    """One line, or one bar in each group. `low` and `high`, empty or as long as `y`, bound `y`; None: unknown."""

    name: str
    y: tuple[Value, ...]
    low: tuple[Value, ...] = ()
    high: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Point:
    """One trade-off: `low` and `high` bound y, None if unknown; points of one `group` look alike."""

    label: str
    x: float
    y: float
    low: Value
    high: Value
    group: str
    on_front: bool


def lines(
    name: str,
    title: str,
    x: Sequence[float],
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    caption: str = "",
    marks: Sequence[tuple[float, str]] = (),
) -> Figure:
    """Each series over `x`, with a band from low to high; None leaves a gap. `marks`: vertical lines (x, label).

    The axes' labels include units. ValueError if a series is not as long as `x`.
    """

    def draw(sheet: Sheet) -> None:
        for i, one in enumerate(series):
            _line(sheet.axes, i, x, one)
        names = [wrapped(one.name, sheet.size, 170) for one in series]
        beside = sheet.form.width > 600 and sheet.line * sum(map(len, names)) <= sheet.form.height
        if not beside:
            sheet.top = sheet.key([one.name for one in series], 26, partial(_line_sample, sheet), sheet.top)
        widest = max((text_width(line, sheet.size) for name in names for line in name), default=0)
        _plain_limits(sheet.axes, [*x, *(at for at, _ in marks)])
        sheet.frame(y_label, right=widest + 56 if beside else 14)
        _marks(sheet, marks)
        sheet.close(sheet.numbers_below(x_label, whole=all(float(v).is_integer() for v in x)))
        if beside:
            _names_at_ends(sheet, [_values(one.y, len(x)) for one in series], names)

    return figure(name, title, caption, draw)


def bars(
    name: str,
    title: str,
    groups: Sequence[str],
    series: Sequence[Series],
    y_label: str,
    caption: str = "",
) -> Figure:
    """A group of bars for each of `groups`, in each one bar per series, with a line from low to high; None: no bar.

    Bars start at 0. `y_label` includes the unit. ValueError if a series has not one value per group.
    """

    def draw(sheet: Sheet) -> None:
        axes, wide = sheet.axes, 0.8 / max(len(series), 1)
        for i, one in enumerate(series):
            at = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * wide
            y, low, high = (_values(v or one.y, len(groups)) for v in (one.y, one.low, one.high))
            there = np.isfinite(y)
            axes.bar(at[there], y[there], wide * 0.88, color=INK[look(i)[0]], alpha=_solid(i), linewidth=0)
            _whiskers(axes, at, low, high, color=INK["ink"], linewidth=1.3)
        sheet.top = sheet.key([one.name for one in series], 12, partial(_bar_sample, sheet), sheet.top)
        axes.set_xlim(-0.5, max(len(groups), 1) - 0.5)
        axes.set_xticks([])
        axes.axhline(0, color=INK["pale"], linewidth=0.8)
        sheet.frame(y_label)
        middles = [sheet.x_pixel(i) for i in range(len(groups))]
        room = (sheet.right - sheet.left) / max(len(groups), 1)
        sheet.close(sheet.names_below(groups, middles, room, sheet.top + sheet.form.height))

    return figure(name, title, caption, draw)


def pareto(
    name: str,
    title: str,
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    caption: str = "",
    x_reversed: bool = False,
) -> Figure:
    """Each point with a line from low to high; those on the front are joined and labelled, the others are dimmed."""
    groups = list(dict.fromkeys(point.group for point in points))
    front = sorted((point for point in points if point.on_front), key=lambda point: point.x)

    def draw(sheet: Sheet) -> None:
        axes = sheet.axes
        axes.plot([p.x for p in front], [p.y for p in front], color=INK["pale"], linewidth=1.4, zorder=2)
        for p in points:
            colour, _, marker = look(groups.index(p.group))
            style: dict[str, Any] = {"alpha": 1.0, "zorder": 4} if p.on_front else {"alpha": 0.42, "zorder": 3}
            _whiskers(
                axes, [p.x], _values((p.low,), 1), _values((p.high,), 1), color=INK[colour], linewidth=1.3, **style
            )
            edge = INK["paper" if p.on_front else colour]
            axes.plot(
                [p.x],
                [p.y],
                marker,
                color=INK[colour],
                markersize=8.5 if p.on_front else 6.5,
                markeredgecolor=edge,
                **style,
            )
        sheet.top = sheet.key(groups, 9, partial(_point_sample, sheet), sheet.top)
        axes.grid(True, axis="x")
        axes.margins(0.08, 0.12)
        if x_reversed:
            axes.invert_xaxis()
        sheet.frame(y_label)
        below = sheet.numbers_below(x_label, whole=False)
        sheet.close(below + _front_labels(sheet, front, points, sheet.top + sheet.form.height + below))

    return figure(name, title, caption, draw)


def heat(
    name: str,
    title: str,
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    unit: str,
    caption: str = "",
) -> Figure:
    """`values` [rows, columns], written into cells of a colour that is the stronger the larger they are.

    Where values have both signs, the cells of negative ones have another colour. Not finite: an empty cell.
    """
    table = np.asarray(values, np.float64)
    if table.shape != (len(rows), len(columns)):
        raise ValueError(f"{table.shape} values for {len(rows)} rows and {len(columns)} columns")
    shades, texts = _shades(table), _texts(table)

    def draw(sheet: Sheet) -> None:
        sheet.axes.set_visible(False)
        sheet.paragraph(unit, colour="pale")
        size, high = sheet.size * 0.95, sheet.line * 1.75
        sheet.left = 12 + max((text_width(row, size) for row in rows), default=0)
        needed = 8 + max((text_width(text, size) for line in texts for text in line), default=0)
        sheet.width = max(sheet.form.width, sheet.left + len(columns) * needed + 4)
        wide = min((sheet.width - 4 - sheet.left) / max(len(columns), 1), 110)
        sheet.right = sheet.left + len(columns) * wide
        for r, row in enumerate(rows):
            y = sheet.top + 4 + r * high
            sheet.text(sheet.left - 8, y + high / 2, row, "right", "pale", size=size)
            for c, text in enumerate(texts[r]):
                x, shade = sheet.left + c * wide, shades[r, c]
                if text:
                    sheet.block(x + 1, y + 1, wide - 2, high - 2, "s1" if table[r, c] < 0 else "s0", float(shade))
                    sheet.text(x + wide / 2, y + high / 2, text, "center", size=size)
        middles = [sheet.left + (c + 0.5) * wide for c in range(len(columns))]
        height = 4 + len(rows) * high
        sheet.close(sheet.names_below(columns, middles, wide, sheet.top + height), height)

    return figure(name, title, caption, draw)


def _values(values: Sequence[Value], count: int) -> Floats:
    """[count], NaN for None and for what is not finite."""
    if len(values) != count:
        raise ValueError(f"{len(values)} values where {count} are expected")
    found = np.array([math.nan if v is None else float(v) for v in values])
    return np.where(np.isfinite(found), found, math.nan)


def _line(axes: Any, i: int, x: Sequence[float], one: Series) -> None:
    colour, dashes, marker = look(i)
    y = _values(one.y, len(x))
    if one.low and one.high:
        low, high = _values(one.low, len(x)), _values(one.high, len(x))
        axes.fill_between(x, low, high, color=INK[colour], alpha=0.16, linewidth=0)
    style = {"markersize": 6.5, "markeredgecolor": INK["paper"], "markeredgewidth": 0.7}
    axes.plot(x, y, linestyle=dashes, color=INK[colour], marker=marker, linewidth=1.9, **style)


def _line_sample(sheet: Sheet, i: int, x: float, y: float) -> None:
    colour, dashes, marker = look(i)
    sheet.stroke((x, x + 26), (y, y), color=INK[colour], linestyle=dashes, linewidth=1.9)
    sheet.stroke((x + 13,), (y,), color=INK[colour], marker=marker, markersize=6, linestyle="none")


def _bar_sample(sheet: Sheet, i: int, x: float, y: float) -> None:
    sheet.block(x, y - 6, 12, 12, look(i)[0], _solid(i))


def _solid(i: int) -> float:
    """Opacity of bars: colours come again after eight series, paler."""
    return 1.0 if i < SERIES else 0.4


def _point_sample(sheet: Sheet, i: int, x: float, y: float) -> None:
    colour, _, marker = look(i)
    sheet.stroke((x + 4.5,), (y,), color=INK[colour], marker=marker, markersize=8, linestyle="none")


def _plain_limits(axes: Any, x: Sequence[float]) -> None:
    """The x axis from the first to the last of x, with a little air."""
    low, high = min(x, default=0.0), max(x, default=1.0)
    air = (high - low) * 0.025 or 0.5
    axes.set_xlim(low - air, high + air)


def _whiskers(axes: Any, at: Any, low: Floats, high: Floats, **style: Any) -> None:
    """Vertical lines from low to high where both are known."""
    known = np.isfinite(low) & np.isfinite(high)
    axes.vlines(np.asarray(at)[known], low[known], high[known], **style)


def _marks(sheet: Sheet, marks: Sequence[tuple[float, str]]) -> None:
    """Vertical lines with their labels above the frame, in as many rows as keep them apart."""
    if not marks:
        return
    size = sheet.size * 0.92
    widths = [text_width(text, size) + 10 for _, text in marks]
    middles = [
        min(max(sheet.x_pixel(at), width / 2), sheet.width - width / 2)
        for (at, _), width in zip(marks, widths, strict=True)
    ]
    rows = stagger(middles, widths)
    bottom = sheet.top + 4 + sheet.line * (max(rows) + 1)
    for (at, text), middle, row in zip(marks, middles, rows, strict=True):
        y = bottom - sheet.line * (row + 0.5)
        sheet.text(middle, y, text, "center", "ink", size=size)
        x, style = sheet.x_pixel(at), {"color": INK["pale"], "linewidth": 1.2, "linestyle": (0, (4, 3))}
        sheet.stroke((x, x), (y + sheet.line / 2, bottom + sheet.form.height), zorder=-1, **style)
    sheet.top = bottom


def _names_at_ends(sheet: Sheet, values: Sequence[Floats], names: Sequence[list[str]]) -> None:
    """Each series' name right of the frame, as near as possible to the height where its line ends."""
    ends = [next((v for v in reversed(y) if math.isfinite(v)), math.nan) for y in values]
    bottom = sheet.top + sheet.form.height
    wanted = [bottom if math.isnan(end) else sheet.y_pixel(end) for end in ends]
    heights = [sheet.line * len(name) + 3 for name in names]
    for i, (y, name) in enumerate(zip(spread(wanted, heights, sheet.top, bottom), names, strict=True)):
        _line_sample(sheet, i, sheet.right + 12, y - (len(name) - 1) * sheet.line / 2)
        for n, line in enumerate(name):
            sheet.text(sheet.right + 44, y + (n - (len(name) - 1) / 2) * sheet.line, line)


def _front_labels(sheet: Sheet, front: Sequence[Point], points: Sequence[Point], below: float) -> float:
    """The front's labels, clear of points, of their bounds and of the line that joins the front.

    Where they find no room, numbers instead, with the labels in a list from height `below` on; returns its height.
    """
    taken = _obstacles(sheet, front, points)
    at = [(sheet.x_pixel(p.x), sheet.y_pixel(p.y)) for p in front]
    inside = Box(sheet.left + 2, sheet.top, sheet.width - 2, sheet.top + sheet.form.height - 2)
    texts, size = [p.label for p in front], sheet.size * 0.92
    boxes = place(at, [_extent(text, size) for text in texts], taken, inside)
    crowded = any(box.covered([*taken, *boxes[:i]], inside) > CROWDED for i, box in enumerate(boxes))
    if crowded:
        texts = [str(i + 1) for i in range(len(front))]
        boxes = place(at, [_extent(text, size) for text in texts], taken, inside)
    for (x, y), box, text in zip(at, boxes, texts, strict=True):
        near = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
        if math.dist(near, (x, y)) > 16:
            sheet.stroke((x, near[0]), (y, near[1]), color=INK["pale"], linewidth=0.8, zorder=-1)
        middle = (box.left + box.right) / 2, (box.top + box.bottom) / 2
        sheet.text(*middle, text, "center", size=size, weight="bold" if crowded else "normal")
    if not crowded:
        return 0.0
    number = partial(_number_sample, sheet)
    return sheet.key([p.label for p in front], text_width("99", sheet.size), number, below + 4) - below


def _obstacles(sheet: Sheet, front: Sequence[Point], points: Sequence[Point]) -> list[Box]:
    """What labels should not cover: points, the lines that bound them, the line that joins the front."""
    taken = []
    for p in points:
        x, y = sheet.x_pixel(p.x), sheet.y_pixel(p.y)
        taken.append(Box(x - 5, y - 5, x + 5, y + 5))
        if p.low is not None and p.high is not None:
            taken.append(Box(x - 1, sheet.y_pixel(p.high), x + 1, sheet.y_pixel(p.low)))
    joints = [(sheet.x_pixel(p.x), sheet.y_pixel(p.y)) for p in front]
    for (x0, y0), (x1, y1) in pairwise(joints):
        for t in np.linspace(0, 1, 2 + int(math.dist((x0, y0), (x1, y1)) / 4)).tolist():
            x, y = x0 + t * (x1 - x0), y0 + t * (y1 - y0)
            taken.append(Box(x - 2, y - 2, x + 2, y + 2))
    return taken


def _extent(text: str, size: float) -> tuple[float, float]:
    return text_width(text, size) + 4, size * 1.3


def _number_sample(sheet: Sheet, i: int, x: float, y: float) -> None:
    sheet.text(x + text_width("99", sheet.size), y, str(i + 1), "right", weight="bold")


def _shades(table: Floats) -> Floats:
    """How strong each cell's colour is, so that text is legible on it; by magnitude where values have both signs."""
    finite = table[np.isfinite(table)]
    if not finite.size:
        return np.zeros_like(table)
    strength = np.abs(table)
    low = 0.0 if finite.min() < 0 < finite.max() else float(np.abs(finite).min())
    span = float(np.abs(finite).max()) - low
    return np.asarray(0.05 + 0.55 * (strength - low) / (span or 1))


def _texts(table: Floats) -> list[list[str]]:
    """Every value with as many decimals as tell the values apart; "" where it is not finite."""
    finite = table[np.isfinite(table)]
    span = float(np.ptp(finite)) if finite.size else 0.0
    scale = span or (float(np.abs(finite).max()) if finite.size else 0.0) or 1.0
    decimals = max(0, 2 - math.floor(math.log10(scale)))
    style = f",.{decimals}f" if decimals <= 5 else ".2e"
    return [[f"{v:{style}}".replace("-", MINUS) if math.isfinite(v) else "" for v in row] for row in table.tolist()]
