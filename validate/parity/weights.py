"""Whether the weights of a quantised bundle are its checkpoint's, rounded.

Parity cannot tell: its reference computes with the bundle's own weights, so a bundle that holds those of another layer
would pass. Here each decoder tensor is compared with the checkpoint's, as far as the model's function goes: an export
may scale what linear layers read if they scale it back, as AWQ does. So the checkpoint's weight is taken as it would be
behind the bundle's norm, and an output of v_proj or up_proj may be larger by any factor that o_proj or down_proj
divides by. Errors are those of the weights as they were rounded: AWQ lets go of inputs that are always small.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from himap_export.engines.bundle import Bundle
from himap_export.engines.checkpoint_files import stored_tensors
from himap_export.exporter.bind import WeightNames
from himap_export.exporter.registry import resolve
from himap_export.graphs.ports import WeightRef
from himap_export.graphs.spec import DecoderSpec
from himap_export.graphs.stages import StagedModel
from himap_export.validate.checkpoint import Source
from himap_export.validate.dequantised import read_tensor
from himap_export.validate.parity.compare import Gate, Parity
from himap_export.validate.parity.tensors import TensorDiff, worst

Floats = npt.NDArray[np.float32]
# Of a weight, root mean square. 4 bits err by 0.07 to 0.15; another layer's weights by 1.4, twice the scale by 1.
LIMIT = 0.4
_READS = {
    "self_attn.q_proj": "input_layernorm", "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}  # fmt: skip
_TAKES_BACK = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}


class Decoder:
    """The decoder's tensors in the checkpoint `folder`, by role, in fp32; they are called as in `model`."""

    def __init__(self, folder: Path, model: Source) -> None:
        self._files = {name: t.file for name, t in stored_tensors([folder]).items()}
        self._names = WeightNames(self._files, resolve(str(model.folder), vision_tower=model.tower).family)

    def __getitem__(self, role: str) -> Floats:
        ref = self._names(role)
        rows = slice(None) if ref.rows is None else slice(ref.rows.start, ref.rows.stop)
        found: Floats = read_tensor(self._files, ref.name, rows).float().numpy()
        return found


def weight_errors(bundle: Bundle, original: Source, rounded: Source) -> dict[str, float]:
    """Returns, by role, how far each decoder tensor of the checkpoint `rounded` lies from that of `original`, scaled as
    its own: root mean square, relative to the original's."""
    v, m = bundle.select().variant, bundle.manifest
    decode = StagedModel(spec=m.decoder, plan=v.plan, budget=v.budget, dtype=m.dtype, names=WeightRef).decode()
    actual, expected = Decoder(rounded.folder, original), Decoder(original.folder, original)
    roles = [role for role in decode.weights if not role.endswith("layernorm.weight") and role != "norm.weight"]
    return {role: _error(role, actual, expected, m.decoder) for role in roles}


def with_weights(parity: Parity, errors: Mapping[str, float]) -> Parity:
    """Returns the same parity with the weights in front, the one that lies furthest, and their gate."""
    role = max(errors, key=lambda role: errors[role])
    row = TensorDiff("weights", errors[role], 1.0, float(np.sqrt(max(0.0, 1 - errors[role] ** 2))))
    note = f"weights: the furthest is {role}, off by {errors[role]:.1%} of the checkpoint's (root mean square)"
    gate = Gate("weights", errors[role], LIMIT)
    return replace(parity, tensors=(row, *parity.tensors), gates=(gate, *parity.gates), notes=(*parity.notes, note))


def _error(role: str, actual: Decoder, expected: Decoder, spec: DecoderSpec) -> float:
    layer, part, kind = _split(role)
    a, b = actual[role], _behind_norm(role, actual, expected)
    with np.errstate(divide="ignore", invalid="ignore"):  # by 0, of an output that is no multiple of the checkpoint's
        if part in _TAKES_BACK.values():
            factors = _factors(f"{layer}{part}.weight", actual, expected)
            b = b / (factors if kind == "bias" else factors[:, None])
        elif part in _TAKES_BACK and kind == "weight":
            factors = _factors(f"{layer}{_TAKES_BACK[part]}.weight", actual, expected)
            if len(factors) < b.shape[1]:  # each key-value head serves several queries'
                factors = factors.reshape(spec.kv_heads, 1, -1).repeat(spec.heads // spec.kv_heads, axis=1).ravel()
            b = b * factors
    size = float(np.linalg.norm(b))
    return worst(np.array([np.linalg.norm(a - b) / size if size else np.linalg.norm(a)]))


def _behind_norm(role: str, actual: Decoder, expected: Decoder) -> Floats:
    """The checkpoint's tensor; of a linear layer that reads a norm, as it must be to read the bundle's norm."""
    layer, part, kind = _split(role)
    norm = f"{layer}{_READS[part]}.weight" if part in _READS else "norm.weight" if part == "lm_head" else None
    if norm is None or kind != "weight":
        return expected[role]
    own, theirs = actual[norm], expected[norm]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(expected[role] * np.where(own == theirs, 1, theirs / own), np.float32)


def _factors(role: str, actual: Decoder, expected: Decoder) -> Floats:
    """By which each output [out] of a linear layer is to be multiplied to be the checkpoint's, at best."""
    a, b = actual[role], _behind_norm(role, actual, expected)
    product, square = (a * b).sum(axis=1), (a * a).sum(axis=1)
    return np.asarray(np.divide(product, square, out=np.ones_like(product), where=square > 0), np.float32)


def _split(role: str) -> tuple[str, str, str]:
    """Returns of layers.3.mlp.up_proj.weight the layer, "layers.3.", the part, "mlp.up_proj", and "weight"."""
    name, _, kind = role.rpartition(".")
    layer = re.match(r"(layers\.\d+\.)?(.*)", name)
    assert layer is not None  # it matches anything
    return layer[1] or "", layer[2], kind
