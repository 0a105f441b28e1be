"""Where the labels of a plot go, so that none covers another. Lengths are pixels, y grows downwards."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi, sin


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def shared(self, other: "Box") -> float:
        """The area that two boxes share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    def covered(self, taken: Sequence["Box"], inside: "Box") -> float:
        """How much of `taken` lies under this box, and, weighing more, how much of it is not `inside`: pixels²."""
        area = (self.right - self.left) * (self.bottom - self.top)
        return sum(self.shared(other) for other in taken) + 20 * (area - self.shared(inside))


def spread(wanted: Sequence[float], heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Centres as near as possible to `wanted`, so that labels of these heights, one below the other, do not overlap.

    Labels that would collide become one pile around their mean (pool adjacent violators), kept within top..bottom.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    piles: list[tuple[list[int], float, float]] = []  # members from top to bottom, top edge, height
    for i in order:
        members, height, middle = [i], heights[i], wanted[i]
        while True:
            edge = min(max(middle - height / 2, top), bottom - height)
            if not piles or piles[-1][1] + piles[-1][2] <= edge:
                break
            above, their_edge, their_height = piles.pop()
            centre = their_edge + their_height / 2
            middle = (centre * len(above) + middle * len(members)) / (len(above) + len(members))
            members, height = above + members, their_height + height
        piles.append((members, edge, height))
    centres = [0.0] * len(wanted)
    for members, edge, _ in piles:
        for i in members:
            centres[i] = edge + heights[i] / 2
            edge += heights[i]
    return centres


def stagger(middles: Sequence[float], widths: Sequence[float]) -> list[int]:
    """The row, 0 first, of each label centred at `middles`: the first row where it touches no label to its left."""
    rows, ends = [0] * len(middles), list[float]()
    for i in sorted(range(len(middles)), key=lambda i: middles[i]):
        left, right = middles[i] - widths[i] / 2, middles[i] + widths[i] / 2
        row = next((r for r, end in enumerate(ends) if end < left), len(ends))
        ends[row : row + 1] = [right]
        rows[i] = row
    return rows


def place(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], taken: Sequence[Box], inside: Box
) -> list[Box]:
    """A box of `sizes` (width, height) beside each point, where it covers the least of `taken` and of earlier labels.

    Each takes the nearest free one of 16 directions at 5 distances; where none is free, the least bad.
    """
    boxes: list[Box] = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        candidates: list[tuple[float, int, Box]] = []
        for far in (9.0, 20.0, 31.0, 42.0, 53.0):
            for turn in range(16):
                angle = pi * (turn / 8 - 0.25)  # the first choice is above and to the right
                cx, cy = x + cos(angle) * (far + width / 2), y + sin(angle) * (far + height / 2)
                box = Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                candidates.append((box.covered([*taken, *boxes], inside) + far, len(candidates), box))
        boxes.append(min(candidates)[2])
    return boxes
