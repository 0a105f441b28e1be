"""Binding: which stored tensor is which weight, and ONNX initializers that point into safetensors files."""

from collections.abc import Callable, Container, Iterator, Mapping

import onnx_ir as ir

from himap_export.engines.weight_file import StoredTensor, check_float, find_tensor
from himap_export.graphs.build import StageGraph
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import Rows, WeightRef

RowsOf = Callable[[str], tuple[int, int] | None]  # of a role


class WeightNames:
    """Roles ("layers.0.mlp.up_proj.weight") to names in this checkpoint, by the candidates a family's layouts allow.

    If none of its `names` are known, to those of the published checkpoints: the first candidate.
    """

    def __init__(
        self, names: Container[str], candidates: Callable[[str], Iterator[str]], tied: bool, rows: RowsOf
    ) -> None:
        self._names, self._candidates, self._tied, self._rows = names, candidates, tied, rows

    def __call__(self, role: str) -> WeightRef:
        """Returns the weight as which the checkpoint stores `role`; HimapError if it does not."""
        name, rows = self._name(role), self._rows(role)
        return WeightRef(name) if rows is None else WeightRef(f"{name}[{rows[0]}:{rows[1]}]", Rows(name, *rows))

    def _name(self, role: str) -> str:
        if not self._names:
            return next(self._candidates("embed_tokens.weight" if self._is_tied(role) else role))
        for name in self._candidates(role):
            if name in self._names:
                return name
        if self._is_tied(role):
            return self._name("embed_tokens.weight")
        tried = ", ".join(self._candidates(role))
        hint = "is this the checkpoint that config.json describes?"
        raise HimapError(f"the checkpoint holds no tensor {role}", f"looked for {tried}", hint, Exit.MISSING)

    def _is_tied(self, role: str) -> bool:
        return role == "lm_head.weight" and self._tied


def fitting(
    tensors: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...], rows: Rows | None = None
) -> StoredTensor:
    """Returns the tensor `name`, which `WeightNames` has found; HimapError (usage) if it has no type that a weight may
    have, or its shape is not the configuration's."""
    stored = find_tensor(tensors, name, rows)
    assert stored is not None, name
    check_float(stored)
    if stored.shape != shape:
        details = f"its shape is {list(stored.shape)}, the model's configuration says {list(shape)}"
        hint = "is this the checkpoint of that model?"
        raise HimapError(f"tensor {stored.name} does not fit", details, hint, Exit.USAGE)
    return stored


def bind(graph: StageGraph, tensors: Mapping[str, StoredTensor], location: Callable[[StoredTensor], str]) -> ir.Model:
    """Gives each weight input of the graph a default, an initializer at its place in a safetensors file, and returns
    the graph's model.

    They stay inputs, because a runtime may compute on a constant: onnxruntime would hold fp32 copies of all fp16 ones.
    `location` maps a stored tensor to its file, relative to the ONNX file. HimapError if a shape differs from the
    configuration's.
    """
    g = graph.model.graph
    for value in [v for v in g.inputs if v.name in graph.weights]:
        assert value.name is not None and value.dtype is not None
        spec = graph.weights[value.name]
        stored = fitting(tensors, value.name, spec.shape, spec.rows)
        value.const_value = ir.ExternalTensor(
            location(stored), stored.offset, stored.nbytes, value.dtype,
            shape=ir.Shape(spec.shape), name=stored.name, base_dir="",
        )  # fmt: skip
        g.register_initializer(value)
    return graph.model
