"""What is advised from curves whose shape is known."""

from himap_export.validate.analysis.recommend import Curves, recommend

QUIET = (0.01,) * 10


def curves(text: tuple[float, ...], image: tuple[float, ...], random: tuple[float, ...] = QUIET) -> Curves:
    return Curves(text, image, random, (1.0, 0.2, 2.0, 2.0) + (0.1,) * 6, (2.0, 2.0, 1.0, 1.0) + (0.2,) * 6)


def test_the_textbook_pattern() -> None:
    """The image speaks to the text in layers 0 and 1, to itself up to layer 5, then no more."""
    found = recommend(curves((0.4, 0.3, *[0.01] * 8), (0.1, 0.1, 0.3, 0.2, 0.2, 0.1, *[0.0] * 4)))
    assert (found.k1, found.k2, found.confident) == (2, 6, True)
    said = " ".join(found.reasons)
    assert "Blocking image-to-text attention changes 40% of answers in layer 0; from layer 2 on at most 1%" in said
    assert "Blocking image-to-image attention changes 30% of answers in layer 2; from layer 6 on at most 0%" in said
    assert "image to image than to the instruction in layers 2-3" in said and "K1 = 2 and K2 = 6" in said


def test_what_the_baseline_changes_too_does_not_count() -> None:
    text = (0.4, 0.3, *[0.2] * 8)
    found = recommend(curves(text, (0.2, 0.2, 0.4, *[0.2] * 7), random=(0.2,) * 10))
    assert (found.k1, found.k2, found.confident) == (2, 3, True)


def test_nothing_matters_anywhere() -> None:
    found = recommend(curves(QUIET, QUIET))
    assert (found.k1, found.k2, found.confident) == (1, 2, False)
    assert any("hardly changes answers in any layer" in reason for reason in found.reasons)


def test_the_order_is_not_himaps() -> None:
    found = recommend(curves((0.4,) * 5 + (0.0,) * 5, (0.4, 0.3, *[0.0] * 8)))
    assert (found.k1, found.k2, found.confident) == (5, 6, False)
    assert any("not HiMAP's order" in reason for reason in found.reasons)


def test_no_layer_is_left() -> None:
    reading = recommend(curves((0.4,) * 10, (0.3,) * 5 + (0.0,) * 5))
    assert (reading.k1, reading.k2, reading.confident) == (None, None, False)
    assert any("no layer is left to gain by" in reason for reason in reading.reasons)
    musing = recommend(curves((0.4, 0.3, *[0.0] * 8), (0.3,) * 10))
    assert (musing.k1, musing.k2, musing.confident) == (2, None, False)
    assert any("a second cut has no layer left" in reason for reason in musing.reasons)
