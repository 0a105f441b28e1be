"""Rules that no single test of a room would notice: who imports what, what starts without what, how long a file is."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from commands import HIMAP_TINY, Workshop, blocked_python, golden_inputs

from himap_export.engines.command import as_options
from himap_export.validate.reference.criteria import reference_himap

ROOT = Path(__file__).parents[1]
ROOMS = ("graphs", "engines", "serve", "exporter", "validate")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
OURS = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]


def modules(room: str) -> list[str]:
    """Dotted names of a room's modules."""
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in SOURCES if path.is_relative_to(ROOT / room)]
    return [".".join(("himap_export", *(p for p in names if p != "__init__"))) for names in parts]


EXPORT_ONLY = ("torch", "transformers", "huggingface_hub", "safetensors", "onnx", "onnx_ir", "onnxscript", "altair")
HEAVY = (*EXPORT_ONLY, "numpy", "onnxruntime", "PIL", "tokenizers", "tensorrt_rtx")
IMPORT_ALL = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(len(sys.argv) - 1)"


@pytest.mark.parametrize(
    ("room", "blocked"),
    [
        ("graphs", ("torch", "transformers", "safetensors", "onnxruntime")),
        ("engines", (*EXPORT_ONLY, "onnxruntime", "tensorrt_rtx")),
        ("exporter", ("onnxruntime", "tensorrt_rtx")),
    ],
)
def test_every_module_imports_without(room: str, blocked: tuple[str, ...]) -> None:
    names = modules(room)
    assert len(names) > 5
    done = blocked_python(IMPORT_ALL, blocked, *names)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(names)}\n"  # and importing prints nothing


def test_the_blocker_blocks() -> None:
    done = blocked_python("import torch", ["torch"])
    assert done.returncode == 1 and "ModuleNotFoundError: torch is blocked" in done.stderr


@pytest.mark.parametrize("room", ["graphs", "engines", "serve", "exporter"])
def test_importing_a_room_loads_no_torch(room: str) -> None:
    """Installed or not: seconds of start-up that no `--help`, plan or answer needs."""
    makers = {"himap_export.exporter.vision", "himap_export.exporter.families.qwen_vl_tower"}  # of torch modules
    names = [name for name in modules(room) if name not in {*makers, "himap_export.serve.ray"}]  # which wants Ray
    code = IMPORT_ALL + "\nprint(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = blocked_python(code, [], *names)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "[]"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_himap_run_needs_neither_torch_nor_onnx(work: Workshop, tmp_path: Path, backend: str) -> None:
    flags = ("--backend", backend, "--text-budget", 14)
    bundle = work.bundle("golden", *flags, cuts=reference_himap(2, 5, 0.5, 0.75))
    code = "from himap_export.engines.cli import main\nmain(sys.argv[1:])"
    arguments = (bundle, "--load-inputs", HIMAP_TINY / "inputs.npz", "--save-outputs", tmp_path / "out.npz")
    done = blocked_python(code, EXPORT_ONLY, *arguments)
    assert done.returncode == 0, done.stderr
    here = work.answer(bundle, golden_inputs())
    with np.load(tmp_path / "out.npz") as there:
        assert set(there) == {"image_features", "kept_k1", "kept_k2", "logits", "tokens"}
        for name in ("kept_k1", "kept_k2", "tokens"):
            np.testing.assert_array_equal(there[name], here[name])


@pytest.mark.parametrize("command", sorted(PROJECT["project"]["scripts"]))
def test_help_imports_nothing_heavy(command: str) -> None:
    module, function = PROJECT["project"]["scripts"][command].split(":")
    code = f"""
import atexit
atexit.register(lambda: print("HEAVY", sorted(set({HEAVY!r}) & set(sys.modules))))
from {module} import {function}
{function}(["--help"])
"""
    done = blocked_python(code, [])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {command}") and done.stdout.endswith("HEAVY []\n")


@pytest.mark.parametrize("command", sorted(PROJECT["project"]["scripts"]))
def test_a_wrong_flag_is_one_line_of_usage_and_exit_2(command: str) -> None:
    script = Path(sys.executable).with_name(command)
    done = subprocess.run([script, "--no-such-flag"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"{command}: error: ") and "Traceback" not in done.stderr


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in OURS}
    assert len(lengths) > 40
    assert {name: count for name, count in lengths.items() if count >= 400} == {}


