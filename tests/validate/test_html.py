"""The report's page judged as a browser and a reader would: by its tags, its texts, its identifiers, its files."""

import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from commands import Workshop, blocked_python
from PIL import Image

from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.html.images import png
from himap_export.validate.html.page import (
    Command,
    Facts,
    Figure,
    Gallery,
    Page,
    Picture,
    Section,
    Table,
    Text,
    render,
    write_report,
)
from himap_export.validate.html.plots import Point, Series, bars, heat, lines, pareto
from himap_export.validate.html.theme import COLOURS

VOID = {"meta", "img", "br", "hr", "link", "input"}
HIMAP = Series("HiMAP", (0.5, 0.75, 1.0), (0.4, 0.6, 0.9), (0.6, 0.9, 1.0))
RANDOM = Series("random <1> & more", (0.25, 0.5, 0.5))
POINTS = [Point("k1=2 r=0.5", 0.3, 70, 68, 72, "himap", True), Point("k1=4 r=0.5", 0.5, 80, None, None, "himap", True)]
POINTS += [Point("chance", 0.6, 60, 55, 65, "random", False)]


class Seen(HTMLParser):
    """What a file consists of; fails on a tag that closes none."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, attribute: str) -> list[str]:
        return [text for _, attributes in self.tags if (text := attributes.get(attribute)) is not None]


def line_plot(
    name: str = "flow", title: str = "Accuracy rises.", series: tuple[Series, ...] = (HIMAP, RANDOM)
) -> Figure:
    return lines(name, title, (1, 2, 3), series, "decoder layer", "right answers, %", marks=[(2, "cut K1")])


def bar_plot() -> Figure:
    return bars("budgets", "Bars.", ["8 tokens", "16 tokens", "64 tokens"], [HIMAP, RANDOM], "right answers, %")


def pareto_plot() -> Figure:
    return pareto("front", "The front.", POINTS, "FLOPs, share", "right answers, %")


def heat_plot() -> Figure:
    return heat(
        "grid", "A grid.", [[60.0, 71.5], [math.nan, 93.25]], ["R1 0.5", "R1 0.7"], ["R2 0.1", "R2 0.2"], "right, %"
    )


def picture(name: str = "example", caption: str = "What colour?") -> Picture:
    return Picture(name, png(Image.new("RGB", (8, 8), "red")), caption)


def page(*blocks: Text | Facts | Command | Table | Figure | Gallery, title: str = "A report") -> Page:
    return Page(title, "of tests", (Section("Found", blocks),), "made by a test")


def whole_page() -> Page:
    table = Table(("policy", "right"), (("HiMAP", "78 %"), ("random", "82 %")), "Both.", strong=(1,))
    blocks = (line_plot(), bar_plot(), pareto_plot(), heat_plot(), table, Gallery((picture(),), "Six of them."))
    words = (Facts((("speed-up", "1.92x", "of 2.01x"),)), Text("One.\n\nTwo `code`."), Command("himap-run a --b 'c'"))
    return Page(
        "A report", "of tests", tuple(Section(f"Part {n}", b) for n, b in enumerate((words, blocks, (), ()))), "end"
    )


def test_tags_balance_and_nothing_is_left_out() -> None:
    seen = Seen(render(whole_page()))
    text = " ".join(" ".join(seen.texts).split())
    for words in (
        "A report",
        "of tests",
        "Part 3",
        "1.92x",
        "of 2.01x",
        "One.",
        "code",
        "78 %",
        "Both.",
        "Six of them.",
        "end",
    ):
        assert words in text
    assert "himap-run a --b 'c'" in text  # as it is copied
    tags = [tag for tag, _ in seen.tags]
    assert tags.count("h1") == 1 and tags.count("h2") == 4 and tags.count("p") > 3 and tags.count("code") == 2
    assert tags.count("svg") == 8  # each plot for wide and for narrow windows
    assert ("tr", {"class": "strong"}) in seen.tags


def test_contents_lead_to_every_section_of_a_long_page() -> None:
    seen = Seen(render(whole_page()))
    targets = [link[1:] for tag, a in seen.tags if tag == "a" and (link := a["href"])]
    assert len(targets) == 4 and set(targets) <= set(seen.values("id"))
    short = whole_page()
    assert "nav" not in [tag for tag, _ in Seen(render(replace(short, sections=short.sections[:3]))).tags]


def test_nothing_outside_the_file_is_referred_to() -> None:
    text = render(whole_page())
    seen = Seen(text)
    links = [*seen.values("href"), *seen.values("src"), *seen.values("xlink:href")]
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not {"link", "script", "iframe", "object"} & {tag for tag, _ in seen.tags}
    assert "http" not in text.replace("http-equiv", "") and "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_what_users_write_is_text_not_markup() -> None:
    nasty = "<script>alert(\"1\")</script> & 'so' `<b>`"
    figure = replace(line_plot(title=nasty), caption=nasty)
    pictures = Gallery((picture(caption=nasty),), nasty)
    blocks = (
        Text(nasty),
        Facts(((nasty, nasty, nasty),)),
        Command(nasty),
        Table((nasty,), ((nasty,),), nasty),
        figure,
        pictures,
    )
    seen = Seen(render(Page(nasty, nasty, (Section(nasty, blocks),) * 4, nasty)))
    assert not {"script", "b"} & {tag for tag, _ in seen.tags}
    assert nasty in seen.values("alt") and nasty in seen.values("aria-label")
    assert sum("<script>alert" in text for text in seen.texts) > 20


def test_every_image_is_described() -> None:
    seen = Seen(render(whole_page()))
    for tag, attributes in seen.tags:
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-label"]
        if tag == "img":
            assert attributes["alt"] == "What colour?"


def test_identifiers_are_unique_in_a_page_of_equal_plots() -> None:
    twice = page(line_plot("one"), line_plot("two"), bar_plot(), pareto_plot())
    seen = Seen(render(twice))
    identifiers = seen.values("id")
    assert len(identifiers) == len(set(identifiers)) > 10
    used = [target for text in seen.values("clip-path") for target in re.findall(r"url\(#(.*)\)", text)]
    used += [link[1:] for link in seen.values("href")]
    assert used and set(used) <= set(identifiers)
    first, second = (set(Seen(line_plot(name).svg).values("id")) for name in ("one", "two"))
    assert first and not first & second


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (line_plot, ("HiMAP", "random <1> & more", "decoder layer", "right answers, %", "cut K1")),
        (bar_plot, ("HiMAP", "random <1> & more", "right answers, %", "8 tokens", "16 tokens", "64 tokens")),
        (pareto_plot, ("himap", "random", "FLOPs, share", "right answers, %", "k1=2 r=0.5", "k1=4 r=0.5")),
        (heat_plot, ("R1 0.5", "R1 0.7", "R2 0.1", "R2 0.2", "right, %", "60.0", "71.5", "93.2")),
    ],
)
def test_plots_say_what_they_show(draw: Callable[[], Figure], words: tuple[str, ...]) -> None:
    figure = draw()
    for part in figure.svg.split("</svg>\n"):  # for wide windows and for narrow ones
        seen = Seen(part if part.endswith("</svg>") else f"{part}</svg>")
        assert figure.title in seen.values("aria-label")
        assert {*words} <= set(seen.texts)
    assert figure == draw()  # the same bytes
    with Image.open(io.BytesIO(figure.png)) as image:
        assert image.width == 2 * 824 and image.convert("RGB").getpixel((image.width - 1, 0)) == (255, 255, 255)


def test_plots_take_the_pages_colours_and_font() -> None:
    """Every colour is a variable, with its value on white where no page sets it; the page sets each for both papers."""
    for figure in (line_plot(), bar_plot(), pareto_plot(), heat_plot()):
        styles = ";".join(Seen(figure.svg).values("style"))
        used = re.findall(r"var\(--(\w+),(#[0-9a-f]{6})\)", styles)
        assert used and all(COLOURS[role][0] == hue for role, hue in used)
        assert re.search(r"(?<!,)#[0-9a-f]{3}", re.sub(r"url\(#[^)]*\)", "", styles)) is None
        assert "DejaVu" not in figure.svg and "currentcolor" not in figure.svg.lower()
    css = render(page(Text("")))
    for role, hues in COLOURS.items():
        assert [f"--{role}:{hue};" in css for hue in hues] == [True, True]
    assert "prefers-color-scheme:dark" in css


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


def strokes(svg: str) -> list[str]:
    """The drawn lines of the first series, as path data."""
    return [
        a["d"] or "" for tag, a in Seen(svg).tags if tag == "path" and "--s0" in (a.get("style") or "") and "d" in a
    ]


def test_a_missing_value_is_a_gap() -> None:
    whole = lines("a", "T", range(5), [Series("one", (1, 2, 3, 4, 5))], "x", "y")
    gap = lines("a", "T", range(5), [Series("one", (1, 2, None, 4, 5))], "x", "y")
    nan = lines("a", "T", range(5), [Series("one", (1, 2, math.inf, 4, 5))], "x", "y")
    assert max(path.count("L") for path in strokes(whole.svg)) == 4
    broken = [path for path in strokes(gap.svg) if path.count("M") == 2 and path.count("L") == 2]
    assert len(broken) == 2  # one for each form
    assert nan == gap


def test_bounds_are_drawn() -> None:
    without = replace(HIMAP, low=(), high=())
    assert "fill-opacity" in line_plot(series=(HIMAP,)).svg
    assert "fill-opacity" not in line_plot(series=(without,)).svg
    bounded, bare = (bars("b", "T", ["1", "2", "3"], [one], "y") for one in (HIMAP, without))
    assert bounded.svg != bare.svg and bounded.png != bare.png


def test_wrong_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="3 values where 2 are expected"):
        lines("a", "T", (1, 2), [HIMAP], "x", "y")
    with pytest.raises(ValueError, match="2 rows and 1 columns"):
        heat("a", "T", np.zeros((2, 2)), ["a", "b"], ["c"], "%")
    with pytest.raises(ValueError, match="row 0 has 1 cells, the head has 2"):
        render(page(Table(("a", "b"), (("c",),))))


def test_a_crowded_front_is_numbered_and_listed() -> None:
    """No label may cover another: where names find no room, numbers stand for them."""
    crowd = [
        Point(f"a plan with a long name {i}", 0.5 + i / 1000, 70 + i / 10, None, None, "g", True) for i in range(30)
    ]
    texts = set(Seen(pareto("p", "T", crowd, "x", "y").svg).texts)
    assert {str(i + 1) for i in range(30)} | {point.label for point in crowd} <= texts
    assert "1" not in Seen(pareto_plot().svg).texts


def test_pareto_turns_its_x_axis_around() -> None:
    def where(svg: str, text: str) -> float:
        found = re.search(rf'<text [^>]*\bx="([0-9.]+)"[^>]*>{re.escape(text)}</text>', svg)
        assert found
        return float(found[1])

    plain = pareto("p", "T", POINTS, "x", "y").svg
    turned = pareto("p", "T", POINTS, "x", "y", x_reversed=True).svg
    assert where(plain, "0.3") < where(plain, "0.5") and where(turned, "0.3") > where(turned, "0.5")


def test_negative_cells_have_another_colour() -> None:
    styles = Seen(heat("h", "T", [[-2.0, 1.0, math.nan]], ["r"], ["a", "b", "c"], "points").svg).values("style")
    assert sum("--s1" in style for style in styles) == 2 and sum("--s0" in style for style in styles) == 2


def test_a_heat_map_of_many_columns_is_scrolled_not_shrunk() -> None:
    """Its cells' text would be too small to read; the plots that fit follow the window."""
    columns = [str(i) for i in range(40)]
    for svg in Seen(heat("h", "T", np.arange(40.0)[None] / 40, ["r"], columns, "share").svg).tags:
        if svg[0] == "svg":
            assert svg[1]["style"] == f"min-width:{svg[1]['width']}px" and float(svg[1]["width"] or 0) > 1000
    assert "min-width" not in line_plot().svg + heat_plot().svg


