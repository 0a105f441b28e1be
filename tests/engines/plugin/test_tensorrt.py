"""The gather's plugin against TensorRT's own `tensorrt.plugin`, in an environment of its own.

The genuine bindings, not in this environment's site-packages, run in a child process over a stand-in of TensorRT's
libraries: this file is what the child runs. It does with the plugin what TensorRT does, in the same order: finds its
creator, creates it as the parser would, asks for types, shapes, formats, launch and kernel. Stood in for are what only
the libraries make: the registry, symbolic sizes and the places where launches are written. So it is not shown that
TensorRT's parser and builder take the plugin, nor that an engine runs it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from himap_export.engines.plugin.ptx import POINTERS, GatherShape, compile_gather
from himap_export.graphs.spec import Dtype

SHAPES = [
    GatherShape(1, 768, 480, 4096, "fp16"),
    GatherShape(2, 123, 47, 128, "fp32"),
    GatherShape(3, 480, 264, 64, "bf16"),
]
NAMES: dict[Dtype, str] = {"fp16": "HALF", "bf16": "BF16", "fp32": "FLOAT"}
LAUNCH = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
BINDINGS = Path(sys.prefix) / "tensorrt-bindings"
ENTRY_POINTS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("getBuilderPluginRegistry", "getPluginRegistry", "initLibNvInferPlugins"),
    *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"),
)


# In the child: TensorRT's part.


class Registry:
    """TensorRT's registry of plugins, which the stand-in library has not."""

    def __init__(self) -> None:
        self.creators: list[Any] = []

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators.append(creator)
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        wanted = (name, version, namespace)
        return next((c for c in self.creators if (c.name, c.plugin_version, c.plugin_namespace) == wanted), None)


class Sizes:
    """TensorRT's builder of symbolic sizes: constants, as all of ours are, and unknown ones."""

    def __init__(self, trt: Any) -> None:
        class Size(trt.IDimensionExpr):  # type: ignore[misc, name-defined]
            def is_constant(self) -> bool:
                return bool(self.value >= 0)

            def get_constant_value(self) -> int:
                return int(self.value)

        self._class = Size

    def constant(self, value: int) -> Any:
        size = self._class.__new__(self._class)  # only TensorRT constructs them
        size.value = value
        return size


def readable_expressions(trt: Any) -> None:
    """What is written for TensorRT can be read: the genuine classes take values and give none back."""
    from tensorrt.plugin import _tensor

    write = trt.ISymExpr.expr.fset

    def keep(self: Any, size: Any) -> None:
        write(self, size)
        self.size = size

    _tensor.SymExprImpl.expr = property(fset=keep)
    trt.DimsExprs = lambda rank: [None] * rank


class Child:
    """One process with the genuine bindings, and our plugin registered in it."""

    def __init__(self) -> None:
        from himap_export.engines.plugin import tensorrt as plugin

        assert not any("tensorrt" in name.split(".")[0] for name in sys.modules), "imported before it is asked for"
        import tensorrt_bindings as trt

        sys.modules["tensorrt"] = trt
        import tensorrt.plugin as trtp

        self.trt, self.trtp, self.sizes, self.registry = trt, trtp, Sizes(trt), Registry()
        readable_expressions(trt)
        trt.get_plugin_registry = lambda: self.registry
        plugin.register()
        plugin.register()
        self.definition = trtp._lib.QDP_REGISTRY[plugin.PLUGIN]

    def create(self, keep: int, request: str = "UNKNOWN") -> Any:
        """As the parser does, from the node's attributes: without network flags its request is UNKNOWN."""
        import numpy as np

        trt = self.trt
        field = trt.PluginField("keep", np.array([keep], np.int64), trt.PluginFieldType.INT64)
        fields, wish = trt.PluginFieldCollection([field]), trt.QuickPluginCreationRequest.__members__[request]
        creator = self.registry.get_creator("TopKGather", "1", "himap")
        return creator.create_plugin("TopKGather", "himap", fields, trt.TensorRTPhase.BUILD, wish)

    def tensor(self, dtype: Any, shape: list[int]) -> Any:
        made = self.trt.DynamicPluginTensorDesc()
        made.desc.dims, made.desc.type, made.desc.format = shape, dtype, self.trt.TensorFormat.LINEAR
        return made

    def build(self, keep: int, dtypes: list[str], shapes: list[list[int]]) -> dict[str, Any]:
        """All that TensorRT learns of one plugin while it builds an engine; a shape's -1 is unknown."""
        plugin, inputs = self.create(keep), [self.trt.DataType.__members__[dtype] for dtype in dtypes]
        types = plugin.get_output_data_types(inputs, [len(shape) for shape in shapes])
        exprs = plugin.get_output_shapes([[self.sizes.constant(n) for n in s] for s in shapes], [], self.sizes)
        sizes = [[size.get_constant_value() for size in expr] for expr in exprs]
        tensors = [self.tensor(k, s) for k, s in zip([*inputs, *types], shapes + sizes, strict=True)]
        taken = plugin.get_supported_format_combinations(tensors, len(inputs))
        plugin.configure_plugin(tensors[: len(inputs)], tensors[len(inputs) :])
        plugin = plugin.clone()
        tactics = plugin.get_valid_tactics()
        plugin.set_tactic(0)
        launch, scalars = SimpleNamespace(), SimpleNamespace(nbSymExprs=-1)
        plugin.get_launch_params(None, tensors, len(inputs), launch, scalars, self.sizes)
        descs = [tensor.desc for tensor in tensors]
        name, ptx = plugin.get_kernel(descs[: len(inputs)], descs[len(inputs) :])
        return {
            "class": type(plugin).__name__,
            "outputs": [[dtype.name, size] for dtype, size in zip(types, sizes, strict=True)],
            "aliased": [plugin.get_aliased_input(i) for i in range(plugin.get_num_outputs())],
            "taken": [[desc.type.name, desc.format.name] for desc in taken],
            "tactics": tactics,
            "launch": {field: sym.size.get_constant_value() for field, sym in vars(launch).items()},
            "scalars": scalars.nbSymExprs,
            "name": name,
            "ptx": ptx.decode(),
        }

    def use(self, attributes: dict[str, Any]) -> Any:
        """As a network made by hand does, but with no tensors: those only TensorRT makes."""
        return self.trtp.op.himap.TopKGather(**attributes)

    def registered(self) -> list[Any]:
        fields = [[c.name, c.plugin_namespace, c.plugin_version] for c in self.registry.creators]
        attributes = [[f.name, f.type.name] for c in self.registry.creators for f in c.field_names]
        return [fields, attributes, self.definition.input_tensor_names, self.definition.num_outputs]


