"""What a criterion may look at when it ranks image tokens: the end of the layer before the cut."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import OpBuilder

from himap_export.graphs.build import dim
from himap_export.graphs.spec import DecoderSpec


@dataclass(frozen=True)
class ScoringContext:
    """What a criterion may look at, at the end of layer `layer` - 1. Nothing that it does not read enters the graph.

    query [B,H,S,E], key [B,G,S,E]: rotated; raw_query, raw_key: what was rotated, behind their norms where there are
    any; value [B,G,S,E]; hidden [B,S,D]: what the layer passes on; all in the model's dtype. token_type, position [B,S]
    int64; `seed` [B,1] int64, for random alone; of S tokens `visual` = V are image tokens, of which `keep` = V' will
    stay, and `text` = T are not. `final_norm` is the model's, behind its last layer; `coefficients` are the cut's.
    """

    op: OpBuilder
    spec: DecoderSpec
    query: ir.Value
    key: ir.Value
    value: ir.Value
    raw_query: ir.Value
    raw_key: ir.Value
    hidden: ir.Value
    layer_input: ir.Value  # [B*S,D]
    token_type: ir.Value
    position: ir.Value
    seed: ir.Value | None
    layer: int
    visual: int
    keep: int
    text: int
    final_norm: Callable[[ir.Value], ir.Value]
    coefficients: Sequence[float] = ()

    @property
    def previous(self) -> ir.Value:
        """What the layer was given, [B,S,D], as `hidden`; a node, so only where it is read."""
        return self.op.Reshape(self.layer_input, [dim(self.position, 0), dim(self.position, 1), self.spec.hidden])

    @property
    def normed(self) -> ir.Value:
        """What the layer passes on, as the head would read it, [B,S,D]; a node and a weight, so only where it is
        read."""
        return self.final_norm(self.hidden)


# Returns [B,S] fp32: of the image tokens those that score highest stay; what it says of others is not looked at.
Score = Callable[[ScoringContext], ir.Value]


def positions_of(op: OpBuilder, flags: ir.Value, tokens: int, count: int) -> ir.Value:
    """Returns indices [B,count], ascending, of the first `count` true `flags` [B,tokens]; `tokens` for missing ones."""
    order = op.Where(flags, list(range(tokens)), tokens)
    index, _ = op.TopK(order, [count], axis=1, largest=0, sorted=1, _outputs=2)
    return index