def test_report_is_written_with_its_parts(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    data = {
        "a": math.nan,
        "b": [1.5, -math.inf, (2, None)],
        "c": {"d": np.float32(np.nan), "e": np.array([1, 2])},
        "f": "é",
    }
    file = write_report(folder, whole_page(), data)
    assert file == folder / "report.html" and file.read_text() == render(whole_page())
    expected = {"a": None, "b": [1.5, None, [2, None]], "c": {"d": None, "e": [1, 2]}, "f": "é"}
    text = (folder / "report.json").read_text()
    assert json.loads(text) == expected and text.startswith('{\n "a": null,')
    assert (folder / "flow.png").read_bytes() == line_plot().png
    names = {"flow.png", "budgets.png", "front.png", "grid.png", "example.png", "report.html", "report.json"}
    assert {path.name for path in folder.iterdir()} == names


def test_report_overwrites_its_own_files_only(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "flow.png").write_text("old")
    write_report(tmp_path, page(line_plot()), {}, "first")
    write_report(tmp_path, page(Text("again")), {}, "first")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "flow.png").read_bytes() == line_plot().png
    assert "again" in (tmp_path / "first.html").read_text()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("flow", "flow"), "two figures are named 'flow'"),
        (("../flow", "other"), "figure name '../flow' is no file stem"),
        (("", "other"), "figure name '' is no file stem"),
    ],
)
def test_names_that_are_no_files_of_their_own_are_refused(tmp_path: Path, names: tuple[str, str], words: str) -> None:
    figure = replace(line_plot(), name=names[0])
    with pytest.raises(HimapError, match=re.escape(words)) as refused:
        write_report(tmp_path / "r", page(figure, Gallery((picture(names[1]),))), {})
    assert refused.value.code is Exit.USAGE and not (tmp_path / "r").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(HimapError, match="cannot write to") as refused:
        write_report(tmp_path / "taken", page(Text("x")), {})
    assert refused.value.code is Exit.USAGE


