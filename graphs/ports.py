"""The tensors that enter and leave a bundle's graphs, and what the graphs promise each other about them.

Each is a port with a role. Ports of one `Place` (role, layer, cut) are one tensor: it is allocated once, and what one
graph writes there the next one reads in place. So how stages connect follows from their ports, and from nothing else:

    role                                              written by                    read by
    pixel_values, of one picture or film              the caller                    vision
    seen_features, seen_deepstack of a layer          vision                        the caller
    image_features, deepstack of a layer              the caller, of all pictures   the stages
    input_ids, position_ids, token_type,
      rope_position_ids, seed                         the caller, of the prompt     the stages
    hidden, score of a cut                            the stage before the cut      the stage that it opens
    kept_positions, kept_types of a cut               the stage that it opens       the stage behind that
    key, value of a layer: its cache                  its stage and decode, which update it in place
    next_id, next_position, next_rope_position        the caller, of each token     decode
    last_hidden                                       the last stage                the caller
    logits                                            the last stage and decode     the caller

Where a plan has slots, decode is there once more, over tensors of as many rows. Row i of its caches takes what prefill
writes for the request in slot i; the rest of its tensors are its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct

from himap_export.graphs.spec import Dtype

ElementType = Literal[Dtype, "int64", "int8", "int4", "fp8", "fp4"]  # the last two: E4M3, E2M1
Kind = Literal["int8", "int4", "fp8", "nvfp4", "int8-dynamic"]  # of quantised weights
Role = Literal[
    "pixel_values", "seen_features", "seen_deepstack", "image_features", "deepstack", "input_ids", "position_ids",
    "token_type", "rope_position_ids", "seed", "hidden", "score", "kept_positions", "kept_types", "key", "value",
    "next_id", "next_position", "next_rope_position", "last_hidden", "logits",
]  # fmt: skip
# What ports are called in ONNX files that are not called by their role: `{layer}` and `{cut}` are theirs to say.
_NAMES: Mapping[Role, str] = {
    "seen_features": "image_features", "seen_deepstack": "deepstack_{layer}", "deepstack": "deepstack_{layer}",
    "hidden": "hidden_k{cut}", "score": "score_k{cut}", "last_hidden": "hidden", "kept_positions": "kept_k{cut}",
    "kept_types": "type_k{cut}", "key": "past_key.{layer}", "value": "past_value.{layer}", "next_id": "input_ids",
    "next_position": "position_ids", "next_rope_position": "rope_position_ids",
}  # fmt: skip
_UPDATED: Mapping[Role, str] = {"key": "present_key.{layer}", "value": "present_value.{layer}"}  # the caches' outputs
_CALLER: tuple[Role, ...] = (
    "pixel_values", "image_features", "deepstack", "input_ids", "position_ids", "token_type", "rope_position_ids",
    "seed", "next_id", "next_position", "next_rope_position",
)  # fmt: skip
_ALWAYS: tuple[Role, ...] = (
    "pixel_values", "seen_features", "image_features", "input_ids", "position_ids", "token_type", "next_id",
    "next_position", "last_hidden", "logits",
)  # fmt: skip

Size = Annotated[int, Meta(ge=0, lt=2**40)]  # of one axis, or of a file in bytes
Index = Annotated[int, Meta(ge=0, le=1024)]


class Place(NamedTuple):
    """Which tensor of a bundle: what it is, and of which layer or cut (1, 2, ..) if there are several."""

    role: Role
    layer: int | None = None
    cut: int | None = None

    def name(self, updated: bool = False) -> str:
        """Returns what its port is called in ONNX files: `updated`, the output of a cache that is updated."""
        form = _UPDATED[self.role] if updated else _NAMES.get(self.role, self.role)
        return form.format(layer=self.layer, cut=self.cut)

    def fits(self) -> bool:
        """Tells whether it says of which layer or cut it is, as its role wants it."""
        form = _NAMES.get(self.role, self.role)
        return ("{layer}" in form, "{cut}" in form) == (self.layer is not None, self.cut is not None)


class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A static tensor."""

    dtype: ElementType
    shape: Annotated[tuple[Size, ...], Meta(max_length=8)]


class Port(TensorSpec, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A tensor that enters or leaves a graph. `updates`: the input whose memory this output shares."""

    role: Role
    layer: Index | None = None
    cut: Index | None = None
    updates: Annotated[str, Meta(max_length=500)] | None = None

    @property
    def place(self) -> Place:
        return Place(self.role, self.layer, self.cut)


class Rows(Struct, frozen=True, forbid_unknown_fields=True):
    """Rows `start` to `stop` of a stored tensor: what is one weight to a graph and a part of a fused one on disk."""

    tensor: Annotated[str, Meta(min_length=1, max_length=500)]
    start: Size
    stop: Size


class LinearForm(Struct, frozen=True, forbid_unknown_fields=True):
    """How the weight of a linear layer is quantised. `block`: inputs that share a scale; 0: all of an output do."""

    kind: Kind
    block: Annotated[int, Meta(ge=0, le=1024)] = 0


class WeightSpec(TensorSpec, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A weight that a graph reads: the stored tensor of its name, or `rows` of another. `constant`: a part of a
    quantised weight, which backends pack as they like; all others are inputs."""

    rows: Rows | None = None
    constant: bool = False


class WeightRef(NamedTuple):
    """What a weight is called in graphs, which rows of a stored tensor it is, if not the tensor of that name, and how
    it is quantised, if it is."""

    name: str
    rows: Rows | None = None
    form: LinearForm | None = None


class GraphPorts(NamedTuple):
    """What one graph reads and writes, by the names in its ONNX file."""

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]