def test_every_module_says_what_it_is() -> None:
    silent = [str(path.relative_to(ROOT)) for path in OURS if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_public_docstrings_begin_with_a_verb() -> None:
    """In the third person; properties and classes are what they are called."""
    found, others = 0, list[str]()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or ast.get_docstring(node) is None:
                continue
            if any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            first = str(ast.get_docstring(node)).split()[0].rstrip(",:;.")
            found += 1
            if not re.fullmatch("[A-Z][a-z]+s", first) or first in ("Rows", "Tokens", "Logits", "This", "Its", "Is"):
                others.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {first}")
    assert found > 300 and others == []


def test_import_contracts_hold(tmp_path: Path) -> None:
    """Seen as a namespace: import-linter takes no package whose parent is one, as the rooms' is."""
    (tmp_path / "himap_export").mkdir()
    for room in ROOMS:
        (tmp_path / "himap_export" / room).symlink_to(ROOT / room)
    script = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--config", ROOT / "pyproject.toml"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert f"{len(PROJECT['tool']['importlinter']['contracts'])} kept, 0 broken" in done.stdout


def ruff(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("ruff")
    command = [str(script), "check", "--no-cache", "--select", "TID251", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, check=False)


def test_no_file_imports_a_room_by_its_bare_name() -> None:
    """`import graphs` works by accident from the repository's root, and loads every class twice."""
    done = ruff(*OURS)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("statement", ["import {}", "from {} import plan", "from {}.plan import PruningPlan"])
def test_ruff_bans_the_bare_names(room: str, statement: str) -> None:
    done = ruff("--stdin-filename", ROOT / "tests" / "example.py", "-", stdin=statement.format(room) + "\n")
    assert done.returncode == 1 and f"himap_export.{room}" in done.stdout


def test_all_four_rooms_are_installed_as_one_namespace() -> None:
    """From anywhere but the repository's root, and each under one name only."""
    code = "import himap_export.graphs.plan, himap_export.validate as v\nprint(v.__file__)\nimport graphs"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert Path(done.stdout.strip()) == ROOT / "validate" / "__init__.py"
    assert "No module named 'graphs'" in done.stderr
    setup = PROJECT["tool"]["setuptools"]
    elsewhere = {".".join(("himap_export", *Path(folder).parts)) for folder in setup["package-dir"].values()}
    declared = {*setup["packages"], *elsewhere}  # a room's folder may be installed in another namespace: optimum's
    found = {".".join(("himap_export", *path.parent.relative_to(ROOT).parts)) for path in SOURCES}
    assert found <= declared, "a folder with modules is missing in [tool.setuptools] packages"


def parameters_by_name() -> dict[str, list[int]]:
    """How many arguments our functions and classes take by position, by name; none of one that takes any number."""
    found: dict[str, list[int]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                own = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
                count = len(own) - (own[:1] in (["self"], ["cls"]))
                found.setdefault(node.name, []).append(0 if node.args.vararg else count)
            elif isinstance(node, ast.ClassDef):
                fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
                found.setdefault(node.name, []).append(len(fields))
    return found


def test_inner_rooms_name_no_options() -> None:
    """Libraries name parameters; `engines/command.py` makes options of them."""
    assert (
        as_options("`max_new_tokens` 9 (use `k1` and `dtype` fp16)") == "--max-new-tokens 9 (use --k1 and --dtype fp16)"
    )
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path in (p for p in SOURCES if p.relative_to(ROOT).parts[0] in ("graphs", "engines", "exporter")):
        if path.name in ("cli.py", "command.py", "optimum_command.py"):
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        documented = [node.body[0] for node in nodes if isinstance(node, holders) and ast.get_docstring(node)]
        docs = {id(first.value) for first in documented if isinstance(first, ast.Expr)}
        words = (node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
        named = [node.value for node in words if id(node) not in docs and re.search("--([a-z]|$)", node.value)]
        assert not named, f"{path} names options: {named}"


def test_no_call_of_ours_has_more_than_four_positional_arguments() -> None:
    """A call is ours if every function and class of its name is, and takes so many."""
    ours, long = parameters_by_name(), []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and len(node.args) > 4:
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if min(ours.get(name, [0])) >= len(node.args):
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert long == []
