"""From an ONNX graph in a file to OpenVINO's model: read by our rules, weights put in, linear layers merged."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.extras import required
from himap_export.engines.openvino.operators import Appended, Rule, rules
from himap_export.engines.openvino.quantised import Dequantized
from himap_export.graphs.errors import HimapError

_NONE: Mapping[str, Dequantized] = MappingProxyType({})
UNKNOWN = "No conversion rule found"  # so says OpenVINO of operators


@dataclass(frozen=True)
class Append:
    """An output of the ONNX graph that the model gives in two parts: what is new in a cache, and at which slots."""

    new: str
    at: str


@dataclass(frozen=True)
class ReadGraph:
    """OpenVINO's model of a graph, and by the ONNX graph's outputs, the caches that it leaves to others to update."""

    model: Any
    appends: Mapping[str, Append]


class Frontend:
    """OpenVINO's ONNX frontend, and no other, with the rules for our graphs, which are read one at a time."""

    def __init__(self, quantised: Mapping[str, Dequantized] = _NONE, packed: bool = False) -> None:
        """`quantised`: weights by the names of their integers; `packed`: see the module of that name."""
        self._appended, self._refused = dict[str, Appended](), list[HimapError]()
        self._onnx = required("openvino.frontend").FrontEndManager().load_by_framework("onnx")
        made = required("openvino.frontend.onnx").ConversionExtension
        for name, rule in rules(self._appended, quantised, packed).items():
            self._onnx.add_extension(made(name, lambda node, rule=rule: self._converted(node, rule)))

    def _converted(self, node: Any, rule: Rule) -> Any:
        """Returns the outputs of what `rule` makes of a node; why it refuses one is kept: OpenVINO does not tell."""
        try:
            return rule(node).outputs()
        except HimapError as problem:
            self._refused.append(problem)
            raise

    def read(self, path: Path, weights: Mapping[str, npt.NDArray[Any]]) -> ReadGraph:
        """Returns the graph in `path`; `weights` stand for the inputs of their names. HimapError for a node that a rule
        refuses, OpenVINO's own errors for what else it cannot read."""
        self._appended.clear()
        self._refused.clear()
        try:
            model = self._onnx.convert(self._onnx.load(str(path)))
        except Exception as problem:  # OpenVINO's share no base class
            # Behind an operator that nobody knows shapes are not known either, which rules refuse.
            if self._refused and UNKNOWN not in str(problem):
                raise self._refused[0] from None
            raise
        _fill(model, weights)
        appends = dict(self._taken_out(model))
        if appends:  # one token: what it costs is reading the weights, in as few pieces as can be
            _merge_linear_layers(model)
            _leave_slots_open(appended.cache.get_node() for appended in self._appended.values())
        for parameter in model.get_parameters():
            if not parameter.output(0).get_target_inputs():  # a cache that prefill only writes
                model.remove_parameter(parameter)
        model.validate_nodes_and_infer_types()
        return ReadGraph(model, appends)

    def _taken_out(self, model: Any) -> Iterator[tuple[str, Append]]:
        """Gives the new tokens, and the slots they belong to, in the places of outputs that are caches with them."""
        slots = dict[str, str]()
        for result in model.get_results():
            port = result.input_value(0)
            found = self._appended.get(port.get_node().get_name())
            if found is None:
                continue
            (name,) = port.get_names()
            port.set_names(set())
            model.remove_result(result)
            source = found.at.get_node().get_name()
            if source not in slots:
                slots[source] = _add_output(model, found.at, f"at.{name}")
            yield name, Append(_add_output(model, found.new, f"new.{name}"), slots[source])


def _add_output(model: Any, value: Any, name: str) -> str:
    """Gives a value as an output of that name. Its own node, not the value's: that has names already, and readers."""
    op = required("openvino.opset15")
    copied = op.reshape(value, op.constant(np.array(value.get_shape())), False)
    copied.output(0).set_names({name})
    model.add_results([op.result(copied)])
    return name


def _fill(model: Any, weights: Mapping[str, npt.NDArray[Any]]) -> None:
    """Puts constants over mapped memory in the places of inputs that are weights."""
    ov = required("openvino")
    for parameter in model.get_parameters():
        array = weights.get(parameter.get_friendly_name())
        if array is not None:
            shared = ov.Tensor(np.asarray(array), list(array.shape), parameter.get_element_type())
            parameter.output(0).replace(ov.op.Constant(shared, shared_memory=True).output(0))
            model.remove_parameter(parameter)


def _leave_slots_open(caches: Iterable[Any]) -> None:
    """Leaves the slots of caches [B,G,C,E] uncounted: beside an input of a fixed shape the CPU plugin holds as much
    memory of its own, all caches once more."""
    ov = required("openvino")
    for cache in caches:
        batch, heads, _, width = cache.get_partial_shape()
        cache.set_partial_shape(ov.PartialShape([batch, heads, ov.Dimension.dynamic(), width]))


def _merge_linear_layers(model: Any) -> None:
    """Makes one product of those that read the same input: query, key and value; gate and up."""
    op, readers = required("openvino.opset15"), defaultdict[tuple[str, int], list[Any]](list)
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or not node.get_attributes()["transpose_b"]:
            continue
        x, weight = node.input_value(0), node.input_value(1)
        if weight.get_node().get_type_name() == "Constant":
            readers[x.get_node().get_name(), x.get_index()].append(node)
    for nodes in readers.values():
        if len(nodes) == 1:
            continue
        y = op.matmul(
            nodes[0].input_value(0), _stacked([node.input_value(1).get_node() for node in nodes]), False, True
        )
        sizes = [node.input_value(1).get_shape()[0] for node in nodes]
        parts = op.variadic_split(y, op.constant(np.int64(-1)), op.constant(np.array(sizes)))
        for node, part in zip(nodes, parts.outputs(), strict=True):
            node.output(0).replace(part)


def _stacked(constants: list[Any]) -> Any:
    """Returns weights [out,in] of one width below one another, as a constant of its own memory."""
    ov, like = required("openvino"), constants[0].output(0)
    rows = [constant.output(0).get_shape()[0] for constant in constants]
    tensor = ov.Tensor(like.get_element_type(), [sum(rows), *like.get_shape()[1:]])
    words = np.dtype(f"u{like.get_element_type().size}")
    np.concatenate([constant.data.view(words) for constant in constants], out=tensor.data.view(words))
    return ov.op.Constant(tensor, shared_memory=True)