def graph_problems(graph: GraphPorts) -> Iterator[str]:
    """Yields what the ports of one graph say that cannot be so."""
    for name, port in (*graph.inputs.items(), *graph.outputs.items()):
        if not port.place.fits():
            yield f"{name} is {port.role} of layer {port.layer} and cut {port.cut}"
    for name in (name for name, port in graph.inputs.items() if port.updates is not None or name in graph.outputs):
        yield f"{name} is an output, too"
    for name, port in graph.outputs.items():
        if (port.updates is not None) != (port.role in _UPDATED):
            yield f"{name} updates {port.updates or 'no input'}"
        elif port.updates is not None:
            old = graph.inputs.get(port.updates)
            if old is None or (old.place, old.dtype, old.shape) != (port.place, port.dtype, port.shape):
                yield f"{name} updates {port.updates}, which is no such input"
    for ports in graph:
        if len({port.place for port in ports.values()}) < len(ports):
            yield f"two of {', '.join(ports)} are one"


def chain_problems(chain: Sequence[GraphPorts], cuts: int) -> Iterator[str]:
    """Yields what vision, the stages of prefill and decode, in their order, promise each other and do not keep."""
    decode, known, written = chain[-1], dict[Place, Port](), set[Place]()
    for graph in chain:
        for name, port in (*graph.inputs.items(), *graph.outputs.items()):
            first = known.setdefault(port.place, port)
            if (first.dtype, first.shape) != (port.dtype, port.shape):
                yield f"{name} is {port.dtype}{list(port.shape)} and {first.dtype}{list(first.shape)}"
        for name, port in graph.inputs.items():
            own = port.role in _UPDATED and graph is not decode
            if port.role not in _CALLER and not own and port.place not in written:
                yield f"nothing writes {name} before it is read"
        for name, port in graph.outputs.items():
            if port.role in _CALLER or (port.place in written and graph is not decode):
                yield f"two write {name}"
        written |= {port.place for port in graph.outputs.values()}
    at_cuts: tuple[Role, ...] = ("hidden", "kept_positions", "kept_types")
    wanted = [Place(role) for role in _ALWAYS]
    wanted += [Place(role, cut=cut) for cut in range(1, cuts + 1) for role in at_cuts]
    yield from (f"no graph has {place.name()}" for place in wanted if place not in known)


def seen_as(place: Place) -> Place:
    """Returns where the stages read what vision writes at `place`, of all pictures of a prompt."""
    return place._replace(role="image_features" if place.role == "seen_features" else "deepstack")


def vision_problems(vision: GraphPorts, stages: Sequence[GraphPorts], images: int) -> Iterator[str]:
    """Yields where what `stages` read of `images` pictures a prompt is not so many times what `vision` writes of
    one."""
    read = {port.place: port for graph in stages for port in graph.inputs.values()}
    for name, port in vision.outputs.items():
        if port.role not in ("seen_features", "seen_deepstack") or len(port.shape) != 3 or port.shape[0] != 1:
            yield f"vision writes {name}, which is {port.role} {list(port.shape)}"
        elif (found := read.get(seen_as(port.place))) is None:
            yield f"nothing reads {name}"
        elif (found.dtype, found.shape[1:]) != (port.dtype, (images * port.shape[1], port.shape[2])):
            yield f"{name} is {list(port.shape)} of one picture and {list(found.shape)} of {images}"
    for place in read.keys() - {seen_as(port.place) for port in vision.outputs.values()}:
        if place.role in ("image_features", "deepstack"):
            yield f"vision does not write {place.name()}"


def slots_problems(decode: GraphPorts, slots: GraphPorts, rows: int) -> Iterator[str]:
    """Yields where the ports of `slots` are not those of `decode` for one prompt, over as many `rows`."""
    for side, found in zip(decode, slots, strict=True):
        wanted = {name: (p.place, p.dtype, (rows, *p.shape[1:]), p.updates) for name, p in side.items()}
        actual = {name: (p.place, p.dtype, p.shape, p.updates) for name, p in found.items()}
        yield from (f"slots has not decode's {name}" for name in wanted if actual.get(name) != wanted[name])
        yield from (f"slots has {name}, which decode has not" for name in actual.keys() - wanted.keys())
