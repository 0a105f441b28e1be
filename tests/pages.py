"""Sample pages and charts of reports, and what a browser would find in one."""

from base64 import b64decode
from html.parser import HTMLParser

from PIL import Image

from himap_export.validate.report.charts import Datum, Point, bars, lines, pareto
from himap_export.validate.report.page import (
    Block,
    Command,
    Facts,
    Figure,
    Gallery,
    Page,
    Picture,
    Section,
    Table,
    png,
)

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Seen(HTMLParser):
    """What a file consists of; fails on a tag that closes none."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
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
        (self.scripts if self.open and self.open[-1] == "script" else self.texts).append(data)

    def values(self, attribute: str) -> list[str]:
        return [text for _, attributes in self.tags if (text := attributes.get(attribute)) is not None]

    def policy(self) -> str:
        found = [a["content"] for _, a in self.tags if a.get("http-equiv") == "Content-Security-Policy"]
        assert len(found) == 1 and found[0]
        return found[0]


HIMAP = [Datum("HiMAP", 1, 0.5, 0.4, 0.6), Datum("HiMAP", 2, 0.75, 0.6, 0.9), Datum("HiMAP", 3, 1.0, 0.9, 1.0)]


DATA = [*HIMAP, Datum("random <1> & more", 1, 0.25), Datum("random <1> & more", 2, None)]


POINTS = [Point("himap", 0.3, 70, 68, 72, "k1=2 r=0.5", True), Point("himap", 0.5, 80, None, None, "k1=4 r=0.5", True)]


POINTS += [Point("random", 0.6, 60, 55, 65, "chance", False)]


def line_plot(name: str = "flow", title: str = "Accuracy rises.") -> Figure:
    return lines(name, title, "up is better.", DATA, "decoder layer", "right answers, %")


def bar_plot() -> Figure:
    return bars("budgets", "Bars.", "tall is better.", DATA, "tokens", "right answers, %")


def pareto_plot() -> Figure:
    return pareto("front", "The front.", "left is better.", POINTS, "FLOPs, share", "right answers, %")


def picture(name: str = "example", caption: str = "What colour?") -> Picture:
    return Picture(name, png(Image.new("RGB", (8, 8), "red")), caption)


def page(*blocks: Block, title: str = "A report") -> Page:
    return Page(title, "of tests", (Section("Found", blocks),))


def whole_page() -> Page:
    table = Table("policies", ("policy", "right"), (("HiMAP", "78 %"), ("random", "82 %")), "Both.", strong=(1,))
    blocks = (line_plot(), bar_plot(), pareto_plot(), table, Gallery((picture(),), "Six of them."))
    words = (Facts((("speed-up", "1.92x", "of 2.01x"),)), "One.\n\nTwo `code`.", Command("himap-run a --b 'c'"))
    return Page("A report", "of tests", tuple(Section(f"Part {n}", b) for n, b in enumerate((words, blocks, (), ()))))


def linked(seen: Seen) -> dict[str, str]:
    """What the links hold, by the name that they are saved under."""
    return {
        a["download"] or "": b64decode((a["href"] or "").partition(";base64,")[2]).decode()
        for tag, a in seen.tags
        if tag == "a" and "download" in a
    }
