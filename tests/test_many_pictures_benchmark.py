"""The benchmark of many pictures: who is judged, by which backend, and what is told of a prompt."""

import pytest
from many_pictures import Measured, table, verdicts
from picture_parts import AtOnce


def measured(images: int, backend: str, over: float, promise: float = 2.6) -> Measured:
    spread = (over, over - 0.1, over + 0.1)
    caches = (140 << 20, 320 << 20)
    return Measured(
        f"{images} images", images, backend, "fp32", (2304, 1152, 288), promise, 0.01, caches, 1.0, over, spread
    )


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([measured(4, "a", 2.3), measured(4, "b", 2.55)], ["met      4 images, b: 2.55x, 98%"]),
        ([measured(4, "a", 2.3), measured(4, "b", 2.5)], ["NOT MET  4 images, b: 2.50x, 96%"]),  # of the promise
        ([measured(8, "a", 2.1, promise=2.1)], ["NOT MET  8 images, a: 2.10x, 100%"]),  # over unpruned
        ([measured(2, "a", 1.0)], []),  # not many
    ],
)
def test_the_better_backend_is_judged_of_many_pictures(found: list[Measured], verdict: list[str]) -> None:
    assert [line.partition(";")[0] for line in verdicts(found)] == verdict


def test_what_is_told() -> None:
    (line,) = table([measured(4, "a", 2.6)]).splitlines()[2:]
    assert "| 2304 → 1152 → 288 | 1000 ms | 2600 ms | 2.60x (2.50 to 2.70) | 100% of 2.60x | 320 → 140 MiB |" in line
    assert AtOnce("a", 4, 1.0, 0.8).told().endswith("(1.25x); faster: at once")
    assert AtOnce("a", 4, 1.0, 1.01).told().endswith("faster: neither")
    assert AtOnce("a", 4, 1.0, 1.2).told().endswith("faster: one by one")
