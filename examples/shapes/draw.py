"""Drawn scenes and the questions one can ask about them: the world that the `shapes` model knows.

A scene is a busy grey background with a grid of cells, a few of which hold a small coloured shape or a small coloured
box with a letter in it. A whole scene has 6 x 6 cells; a part of one has fewer, and its corner lies anywhere in the
whole. All is reproducible from a seed, and nothing here needs torch.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

CELL, GRID, PATCH = 56, 6, 14  # pixels a cell, cells a side of a whole scene, pixels a patch
SIDE = CELL * GRID
COLORS = {
    "red": (214, 40, 40), "green": (42, 157, 60), "blue": (38, 84, 214),
    "yellow": (244, 208, 32), "purple": (140, 50, 170), "orange": (245, 130, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star")
KINDS = (*SHAPES, "box")
LETTERS = "ACEHKTXZ"
NUMBERS = ("zero", "one", "two", "three", "four")
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)  # of nine equal parts of a whole scene
ANSWERS = (*KINDS, *COLORS, *NUMBERS, *LETTERS, "yes", "no", *(place for row in PLACES for place in row))
PHRASES = {
    "color": (
        "what color is the {0}?", "which color is the {0}?", "what is the color of the {0}?", "the {0} has what color?",
    ),
    "shape": ("what shape is {0}?", "which shape is {0}?", "what is the {0} shape?", "which of the shapes is {0}?"),
    "count": ("how many {0}s?", "how many {0}s are there?", "count the {0}s.", "what is the number of {0}s?"),
    "relation": (
        "what is {1} the {0}?", "which thing is {1} the {0}?", "what do you see {1} the {0}?",
        "{1} the {0}, what is next?",
    ),
    "letter": (
        "which letter is in the {0} box?", "what letter is in the {0} box?", "what does the {0} box say?",
        "read the {0} box.",
    ),
    "exists": ("is there any {0} {1}?", "is there a {0} {1}?", "do you see a {0} {1}?", "can you find any {0} {1}?"),
    "where": ("where is the {0}?", "in which part is the {0}?", "where do you see the {0}?", "find the {0}."),
}  # fmt: skip
TYPES = tuple(PHRASES)
BESIDE = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Item:
    """A shape, or a "box" that holds `letter`, around pixel (x, y) of its scene, `size` pixels wide, in cell (row,
    column) of the whole."""

    kind: str
    color: str
    letter: str
    row: int
    column: int
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class Scene:
    """`items` in cells x cells cells, of which the first is cell `corner` of a whole scene; `texture` seeds what is
    behind them."""

    items: tuple[Item, ...]
    cells: int
    corner: tuple[int, int]
    texture: int


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    type: str


def sample_scene(rng: random.Random, cells: int = GRID) -> Scene:
    """A few shapes, few kinds at a time so that counting matters, and up to two boxes: 4 to 9 in a whole scene."""
    corner = rng.randint(0, GRID - cells), rng.randint(0, GRID - cells)
    count = rng.randint(*{2: (2, 4), 4: (3, 7), 6: (4, 9)}[cells])
    places = _sample_places(rng, cells, count)
    boxes = rng.choice((0, 1, 1, 2))
    kinds = rng.sample(SHAPES, rng.choice((2, 3, 4)))
    items = []
    for i, (row, column) in enumerate(places):
        kind = "box" if i < boxes else rng.choice(kinds)
        size = rng.randint(36, 48) if kind == "box" else rng.randint(28, 46)
        slack = (CELL - size) // 2
        x = column * CELL + CELL // 2 + rng.randint(-slack, slack)
        y = row * CELL + CELL // 2 + rng.randint(-slack, slack)
        letter = rng.choice(LETTERS) if kind == "box" else ""
        color = rng.choice(tuple(COLORS))
        items.append(Item(kind, color, letter, row=row + corner[0], column=column + corner[1], x=x, y=y, size=size))
    return Scene(tuple(items), cells, corner, rng.getrandbits(32))


def _sample_places(rng: random.Random, cells: int, count: int) -> list[tuple[int, int]]:
    """So many cells, in half of the draws next to one that is taken: then there is something to relate."""
    free, taken = [(r, c) for r in range(cells) for c in range(cells)], list[tuple[int, int]]()
    while len(taken) < count:
        beside = [(r, c) for r, c in free if any(abs(r - y) + abs(c - x) == 1 for y, x in taken)]
        place = rng.choice(beside if beside and rng.random() < 0.5 else free)
        free.remove(place)
        taken.append(place)
    return rng.sample(taken, count)


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB image of CELL * cells pixels a side."""
    image = _background(scene.cells * CELL, scene.texture)
    pen = ImageDraw.Draw(image)
    for item in scene.items:
        _draw_item(pen, item)
    return image


