"""The real commands, called as a shell would call them, and one workshop of tiny checkpoints and bundles for all tests.

    work.answer(work.bundle("gqa2", "--k1", "2", "--k2", "4"), inputs, "--max-new-tokens", "8")["tokens"]

A bundle takes about two seconds to export, so each is made once, whichever of pytest-xdist's workers needs it first.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from families import FAMILIES, make_family
from forked import PRELOADED, environment, forked
from tiny import TINY, Inputs, Tiny, make_llava

from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.cli import main as run_main
from himap_export.engines.pipeline import Pipeline
from himap_export.exporter.cli import main as export_main
from himap_export.validate.reference.criteria import Cuts
from himap_export.validate.reference.reference import Reference

HIMAP_TINY = Path(__file__).parent / "fixtures" / "himap-tiny"
SHAPES_64 = Path(__file__).parent / "fixtures" / "shapes-64" / "model"  # answers what follows rightly
QUESTIONS_64 = SHAPES_64.parent / "images" / "questions.jsonl"
MAIN = {  # where each command's `main` is
    "himap-export": "himap_export.exporter.cli",
    "himap-run": "himap_export.engines.cli",
    "himap-serve": "himap_export.serve.cli",
    "himap-validate": "himap_export.validate.cli",
    "himap-analyze": "himap_export.validate.analysis.cli",
    "himap-tune": "himap_export.validate.tuning.cli",
}
ORT = ("--backend", "onnxruntime")  # what an export is for here, whatever else is installed
OPENVINO = ("--backend", "openvino")
Arrays = Mapping[str, npt.NDArray[Any]]


def call(main: Callable[[list[str]], object], *arguments: object) -> int:
    """A command's `main` in this process; its exit code."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


def greedy(
    reference: Reference, *arrays: Any, max_new_tokens: int, cuts: Cuts = (), seeds: Any = None, seconds: Any = ()
) -> npt.NDArray[np.int64]:
    """The reference's own answers [B,N], as Hugging Face's `generate` lays them out."""
    start = reference.prefill(*arrays, cuts=cuts, seeds=seeds, seconds=seconds)
    return reference.answer(start, max_new_tokens)[0]


