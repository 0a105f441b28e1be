"""What selectors' own authors keep of himap-tiny, and how they score it: himap-export and the reference beside them.

Made by tests/fixtures/selector_goldens.py (tests/fixtures/README.md).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from commands import HIMAP_TINY, Workshop, golden_inputs, padded
from numpy.typing import NDArray

from himap_export.validate.reference.criteria import Cuts, ReferenceCut

SLOPE, HEADS = 0.05, (0.4, 0.1, 0.3, 0.2)  # as in the script that made the goldens
PLANS: Mapping[str, Cuts] = {
    "debiased": (
        ReferenceCut(2, "instruction-debiased", keep=8, coefficients=(SLOPE,)),
        ReferenceCut(5, "image", keep=2),
    ),
    "hawk": (ReferenceCut(1, "hawk", keep=4, coefficients=HEADS),),
    **{f"dart-{layer}": (ReferenceCut(layer, "dart", keep=12),) for layer in (1, 2, 5, 8)},
}


def golden(plan: str) -> tuple[list[NDArray[np.int64]], NDArray[np.float32] | None]:
    """What the authors keep at each cut of a plan, and their scores at the first, where they have any."""
    name, _, layer = plan.partition("-")
    stored = np.load(HIMAP_TINY / f"selector_{'himap-debiased' if name == 'debiased' else name}.npz")
    names = [f"kept_{layer}"] if layer else [f"kept{n}" for n, _ in enumerate(PLANS[plan], 1)]
    return [stored[name] for name in names], stored.get("score1")


@pytest.fixture(scope="module")
def bundle(work: Workshop) -> Path:
    tables = [
        f"[{name}]\n"
        + "".join(
            f'[[{name}.cuts]]\nlayer = {c.layer}\ncriterion = "{c.criterion}"\nkeep = {c.keep}\n'
            f"coefficients = {list(c.coefficients)}\n"
            for c in cuts
        )
        for name, cuts in PLANS.items()
    ]
    plans = work.folder / "selectors.toml"
    plans.write_text("".join(tables))
    return work.bundle("golden", "--text-budget", 20, "--max-new-tokens", 2, "--plan", plans)


@pytest.mark.parametrize("plan", PLANS)
def test_bundles_and_the_reference_keep_what_the_authors_keep(work: Workshop, bundle: Path, plan: str) -> None:
    (kept, score), inputs = golden(plan), golden_inputs()
    truth = work.reference("golden").prefill(inputs.input_ids, inputs.pixel_values, cuts=PLANS[plan])
    found = work.answer(bundle, inputs, "--plan", plan, "--max-new-tokens", 1)
    for n, wanted in enumerate(kept):
        np.testing.assert_array_equal(truth.kept[n][0], wanted)
        np.testing.assert_array_equal(found[f"kept_k{n + 1}"], padded(wanted[None], found[f"kept_k{n + 1}"].shape[1]))
    np.testing.assert_allclose(found["logits"], truth.logits, rtol=0, atol=1e-3)
    if score is not None:  # debiasing's authors round their weights to fp16
        np.testing.assert_allclose(truth.scores[0][0], score, rtol=1e-3 if plan == "debiased" else 1e-5, atol=1e-6)


def test_the_slope_makes_a_difference() -> None:
    plain = np.load(HIMAP_TINY / "golden_k2_5_n8_2.npz")["kept1"].tolist()
    assert golden("debiased")[0][0].tolist() != plain
