"""One drawing of a plot, placed by the pixel: keys and labels, a frame below them; and the figure made of three.

One function draws a figure three times: wide and narrow for the page, which shows the one that fits the window, so that
text is never scaled below legibility, and once with its title, for the PNG. Matplotlib measures text in its own, wider
font, so what does not overlap there does not overlap in the page's.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, degrees, pi, radians, sin
from typing import Any

from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.html.page import Figure
from himap_export.validate.html.svg import themed
from himap_export.validate.html.theme import COLOURS, SERIES

MINUS = "\N{MINUS SIGN}"
LEFT = 2.0  # pixels between the left edge and text
INCH = 72  # pixels, at Matplotlib's 72 dpi: one of its points is one of our pixels
SLANT = radians(40)  # of names that are too long to stand side by side
MARKERS = "osD^vPX<>"  # with 8 colours and 5 dashes: no two of 360 series look the same
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (7, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
INK = {role: on_white for role, (on_white, _) in COLOURS.items()}


@dataclass(frozen=True)
class Form:
    """How wide a drawing is, how high its frame, and how large its text: pixels."""

    name: str
    width: float
    height: float
    size: float


WIDE, NARROW, PRINT = Form("wide", 824, 330, 13), Form("narrow", 360, 250, 12), Form("print", 824, 330, 13)
RC = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # comes with Matplotlib: the same drawing on every machine
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": INK["pale"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": INK["line"],
    "grid.linewidth": 1,
    "xtick.color": INK["pale"],
    "ytick.color": INK["pale"],
    "ytick.major.size": 0,
}


def matplotlib() -> Any:
    """The library, loaded when the first plot is drawn. HimapError (Exit.MISSING) if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        hint = "pip install 'himap-export[report]'"
        raise HimapError("a report's plots need matplotlib", hint=hint, code=Exit.MISSING) from None
    return matplotlib


def figure(name: str, title: str, caption: str, draw: Callable[["Sheet"], None]) -> Figure:
    """The figure that `draw` draws, on a sheet of each form."""
    with matplotlib().rc_context(RC | {"svg.hashsalt": name}):
        parts = []
        for form in (WIDE, NARROW):
            sheet = Sheet(form)
            draw(sheet)
            parts.append(themed(sheet.saved("svg"), f"{name}-{form.name}", form.name, title, sheet.width > form.width))
        sheet = Sheet(PRINT)
        sheet.paragraph(title, size=15, weight="bold")
        sheet.top += 6
        draw(sheet)
        return Figure(name, title, "\n".join(parts), sheet.saved("png"), caption)


def text_width(text: str, size: float) -> float:
    """In pixels."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)
    return float(width)


def wrapped(text: str, size: float, room: float) -> list[str]:
    """The lines of `text` when no line is wider than `room` pixels, unless one word is."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer, size) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


