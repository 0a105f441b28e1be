"""What a report is made of, as data, and the one self-contained HTML file it becomes."""

import html
import json
import math
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any, assert_never

import numpy as np

from himap_export.engines.files import check_report, write_file
from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.html.theme import CSS

CONTENTS = 3  # a page with more sections than this has a table of contents


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by blank lines; `code` in backticks."""

    text: str


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
    """Rows as long as `head`; the first column names a row. `strong`: indices of the rows to emphasise."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    strong: tuple[int, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A plot. `name` is its file's stem, `title` a sentence that says what it shows, `svg` markup for a page."""

    name: str
    title: str
    svg: str
    png: bytes
    caption: str = ""


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
    footer: str = ""


def render(page: Page) -> str:
    """The whole HTML file: no script, no link to anything outside; its own policy forbids browsers to load any."""
    title, subtitle = html.escape(page.title), _prose(page.subtitle)
    contents = _contents(page.sections) if len(page.sections) > CONTENTS else ""
    sections = "\n".join(_section(n, section) for n, section in enumerate(page.sections, 1))
    footer = f"<footer><p>{_prose(page.footer)}</p></footer>\n" if page.footer else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="subtitle">{subtitle}</p>
</header>
{contents}<main>
{sections}
</main>
{footer}</body>
</html>
"""


def write_report(folder: Path, page: Page, data: Mapping[str, Any], name: str = "report") -> Path:
    """Writes `name`.html, `name`.json and one PNG for each figure and picture into `folder`; returns the HTML's path.

    Each file appears whole or not at all; other files in the folder stay. NaN and infinity become null in the JSON.
    HimapError (usage) if two figures share a name or one is no file stem, or as `check_report`; HimapError if a file
    cannot be written.
    """
    images = _images(page)
    text = json.dumps(finite(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    files = {f"{name}.json": text.encode(), **images, f"{name}.html": render(page).encode()}
    check_report(folder, tuple(files))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise HimapError(f"cannot write a report to {folder}", problem.strerror or str(problem)) from None
    for file, content in files.items():
        write_file(folder / file, methodcaller("write", content))
    return folder / f"{name}.html"


def finite(value: Any) -> Any:
    """The same value as JSON can hold it: None for NaN and infinity, lists for tuples and NumPy arrays."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _images(page: Page) -> dict[str, bytes]:
    """File name -> PNG of every figure and picture of the page."""
    blocks = [block for section in page.sections for block in section.blocks]
    shown: list[Figure | Picture] = [block for block in blocks if isinstance(block, Figure)]
    shown += [picture for block in blocks if isinstance(block, Gallery) for picture in block.pictures]
    images: dict[str, bytes] = {}
    for image in shown:
        if not re.fullmatch(r"\w[\w.-]*", image.name):
            raise HimapError(
                f"figure name {image.name!r} is no file stem", hint="letters, digits, . _ -", code=Exit.USAGE
            )
        if f"{image.name}.png" in images:
            raise HimapError(f"two figures are named {image.name!r}", hint="each is a file of its own", code=Exit.USAGE)
        images[f"{image.name}.png"] = image.png
    return images


def _contents(sections: tuple[Section, ...]) -> str:
    links = [f'<li><a href="#section-{n}">{html.escape(s.title)}</a></li>' for n, s in enumerate(sections, 1)]
    return "\n".join(['<nav aria-label="Contents"><ol>', *links, "</ol></nav>", ""])


def _section(n: int, section: Section) -> str:
    head = (
        f'<section id="section-{n}" aria-labelledby="title-{n}">\n<h2 id="title-{n}">{html.escape(section.title)}</h2>'
    )
    return "\n".join([head, *map(_block, section.blocks), "</section>"])


def _block(block: Block) -> str:
    match block:
        case Text():
            return "\n".join(f"<p>{_prose(part)}</p>" for part in re.split(r"\n\s*\n", block.text.strip()))
        case Command():
            words = " ".join(f"<span>{html.escape(word)}</span>" for word in block.line.split(" "))
            return f"<pre><code>{words}</code></pre>"
        case Facts():
            return _facts(block)
        case Table():
            return _table(block)
        case Figure():
            return _figure(block)
        case Gallery():
            return _gallery(block)
        case _:
            assert_never(block)


def _facts(facts: Facts) -> str:
    cards = [
        f'<div><dt>{html.escape(label)}</dt><dd class="value">{html.escape(value)}</dd>'
        f'<dd class="small">{_prose(note)}</dd></div>'
        for label, value, note in facts.items
    ]
    return "\n".join(['<dl class="facts">', *cards, "</dl>"])


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.head)
    rows = []
    for i, row in enumerate(table.rows):
        if len(row) != len(table.head):
            raise ValueError(f"row {i} has {len(row)} cells, the head has {len(table.head)}")
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        strong = ' class="strong"' if i in table.strong else ""
        rows.append(f'<tr{strong}><th scope="row">{html.escape(row[0])}</th>{cells}</tr>')
    name = html.escape(table.caption or ", ".join(table.head))
    lines = [f'<div class="table"><div class="scroll" role="region" tabindex="0" aria-label="{name}"><table>']
    return "\n".join(
        [
            *lines,
            f"<thead><tr>{head}</tr></thead>",
            "<tbody>",
            *rows,
            f"</tbody></table></div>{_note(table.caption)}</div>",
        ]
    )


def _figure(figure: Figure) -> str:
    return (
        f'<figure id="figure-{html.escape(figure.name)}"><figcaption>{html.escape(figure.title)}</figcaption>\n'
        f'<div class="plot">{figure.svg}</div>{_note(figure.caption)}</figure>'
    )


def _gallery(gallery: Gallery) -> str:
    items = [
        f'<li><img alt="{html.escape(p.caption)}" src="data:image/png;base64,{b64encode(p.png).decode()}">'
        f"<p>{_prose(p.caption)}</p></li>"
        for p in gallery.pictures
    ]
    kind = "gallery wide" if gallery.wide else "gallery"
    return "\n".join([f'<figure class="{kind}"><ul>', *items, f"</ul>{_note(gallery.caption)}</figure>"])


def _note(caption: str) -> str:
    return f'<p class="note">{_prose(caption)}</p>' if caption else ""


def _prose(text: str) -> str:
    """Escaped text, with what stood in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