def serve() -> None:
    """Answers lines of [method, arguments] by lines of [result, error]."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where TensorRT's own words go
    child = Child()
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            answer = [getattr(child, method)(*arguments), None]
        except Exception as error:
            answer = [None, f"{type(error).__name__}: {error}"]
        print(json.dumps(answer, default=str), file=answers, flush=True)


# In pytest: what is expected.


class ChildError(Exception):
    """What was raised in the child."""


class Bindings:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def ask(self, method: str, *arguments: object) -> Any:
        assert self.process.stdin and self.process.stdout
        print(json.dumps([method, arguments]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, "the child died; its words are above"
        result, error = json.loads(line)
        if error:
            raise ChildError(error)
        return result

    def build(self, shape: GatherShape, dtypes: list[str] | None = None, wide: list[int] | None = None) -> Any:
        flat = [shape.batch, shape.tokens]
        shapes = [wide or [*flat, shape.hidden], flat, flat, flat]
        return self.ask("build", shape.keep, dtypes or [NAMES[shape.dtype], "FLOAT", "INT64", "INT64"], shapes)


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bindings]:
    assert (BINDINGS / "tensorrt_bindings").is_dir(), f"TensorRT's bindings are not in {BINDINGS}: run `make install`"
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler `cc` here, which the stand-in of TensorRT's libraries needs")
    folder = tmp_path_factory.mktemp("tensorrt")
    source, library = folder / "stand_in.c", folder / "libnvinfer.so.11"
    source.write_text("".join(f"void *{name}(void *a, void *b, int c) {{ return 0; }}\n" for name in ENTRY_POINTS))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    for name in ("libnvinfer_plugin.so.11", "libnvonnxparser.so.11"):
        (folder / name).symlink_to(library)
    found = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(BINDINGS), "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, __file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=os.environ | found, **pipes) as process:  # type: ignore[call-overload]
        yield Bindings(process)
        process.stdin.close()


def test_the_node_finds_it(bindings: Bindings) -> None:
    """Its operator, domain, version, attribute and inputs; registered once, however often that is asked for."""
    from himap_export.graphs.gather import DOMAIN, _function_proto

    function = _function_proto()
    found = bindings.ask("registered")
    assert found == [[[function.name, DOMAIN, "1"]], [["keep", "INT64"]], list(function.input), len(function.output)]
    assert list(function.attribute) == ["keep"]


def test_the_kernels_arguments_are_the_nodes() -> None:
    """TensorRT passes inputs, then scalars (there are none), then outputs."""
    from himap_export.graphs.gather import _function_proto

    assert list(POINTERS) == [*_function_proto().input, *_function_proto().output]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_an_engine_is_built_from(bindings: Bindings, shape: GatherShape, tmp_path: Path) -> None:
    kernel, built, x = compile_gather(shape), bindings.build(shape), NAMES[shape.dtype]
    kept = [shape.batch, shape.keep]
    assert built["class"] == "_TemplateAOTPlugin"
    assert built["outputs"] == [[x, [*kept, shape.hidden]], ["INT64", kept], ["INT64", kept]]
    assert built["aliased"] == [-1, -1, -1]
    dtypes = [x, "FLOAT", "INT64", "INT64", x, "INT64", "INT64"]
    assert built["taken"] == [[dtype, "LINEAR"] for dtype in dtypes] and built["tactics"] == []
    assert built["launch"] == dict(zip(LAUNCH, (*kernel.grid, *kernel.block, kernel.shared_bytes), strict=True))
    assert built["scalars"] == 0
    assert (built["name"], built["ptx"]) == (kernel.name, kernel.ptx)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_its_ptx_is_a_kernel_of_seven_pointers(bindings: Bindings, shape: GatherShape, tmp_path: Path) -> None:
    import triton

    built, source = bindings.build(shape), tmp_path / "kernel.ptx"
    head = built["ptx"].partition(f".entry {built['name']}(")[2].partition(")")[0]
    assert [line.split()[:3] for line in head.split(",")] == [[".param", ".u64", ".ptr"]] * 7
    source.write_text(built["ptx"])
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    done = subprocess.run([ptxas, "--gpu-name=sm_90", source, "-o", tmp_path / "cubin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("dtypes", "wide", "keep", "said"),
    [
        (["INT8", "FLOAT", "INT64", "INT64"], None, 4, "types: x, score, position and token_type are INT8, FLOAT"),
        (["HALF", "HALF", "INT64", "INT64"], None, 4, "no kernel for its inputs' types"),
        (["HALF", "FLOAT", "INT32", "INT64"], None, 4, "no kernel for its inputs' types"),
        (None, [1, -1, 16], 4, r"cannot keep 4 tokens of these inputs: x is \[1, -1, 16\]"),
        (None, [1, 8, -1], 4, r"x is \[1, 8, -1\], score, position and token_type are \[1, 8\], \[1, 8\], \[1, 8\]"),
        (None, [1, 9, 16], 4, r"x is \[1, 9, 16\]"),
        (None, None, 9, "cannot keep 9 tokens"),
        (None, None, 0, "cannot keep 0 tokens"),
    ],
)
def test_what_it_cannot_do_is_refused(
    bindings: Bindings, dtypes: list[str] | None, wide: list[int] | None, keep: int, said: str
) -> None:
    with pytest.raises(ChildError, match=said) as caught:
        bindings.build(GatherShape(1, 8, keep, 16, "fp16"), dtypes, wide)
    assert str(caught.value).startswith("HimapError: TensorRT's top-k gather ") and "\n" not in str(caught.value)


def test_there_is_no_implementation_that_needs_python(bindings: Bindings) -> None:
    with pytest.raises(ChildError, match="JIT implementation requested, but not defined for 'himap::TopKGather'"):
        bindings.ask("create", 4, "STRICT_JIT")
    for request in ("UNKNOWN", "PREFER_AOT", "STRICT_AOT", "PREFER_JIT"):
        assert "_TemplateAOTPlugin" in bindings.ask("create", 4, request)


@pytest.mark.parametrize(("gather", "form"), [("auto", "plugin"), ("plugin", "plugin"), ("ops", "ops")])
def test_only_who_wants_the_plugin_registers_it(monkeypatch: pytest.MonkeyPatch, gather: Any, form: str) -> None:
    from himap_export.engines.backends import tensorrt as backend

    calls: list[object] = []
    monkeypatch.setattr(backend.plugin, "register", lambda: calls.append("registered"))
    monkeypatch.setattr("himap_export.engines.plugin.ptx.find_spec", lambda name: None)
    monkeypatch.setattr(backend, "builder", SimpleNamespace(build=lambda *a: calls.append(a[3]), check=lambda *a: None))
    backend.build(None, "k1", gather)  # type: ignore[arg-type]
    assert calls == ["registered"] * (form == "plugin") + [form]
    if form == "ops":
        backend.check("fp16", gather)
    else:
        with pytest.raises(Exception, match=r"needs triton, which is not installed \(.*`gather` ops\)"):
            backend.check("fp16", gather)


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"keep": "4"}, "Unexpected type '<class 'str'>' for attribute 'keep'"),
        ({"kept": 4}, "Unexpected attribute kept provided"),
        ({"keep": 4}, r"Expected \(ITensor, ITensor, ITensor, ITensor, keep\)"),
    ],
)
def test_wrong_use_is_refused(bindings: Bindings, attributes: dict[str, object], said: str) -> None:
    with pytest.raises(ChildError, match=said):
        bindings.ask("use", attributes)


def test_without_tensorrt_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from himap_export.engines.plugin.tensorrt import register
    from himap_export.graphs.errors import Exit, HimapError

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(HimapError, match="tensorrt is not installed") as caught:
        register()
    assert caught.value.code == Exit.MISSING


if __name__ == "__main__":
    serve()
