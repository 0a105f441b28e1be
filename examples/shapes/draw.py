"""Scenes of coloured shapes and lettered boxes: sampling, drawing, per-patch labels, questions and answers.

Needs Pillow and NumPy only. Everything is a pure function of a `random.Random`, so a seed gives the same images and
the same questions on every machine with the same Pillow.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 336
"""Side of a drawn image in pixels: three times what the model sees."""
GRID = 3
"""Objects stand in the cells of a GRID x GRID table, with jitter."""
PATCHES = 8
"""Patches a side that the vision tower cuts an image into."""
SHAPES = ("circle", "square", "triangle", "star")
KINDS = (*SHAPES, "box")
COLORS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (245, 214, 40),
    "purple": (142, 58, 178),
    "cyan": (60, 200, 220),
}
LETTERS = ("A", "C", "H", "L", "O", "T", "X", "Z")
COUNTS = tuple(str(n) for n in range(5))
ANSWERS = (*KINDS, *COLORS, *COUNTS, *LETTERS)
PLURALS = {kind: "boxes" if kind == "box" else f"{kind}s" for kind in KINDS}
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
TEMPLATES = {
    "color": ("What color is the {kind}?", "Which color does the {kind} have?", "Tell me the color of the {kind}."),
    "shape": ("What shape is {color}?", "Which object is {color}?", "What is the {color} thing?"),
    "count": ("How many {plural} are there?", "How many {plural} do you see?", "Count the {plural}."),
    "relation": ("What is {side} the {kind}?", "Which object is {side} the {kind}?", "What stands {side} the {kind}?"),
    "letter": (
        "Which letter is in the {color} box?",
        "What letter does the {color} box hold?",
        "Read the letter in the {color} box.",
    ),
}
TYPES = tuple(TEMPLATES)


@dataclass(frozen=True)
class Item:
    """One object of a scene: `cell` is (row, column); centre and radius are in pixels of the drawn image."""

    kind: str
    color: str
    letter: str | None
    cell: tuple[int, int]
    x: float
    y: float
    radius: float
    turn: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """Objects and the seed of the background they stand on."""

    items: tuple[Item, ...]
    texture: int


@dataclass(frozen=True)
class Question:
    """A question with one right answer; `type` is a key of TEMPLATES."""

    text: str
    answer: str
    type: str


def sample_scene(rng: random.Random) -> Scene:
    """Three to seven objects in distinct cells; half of the scenes hold a crowd of two to four of one kind."""
    kinds = [rng.choice(KINDS) for _ in range(rng.randint(3, 5))]
    if rng.random() < 0.5:
        crowd = rng.choice(KINDS)
        kinds = [kind for kind in kinds if kind != crowd][:3] + [crowd] * rng.randint(2, 4)
    kinds = _at_most(kinds, len(COUNTS) - 1)
    cells = rng.sample([(row, column) for row in range(GRID) for column in range(GRID)], len(kinds))
    return Scene(
        tuple(_sample_item(rng, kind, cell) for kind, cell in zip(kinds, cells, strict=True)), rng.getrandbits(32)
    )


def _at_most(kinds: list[str], limit: int) -> list[str]:
    return [kind for place, kind in enumerate(kinds) if kinds[:place].count(kind) < limit]


def _sample_item(rng: random.Random, kind: str, cell: tuple[int, int]) -> Item:
    color = rng.choice(tuple(COLORS))
    pitch = SIZE / GRID
    row, column = cell
    red, green, blue = (min(255, max(0, channel + rng.randint(-18, 18))) for channel in COLORS[color])
    return Item(
        kind=kind,
        color=color,
        letter=rng.choice(LETTERS) if kind == "box" else None,
        cell=cell,
        x=(column + 0.5) * pitch + rng.uniform(-8, 8),
        y=(row + 0.5) * pitch + rng.uniform(-8, 8),
        radius=rng.uniform(38, 46) if kind == "box" else rng.uniform(28, 44),
        turn=rng.uniform(-0.2, 0.2),
        rgb=(red, green, blue),
    )


def draw_scene(scene: Scene) -> Image.Image:
    """The scene as an RGB image of SIZE x SIZE."""
    image = _background(scene.texture)
    canvas = ImageDraw.Draw(image)
    for item in scene.items:
        _draw_outline(canvas, item, item.rgb)
        if item.letter is not None:
            _draw_letter(canvas, item)
    return image


def label_map(scene: Scene) -> np.ndarray:
    """What each patch shows: uint8 [3, PATCHES, PATCHES] of kind, colour and letter, 0 for background or no letter.

    A patch belongs to the object that covers most of it, if that is at least a sixth of the patch.
    """
    mask = Image.new("L", (SIZE, SIZE))
    canvas = ImageDraw.Draw(mask)
    for index, item in enumerate(scene.items, start=1):
        _draw_outline(canvas, item, index)
    side = SIZE // PATCHES
    pixels = np.asarray(mask).reshape(PATCHES, side, PATCHES, side).transpose(0, 2, 1, 3).reshape(PATCHES, PATCHES, -1)
    covered = np.stack([(pixels == index).sum(-1) for index in range(1, len(scene.items) + 1)])
    owner = np.where(covered.max(0) * 6 >= side * side, covered.argmax(0) + 1, 0)
    colors, letters = tuple(COLORS), (None, *LETTERS)
    table = np.zeros((3, len(scene.items) + 1), np.uint8)
    for index, item in enumerate(scene.items, start=1):
        table[:, index] = KINDS.index(item.kind) + 1, colors.index(item.color) + 1, letters.index(item.letter)
    return table[:, owner]


def _background(seed: int) -> Image.Image:
    """A pale or dark grey-ish slope with soft blotches."""
    noise = np.random.default_rng(seed)
    base = noise.uniform(0.12, 0.88) * 255 + noise.uniform(-14, 14, 3)
    blotches = noise.normal(0, 9, (7, 7, 1)) + noise.normal(0, 3, (7, 7, 3))
    slope = np.linspace(-1, 1, 7)
    blotches += (noise.uniform(-16, 16) * slope[:, None] + noise.uniform(-16, 16) * slope[None, :])[:, :, None]
    small = Image.fromarray(np.clip(base + blotches, 0, 255).astype(np.uint8))
    return small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _draw_outline(canvas: ImageDraw.ImageDraw, item: Item, fill: tuple[int, int, int] | int) -> None:
    if item.kind == "circle":
        box = (item.x - item.radius, item.y - item.radius, item.x + item.radius, item.y + item.radius)
        canvas.ellipse(box, fill=fill)
    elif item.kind == "box":
        canvas.rounded_rectangle(_frame(item, 0), radius=8, fill=fill)
    else:
        canvas.polygon(_corners(item), fill=fill)


def _draw_letter(canvas: ImageDraw.ImageDraw, item: Item) -> None:
    canvas.rectangle(_frame(item, 9), fill=(250, 250, 250))
    font = ImageFont.load_default(size=round(item.radius * 1.55))
    canvas.text((item.x, item.y), item.letter, fill=(15, 15, 15), font=font, anchor="mm", stroke_width=2)


def _frame(item: Item, inset: float) -> tuple[float, float, float, float]:
    reach = item.radius - inset
    return (item.x - reach, item.y - reach, item.x + reach, item.y + reach)


def _corners(item: Item) -> list[tuple[float, float]]:
    """Corners of a square, a triangle or a five-pointed star, clockwise from the top."""
    count = {"square": 4, "triangle": 3, "star": 10}[item.kind]
    start = -math.pi / 2 + item.turn + (math.pi / 4 if item.kind == "square" else 0.0)
    grow = {"square": 1.15, "triangle": 1.2, "star": 1.2}[item.kind]
    corners = []
    for step in range(count):
        angle = start + 2 * math.pi * step / count
        reach = item.radius * grow * (0.42 if item.kind == "star" and step % 2 else 1.0)
        corners.append((item.x + reach * math.cos(angle), item.y + reach * math.sin(angle)))
    return corners


def ask(scene: Scene, kind_of_question: str, rng: random.Random) -> Question | None:
    """A question of the given type, or None where the scene has no such question with one right answer."""
    facts = _FACTS[kind_of_question](scene)
    if not facts:
        return None
    answer = rng.choice(sorted({fact["answer"] for fact in facts}))
    fact = rng.choice([fact for fact in facts if fact["answer"] == answer])
    text = rng.choice(TEMPLATES[kind_of_question]).format(**fact)
    if rng.random() < 0.5:
        text = text[0].lower() + text[1:]
    return Question(text, answer, kind_of_question)


def ask_any(scene: Scene, rng: random.Random) -> Question:
    """A question of a random type; every scene can be counted, so there always is one."""
    for kind_of_question in rng.sample(TYPES, len(TYPES)):
        question = ask(scene, kind_of_question, rng)
        if question is not None:
            return question
    raise AssertionError("a scene without a question")


def _unique(scene: Scene, of: Callable[[Item], str]) -> list[Item]:
    """Objects that alone have their value of `of`."""
    times = Counter(of(item) for item in scene.items)
    return [item for item in scene.items if times[of(item)] == 1]


def _color_facts(scene: Scene) -> list[dict[str, str]]:
    return [{"kind": item.kind, "answer": item.color} for item in _unique(scene, lambda item: item.kind)]


def _shape_facts(scene: Scene) -> list[dict[str, str]]:
    return [{"color": item.color, "answer": item.kind} for item in _unique(scene, lambda item: item.color)]


def _count_facts(scene: Scene) -> list[dict[str, str]]:
    times = Counter(item.kind for item in scene.items)
    return [{"plural": PLURALS[kind], "answer": str(times[kind])} for kind in KINDS]


def _relation_facts(scene: Scene) -> list[dict[str, str]]:
    """The neighbour in the next cell of an object that is the only one of its kind."""
    at = {item.cell: item for item in scene.items}
    facts = []
    for item in _unique(scene, lambda item: item.kind):
        for side, (down, right) in SIDES.items():
            other = at.get((item.cell[0] + down, item.cell[1] + right))
            if other is not None:
                facts.append({"kind": item.kind, "side": side, "answer": other.kind})
    return facts


def _letter_facts(scene: Scene) -> list[dict[str, str]]:
    boxes = Scene(tuple(item for item in scene.items if item.kind == "box"), scene.texture)
    return [{"color": item.color, "answer": item.letter or ""} for item in _unique(boxes, lambda item: item.color)]


_FACTS: dict[str, Callable[[Scene], list[dict[str, str]]]] = {
    "color": _color_facts,
    "shape": _shape_facts,
    "count": _count_facts,
    "relation": _relation_facts,
    "letter": _letter_facts,
}


def held_out(n: int, seed: int) -> Iterator[tuple[Image.Image, str, str, str]]:
    """`n` of (image, question, answer, type), one question an image, the types in turn; no training seed meets these."""
    rng = random.Random(f"held-out-{seed}")
    for index in range(n):
        question = None
        while question is None:
            scene = sample_scene(rng)
            question = ask(scene, TYPES[index % len(TYPES)], rng)
        yield draw_scene(scene), question.text, question.answer, question.type
