"""Exports that send themselves a signal at a chosen step: a server of processes for test_crashes.py.

    python crash.py NEW_BUNDLE MODEL        then one job a line on standard input, one result a line on standard output

A step is whatever changes the disk around --out, as Python's audit events tell, and the return of the export itself.
The phases are stand-ins that copy a bundle which is there already: what is under test is not what they build, but what
is left of it. Everything else is the real command, in a process of its own, forked from this one.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

EXPORT = "himap_export.exporter.export"
# Before these happen to something below the watched folder, or to no path at all (an exchange), a signal can come.
CHANGES = ("os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree", "ctypes.dlopen", "open")


@dataclass(frozen=True)
class Job:
    """One export to `out`. `sent` (a signal's number) comes at step `at`, to the process that works or, if the command
    is `supervised`, to the one that waits for it. `exchange`: whether the file system can exchange two folders."""

    model: str
    out: str
    at: int = 0
    sent: int = 0
    supervised: bool = False
    exchange: bool = True
    log: str = ""


@dataclass
class Ended:
    """`code`: as subprocess tells it, negative for a signal; `steps`: what was seen of them; `said`: standard error."""

    code: int
    said: str = ""
    steps: list[str] = field(default_factory=list)


class Steps:
    """Counts steps in the watched folder and sends the job's signal at the one it names."""

    def __init__(self, job: Job) -> None:
        self.job, self.seen, self.home = job, 0, str(Path(job.out).parent)
        self.log = Path(job.log).open("a", buffering=1)  # noqa: SIM115  # as long as the process

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook."""
        if event not in CHANGES or (event == "open" and not (isinstance(arguments[1], str) and "w" in arguments[1])):
            return
        paths = [os.fsdecode(a) for a in arguments if isinstance(a, str | bytes | os.PathLike)]
        if event == "ctypes.dlopen" or any(path.startswith(f"{self.home}/") for path in paths):
            self.step(f"{event} {' '.join(path.removeprefix(self.home) for path in paths)}")

    def step(self, name: str) -> None:
        """One step; the signal, if it is this one's."""
        self.seen += 1
        self.log.write(f"{name}\n")
        if self.seen == self.job.at:
            os.kill(os.getppid() if self.job.supervised else os.getpid(), self.job.sent)
            if self.job.supervised:
                time.sleep(0.2)  # until it is passed on


def _phase(new: Path, part: int, export: Any) -> str:
    """A fifth of the new bundle; the manifest comes last."""
    files = sorted(p for p in new.rglob("*") if p.is_file() and p.name != "manifest.json")
    for file in files[part::4] if part < 4 else [new / "manifest.json"]:
        target = export.work / file.relative_to(new)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    return ""


def _export(job: Job, new: Path) -> None:
    """The command, with stand-ins for what takes long."""
    from himap_export.exporter import export, target
    from himap_export.exporter.cli import main

    steps, real = Steps(job), export.write_bundle

    def exported(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        steps.step("the export returned")
        return result

    patches: dict[tuple[object, str], Callable[..., Any]] = {
        (export.Export, name): partial(_phase, new, n)
        for n, name in enumerate(("vision", "stages", "weights", "compile", "finalise"))
    }
    # partial objects are no methods: bound by hand
    patches = {place: (lambda self, phase=phase: phase(self)) for place, phase in patches.items()}
    for (_, name), phase in patches.items():
        phase.__name__ = name
    for name in ("_check_weights", "read_processor"):  # they read the checkpoint, and take a second
        patches[export, name] = lambda *_: None
    patches[export, "write_bundle"] = exported
    if not job.exchange:
        patches[target, "exchange"] = lambda *_: False
    for (owner, name), stand_in in patches.items():
        mock.patch.object(owner, name, stand_in).start()
    # Only under its own name does a command fork the process that works.
    asked = [
        job.model,
        "--k1",
        "1",
        "--k2",
        "3",
        "--text-budget",
        "24",
        "--backend",
        "onnxruntime",
        "--out",
        job.out,
        "--overwrite",
    ]
    sys.argv = ["himap-export" if job.supervised else "crash", *asked]
    sys.addaudithook(steps.hook)
    main()


def run(job: Job, new: Path) -> Ended:
    """The job in a process of its own."""
    said = Path(f"{job.log}.said")
    child = os.fork()
    if child == 0:
        code = 70
        try:
            descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            _export(job, new)
        except SystemExit as left:
            code = int(left.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(code, said.read_text(), Path(job.log).read_text().splitlines())


def serve(new: Path, model: str) -> None:
    """Imports what exports need, then answers jobs until there are none."""
    import onnxruntime  # noqa: F401

    from himap_export.exporter import export, target  # noqa: F401
    from himap_export.exporter.cli import main

    os.environ["HF_HUB_OFFLINE"] = "1"
    with suppress(SystemExit), redirect_stdout(sys.stderr):
        main([model, "--k1", "1", "--k2", "3", "--dry-run"])
    for line in sys.stdin:
        print(json.dumps(asdict(run(Job(**json.loads(line)), new))), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
