"""What a report is made of, as data, and the one self-contained HTML file that Jinja makes of it."""

import csv
import io
import json
import math
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from hashlib import sha256
from importlib.util import find_spec
from operator import methodcaller
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from himap_export.engines.files import check_report, write_file
from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.report.theme import COLOURS, chart_config

LIBRARIES = ("altair", "jinja2", "vl_convert")
PRINT_WIDTH = 824  # pixels of a PNG, before that is doubled
# Draws every chart in place of its PNG, in colours that are the page's variables: they follow light, dark and paper.
DRAW = """
for (const figure of document.querySelectorAll("figure.chart")) {
  const spec = JSON.parse(figure.querySelector("script").text);
  const config = JSON.parse(document.querySelector("#config").text);
  vegaEmbed(figure.querySelector("div"), spec, {config, renderer: "svg", actions: false, tooltip: {theme: "page"}});
}
"""


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by blank lines; `code` in backticks."""

    kind: ClassVar = "text"
    text: str


@dataclass(frozen=True)
class Facts:
    """The headline numbers as cards: (label, big value, small note)."""

    kind: ClassVar = "facts"
    items: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Command:
    """One shell command."""

    kind: ClassVar = "command"
    line: str


@dataclass(frozen=True)
class Table:
    """Rows as long as `head`; the first column names a row. `strong`: indices of the rows to emphasise.

    ValueError if a row has another length.
    """

    kind: ClassVar = "table"
    name: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    strong: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.head):
                raise ValueError(f"row {i} has {len(row)} cells, the head has {len(self.head)}")

    @property
    def csv(self) -> str:
        return as_csv([self.head, *self.rows])


@dataclass(frozen=True)
class Figure:
    """A chart as Vega-Lite's JSON. `name` is its files' stem, `title` says what it shows, `how` how to read it; `data`
    are the rows that it draws, named by `head`."""

    kind: ClassVar = "figure"
    name: str
    title: str
    how: str
    spec: dict[str, Any] = field(repr=False)
    head: tuple[str, ...]
    data: tuple[tuple[Any, ...], ...]

    @property
    def csv(self) -> str:
        return as_csv([self.head, *self.data])

    @cached_property
    def png(self) -> bytes:
        """The chart with its title on white paper, at twice its size."""
        import vl_convert

        fit = {"type": "fit-x", "contains": "padding"}
        spec = self.spec | {"title": self.title, "width": PRINT_WIDTH, "padding": 12, "autosize": fit}
        drawn = vl_convert.vegalite_to_png(spec, scale=2, config=chart_config(variables=False))
        return png(Image.open(io.BytesIO(drawn)).convert("RGB"), 2 * PRINT_WIDTH)


@dataclass(frozen=True)
class Picture:
    """An example image; `name` is its file's stem, `caption` also what is read aloud for it."""

    name: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Example images in a grid that follows the window's width; `wide` ones stand one below the other."""

    kind: ClassVar = "gallery"
    pictures: tuple[Picture, ...]
    caption: str = ""
    wide: bool = False


Block = Text | Facts | Command | Table | Figure | Gallery


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    sections: tuple[Section, ...]


def check_libraries() -> None:
    """HimapError (Exit.MISSING) if a library that reports need is not installed. Called before any work; loads none."""
    for name in LIBRARIES:
        try:
            missing = find_spec(name) is None
        except ImportError:
            missing = True
        if missing:
            hint = "pip install 'himap-export[report]'"
            raise HimapError(f"a report needs {name}", hint=hint, code=Exit.MISSING)


def render(page: Page, data: str = "{}\n") -> str:
    """Returns the whole HTML file; `data`, the text of its report.json, is a link in it.

    Nothing outside the file is referred to, and the page's own policy forbids browsers to load or send anything, and to
    run any script but the one that draws the charts.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    charts = any(block.kind == "figure" for section in page.sections for block in section.blocks)
    script = _script() if charts else ""
    loader = PackageLoader("himap_export.validate.report")
    jinja = Environment(autoescape=True, loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    jinja.filters |= {"prose": _prose, "data_uri": data_uri}
    hash_of_script = b64encode(sha256(script.encode()).digest()).decode()
    return jinja.get_template("report.html.j2").render(
        page=page, data=data, colours=COLOURS, config=chart_config(), script=script, hash_of_script=hash_of_script
    )


def write_report(folder: Path, page: Page, data: Mapping[str, Any], name: str = "report") -> Path:
    """Writes `name`.html, `name`.json and one PNG for each figure and picture into `folder`; returns the HTML's path.

    Each file appears whole or not at all; other files in the folder stay. NaN and infinity become null in the JSON.
    HimapError (usage) if two figures share a name or one is no file stem, or as `check_report`; HimapError if a file
    cannot be written.
    """
    images = _images(page)
    text = json.dumps(finite(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    check_report(folder, (f"{name}.json", *images, f"{name}.html"))
    files = {f"{name}.json": text.encode(), **{file: image.png for file, image in images.items()}}
    files[f"{name}.html"] = render(page, text).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise HimapError(f"cannot write a report to {folder}", problem.strerror or str(problem)) from None
    for file, content in files.items():
        write_file(folder / file, methodcaller("write", content))
    return folder / f"{name}.html"


def finite(value: Any) -> Any:
    """Returns the same value as JSON can hold it: None for NaN and infinity, lists for tuples and NumPy arrays."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def png(image: Image.Image, max_side: int = 640) -> bytes:
    """Returns the image as PNG, shrunk so that no side is longer than `max_side` pixels."""
    small = image.copy()
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, format="PNG", optimize=True)
    return file.getvalue()


def as_csv(rows: Sequence[Sequence[Any]]) -> str:
    """Returns the rows as CSV; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def data_uri(content: str | bytes, kind: str) -> str:
    """Returns the content as a link that holds all of it; `kind` is its media type."""
    raw = content.encode() if isinstance(content, str) else content
    return f"data:{kind};base64,{b64encode(raw).decode()}"


def _images(page: Page) -> dict[str, Figure | Picture]:
    """Returns every figure and picture of the page by the name of its PNG."""
    blocks = [block for section in page.sections for block in section.blocks]
    shown: list[Figure | Picture] = [block for block in blocks if isinstance(block, Figure)]
    shown += [picture for block in blocks if isinstance(block, Gallery) for picture in block.pictures]
    images: dict[str, Figure | Picture] = {}
    for image in shown:
        if not re.fullmatch(r"\w[\w.-]*", image.name):
            hint = "letters, digits, . _ -"
            raise HimapError(f"figure name {image.name!r} is no file stem", hint=hint, code=Exit.USAGE)
        if f"{image.name}.png" in images:
            raise HimapError(f"two figures are named {image.name!r}", hint="each is a file of its own", code=Exit.USAGE)
        images[f"{image.name}.png"] = image
    return images


def _prose(text: str) -> str:
    """Returns escaped text, with what stood in backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


@cache
def _script() -> str:
    """Returns Vega, Vega-Lite, Vega-Embed and the lines that draw this page's charts, as one script."""
    import vl_convert
    from markupsafe import Markup

    return Markup(vl_convert.javascript_bundle(DRAW))