def test_a_report_goes_into_no_bundle_and_over_no_link(work: Workshop, tmp_path: Path) -> None:
    bundle, mine = work.bundle("golden"), tmp_path / "mine"
    before = sorted(bundle.rglob("*"))
    for folder in (bundle, bundle / "weights", bundle / "new" / "report"):
        with pytest.raises(HimapError, match="is a bundle"):
            write_report(folder, page(Text("x")), {})
    assert sorted(bundle.rglob("*")) == before
    mine.write_text("mine")
    (tmp_path / "flow.png").symlink_to(mine)
    with pytest.raises(HimapError, match=r"flow\.png is there and is not a plain file"):
        write_report(tmp_path, page(line_plot()), {})
    assert mine.read_text() == "mine" and not (tmp_path / "report.html").exists()


def test_without_matplotlib_the_hint_says_what_to_install() -> None:
    code = """
from himap_export.graphs.errors import HimapError
from himap_export.validate.html import page, plots
print("<h1>" in page.render(page.Page("t", "s", ())))
try:
    plots.bars("a", "t", ["g"], [plots.Series("s", (1.0,))], "y")
except HimapError as problem:
    print(problem, int(problem.code))
"""
    done = blocked_python(code, ["matplotlib"])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\na report's plots need matplotlib (pip install 'himap-export[report]') 4\n"
