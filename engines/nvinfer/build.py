"""From an ONNX graph to an engine: parsed, configured, built, written, and read back for what it became."""

import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Literal

from himap_export.engines.backends import Gather
from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import EngineRecord
from himap_export.engines.nvinfer.edition import Edition, log_of, one_line
from himap_export.engines.nvinfer.kernels import UNSEEN, kernels, layers, multiplied_out
from himap_export.graphs.errors import Exit, HimapError


def check(edition: Edition, dtype: str) -> None:
    """Raises HimapError if the product has no fused attention in `dtype`, or is not installed."""
    if dtype == "fp32":
        hint = "use `dtype` fp16 or bf16"
        raise HimapError(f"{edition.title} has no fused attention kernel in fp32", hint=hint, code=Exit.USAGE)
    edition.api()


def build(edition: Edition, bundle: Bundle, graph: str, gather: Gather) -> EngineRecord:
    """Compiles one graph into `<edition>/<graph>.engine`; `gather` "plugin" or "ops" says which form it must hold.

    Weights are the engine's inputs, so that it is small and all engines share one copy; unless the bundle embeds them:
    then they are constants inside it.
    """
    trt, log, start = edition.api(), log_of(edition), time.perf_counter()
    log.clear()
    record, file = bundle.manifest.graphs[graph], f"{edition.name}/{graph}.engine"
    source, path = bundle.path(record.file), bundle.path(file)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    inside = bundle.manifest.weight_form == "embedded"
    targets = edition.targets({weight.kind for weight in bundle.manifest.quantised().values()})
    operators = _parse(edition, parser, source=source, inside=inside, weights=frozenset(record.weights))
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as out:
        built = builder.build_serialized_network_to_stream(
            network, _config(edition, builder, targets), _writer(trt, out)
        )
    if not built:
        path.unlink()
        raise _refused(edition, source, next(iter(log.errors), "the builder says no more"))
    form = _gather_form(trt, network, operators)
    if form not in ("none", gather):
        details = f"the engine of {graph} holds its {'standard operators' if form == 'ops' else form}"
        raise HimapError(f"{edition.title} did not take the gather as {gather}", details)
    if apart := multiplied_out(log.layers, record.weights.values()):
        path.unlink()
        raise _multiplies_out(edition, graph, apart)
    return EngineRecord(
        file, round(time.perf_counter() - start, 3), form,
        layers=layers(network), kernels=kernels(log.layers, operators), targets=targets,
    )  # fmt: skip


def _parse(edition: Edition, parser: Any, source: Path, inside: bool, weights: frozenset[str]) -> dict[str, str]:
    """Reads `source` into the parser's network; returns each node's operator by name."""
    import onnx_ir as ir

    from himap_export.engines.nvinfer.weight_only import fusible

    try:
        model = ir.load(source)  # external initializers stay on disk
    except Exception as problem:  # protobuf's and onnx_ir's errors share no base class
        raise _refused(edition, source, f"not a readable ONNX file, {problem}") from None
    fusible(model)
    if not inside:
        for weight in weights:  # each is an input already, and the initializer only its default
            model.graph.initializers.pop(weight, None)
    parsed = parser.parse(ir.to_proto(model).SerializeToString(), str(source))
    if not parsed:
        raise _refused(edition, source, _first_error(parser))
    return {node.name or "": node.op_type for node in model.graph}


def _config(edition: Edition, builder: Any, targets: tuple[int, ...]) -> Any:
    trt, config = edition.api(), builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it the log names no layers
    if targets:
        config.num_compute_capabilities = len(targets)
    for i, capability in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), i)
    return config


def _writer(trt: ModuleType, out: IO[bytes]) -> Any:
    """Returns a writer in pieces: with weights inside an engine is larger than what memory should hold twice."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return out.write(data)

    return Writer()


def _first_error(parser: Any) -> str:
    if not parser.num_errors:
        return "the parser says no more"
    error = parser.get_error(0)
    return f"{error.node_operator()} {error.node_name()}: {error.desc()}"


def _refused(edition: Edition, source: Path, problem: str) -> HimapError:
    if "not supported by a dedicated kernel" in problem:
        details, hint = "it has no fused kernel for one of its Attention nodes", "heads as narrow as 8 have none"
    else:
        details, hint = one_line(problem), f"check {edition.name}'s version"
    return HimapError(f"{edition.title} refuses {source}", details, hint)


def _multiplies_out(edition: Edition, graph: str, apart: tuple[str, ...]) -> HimapError:
    if apart == (UNSEEN,):
        summary = f"{edition.title} does not show that it multiplies quantised weights of {graph} as they are"
        return HimapError(summary, f"it has {UNSEEN}", f"check {edition.name}'s version")
    details = f"in {', '.join(dict.fromkeys(apart))}"
    return HimapError(f"{edition.title} multiplies quantised weights of {graph} out before their product", details)


def _gather_form(trt: ModuleType, network: Any, operators: Mapping[str, str]) -> Literal["ops", "plugin", "none"]:
    """Tells whether the parser found a plugin for `himap::TopKGather` or inlined its standard operators."""
    if any(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers)):
        return "plugin"
    return "ops" if "TopKGather" in operators.values() else "none"