def _background(side: int, texture: int) -> Image.Image:
    """Greys that drift over the image, strokes and blots of little colour on them, and noise over all."""
    rng, noise = random.Random(texture), np.random.default_rng(texture)
    drift = Image.fromarray(noise.integers(120, 225, (3, 3, 3), np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    image = Image.blend(drift.convert("L").convert("RGB"), drift, 0.35)
    pen = ImageDraw.Draw(image)
    for _ in range(round(90 * (side / SIDE) ** 2)):
        x, y, grey = rng.uniform(0, side), rng.uniform(0, side), rng.randint(95, 240)
        color = tuple(grey + rng.randint(-12, 12) for _ in range(3))
        w, h = rng.uniform(4, 46), rng.uniform(3, 26)
        if rng.random() < 0.5:
            pen.line((x, y, x + rng.uniform(-60, 60), y + rng.uniform(-60, 60)), color, width=rng.randint(1, 4))
        else:
            pen.ellipse((x - w, y - h, x + w, y + h), outline=color, width=rng.randint(1, 3))
    grain = noise.integers(-6, 7, (side, side, 1), np.int16)
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def _draw_item(pen: ImageDraw.ImageDraw, item: Item) -> None:
    x, y, r, color = item.x, item.y, item.size / 2, COLORS[item.color]
    if item.kind == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), color)
    elif item.kind == "square":
        pen.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), color)
    elif item.kind == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)], color)
    elif item.kind == "star":
        turns = [math.pi * (i / 5 - 0.5) for i in range(10)]
        radii = [r * 1.05, r * 0.44] * 5
        pen.polygon([(x + q * math.cos(t), y + q * math.sin(t)) for q, t in zip(radii, turns, strict=True)], color)
    else:
        pen.rectangle((x - r, y - r, x + r, y + r), "white", color, width=round(item.size * 0.12))
        font = ImageFont.load_default(round(item.size * 0.7))
        pen.text((x, y), item.letter, color, font, anchor="mm", stroke_width=1)


def neighbour(items: tuple[Item, ...], item: Item, down: int, right: int) -> Item | None:
    """The item in the next cell that way."""
    cell = item.row + down, item.column + right
    return next((other for other in items if (other.row, other.column) == cell), None)


def patch_labels(scene: Scene) -> npt.NDArray[np.int64]:
    """[7, patches]: kind, color and letter of the item that each patch's middle lies in, and the kinds left of, right
    of, above and below that item; 0 is none."""
    side = scene.cells * CELL // PATCH
    labels = np.zeros((3 + len(BESIDE), side, side), np.int64)
    middle = (np.arange(side) + 0.5) * PATCH
    for item in scene.items:
        rows, columns = (np.abs(middle - at) <= item.size / 2 for at in (item.y, item.x))
        beside = [neighbour(scene.items, item, *step) for step in BESIDE.values()]
        letter = LETTERS.index(item.letter) + 1 if item.letter else 0
        here = [KINDS.index(item.kind) + 1, tuple(COLORS).index(item.color) + 1, letter]
        here += [KINDS.index(other.kind) + 1 if other else 0 for other in beside]
        labels[:, np.outer(rows, columns)] = np.array(here)[:, None]
    return labels.reshape(len(labels), -1)


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Every well-posed question about the scene but for `exists`, of which there are two; in random order."""
    shapes = [i for i in scene.items if i.kind != "box"]
    kinds, colors = Counter(i.kind for i in scene.items), Counter(i.color for i in shapes)
    pairs, boxes = Counter((i.color, i.kind) for i in scene.items), [i for i in scene.items if i.kind == "box"]
    said = Counter(box.letter for box in boxes)
    found = [("color", i.color, (i.kind,)) for i in shapes if kinds[i.kind] == 1]
    found += [("color", i.color, (f"letter {i.letter}",)) for i in boxes if said[i.letter] == 1]
    found += [("shape", i.kind, (i.color,)) for i in shapes if colors[i.color] == 1]
    absent = rng.sample([kind for kind in SHAPES if not kinds[kind]], min(1, sum(not kinds[kind] for kind in SHAPES)))
    counted = {kind: kinds[kind] for kind in (*SHAPES, "box") if kinds[kind] or kind in absent}
    found += [("count", NUMBERS[n], (_counted(kind),)) for kind, n in counted.items() if n < len(NUMBERS)]
    found += [("letter", i.letter, (i.color,)) for i in boxes if pairs[i.color, "box"] == 1]
    found += _relations(scene.items, kinds)
    for there in (True, False):
        have = {(color, kind) for color, kind in pairs if kind != "box"}
        asked = sorted(have if there else {(c, k) for c in COLORS for k in SHAPES} - have)
        found += [("exists", "yes" if there else "no", rng.choice(asked))] if asked else []
    found += [("where", _place(i), (i.kind,)) for i in scene.items if kinds[i.kind] == 1]
    found += [("where", _place(i), (f"{i.color} {i.kind}",)) for i in scene.items if pairs[i.color, i.kind] == 1]
    rng.shuffle(found)
    return [Question(rng.choice(PHRASES[kind]).format(*words), answer, kind) for kind, answer, words in found]


def _counted(kind: str) -> str:
    """The word that takes an s."""
    return "boxe" if kind == "box" else kind


def _place(item: Item) -> str:
    return PLACES[item.row * 3 // GRID][item.column * 3 // GRID]


def _relations(items: tuple[Item, ...], kinds: Counter[str]) -> list[tuple[str, str, tuple[str, ...]]]:
    """What stands in the cell beside an item that is the only one of its kind."""
    return [
        ("relation", other.kind, (item.kind, words))
        for item in items
        if kinds[item.kind] == 1
        for words, step in BESIDE.items()
        if (other := neighbour(items, item, *step)) is not None
    ]


def held_out(n: int, seed: int) -> Iterator[tuple[Image.Image, str, str, str]]:
    """`n` of (image, question, answer, type), the types in turn, from scenes that training never draws."""
    rng = random.Random(f"held out {seed}")
    for i in range(n):
        question = None
        while question is None:
            scene = sample_scene(rng)
            question = next((q for q in questions(scene, rng) if q.type == TYPES[i % len(TYPES)]), None)
        yield draw(scene), question.text, question.answer, question.type


def corpus() -> list[str]:
    """Every word of the world in every phrase, for the tokenizer."""
    things = (*KINDS, *COLORS, *(f"letter {letter}" for letter in LETTERS), "boxe")
    lines = [p.format(w, b) for ps in PHRASES.values() for p in ps for w in things for b in (*BESIDE, *SHAPES)]
    return lines + [f" {word}" for word in ANSWERS] * 1000  # often enough to become one token each
