"""Binding: which stored tensor is which weight, and ONNX initializers that point into safetensors files."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from himap_export.engines.weight_file import StoredTensor, check_float, find_tensor
from himap_export.exporter.family import Family
from himap_export.graphs.build import StageGraph
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import LinearForm, Rows, WeightRef


@dataclass(frozen=True)
class WeightNames:
    """Roles ("layers.0.mlp.up_proj.weight") to names in this checkpoint, by the layouts that its `family` allows.

    If none of its `names` are known, to those of the published checkpoints: the first candidate. `forms`: of the roles
    that are quantised.
    """

    names: Container[str]
    family: Family[Any]
    forms: Mapping[str, LinearForm] = field(default_factory=dict)

    def __call__(self, role: str) -> WeightRef:
        """Returns the weight as which the checkpoint stores `role`; HimapError if it does not."""
        name, rows, form = self._name(role), self.family.rows(role), self.forms.get(role)
        if rows is None:
            return WeightRef(name, form=form)
        return WeightRef(f"{name}[{rows[0]}:{rows[1]}]", Rows(name, *rows), form)

    def _name(self, role: str) -> str:
        is_tied = role == "lm_head.weight" and self.family.tied
        if not self.names:
            return next(self.family.names("embed_tokens.weight" if is_tied else role))
        for name in self.family.names(role):
            if name in self.names:
                return name
        if is_tied:
            return self._name("embed_tokens.weight")
        tried = ", ".join(self.family.names(role))
        hint = "is this the checkpoint that config.json describes?"
        raise HimapError(f"the checkpoint holds no tensor {role}", f"looked for {tried}", hint, Exit.MISSING)


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
    Parts of quantised weights become constants: only so are they packed for kernels that read them as they are.
    `location` maps a stored tensor to its file, relative to the ONNX file. HimapError if a shape differs from the
    configuration's.
    """
    g = graph.model.graph
    for value in [v for v in g.inputs if v.name in graph.weights]:
        assert value.name is not None and value.dtype is not None
        spec = graph.weights[value.name]
        stored = tensors[value.name] if spec.constant else fitting(tensors, value.name, spec.shape, spec.rows)
        value.const_value = ir.ExternalTensor(
            location(stored), stored.offset, stored.nbytes, value.dtype,
            shape=ir.Shape(spec.shape), name=stored.name, base_dir="",
        )  # fmt: skip
        if spec.constant:
            g.inputs.remove(value)
        g.register_initializer(value)
    return graph.model
