"""Our graphs in OpenVINO's operators: rules for the ONNX nodes that its frontend reads slowly, wrongly or not at all.

1. `TensorScatter` it does not know. What prefill writes at a cache's head becomes the whole cache, zeros behind it. A
   token that decode appends is `Appended`: it stays outside the cache, which the graph then only reads.
2. `Attention` it reads as one operator that its CPU code takes apart again, transposing the whole key cache for each
   token. Ours is taken apart here: for one token keys times query, [C,E] x [E,n], so that the cache is read as it lies.
3. `Gemm` it reads as alpha * x W + beta * C. Folding an alpha of 1 into each weight copies it: seconds at 200 M.
4. `Mod` of integers its CPU code computes in fp32, wrongly beyond 2^24: refused where the divisor leaves no doubt.
5. `DequantizeLinear`, before a `Gemm`: in bf16 it would multiply the weights out; see `quantised`.
6. `Conv`, which cuts patches: in bf16 its CPU code is plainly wrong for the 6 channels of Qwen's towers (2026.4).

Why appends are taken out: a scatter that works in place gets memory of its own from the CPU plugin, so all caches would
be copied at every token, 30 MB and 10 of 42 ms in docs/log.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from himap_export.engines.extras import required
from himap_export.engines.openvino.quantised import Dequantized, dequantized, product
from himap_export.graphs.errors import HimapError

Rule = Callable[[Any], Any]  # from the frontend's node to OpenVINO's


@dataclass(frozen=True)
class Appended:
    """A cache [B,G,C,E] as the graph finds it, and `new` [B,G,1,E], which belongs into it at slots `at` [B]."""

    cache: Any
    new: Any
    at: Any


def rules(appended: dict[str, Appended], stored: Mapping[str, Dequantized], packed: bool) -> Mapping[str, Rule]:
    """Returns what makes OpenVINO's operators of ONNX nodes, by their types; appends to caches go into `appended`, by
    the name of the node that stands for the cache with the token in it. `stored`: quantised weights by the names of
    their integers; `packed`: see `quantised`."""
    weights = dict[str, Dequantized]()
    return {
        "TensorScatter": lambda node: _tensor_scatter(node, appended),
        "Attention": lambda node: _attention(node, appended),
        "DequantizeLinear": lambda node: dequantized(node, stored, weights),
        "Gemm": lambda node: _gemm(node, weights, packed),
        "Mod": _mod,
        "Conv": _patches,
    }


def _ops() -> Any:
    return required("openvino.opset15")


def _shape(value: Any) -> list[int]:
    return [axis.get_length() for axis in value.get_partial_shape()]


def _float(value: float, like: Any) -> Any:
    return _ops().convert(_ops().constant(np.float32(value)), like.get_element_type())


def _tensor_scatter(node: Any, appended: dict[str, Appended]) -> Any:
    """Writes [B,G,n,E] into a cache [B,G,C,E]: at its head, or one token at slots `at` [B]."""
    op, (cache, new, at) = _ops(), (node.get_input(i) for i in range(3))
    shape, count = _shape(cache), _shape(new)[2]
    head = at.get_node().get_type_name() == "Constant" and not np.any(at.get_node().get_data())
    if node.get_attribute("axis", -2) not in (2, -2) or len(shape) != 4 or not (head or count == 1):
        raise HimapError("TensorScatter writes neither at a cache's head nor one token, as our graphs do")
    if head:
        rest = op.broadcast(_float(0, new), [*shape[:2], shape[2] - count, shape[3]])
        return op.concat([new, rest], 2)
    here = op.equal(op.constant(np.arange(shape[2])[:, None]), op.reshape(at, [-1, 1, 1, 1], False))
    whole = op.select(here, new, cache)
    appended[whole.get_name()] = Appended(cache, new, at)
    return whole


def _attention(node: Any, appended: Mapping[str, Appended]) -> Any:
    """Attends from q [B,H,S,E] to k, v [B,G,C,E], causally or by a mask that broadcasts to [B,H,S,C], or to all."""
    op, (q, k, v) = _ops(), (node.get_input(i) for i in range(3))
    if node.get_input_size() > 4 or len(_shape(q)) != 4 or node.get_attribute("softcap", 0.0):
        raise HimapError("Attention has caches, flat heads or a cap, which no graph of ours has")
    scale = _float(node.get_attribute("scale", _shape(q)[3] ** -0.5), q)
    mask = node.get_input(3) if node.get_input_size() == 4 else None
    if k.get_node().get_name() in appended and mask is not None:
        keys, values = (appended[x.get_node().get_name()] for x in (k, v))
        return _cached(q, keys, values, mask=mask, scale=scale)
    if mask is not None and mask.get_element_type().to_string() == "boolean":
        mask = op.select(mask, _float(0, q), _float(-np.inf, q))
    if node.get_attribute("is_causal", 0):
        seen = np.arange(_shape(k)[2]) <= np.arange(_shape(q)[2])[:, None]
        causal = op.constant(np.where(seen, 0, -np.inf).astype(np.float32)[None, None])
        mask = op.convert(causal, q.get_element_type())
    logits = op.multiply(_by_head(q, k, True), scale)
    probability = op.softmax(logits if mask is None else op.add(logits, mask), -1).output(0)
    return _by_head(probability, v, False)


def _by_head(x: Any, y: Any, transposed: bool) -> Any:
    """Returns x [B,H,S,n] times the y [B,G,C,E] of each head's group."""
    op, (batch, heads, length, width), groups = _ops(), _shape(x), _shape(y)[1]
    if groups == heads or heads != length:
        return op.matmul(x, _repeated(y, heads // groups), False, transposed)
    # Of as many heads as tokens the CPU plugin's fused attention is wrong (2026.4): by groups it is not fused.
    product = op.matmul(op.reshape(x, [batch, groups, -1, width], False), y, False, transposed)
    return op.reshape(product, [batch, heads, length, -1], False)


def _cached(q: Any, keys: Appended, values: Appended, mask: Any, scale: Any) -> Any:
    """Attends from one token, q [B,H,1,E], to the caches as they are, the slot of its own hidden, and to itself."""
    op, (batch, heads, _, width) = _ops(), _shape(q)
    groups, length = _shape(keys.cache)[1:3]
    by_group = op.reshape(q, [batch, groups, heads // groups, width], False)
    own = op.equal(op.constant(np.arange(length)), op.reshape(keys.at, [-1, 1, 1, 1], False))
    hidden = op.select(own, _float(-np.inf, q), mask)
    # Keys times query: the other way round the CPU plugin transposes the cache.
    past = op.transpose(op.matmul(keys.cache, by_group, False, True), [0, 1, 3, 2])
    past = op.add(op.multiply(past, scale), hidden)
    itself = op.multiply(op.matmul(by_group, keys.new, False, True), scale)
    probability = op.softmax(op.concat([past, itself], 3), -1)
    parts = op.variadic_split(probability, op.constant(np.int64(3)), op.constant(np.array([length, 1])))
    out = op.add(op.matmul(parts.output(0), values.cache, False, False), op.multiply(parts.output(1), values.new))
    return op.reshape(out, [batch, heads, 1, width], False)


def _repeated(x: Any, share: int) -> Any:
    """Returns [B,G,C,E] as [B,G*share,C,E], each head as often as queries share it."""
    if share == 1:
        return x
    op, (batch, groups, length, width) = _ops(), _shape(x)
    wide = op.broadcast(op.unsqueeze(x, [2]), [batch, groups, share, length, width])
    return op.reshape(wide, [batch, groups * share, length, width], False)


def _gemm(node: Any, weights: Mapping[str, Dequantized], packed: bool) -> Any:
    """Multiplies [M,in] by [in,out] or, transposed, [out,in], and adds what there is to add.

    One row of 16 bits is the weights' right-hand side instead: so they are read as they lie in their file, at the
    memory's speed. The other way round the CPU plugin keeps a copy of its own, and reads it at two thirds of that.
    """
    op, x, weight = _ops(), node.get_input(0), node.get_input(1)
    if node.get_attribute("alpha", 1.0) != 1 or node.get_attribute("beta", 1.0) != 1:
        raise HimapError("Gemm scales its factors, which no graph of ours does")
    turned, by_out = (bool(node.get_attribute(name, 0)) for name in ("transA", "transB"))
    if (stored := weights.get(weight.get_node().get_name())) is not None and not (turned or by_out):
        y = product(x, stored, packed)
    elif by_out and not turned and _shape(x)[0] == 1 and x.get_element_type().size == 2:
        y = op.reshape(op.matmul(weight, x, False, True), [1, -1], False)
    else:
        y = op.matmul(x, weight, turned, by_out)
    return op.add(y, node.get_input(2)) if node.get_input_size() == 3 else y


def _patches(node: Any) -> Any:
    """Multiplies the whole patches of images [B,C,Y,X] by weights [out,C,h,w], and adds what there is to add."""
    op, x, weight = _ops(), node.get_input(0), node.get_input(1)
    (batch, channels, height, width), (out, _, h, w) = _shape(x), _shape(weight)
    plain = not any(node.get_attribute("pads", [0])) and node.get_attribute("group", 1) == 1
    if list(node.get_attribute("strides", [1, 1])) != [h, w] or not plain:
        raise HimapError("Conv does something else than cut patches, which no graph of ours does")
    grid = height // h, width // w
    if (grid[0] * h, grid[1] * w) != (height, width):
        x = op.slice(x, [0, 0], [grid[0] * h, grid[1] * w], [1, 1], [2, 3]).output(0)
    tiles = op.reshape(x, [batch, channels, grid[0], h, grid[1], w], False)
    rows = op.reshape(op.transpose(tiles, [0, 2, 4, 1, 3, 5]), [batch, grid[0] * grid[1], channels * h * w], False)
    y = op.matmul(rows, op.reshape(weight, [out, channels * h * w], False), False, True)
    y = op.add(y, node.get_input(2)) if node.get_input_size() == 3 else y
    return op.reshape(op.transpose(y, [0, 2, 1]), [batch, out, *grid], False)


def _mod(node: Any) -> Any:
    """Returns x modulo a constant up to 2^22; HimapError for any other, as random scores had in older bundles."""
    divisor = node.get_input(1).get_node()
    known = divisor.get_type_name() == "Constant" and not node.get_attribute("fmod", 0)
    if not known or not 0 < np.min(divisor.get_data()) <= np.max(divisor.get_data()) <= 2**22:
        raise HimapError("Mod divides by something else than a constant up to 2^22", "its graph is of an older bundle")
    return _ops().floor_mod(node.get_input(0), divisor)
