"""Drawn scenes and the questions one can ask about them: the world that the `shapes` model knows.

A scene is a 4 x 4 grid of cells, some of which hold a coloured shape or a coloured box with a letter in it. All is
reproducible from a seed, and nothing here needs torch.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

SIDE, GRID = 336, 4  # pixels of a drawn image, cells a side
CELL = SIDE // GRID
COLORS = {
    "red": (214, 40, 40), "green": (42, 157, 60), "blue": (38, 84, 214),
    "yellow": (244, 208, 32), "purple": (140, 50, 170), "orange": (245, 130, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star")
LETTERS = "ACEHKTXZ"
NUMBERS = ("zero", "one", "two", "three", "four")
ANSWERS = (*SHAPES, "box", *COLORS, *NUMBERS, *LETTERS, "yes", "no")
TYPES = ("color", "shape", "count", "relation", "letter", "exists")
PHRASES = {
    "color": ("what color is the {0}?", "which color is the {0}?"),
    "shape": ("what shape is {0}?", "which shape is {0}?"),
    "count": ("how many {0}s?", "how many {0}s are there?"),
    "relation": ("what is {1} the {0}?",),
    "letter": ("which letter is in the {0} box?", "what letter is in the {0} box?"),
    "exists": ("is there any {0} {1}?",),
}
BESIDE = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Item:
    """A shape, or a "box" that holds `letter`, around pixel (x, y), `size` pixels wide, in cell (row, column)."""

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
    items: tuple[Item, ...]
    background: tuple[int, int, int]


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    type: str


def sample_scene(rng: random.Random) -> Scene:
    """Two to six shapes, few kinds at a time so that counting matters, and up to two boxes."""
    cells = rng.sample([(r, c) for r in range(GRID) for c in range(GRID)], rng.randint(3, 7))
    boxes = rng.choice((0, 1, 1, 2))
    kinds = rng.sample(SHAPES, rng.choice((2, 3, 4)))
    items = []
    for i, (row, column) in enumerate(cells):
        kind = "box" if i < boxes else rng.choice(kinds)
        size = rng.randint(62, 76) if kind == "box" else rng.randint(46, 74)
        slack = (CELL - size) // 2
        x = column * CELL + CELL // 2 + rng.randint(-slack, slack)
        y = row * CELL + CELL // 2 + rng.randint(-slack, slack)
        letter = rng.choice(LETTERS) if kind == "box" else ""
        items.append(Item(kind, rng.choice(tuple(COLORS)), letter, row, column, x, y, size))
    grey = rng.randint(205, 255)
    low, high = -min(14, grey - 205), min(14, 255 - grey)
    r, g, b = (grey + rng.randint(low, high) for _ in range(3))
    return Scene(tuple(items), (r, g, b))


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB image of SIDE x SIDE pixels."""
    image = Image.new("RGB", (SIDE, SIDE), scene.background)
    pen = ImageDraw.Draw(image)
    for item in scene.items:
        _draw_item(pen, item)
    return image


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
        pen.rectangle((x - r, y - r, x + r, y + r), "white", color, width=round(item.size * 0.15))
        pen.text(
            (x, y), item.letter, color, ImageFont.load_default(round(item.size * 0.66)), anchor="mm", stroke_width=1
        )


def patch_labels(scene: Scene, patches: int) -> npt.NDArray[np.int64]:
    """[3, patches * patches]: kind, color and letter of the item that each patch's middle lies in; 0 is none."""
    labels = np.zeros((3, patches, patches), np.int64)
    middle = (np.arange(patches) + 0.5) * SIDE / patches
    kinds, colors = (*SHAPES, "box"), tuple(COLORS)
    for item in scene.items:
        rows, columns = (np.abs(middle - at) <= item.size / 2 for at in (item.y, item.x))
        letter = LETTERS.index(item.letter) + 1 if item.letter else 0
        here = np.array([kinds.index(item.kind) + 1, colors.index(item.color) + 1, letter])
        labels[:, np.outer(rows, columns)] = here[:, None]
    return labels.reshape(3, -1)


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Every well-posed question about the scene but for `exists`, of which there is one; in random order."""
    shapes = [i for i in scene.items if i.kind != "box"]
    kinds, colors = Counter(i.kind for i in shapes), Counter(i.color for i in shapes)
    boxes = [i for i in scene.items if i.kind == "box"]
    found = [("color", i.color, (i.kind,)) for i in shapes if kinds[i.kind] == 1]
    found += [("shape", i.kind, (i.color,)) for i in shapes if colors[i.color] == 1]
    absent = rng.sample([kind for kind in SHAPES if not kinds[kind]], min(1, len(SHAPES) - len(kinds)))
    found += [("count", NUMBERS[kinds[kind]], (kind,)) for kind in (*kinds, *absent) if kinds[kind] < len(NUMBERS)]
    found += [("letter", i.letter, (i.color,)) for i in boxes if sum(b.color == i.color for b in boxes) == 1]
    found += _relations(scene.items, kinds)
    there = rng.random() < 0.5
    pairs = {(i.color, i.kind) for i in shapes}
    asked = rng.choice(sorted(pairs) if there else sorted({(c, k) for c in COLORS for k in SHAPES} - pairs))
    found.append(("exists", "yes" if there else "no", asked))
    rng.shuffle(found)
    return [Question(rng.choice(PHRASES[kind]).format(*words), answer, kind) for kind, answer, words in found]


def _relations(items: tuple[Item, ...], kinds: Counter[str]) -> list[tuple[str, str, tuple[str, ...]]]:
    """What stands beside a shape that is the only one of its kind, if just one item does in its row or column."""
    found: list[tuple[str, str, tuple[str, ...]]] = []
    for item in items:
        if kinds[item.kind] != 1:
            continue
        for words, (down, right) in BESIDE.items():
            there = [
                o for o in items
                if (o.row == item.row and (o.column - item.column) * right > 0)
                or (o.column == item.column and (o.row - item.row) * down > 0)
            ]  # fmt: skip
            if len(there) == 1:
                found.append(("relation", there[0].kind, (item.kind, words)))
    return found


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
    lines = [
        p.format(w, b) for ps in PHRASES.values() for p in ps for w in (*SHAPES, *COLORS) for b in (*BESIDE, *SHAPES)
    ]
    return lines + [f" {word}" for word in ANSWERS] * 1000  # often enough to become one token each
