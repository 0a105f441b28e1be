"""What the peers' benchmark runs: one random checkpoint, our bundles of it, and what each peer's own tools make of it.

All lie in one work folder. The checkpoint and the peers' files are made once; our bundles always, so that they are
today's graphs.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
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
MISSING = "`make peers-env` makes the peers' environment"
ENVIRONMENT = Path(__file__).parents[1] / ".peers-venv"


def export(model: Path, out: Path, backend: str, dtype: Dtype, pruned: bool) -> None:
    import himap_export as hx

    asked: hx.ExportOptions = dict(PRUNED) if pruned else {"policy": "none"}
    hx.export(
        model, out=out, overwrite=True, progress=partial(print, file=sys.stderr), backend=backend, dtype=dtype,
        text_budget=TEXT, max_new_tokens=64, hard_link=True, **asked,
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
        source = self._checkpoints() / family
        program = [self.environment / "bin" / "optimum-cli", "export", "openvino", "--model", source]
        program += ["--task", "image-text-to-text", "--weight-format", "fp32"]
        return self._made(f"openvino-{family}", lambda out: self._run([*program, out]))

    def onnxruntime_genai(self, precision: str) -> Path:
        program = [self.python, WORKERS / "ort_model.py", "-e", "cpu", "-p", precision]
        program += ["-i", self._checkpoints() / "llama", "-c", self.work / "builder-cache", "-o"]
        return self._made(f"onnxruntime-genai-{precision}", lambda out: self._run([*program, out]))

    def gguf(self, precision: str) -> Path:
        kind = {"fp32": "F32", "bf16": "BF16"}[precision]
        program = [self.python, WORKERS / "gguf_file.py", self._checkpoints() / "llama", kind]
        return self._made(f"decoder-{precision}.gguf", lambda out: self._run([*program, out]))

    def _checkpoints(self) -> Path:
        program = [self.python, WORKERS / "checkpoints.py", self.checkpoint()]
        return self._made("checkpoints", lambda out: self._run([*program, out]))

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

    def _run(self, program: Sequence[Path | str]) -> None:
        """Runs a program of the peers' environment, without a network; what it prints goes to a file."""
        if not Path(program[0]).exists():
            raise HimapError(f"{program[0]} is not there", hint=MISSING, code=Exit.MISSING)
        words = [str(word) for word in program]
        print(f"making {words[-1].rsplit('-', 1)[-1]} with {Path(words[0]).name}", file=sys.stderr)
        log = self.work / "making.log"
        with log.open("ab") as out:
            done = subprocess.run(words, stdout=out, stderr=out, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
        if done.returncode:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise HimapError(f"{Path(words[0]).name} failed", " ".join(last), f"see {log}")