def spawn(
    command: str, *arguments: object, folder: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """An installed command's script in a process of its own, which has imported PyTorch already, in `folder`, this
    process's if None, with `variables` added to the environment."""
    script = str(Path(sys.executable).with_name(command))
    code, argv = f"import runpy\nrunpy.run_path({script!r}, run_name='__main__')", [script, *map(str, arguments)]
    return forked(code, argv, folder or Path.cwd(), environment() | variables)


def workers(parent: int | None = None) -> list[int]:
    """The ids of the processes that `isolation` runs below `parent`, this one if None."""
    folder = Path(f"/proc/{parent or os.getpid()}/task")
    children = [int(pid) for file in folder.glob("*/children") for pid in file.read_text().split()]
    found = [pid for pid in children if b"isolation import serve" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found + [worker for pid in children if pid not in found for worker in workers(pid)]


def plan_flags(cuts: Cuts) -> tuple[str, ...]:
    """`--k1 2 --k2 5 --r1 0.5 --r2 0.75`."""
    return tuple(
        text for n, cut in enumerate(cuts, 1) for text in (f"--k{n}", f"{cut.layer}", f"--r{n}", f"{cut.remove}")
    )


def save_inputs(file: Path, inputs: Inputs) -> Path:
    """What `himap-run --load-inputs` reads. A prompt without padding goes without a mask."""
    arrays: dict[str, Any] = {"input_ids": inputs.input_ids, "pixel_values": inputs.pixel_values}
    if not inputs.attention_mask.all():
        arrays["attention_mask"] = inputs.attention_mask
    if inputs.seconds:
        arrays["second_per_grid_ts"] = np.array(inputs.seconds)
    np.savez(file, **arrays)
    return file


def golden_inputs(fixture: Path = HIMAP_TINY) -> Inputs:
    """The prompt behind a fixture's goldens; himap-tiny's: 5 system tokens, 16 image tokens, 9 text tokens."""
    with np.load(fixture / "inputs.npz") as stored:
        ids, pixels = stored["input_ids"], stored["pixel_values"]
    return Inputs(ids, np.ones_like(ids), pixels)


def padded(rows: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.int64]:
    """Kept positions [B,n] as a static stage of `width` tokens holds them: -1 on the right."""
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=-1)


@dataclass(frozen=True)
class Workshop:
    """Checkpoints and bundles under `folder`, shared by pytest-xdist's workers; references are per process."""

    folder: Path
    _references: dict[tuple[str, torch.dtype], Reference] = field(default_factory=dict)

    def tiny(self, name: str) -> Tiny:
        """The sizes of a checkpoint: one of TINY, or "golden"."""
        return TINY["mha"] if name == "golden" else TINY[name]

    def checkpoint(self, name: str) -> Path:
        """The checkpoint's folder; "golden" is the authors' himap-tiny."""
        if name == "golden":
            return HIMAP_TINY
        with self._once(f"checkpoint-{name}") as (folder, missing):
            if missing:
                make_llava(folder, TINY[name])
        return folder

    def reference(self, name: str, dtype: torch.dtype = torch.float32) -> Reference:
        if (name, dtype) not in self._references:
            self._references[name, dtype] = Reference(self.checkpoint(name), dtype)
        return self._references[name, dtype]

    def bundle(self, name: str, *flags: object, cuts: Cuts | None = None) -> Path:
        """What `himap-export` makes of a checkpoint. Read it only; its defaults here are small."""
        text = [str(flag) for flag in flags] + list(plan_flags(cuts) if cuts else ())
        for option, default in (("--text-budget", "24"), ("--max-new-tokens", "32"), ORT):
            text += [] if option in text else [option, default]
        source = self.checkpoint(name)
        key = hashlib.sha256(" ".join(text).encode()).hexdigest()[:12]
        with self._once(f"bundle-{name}-{key}") as (folder, missing):
            if missing:
                assert call(export_main, source, *text, "--out", folder) == 0
        return folder

    def family(self, name: str) -> Path:
        """The checkpoint of one of FAMILIES."""
        with self._once(f"family-{name}") as (folder, missing):
            if missing:
                make_family(folder, name)
        return folder

    def family_bundle(self, name: str, *flags: object, key: str = "", text_budget: int = 24) -> Path:
        """What `himap-export` makes of one of FAMILIES; `key` tells apart files that go by one name."""
        own = () if "--image-size" in flags else FAMILIES[name].flags
        text = [
            *map(str, (*own, *flags)),
            "--text-budget",
            str(text_budget + FAMILIES[name].text),
            "--max-new-tokens",
            "16",
        ]
        text += [] if "--backend" in text else ORT
        digest = hashlib.sha256(" ".join([*text, key]).encode()).hexdigest()[:12]
        with self._once(f"family-{name}-{digest}") as (folder, missing):
            if missing:
                assert call(export_main, self.family(name), *text, "--out", folder) == 0
        return folder

    def pipeline(self, bundle: Path, backend: str = "onnxruntime") -> Pipeline:
        """One thread: tests share two cores, and sums come out the same every time."""
        return Pipeline(Bundle.open(bundle).select(), backend, Opening(threads=1))

    def answer(self, bundle: Path, inputs: Inputs, *flags: object) -> Arrays:
        """What `himap-run` saves for `inputs`: kept_k1, kept_k2, logits, tokens."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            asked, answered = save_inputs(Path(folder) / "in.npz", inputs), Path(folder) / "out.npz"
            arguments = ["--load-inputs", asked, "--save-outputs", answered, "--threads", "1", *flags]
            assert call(run_main, bundle, *arguments) == 0
            with np.load(answered) as stored:
                return dict(stored)

    @contextmanager
    def _once(self, name: str) -> Iterator[tuple[Path, bool]]:
        """A folder's path and whether it is still missing, under a lock that other workers wait for."""
        done = self.folder / f"{name}.done"
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self.folder / name, not done.exists()
            done.touch()


def blocked_python(
    code: str, blocked: Sequence[str], *arguments: object, fresh: bool = True
) -> subprocess.CompletedProcess[str]:
    """`code` in an interpreter in which importing one of `blocked` fails, as if it were not installed.

    Unless it is to be `fresh`, it may have imported PyTorch and transformers already, if they are not among them."""
    guard = f"""
import sys
blocked = {set(blocked)!r}
assert not blocked & {{name.partition(".")[0] for name in sys.modules}}
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Guard())
"""
    words = list(map(str, arguments))
    if not fresh and not {name.partition(".")[0] for name in PRELOADED} & set(blocked):
        return forked(guard + code, ["-c", *words], Path.cwd(), environment())
    command = [sys.executable, "-c", guard + code, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
