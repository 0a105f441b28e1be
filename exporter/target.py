"""Where a bundle goes: checked before any work, built in a hidden folder beside it, and put in place by one rename."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from himap_export.engines.manifest import FILE_NAME
from himap_export.graphs.errors import Exit, HimapError


def check_target(out: Path, overwrite: bool) -> None:
    """HimapError if `out` is a Python package, a file, a folder of something else, or a bundle without `overwrite`."""
    if (out / "__init__.py").exists():
        hint = "give another --out: it becomes the bundle's own folder"
        raise HimapError(f"{out} is a Python package", hint=hint, code=Exit.USAGE)
    if out.exists() and not out.is_dir():
        raise HimapError(f"{out} is a file", hint="--out is the bundle's folder", code=Exit.USAGE)
    if (out / FILE_NAME).exists():
        if not overwrite:
            raise HimapError(f"{out} already holds a bundle", hint="give --overwrite to replace it", code=Exit.USAGE)
    elif out.is_dir() and any(out.iterdir()):
        hint = "give an empty or a new folder; what is there is left alone"
        raise HimapError(f"{out} is not empty and holds no bundle", hint=hint, code=Exit.USAGE)


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """A fresh folder beside `out` that replaces it on success and vanishes on any failure, Ctrl-C included."""
    out = out.absolute()
    work = out.with_name(f".{out.name}.partial-{os.getpid()}")
    parents = [p for p in out.parents if not p.exists()]
    try:
        work.mkdir(parents=True)
        yield work
        _replace(work, out)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise HimapError(f"cannot write {out}", reason, "check its permissions and the free space") from problem
    finally:
        if work.exists():
            shutil.rmtree(work)
        if not out.exists():
            for parent in parents:
                if parent.exists() and not any(parent.iterdir()):
                    parent.rmdir()


def _replace(work: Path, out: Path) -> None:
    if (out / FILE_NAME).exists():
        old = work.with_name(work.name + ".old")
        out.rename(old)
        work.rename(out)
        shutil.rmtree(old)
    else:
        work.rename(out)  # onto nothing, or onto an empty folder
