"""Programs in processes of their own, forked from one that has imported what they are slow to import.

PyTorch and transformers take four seconds to import, most of what a short program takes. The process forked from
imports nothing of this project: what a program finds of it, and what it loads when, is as in a fresh interpreter.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "torch.export",
    "torch.onnx._internal.exporter._core",
    "onnx",
    "onnxscript",
    "onnxscript.rewriter",
    "transformers",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
)
# A child runs its exit hooks and leaves out what else an interpreter does at its end: it takes all of PyTorch apart.
SERVER = """
import atexit, gc, importlib, json, os, sys, traceback

def code_of(job):
    try:
        exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as left:
        assert left.code is None or isinstance(left.code, int)
        return left.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

def serve(job):
    os.chdir(job["folder"])
    for number, (path, flags) in enumerate(job["streams"]):
        os.dup2(os.open(path, flags), number)
    sys.stdin = open(0)
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = job["argv"]
    code = code_of(job)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
gc.freeze()  # children share its memory
for line in sys.stdin.buffer:
    child = os.fork()
    if not child:
        serve(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


def environment() -> dict[str, str]:
    """This process's, without pytest's own variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}


@functools.cache
def _server() -> "subprocess.Popen[str]":
    """Ends with this process: its standard input is closed then."""
    command, pipe = [sys.executable, "-c", SERVER, json.dumps(PRELOADED)], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment(), cwd="/")


def forked(
    code: str, argv: Sequence[str], folder: Path, variables: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """What `python -c code` does in `folder` and the environment `variables`, with `argv` for its `sys.argv`."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as place:
        said = [Path(place) / name for name in ("stdout", "stderr")]
        written = [(str(path), os.O_WRONLY | os.O_CREAT) for path in said]
        job = {"code": code, "argv": argv, "environment": dict(variables), "folder": str(folder)}
        server.stdin.write(json.dumps(job | {"streams": [(os.devnull, os.O_RDONLY), *written]}) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the process that is forked from has died"
        return subprocess.CompletedProcess(argv, int(answer), *(path.read_text() for path in said))
