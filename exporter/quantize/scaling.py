"""The scales of a whole decoder, from a calibration set: what becomes of its weights before they are rounded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from himap_export.engines.questions import Example
from himap_export.engines.weight_file import StoredTensor, read_header, write_safetensors
from himap_export.exporter.quantize.awq import Floats, Folding, Rounded, Scaled, search, spread, storable
from himap_export.exporter.quantize.calibration import Source, activations
from himap_export.exporter.quantize.floats import FLOATS
from himap_export.exporter.quantize.forms import HEAD as HEAD_ROLE
from himap_export.exporter.quantize.rounding import dequantise, quantise
from himap_export.graphs.ports import LinearForm, WeightRef
from himap_export.graphs.quantization import linear_shapes
from himap_export.graphs.spec import Dtype
from himap_export.graphs.stages import StagedModel

_OUTPUTS = 256  # of a linear layer's, by which scales are judged


@dataclass(frozen=True)
class Calibrated:
    """How weights change before they are rounded, and how good that is, group by group. `largest`: of |x| in the input
    of each linear layer, by its weight's role, once scaled: what a static scale of activations has to hold."""

    folding: Folding
    scaled: tuple[Scaled, ...]
    largest: Mapping[str, float]
    prompts: int

    @property
    def method(self) -> str:
        """Says what was done, and what it does to the groups' outputs: their mean error, relative."""
        if not self.scaled:
            return f"ranges of activations from {self.prompts} prompts"
        before, after = (np.mean(errors) for errors in zip(*((s.before, s.after) for s in self.scaled), strict=True))
        return f"AWQ scales from {self.prompts} prompts (output error {before:.3%} to {after:.3%})"


def calibrate(source: Source, questions: Sequence[Example]) -> Calibrated:
    """Returns the scales for the weights that the plan quantises. HimapError as `activations`."""
    spec, dtype, forms = source.planned.decoder, source.planned.dtype, source.planned.forms
    scales, report, largest, shapes = dict[str, Floats](), list[Scaled](), dict[str, float](), linear_shapes(spec)
    for group, seen in activations(source, questions, head=HEAD_ROLE in forms):
        roles = [f"{reader}.weight" for reader in group.readers]
        if not (rounded := [role for role in roles if role in forms]):
            continue
        if forms[rounded[0]].kind in FLOATS:  # their values are as fine at any scale
            largest |= dict.fromkeys(roles, float(seen.largest.max()))
            continue
        weight = np.concatenate([_sample(source, role, shapes[role]) for role in rounded])
        found, how = search(spec, group.maker, seen, weight=weight, rounded=_rounded(forms[rounded[0]], dtype))
        if group.maker.endswith("norm"):
            found = storable(source.read(f"{group.maker}.weight", found.shape), found, dtype)
        scales[group.maker] = found
        report.append(how)
        largest |= dict.fromkeys(roles, float((seen.largest / spread(spec, group.maker, found)).max()))
    return Calibrated(Folding(spec, scales), tuple(report), largest, prompts=len(questions))


def write_folded(source: Source, folding: Folding, target: Path) -> dict[str, StoredTensor]:
    """Writes what `folding` makes of weights that the plan does not quantise, norms and biases, as fp32, into a
    safetensors file; returns them by the names that graphs know them by."""
    planned = source.planned
    v = planned.variants[0]
    decode = StagedModel(planned.decoder, v.plan, v.budget, dtype=planned.dtype, names=WeightRef).decode()
    roles = {role: spec.shape for role, spec in decode.weights.items() if role not in planned.forms}
    changed = {role: shape for role, shape in roles.items() if folding.changes(role)}
    held = {source.names(role).name: ("F32", shape) for role, shape in changed.items()}
    write_safetensors(target, held, (folding.fold(role, source.read(role, s)).whole() for role, s in changed.items()))
    return read_header(target)


def _rounded(form: LinearForm, dtype: Dtype) -> Rounded:
    return lambda weight: dequantise(quantise(weight, form, dtype), form, dtype)


def _sample(source: Source, role: str, shape: tuple[int, int]) -> Floats:
    """Returns some rows of a linear layer's weight, [n,in]."""
    rows = np.random.default_rng(0).permutation(shape[0])[:_OUTPUTS]
    return source.read(role, shape, np.sort(rows))
