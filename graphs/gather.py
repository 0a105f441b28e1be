"""`himap::TopKGather`: one custom node whose model-local function says, in standard operators, exactly what it does.

Runtimes that know no such operator inline the function; TensorRT uses a plugin of that name instead when one is
registered.
"""

from functools import cache

import onnx
import onnx_ir as ir
from onnxscript import OpBuilder

from himap_export.graphs.build import DOMAIN, dim

# The keep-th largest score is certain even where TopK's order among equal scores is not: keep all that lie above it,
# then fill up from its equals by lowest index. Only then sort what is kept by place. NaN ranks last.
_BODY = """
<domain: "himap", opset_import: ["" : 24]>
TopKGather <keep> (x, score, position, token_type) => (y, kept_position, kept_type)
{
  keep = Constant <value_int: int = @keep> ()
  axis = Constant <value_ints = [1]> ()
  last = Constant <value_ints = [-1]> ()
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  worst = Constant <value = float {-inf}> ()
  keep1 = Reshape (keep, last)

  missing = IsNaN (score)
  rank = Where (missing, worst, score)
  best, unordered = TopK <axis = 1> (rank, keep1)
  threshold = ReduceMin <keepdims = 1> (best, axis)
  above = Greater (rank, threshold)
  equal = Equal (rank, threshold)
  above01 = Cast <to = 7> (above)
  equal01 = Cast <to = 7> (equal)
  taken = ReduceSum <keepdims = 1> (above01, axis)
  room = Sub (keep, taken)
  turn = CumSum (equal01, one)
  fits = LessOrEqual (turn, room)
  filled = And (equal, fits)
  kept = Or (above, filled)

  length1 = Shape <start = 1, end = 2> (score)
  length = Squeeze (length1)
  place = Range (zero, length, one)
  order = Where (kept, place, length)
  index, ascending = TopK <axis = 1, largest = 0, sorted = 1> (order, keep1)

  row = Unsqueeze (index, last)
  y = GatherND <batch_dims = 1> (x, row)
  kept_position = GatherElements <axis = 1> (position, index)
  kept_type = GatherElements <axis = 1> (token_type, index)
}
"""


@cache
def _function_proto() -> onnx.FunctionProto:
    return onnx.parser.parse_function(_BODY)


def top_k_gather(
    op: OpBuilder, x: ir.Value, score: ir.Value, position: ir.Value, token_type: ir.Value, keep: int
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Keeps `keep` = S' tokens, those of highest score, in their order; of equals the lowest index, NaN ranks last.

    x [B,S,D] fp16, bf16 or fp32; score [B,S] fp32, +inf for tokens that must stay; position, token_type [B,S] int64.
    Returns x' [B,S',D], position' and token_type' [B,S'].
    """
    batch, hidden = dim(x, 0), dim(x, 2)
    function = ir.from_proto(_function_proto())
    attributes = {"keep": keep, "plugin_namespace": DOMAIN, "plugin_version": "1"}
    y, kept_position, kept_type = op.call(function, x, score, position, token_type, **attributes)
    y.shape, y.type = ir.Shape([batch, keep, hidden]), x.type
    for value in (kept_position, kept_type):
        value.shape, value.type = ir.Shape([batch, keep]), ir.TensorType(ir.DataType.INT64)
    return y, kept_position, kept_type
