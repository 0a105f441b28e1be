"""Criteria of one's own: how tokens are ranked inside a graph, and how the reference says that they should be."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from himap_export.graphs.importance import register_score
from himap_export.graphs.scoring import ScoringContext

if TYPE_CHECKING:
    from torch import Tensor

    from himap_export.validate.reference.criteria import State


def register_criterion(
    name: str,
    score: Callable[[ScoringContext], ir.Value],
    reference: "Callable[[State, int, int], Tensor] | None" = None,
) -> None:
    """Registers an importance score, so that a cut may name it as its criterion.

    `score` builds it into a graph: of a ScoringContext, the importance [B,S] fp32 of each token, of which only that of
    image tokens counts. `reference` says it again in PyTorch, for `validate`: of the reference's State, the number of
    tokens that stay, and a seed, the scores [V] of the image tokens alive; without it a bundle can be exported and run,
    not judged. HimapError (usage) if the name is taken.
    """
    register_score(name, score)
    if reference is not None:
        from himap_export.validate.reference.criteria import register_reference  # torch: seconds to import

        register_reference(name, reference)
