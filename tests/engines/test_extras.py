"""Commands in environments that lack a package: one line that says how to get it, and exit code 4."""

import tomllib
from pathlib import Path

import pytest
from commands import HIMAP_TINY, MAIN, Workshop, blocked_python

from himap_export.engines.extras import EXTRAS, missing_extra, required
from himap_export.graphs.errors import Exit, HimapError

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "shapes" / "images" / "questions.jsonl"
RUN = "import importlib\nimportlib.import_module(sys.argv[1]).main(sys.argv[2:])"
TRANSFORMERS = {name for name, extra in EXTRAS.items() if extra == "export"} - {"tqdm"}


def test_every_extra_is_one_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) <= set(extras)


@pytest.mark.parametrize(
    ("command", "words", "hidden", "named"),
    [
        ("himap-export", ("llava-7b", "--dry-run"), TRANSFORMERS, "export"),
        ("himap-export", ("shapes", "--out", "OUT"), TRANSFORMERS, "export"),
        ("himap-export", ("shapes", "--out", "OUT"), {"torch"}, "export"),
        pytest.param(  # as himap-run's below, behind the vision graph
            "himap-export", ("shapes", "--out", "OUT", "--backend", "onnxruntime"), {"onnxruntime"}, "onnxruntime",
            marks=pytest.mark.slow,
        ),
        ("himap-export", ("shapes", "--out", "OUT", "--backend", "openvino"), {"openvino"}, "openvino"),
        ("himap-export", ("shapes", "--out", "OUT"), {"onnxruntime", "openvino"}, "onnxruntime"),
        ("himap-export", ("shapes", "--dry-run"), {"onnxruntime", "openvino"}, "onnxruntime"),
        ("himap-export", ("shapes", "--out", "OUT", "--backend", "tensorrt-rtx"), {"tensorrt_rtx"}, "tensorrt-rtx"),
        ("himap-run", ("BUNDLE", "--load-inputs", HIMAP_TINY / "inputs.npz"), {"onnxruntime"}, "onnxruntime"),
        ("himap-serve", ("BUNDLE",), {"starlette"}, "serve"),
        ("himap-validate", ("BUNDLE", "--no-speed"), {"torch"}, "export"),
        ("himap-validate", ("BUNDLE", "--no-speed"), TRANSFORMERS, "export"),
        ("himap-validate", ("BUNDLE", "--no-speed"), {"onnxruntime"}, "onnxruntime"),
        ("himap-analyze", ("shapes", "--dataset", DATA, "--out", "OUT"), TRANSFORMERS, "export"),
        ("himap-analyze", ("shapes", "--dataset", DATA, "--out", "OUT"), {"altair"}, "report"),
        ("himap-analyze", ("shapes", "--dataset", DATA, "--out", "OUT"), {"torch"}, "export"),
        ("himap-tune", ("shapes", "--dataset", DATA, "--out", "OUT"), TRANSFORMERS, "export"),
        ("himap-tune", ("shapes", "--dataset", DATA, "--out", "OUT", "--no-time"), {"torch"}, "export"),
        ("himap-tune", ("shapes", "--dataset", DATA, "--out", "OUT"), {"onnxruntime", "openvino"}, "onnxruntime"),
    ],
)  # fmt: skip
def test_a_missing_package_is_one_line_with_both_ways_to_install_it(
    command: str, words: tuple[object, ...], hidden: set[str], named: str, work: Workshop, tmp_path: Path
) -> None:
    bundle = work.bundle("golden", "--k1", 2, "--k2", 4) if "BUNDLE" in words else None
    places = {"OUT": tmp_path / "out", "BUNDLE": bundle}
    given = (places.get(str(word), word) for word in words)
    done = blocked_python(RUN, sorted(hidden), MAIN[command], *given, fresh=False)
    assert done.returncode == Exit.MISSING, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"{command}: error: ") and "Traceback" not in done.stderr
    assert f"pip install 'himap-export[{named}]'" in said and f"pip install -e '.[{named}]'" in said
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.onnx"))


def test_a_module_of_no_extra_is_a_bug() -> None:
    assert missing_extra(ModuleNotFoundError("no", name="himap_export.absent")) is None
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        required("no_such_module")


def test_a_library_that_does_not_load_is_not_called_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torn.py").write_text("raise ImportError('libtorn.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(HimapError, match=r"torn is installed, but cannot be loaded: libtorn\.so") as caught:
        required("torn")
    assert caught.value.code == Exit.MISSING
