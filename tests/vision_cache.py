"""Vision graphs that tests export again and again, each made once in a run.

The torch exporter takes two thirds of an export's time, and what it makes depends on nothing but its arguments.
Commands that tests start as processes of their own do without.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import onnx
import onnx_ir as ir

from himap_export.exporter.bind import WeightNames
from himap_export.exporter.family import Family, VisionSpec
from himap_export.graphs.build import StageGraph
from himap_export.graphs.ports import GraphPorts, WeightSpec

Make = Callable[..., StageGraph]


def remembering(make: Make, folder: Path) -> Make:
    """`vision_graph` that keeps what `make` made in `folder`, for pytest-xdist's other workers too."""

    def vision_graph(
        name: str,
        family: Family[Any],
        spec: VisionSpec,
        *,
        hidden: int,
        dtype: str,
        names: WeightNames,
    ) -> StageGraph:
        if not isinstance(names, WeightNames):
            return make(name, family, spec, hidden=hidden, dtype=dtype, names=names)
        given = (name, family.architecture, family.fields, repr(spec), hidden, dtype, sorted(names.names))
        key = hashlib.sha256(json.dumps(given, sort_keys=True, default=str).encode()).hexdigest()[:20]
        file = folder / f"vision-{key}.onnx"
        if not file.exists():
            graph = make(name, family, spec, hidden=hidden, dtype=dtype, names=names)
            proto, part = ir.to_proto(graph.model), folder / f"{key}.{os.getpid()}"
            held = {"weights": graph.weights, "ports": graph.ports}
            onnx.helper.set_model_props(proto, {k: msgspec.json.encode(v).decode() for k, v in held.items()})
            part.write_bytes(proto.SerializeToString())
            part.rename(file)
        model = ir.from_proto(onnx.load(file, load_external_data=False))
        weights = msgspec.json.decode(model.metadata_props.pop("weights"), type=dict[str, WeightSpec])
        ports = msgspec.json.decode(model.metadata_props.pop("ports"), type=GraphPorts)
        return StageGraph(name, model, ports, weights)

    return vision_graph
