"""Weights in fp8 and nvfp4, against NumPy statements of the formats and against every other choice of a block."""

import numpy as np
import pytest

from himap_export.exporter.quantize.floats import E2M1, E4M3, quantise_floats
from himap_export.exporter.quantize.rounding import Quantised
from himap_export.graphs.ports import LinearForm

FP8, NVFP4 = LinearForm("fp8"), LinearForm("nvfp4", 16)
E2M1_NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def dequantised(found: Quantised, form: LinearForm) -> "np.ndarray":
    """The weight [out,in] that the parts stand for, fp32."""
    if form.kind == "fp8":
        return (found.parts["fp8"].view(E4M3).astype(np.float32) * found.parts["scale"]).T
    steps = found.parts["block_scale"].view(E4M3).astype(np.float32) * found.parts["scale"]
    return (unpacked(found.parts["fp4"]) * np.repeat(steps, 16, axis=0)).T


def unpacked(packed: "np.ndarray") -> "np.ndarray":
    """The numbers [.., 2n] fp32 that bytes [.., n] hold, the even column in the low four bits."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return codes.view(E2M1).astype(np.float32)


def e4m3_numbers() -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Every finite number of E4M3 that is not negative: 4 bits of exponent, bias 7, and 3 of mantissa."""
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return np.array([m / 8 * 2.0**-6 for m in range(8)] + normal[:-1])  # the last is NaN


def nearest(x: "np.ndarray", numbers: "np.ndarray") -> "np.ndarray":
    """The nearest of +-numbers to each x."""
    at = np.abs(np.abs(x)[..., None] - numbers).argmin(axis=-1)
    return np.sign(x) * numbers[at]


def weight(out: int, wide: int) -> "np.ndarray":
    random = np.random.default_rng(0)
    w = random.standard_normal((out, wide)).astype(np.float32) * random.uniform(0.01, 3, (out, 1)).astype(np.float32)
    w[3] = 0
    w[5, :16] = 0
    return w


def test_fp8_is_the_nearest_number_on_each_outputs_scale() -> None:
    w = weight(24, 64)
    found = quantise_floats(w, FP8, largest=44.8)
    q, scale = found.parts["fp8"].view(E4M3).astype(np.float64), found.parts["scale"]
    assert found.parts["fp8"].shape == (64, 24) and scale.dtype == np.float32 and scale.shape == (24,)
    top = np.abs(w).max(axis=1)
    np.testing.assert_allclose(scale, np.where(top > 0, top / 448, 1), rtol=1e-6)
    ratio = w.astype(np.float64) / scale[:, None]
    np.testing.assert_allclose(np.abs(q.T - ratio), np.abs(nearest(ratio, e4m3_numbers()) - ratio), atol=1e-4)
    assert np.abs(q).max() == 448
    assert found.parts["input_scale"] == np.float32(0.1)
    back = dequantised(found, FP8)
    np.testing.assert_array_equal(back, (q * scale).T.astype(np.float32))
    assert found.error == pytest.approx(np.sqrt(((back - w) ** 2).sum() / (w**2).sum()), rel=1e-4)
    assert 0.01 < found.error < 0.04


def test_nvfp4_is_the_better_of_two_scales_for_each_block() -> None:
    w = weight(24, 64)
    found = quantise_floats(w, NVFP4, largest=5.0)
    packed, steps, scale = (found.parts[name] for name in ("fp4", "block_scale", "scale"))
    assert packed.shape == (64, 12) and steps.shape == (4, 24) and scale.shape == () == found.parts["input_scale"].shape
    assert scale == pytest.approx(np.abs(w).max() / (448 * 6), rel=1e-6)
    assert found.parts["input_scale"] == pytest.approx(5 / (448 * 6), rel=1e-6)
    blocks, best = w.reshape(24, 4, 16), np.full((24, 4), np.inf)
    for aim in (6, 4):
        step = nearest(np.minimum(np.abs(blocks).max(-1) / aim / scale, 448), e4m3_numbers()) * scale
        with np.errstate(divide="ignore", invalid="ignore"):
            q = np.where(step[..., None] > 0, nearest(np.clip(blocks / step[..., None], -6, 6), E2M1_NUMBERS), 0)
        best = np.minimum(best, np.square(q * step[..., None] - blocks).sum(-1))
    back = dequantised(found, NVFP4)
    np.testing.assert_allclose(np.square(back - w).reshape(24, 4, 16).sum(-1), best, rtol=1e-3, atol=1e-6)
    assert found.error == pytest.approx(np.sqrt(best.sum() / (w**2).sum()), rel=1e-4)
    assert not back[3].any() and not back[5, :16].any()


def test_fp4_codes_are_read_low_bits_first() -> None:
    codes = np.array([[0x10, 0x32, 0x54, 0x76], [0x98, 0xBA, 0xDC, 0xFE]], np.uint8)
    np.testing.assert_array_equal(unpacked(codes), [E2M1_NUMBERS, -E2M1_NUMBERS])


@pytest.mark.parametrize("form", [FP8, NVFP4])
def test_scales_are_above_zero(form: LinearForm) -> None:
    """Of weights and inputs that are all zero, and of the smallest that there are: TensorRT divides by them."""
    for w in (np.zeros((4, 32), np.float32), np.full((4, 32), 1e-45, np.float32)):
        found = quantise_floats(w, form, largest=0.0)
        assert (found.parts["scale"] > 0).all() and found.parts["input_scale"] > 0
        assert np.isfinite(dequantised(found, form)).all()


@pytest.mark.parametrize("form", [FP8, NVFP4])
def test_many_outputs_are_rounded_as_few(form: LinearForm) -> None:
    """In pieces, which share nothing but the tensor's scale: that of the largest weight."""
    w = np.random.default_rng(1).standard_normal((40, 64)).astype(np.float16)
    many = np.tile(w, (1000, 1))
    few, all_ = (dequantised(quantise_floats(x, form, 1.0), form) for x in (w, many))
    np.testing.assert_array_equal(all_, np.tile(few, (1000, 1)))
