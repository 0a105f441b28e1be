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
from typing import Literal

from prefill import TEXT, write_model

from himap_export.engines.bundle import Bundle, RunSpec
from himap_export.engines.isolation import isolated
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.spec import Dtype

WORKERS = Path(__file__).parent / "peer_workers"
BLOCK = 32  # inputs that share a scale in int4, as in the peers' defaults
PRUNED = {"k1": 2, "k2": 8, "r1": 0.5, "r2": 0.75}
Quantized = Literal["", "int8", "int4", "int8-dynamic"]
Words = list[Path | str]
MISSING = "`make peers-env` makes the peers' environment"
ENVIRONMENT = Path(__file__).parents[1] / ".peers-venv"


@dataclass(frozen=True)
class Form:
    """How our bundle is exported: `dtype` is the model's, `quantize` the kind of its quantised weights, "" for none;
    `head`: whether the head is one of them."""

    backend: str
    dtype: Dtype
    pruned: bool
    quantize: Quantized = ""
    head: bool = False

    @property
    def folder(self) -> str:
        weights = f"-{self.quantize}{'-head' * self.head}" if self.quantize else ""
        return f"ours-{self.backend}-{self.dtype}{weights}-{'pruned' if self.pruned else 'unpruned'}"


def export(model: Path, out: Path, form: Form) -> None:
    import himap_export as hx

    asked: hx.ExportOptions = dict(PRUNED) if form.pruned else {"policy": "none"}
    if form.quantize:
        asked |= {"quantize": form.quantize, "quantize_head": form.head}
    if form.quantize == "int4":
        asked["block"] = BLOCK
    linked = form.dtype == "fp32" and not form.quantize
    hx.export(
        model, out=out, overwrite=True, progress=partial(print, file=sys.stderr), backend=form.backend,
        dtype=form.dtype, text_budget=TEXT, max_new_tokens=64, hard_link=linked, **asked,
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

    def bundle(self, form: Form) -> RunSpec:
        """Returns one of our bundles, exported by this process; HimapError as of `himap_export.export`."""
        out = self.work / form.folder
        if out not in self.exported:
            isolated(f"exporting {out.name}", {}, export, self.checkpoint(), out, form)
            self.exported[out] = Bundle.open(out, verify=False).select()
        return self.exported[out]

    def openvino(self, family: str, weights: str) -> Path:
        """Returns optimum-intel's export of "llava" or "qwen2_vl" with fp32 or int4 weights, by its own defaults."""
        tool: Words = [self.environment / "bin" / "optimum-cli", "export", "openvino", "--model"]
        tool += [self._checkpoints() / family, "--task", "image-text-to-text", "--weight-format", weights]
        return self._tool(f"openvino-{family}{'' if weights == 'fp32' else f'-{weights}'}", tool)

    def onnxruntime_genai(self, precision: str, checkpoint: Path | None = None) -> Path:
        """Returns what its model builder makes of a checkpoint, the decoder's if None, in a precision of its own."""
        tool: Words = [self.python, WORKERS / "ort_model.py", "-e", "cpu", "-p", precision, "-i"]
        tool += [checkpoint or self._checkpoints() / "llama", "-c", self.work / "builder-cache", "-o"]
        return self._tool(f"onnxruntime-genai-{f'{checkpoint.name}-' if checkpoint else ''}{precision}", tool)

    def gguf(self, precision: str) -> Path:
        """Returns the decoder in llama.cpp's format: fp32 or bf16; q4_0 or q8_0, by its own quantiser's defaults, which
        leave the head in 6 or 8 bits."""
        name = f"decoder-{precision}.gguf"
        if kind := {"fp32": "F32", "bf16": "BF16"}.get(precision):
            return self._tool(name, [self.python, WORKERS / "gguf_file.py", self._checkpoints() / "llama", kind])
        whole, quantiser = self.gguf("fp32"), self.environment / "bin" / "llama-quantize"
        return self._made(name, lambda out: self._run(name, [quantiser, whole, out, precision.upper()]))

    def random_gguf(self, config: Path) -> Path:
        """Returns a LLaMA of random weights in llama.cpp's Q4_0, of the sizes in `config`."""
        return self._tool("random-q4_0.gguf", [self.python, WORKERS / "random_llama.py", config, "q4_0"])

    def random_onnxruntime_genai(self, config: Path) -> Path:
        """Returns what onnxruntime-genai's model builder makes of random int4 weights, of the sizes in `config`: in
        AWQ's form, as the builder rounds no model that is larger than the memory."""
        checkpoint = self._tool("random-awq", [self.python, WORKERS / "random_llama.py", config, "awq"])
        try:
            return self.onnxruntime_genai("int4", checkpoint)
        finally:
            shutil.rmtree(checkpoint)

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
