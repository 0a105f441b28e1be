"""The charts of reports: what they say, to whom, and in which colours."""

import csv
import io
import json
import math
import re
from dataclasses import replace

import pytest
from pages import HIMAP, Seen, bar_plot, line_plot, linked, page, pareto_plot, whole_page
from PIL import Image

from himap_export.validate.report.charts import Datum, Point, bars, lines, pareto
from himap_export.validate.report.page import (
    Figure,
    render,
)
from himap_export.validate.report.theme import COLOURS


def channels(figure: Figure, mark: str) -> dict[str, dict[str, object]]:
    """The encoding of the figure's layer of this mark."""
    (layer,) = [layer for layer in figure.spec["layer"] if layer["mark"]["type"] == mark]
    found: dict[str, dict[str, object]] = layer["encoding"]
    return found


@pytest.mark.parametrize(
    ("figure", "mark", "words"),
    [
        (line_plot(), "point", ("HiMAP", "random <1> & more", "decoder layer", "right answers, %")),
        (bar_plot(), "bar", ("HiMAP", "random <1> & more", "right answers, %", "tokens")),
        (pareto_plot(), "point", ("himap", "random", "FLOPs, share", "right answers, %", "k1=2 r=0.5", "k1=4 r=0.5")),
    ],
)
def test_plots_say_what_they_show(figure: Figure, mark: str, words: tuple[str, ...]) -> None:
    """In the chart, under the pointer and as CSV; and as a PNG of the same bytes each time."""
    told = json.dumps(figure.spec)
    for word in words:
        assert json.dumps(word)[1:-1] in told
    tooltip = channels(figure, mark)["tooltip"]
    assert [t["field"] for t in tooltip][1:] == ["x", "y", "low", "high"]  # type: ignore[index]
    seen = linked(Seen(render(page(figure))))
    rows = list(csv.reader(seen[f"{figure.name}.csv"].splitlines()))
    assert rows == [["" if v is None else str(v) for v in row] for row in (figure.head, *figure.rows)]
    assert "right answers, %" in figure.head and figure.png == replace(figure).png
    with Image.open(io.BytesIO(figure.png)) as image:
        assert image.width == 2 * 824 and image.convert("RGB").getpixel((image.width - 1, 0)) == (255, 255, 255)


def test_plots_take_the_pages_colours_and_font() -> None:
    """No chart names a colour: those of the configuration are variables, which the page sets for both papers."""
    for figure in (line_plot(), bar_plot(), pareto_plot()):
        assert re.search(r"#[0-9a-f]{3}", json.dumps(figure.spec)) is None
    text = render(whole_page())
    (config,) = [json.loads(s) for s in Seen(text).scripts if s.startswith("{") and '"$schema"' not in s]
    used = re.findall(r"var\(--(\w+)\)", json.dumps(config))
    assert {"ink", "pale", "line", *(f"s{n}" for n in range(8))} <= set(used) <= set(COLOURS)
    assert "#" not in json.dumps(config)
    for role, hues in COLOURS.items():
        assert [f"--{role}: {hue};" in text for hue in hues] == [True, True]
    assert "prefers-color-scheme: dark" in text


def luminance(hue: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(hue[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("paper", [0, 1])
@pytest.mark.parametrize(
    ("role", "ratio"), [("ink", 7), ("pale", 4.5), ("link", 4.5), *((f"s{i}", 3) for i in range(8))]
)
def test_contrast_on_both_papers(role: str, ratio: float, paper: int) -> None:
    """WCAG 2.2: 4.5 for text, 3 for what a plot draws."""
    for ground in ("paper", "wash"):
        dark, light = sorted((luminance(COLOURS[role][paper]), luminance(COLOURS[ground][paper])))
        assert (light + 0.05) / (dark + 0.05) >= ratio


def drawn(figure: Figure) -> str:
    import vl_convert

    return str(vl_convert.vegalite_to_svg(figure.spec | {"width": 400}))


def strokes(figure: Figure) -> list[str]:
    """The lines that are drawn of the series, as path data."""
    described = [
        a for tag, a in Seen(drawn(figure)).tags if tag == "path" and a.get("aria-roledescription") == "line mark"
    ]
    return [a.get("d") or "" for a in described]


def test_a_missing_value_is_a_gap() -> None:
    def of(*ys: float | None) -> Figure:
        return lines("a", "T", "", [Datum("one", x, y) for x, y in enumerate(ys)], "x", "y")

    whole, gap, infinite = of(1, 2, 3, 4, 5), of(1, 2, None, 4, 5), of(1, 2, math.inf, 4, 5)
    assert max(path.count("L") for path in strokes(whole)) == 4
    assert [path.count("M") for path in strokes(gap) if path.count("L") == 2] == [2]
    assert infinite == gap and infinite.png == gap.png


def test_bounds_are_drawn() -> None:
    bare = [replace(d, low=None, high=None) for d in HIMAP]
    for draw in (lines, bars):
        with_bounds, without = (draw("b", "T", "", data, "x", "y") for data in (HIMAP, bare))
        assert drawn(with_bounds) != drawn(without) and with_bounds.png != without.png


def test_a_front_is_numbered_and_listed() -> None:
    """However crowded it is: numbers stand for names, which the legend lists in the front's order."""
    crowd = [
        Point("g", 0.5 + i / 1000, 70 + i / 10, None, None, f"a plan with a long name {i}", True) for i in range(30)
    ]
    seen = Seen(drawn(pareto("p", "T", "", crowd[::-1], "x", "y")))
    assert {str(i + 1) for i in range(30)} | {f"{i + 1}  {p.label}" for i, p in enumerate(crowd)} <= set(seen.texts)
    assert "3" not in {t.split(" ")[0] for t in Seen(drawn(pareto_plot())).texts}


def test_no_two_series_look_alike() -> None:
    """For every kind of colour vision: what has the same of 8 colours has other dashes, or another opacity."""
    data = [Datum(f"series {n}", x, n + x) for n in range(24) for x in range(2)]
    for draw, mark, channel in ((lines, "line", "strokeDash"), (bars, "bar", "opacity")):
        scale = channels(draw("n", "T", "", data, "x", "y"), mark)[channel]["scale"]
        assert isinstance(scale, dict)
        looks = {(n % 8, str(look)) for n, look in enumerate(scale["range"])}
        assert len(scale["domain"]) == len(scale["range"]) == len(looks) == 24