class Sheet:
    """A page as wide as its form: `top` grows as things are written onto it from above, then comes the frame.

    Positions are pixels from the top left corner, known before the sheet's height is.
    """

    def __init__(self, form: Form) -> None:
        from matplotlib.figure import Figure as Canvas
        from matplotlib.transforms import Affine2D

        self.form, self.size, self.width = form, form.size, form.width
        self.line = round(form.size * 1.45, 1)  # pixels from one line of text to the next
        self.top, self.left, self.right = 4.0, 0.0, form.width
        self._canvas = Canvas(figsize=(form.width / INCH, 1), dpi=INCH, facecolor="none")
        self.axes = self._canvas.add_axes((0, 0, 1, 1), facecolor="none")
        self._down = Affine2D()
        self._pixels = self._down + self._canvas.dpi_scale_trans

    def text(self, x: float, y: float, text: str, align: str = "left", colour: str = "ink", **more: Any) -> None:
        """One line of text whose middle is at height y."""
        style = {"size": self.size, "va": "center_baseline", **more}
        self._canvas.text(x, y, text, transform=self._pixels, ha=align, color=INK[colour], **style)

    def stroke(self, xs: Sequence[float], ys: Sequence[float], **style: Any) -> None:
        from matplotlib.lines import Line2D

        self._canvas.add_artist(Line2D(xs, ys, transform=self._pixels, **style))

    def block(self, x: float, y: float, width: float, height: float, colour: str, alpha: float = 1) -> None:
        from matplotlib.patches import Rectangle

        style: dict[str, Any] = {"facecolor": (INK[colour], alpha), "edgecolor": "none", "transform": self._pixels}
        self._canvas.add_artist(Rectangle((x, y), width, height, **style))

    def paragraph(self, text: str, size: float | None = None, **style: Any) -> None:
        """Lines of text from the left margin, as many as they need."""
        size = size or self.size
        for line in wrapped(text, size * 1.08, self.width - 2 * LEFT):
            self.text(LEFT, self.top + self.line / 2, line, size=size, **style)
            self.top += size * 1.45

    def key(self, names: Sequence[str], wide: float, sample: Callable[[int, float, float], None], y: float) -> float:
        """Names side by side from height y on, in as many rows as they need; returns the height below them.

        Each is behind its sample, which `sample(i, x, y)` draws into `wide` pixels from x on.
        """
        x, start = LEFT, wide + 6
        for i, name in enumerate(names):
            lines = wrapped(name, self.size, self.width - LEFT - start)
            room = start + max(text_width(line, self.size) for line in lines)
            if x > LEFT and x + room > self.width:
                x, y = LEFT, y + self.line
            sample(i, x, y + self.line / 2)
            for n, line in enumerate(lines):
                self.text(x + start, y + (n + 0.5) * self.line, line)
            y += (len(lines) - 1) * self.line
            x += room + 20
        return y + self.line + 6

    def frame(self, y_label: str, right: float = 14) -> None:
        """Fixes the frame's left and right, with room for the y axis' numbers; writes that axis' label above."""
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        self.paragraph(y_label, colour="pale")
        self.top += 8
        self.axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        self.axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        self.axes.tick_params(labelsize=self.size * 0.95)
        low, high = sorted(self.axes.get_ylim())
        ticks = [number(v) for v in self.axes.yaxis.get_major_locator()() if low <= v <= high]
        self.left = 8 + max((text_width(tick, self.size) for tick in ticks), default=0)
        self.right = self.width - right

    def x_pixel(self, x: float) -> float:
        low, high = self.axes.get_xlim()
        return float(self.left + (x - low) / (high - low) * (self.right - self.left))

    def y_pixel(self, y: float) -> float:
        low, high = self.axes.get_ylim()
        return float(self.top + (high - y) / (high - low) * self.form.height)

    def numbers_below(self, label: str, whole: bool) -> float:
        """Numbers along the x axis and its label; returns the room they need."""
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        bins = max(3, int((self.right - self.left) / 60))
        self.axes.xaxis.set_major_locator(MaxNLocator(min(bins, 12), integer=whole, steps=[1, 2, 5, 10]))
        self.axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        y = self.top + self.form.height + 10 + self.line
        lines = wrapped(label, self.size, self.right - self.left)
        for n, line in enumerate(lines):
            self.text((self.left + self.right) / 2, y + (n + 0.5) * self.line, line, "center", "pale")
        return 14 + self.line * (1 + len(lines))

    def names_below(self, names: Sequence[str], middles: Sequence[float], room: float, y: float) -> float:
        """Names centred at `middles` below y: wrapped if `room` pixels are enough, else slanted; their height."""
        lines = [wrapped(name, self.size, room - 6) for name in names]
        widest = max((text_width(line, self.size) for name in lines for line in name), default=0)
        if widest <= room:
            for name, x in zip(lines, middles, strict=True):
                for n, line in enumerate(name):
                    self.text(x, y + 8 + (n + 0.5) * self.line, line, "center", "pale")
            return 12 + self.line * max(map(len, lines), default=1)
        widths = [text_width(name, self.size) for name in names]
        fits = all(cos(SLANT) * width < x for width, x in zip(widths, middles, strict=True))
        angle = SLANT if fits else pi / 2
        for label, x in zip(names, middles, strict=True):
            style = {"rotation": degrees(angle), "rotation_mode": "anchor"}
            self.text(x + self.size * 0.4, y + 12, label, "right", "pale", **style)
        return 16 + sin(angle) * max(widths) + self.line / 2

    def close(self, below: float, height: float | None = None) -> None:
        """Fixes the sheet's height: the frame is at `top`, `below` is the room under it."""
        height = self.form.height if height is None else height
        whole = self.top + height + below
        self._canvas.set_size_inches(self.width / INCH, whole / INCH)
        self._down.clear().scale(1, -1).translate(0, whole).scale(1 / INCH)
        across = (self.right - self.left) / self.width
        self.axes.set_position((self.left / self.width, below / whole, across, height / whole))

    def saved(self, kind: str) -> bytes:
        """The drawing as "svg" without, or as "png" with a white background and at twice its size."""
        file = io.BytesIO()
        if kind == "svg":
            self._canvas.savefig(file, format=kind, metadata={"Date": None})
        else:
            self._canvas.savefig(file, format=kind, dpi=2 * INCH, facecolor="white", metadata={"Software": None})
        return file.getvalue()


def look(i: int) -> tuple[str, Any, str]:
    """Colour role, dashes and marker of series i."""
    return f"s{i % SERIES}", DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)]


def number(value: float) -> str:
    """A number on an axis, with a real minus."""
    return f"{value:,.10g}".replace("-", MINUS)
