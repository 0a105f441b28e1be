"""What a report is made of, as data, and the one self-contained HTML file that Jinja makes of it."""

import csv
import io
import json
import math
import re
import resource
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from hashlib import sha256
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from himap_export.engines.extras import how_to_install
from himap_export.engines.files import check_report, write_file
from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.report.theme import COLOURS, chart_config

ADDRESSES = 80 * 10**9  # bytes that the engine of Vega reserves, though it uses few; refused them, it aborts
PNG_WIDTH = 824  # pixels of a chart, before they are doubled
# Draws every chart in place of its PNG, in colours that are the page's variables: they follow light, dark and paper.
DRAW = """
for (const figure of document.querySelectorAll("figure.chart")) {
  const spec = JSON.parse(figure.querySelector("script").text);
  const config = JSON.parse(document.querySelector("#config").text);
  const options = {config, renderer: "svg", actions: false, logLevel: 1, tooltip: {theme: "page"}};
  vegaEmbed(figure.querySelector("div"), spec, options);
}
"""


@dataclass(frozen=True)
class Facts:
    """The headline numbers as cards: (label, big value, small note)."""

    items: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Command:
    """One shell command."""

    line: str


@dataclass(frozen=True)
class Table:
    """Rows as long as `head`, or ValueError; the first column names a row. `strong`: indices of rows to emphasise."""

    name: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    strong: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.head):
                raise ValueError(f"row {i} has {len(row)} cells, the head has {len(self.head)}")


@dataclass(frozen=True)
class Figure:
    """A chart as Vega-Lite's JSON. `name` is its files' stem, `title` says what it shows, `how` how to read it; it
    draws `rows`, whose columns are `head`."""

    name: str
    title: str
    how: str
    spec: dict[str, Any] = field(repr=False)
    head: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    @cached_property
    def png(self) -> bytes:
        """The chart with its title on white paper, at twice its size."""
        spec = self.spec | {"title": self.title, "width": PNG_WIDTH, "padding": 12}
        drawn = _vega().vegalite_to_png(spec, scale=2, config=chart_config(variables=False))
        return png(Image.open(io.BytesIO(drawn)).convert("RGB"), 2 * PNG_WIDTH)


@dataclass(frozen=True)
class Picture:
    """An example image; `name` is its file's stem, `caption` also what is read aloud for it."""

    name: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Example images in a grid that follows the window's width; `wide` ones stand one below the other."""

    pictures: tuple[Picture, ...]
    caption: str = ""
    wide: bool = False


Block = str | Facts | Command | Table | Figure | Gallery  # str: paragraphs, parted by blank lines; `code` in backticks


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
    """Checks that the libraries of reports are there, before any work. HimapError (missing) if one is not."""
    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as missing:
        hint = how_to_install("report")
        raise HimapError(f"a report needs {missing.name}", hint=hint, code=Exit.MISSING) from None


def render(page: Page, data: str = "{}\n") -> str:
    """Returns the whole HTML file; `data`, the text of its report.json, is a link in it.

    Nothing outside the file is referred to, and the page's own policy forbids browsers to load or send anything, and to
    run any script but the one that draws the charts.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    jinja = Environment(
        loader=PackageLoader("himap_export.validate.report"), undefined=StrictUndefined,
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    jinja.filters |= {"prose": _prose, "data_uri": _data_uri, "csv": _csv, "kind": lambda block: type(block).__name__}
    charts = any(isinstance(block, Figure) for section in page.sections for block in section.blocks)
    script, script_hash = _script() if charts else ("", "")
    return jinja.get_template("report.html.j2").render(
        page=page, data=data, colours=COLOURS, config=chart_config(), script=script, script_hash=script_hash
    )


def write_report(folder: Path, page: Page, data: Mapping[str, Any], name: str = "report") -> Path:
    """Writes `name`.html, `name`.json and one PNG for each figure and picture into `folder`; returns the HTML's path.

    Each file appears whole or not at all; other files in the folder stay. NaN and infinity become null in the JSON.
    HimapError (usage) if two figures share a name or one is no file stem, or as `check_report`; HimapError if a file
    cannot be written.
    """
    images: dict[str, Figure | Picture] = {}
    for block in (block for section in page.sections for block in section.blocks):
        for image in block.pictures if isinstance(block, Gallery) else [block] if isinstance(block, Figure) else []:
            if not re.fullmatch(r"\w[\w.-]*", image.name) or f"{image.name}.png" in images:
                details = "figures are files: letters, digits, . _ -, each once"
                raise HimapError(f"a figure cannot be named {image.name!r}", details, code=Exit.USAGE)
            images[f"{image.name}.png"] = image
    check_report(folder, (f"{name}.json", *images, f"{name}.html"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise HimapError(f"cannot write a report to {folder}", problem.strerror or str(problem)) from None
    text = json.dumps(finite(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(folder / f"{name}.json", methodcaller("write", text.encode()))  # first: whatever a chart meets
    for file, image in images.items():
        write_file(folder / file, methodcaller("write", image.png))
    write_file(folder / f"{name}.html", methodcaller("write", render(page, text).encode()))
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
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    small.save(file, format="PNG", optimize=True)
    return file.getvalue()


def _csv(block: Table | Figure) -> str:
    """Returns the rows of a block below their head; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([block.head, *block.rows])
    return text.getvalue()


def _data_uri(content: str | bytes, kind: str) -> str:
    """Returns the content as a link that holds all of it; `kind` is its media type."""
    raw = content.encode() if isinstance(content, str) else content
    return f"data:{kind};base64,{b64encode(raw).decode()}"


def _prose(text: str) -> str:
    """Returns escaped text, with what stood in backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _vega() -> Any:
    """Returns the library that draws and bundles. HimapError (Exit.MISSING) where this process may not reserve the
    addresses that it needs."""
    import vl_convert

    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY and most < ADDRESSES:
        details = f"they need {ADDRESSES // 10**9} GB of addresses, of which few are used; {most / 1e9:.0f} are allowed"
        hint = "lift the limit: ulimit -v unlimited"
        raise HimapError("a report's charts cannot be drawn", details, hint, Exit.MISSING)
    return vl_convert


@cache
def _script() -> tuple[str, str]:
    """Returns Vega, Vega-Lite, Vega-Embed and DRAW as one script, and its sha256, by which the page's policy lets it
    run."""
    from markupsafe import Markup

    script = Markup(_vega().javascript_bundle(DRAW))
    return script, b64encode(sha256(script.encode()).digest()).decode()
