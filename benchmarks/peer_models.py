"""What the peers' benchmark runs: one random checkpoint, our bundles of it, and what each peer's own tools make of it.

All lie in one work folder. The checkpoint and the peers' files are made once; our bundles always, so that they are
today's graphs.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from prefill import TEXT, write_model

from himap_export.engines.bundle import Bundle, RunSpec
from himap_export.engines.isolation import isolated
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.spec import Dtype

WORKERS = Path(__file__).parent / "peer_workers"
PRUNED = {"k1": 2, "k2": 8, "r1": 0.5, "r2": 0.75}
Words = list[Path | str]
MISSING = "`make peers-env` makes the peers' environment"
ENVIRONMENT = Path(__file__).parents[1] / ".peers-venv"


def export(model: Path, out: Path, backend: str, dtype: Dtype, pruned: bool) -> None:
    import himap_export as hx

    asked: hx.ExportOptions = dict(PRUNED) if pruned else {"policy": "none"}
    hx.export(
        model, out=out, overwrite=True, progress=partial(print, file=sys.stderr), backend=backend, dtype=dtype,
        text_budget=TEXT, max_new_tokens=64, hard_link=dtype == "fp32", **asked,
    )  # fmt: skip


@dataclass(frozen=True)
class Models:
    """The work folder, the folder of the peers' environment, and the bundles that were exported already."""

    work: Path
    environment: Path = ENVIRONMENT
    exported: dict[Path, RunSpec] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        return self.environment / "bin" / "python"

    @property
    def llama_bench(self) -> Path:
        return self.environment / "bin" / "llama-bench"

    def checkpoint(self) -> Path:
        """Returns the folder of the random LLaVA."""
        return self._made("model", lambda out: isolated("writing the model", {}, write_model, out))

    def bundle(self, backend: str, dtype: Dtype, pruned: bool) -> RunSpec:
        """Returns one of our bundles, exported by this process; HimapError as of `himap_export.export`."""
        out = self.work / f"ours-{backend}-{dtype}-{'pruned' if pruned else 'unpruned'}"
        if out not in self.exported:
            isolated(f"exporting {out.name}", {}, export, self.checkpoint(), out, backend, dtype, pruned)
            self.exported[out] = Bundle.open(out, verify=False).select()
        return self.exported[out]

    def openvino(self, family: str) -> Path:
        """Returns optimum-intel's export of "llava" or "qwen2_vl", fp32."""
        tool: Words = [self.environment / "bin" / "optimum-cli", "export", "openvino", "--model"]
        tool += [self._checkpoints() / family, "--task", "image-text-to-text", "--weight-format", "fp32"]
        return self._tool(f"openvino-{family}", tool)

    def onnxruntime_genai(self, precision: str) -> Path:
        """Returns what its model builder makes of the decoder in a precision of the builder's."""
        tool: Words = [self.python, WORKERS / "ort_model.py", "-e", "cpu", "-p", precision, "-i"]
        tool += [self._checkpoints() / "llama", "-c", self.work / "builder-cache", "-o"]
        return self._tool(f"onnxruntime-genai-{precision}", tool)

    def gguf(self, precision: str) -> Path:
        """Returns the decoder in llama.cpp's format, fp32 or bf16."""
        kind = {"fp32": "F32", "bf16": "BF16"}[precision]
        checkpoint = self._checkpoints() / "llama"
        return self._tool(f"decoder-{precision}.gguf", [self.python, WORKERS / "gguf_file.py", checkpoint, kind])

    def _checkpoints(self) -> Path:
        return self._tool("checkpoints", [self.python, WORKERS / "checkpoints.py", self.checkpoint()])

    def _tool(self, name: str, words: Words) -> Path:
        """Returns `name` of the work folder, which a program of the peers' environment makes: its last word is where.
        HimapError if it is not installed, or fails."""
        return self._made(name, lambda out: self._run(name, [*words, out]))

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        """Returns `name` of the work folder; `make` is told where to write it if it is not there yet."""
        found = self.work / name
        if not found.exists():
            part = self.work / f"partial-{os.getpid()}-{name}"
            try:
                make(part)
                part.rename(found)
            finally:
                shutil.rmtree(part, ignore_errors=True)
                if part.is_file():
                    part.unlink()
        return found

    def _run(self, name: str, words: Words) -> None:
        """Runs a program without a network; what it prints goes to a file."""
        if not Path(words[0]).exists():
            raise HimapError(f"{words[0]} is not there", hint=MISSING, code=Exit.MISSING)
        print(f"making {name}", file=sys.stderr)
        log, offline = self.work / "making.log", {**os.environ, "HF_HUB_OFFLINE": "1"}
        with log.open("ab") as out:
            done = subprocess.run(words, stdout=out, stderr=out, env=offline, check=False)
        if done.returncode:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise HimapError(f"{name} could not be made", " ".join(last), f"see {log}")
