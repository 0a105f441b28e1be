"""Graphs as bytes, and whether TensorRT-RTX builds an engine of one: it fuses attention, or the build fails."""

import onnx_ir as ir

from himap_export.engines.nvinfer.edition import RTX, log_of
from himap_export.graphs.build import StageGraph


def serialized(graph: StageGraph) -> bytes:
    data: bytes = ir.to_proto(graph.model).SerializeToString()
    return data


def expect_rtx_build(graph: StageGraph) -> None:
    trt, log = RTX.api(), log_of(RTX)
    log.clear()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse(serialized(graph)), log.errors
    assert builder.build_serialized_network(network, builder.create_builder_config()) is not None, log.errors
