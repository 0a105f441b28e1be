"""Files that a command writes where the user said: whole or not at all, and over nothing that is not the same kind."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from himap_export.engines.manifest import is_bundle
from himap_export.engines.supervisor import announced
from himap_export.graphs.errors import Exit, HimapError

# What files of a kind begin with: another file at the user's path is somebody's, not an older output.
KINDS = {".npz": (b"PK\x03\x04", b"PK\x05\x06"), ".png": (b"\x89PNG",)}


def check_output(path: Path, kind: str, *inputs: Path | None) -> None:
    """Raises HimapError (usage) unless `path` can become a file of `kind` (of KINDS): in a folder that can be written
    and is not a bundle's, over nothing or a plain file of that kind that is none of `inputs`. Called before any
    work."""
    if not _is(path.absolute().parent, stat.S_ISDIR):
        raise HimapError(f"cannot write {path}", f"{path.parent} is no folder", code=Exit.USAGE)
    check_outside(path)
    if not _exists(path):
        _check_writable(path, path.absolute().parent)
        return
    if not _is(path, stat.S_ISREG, follow=False):
        raise HimapError(f"cannot write {path}", "it is there and is not a plain file", "give another name", Exit.USAGE)
    for file in inputs:
        if file is not None and file.exists() and path.samefile(file):
            raise HimapError(f"cannot write {path}", "it is an input of this command", "give another name", Exit.USAGE)
    with path.open("rb") as f:
        start = f.read(8)
    if start and not start.startswith(KINDS[kind]):
        details = f"it is there and is not a {kind} file"
        raise HimapError(f"cannot write {path}", details, "give another name; it is left alone", Exit.USAGE)


def check_outside(path: Path) -> None:
    """Raises HimapError (usage) if `path`, a file or a folder to be written, lies in a bundle, or is one."""
    whole = Path(os.path.realpath(path))
    for folder in (whole, *whole.parents):
        if is_bundle(folder):
            details, hint = f"{folder} is a bundle", "a bundle holds what its manifest lists: choose another place"
            raise HimapError(f"cannot write {path}", details, hint, Exit.USAGE)


def write_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Lets `write` fill a file beside `path`, and puts it there when it is whole. HimapError if it cannot."""
    try:
        handle, name = tempfile.mkstemp(prefix=".himap-", suffix=".partial", dir=path.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as f:
                write(f)
            part.chmod(0o666 & ~_umask())
            if _exists(path) and not _is(path, stat.S_ISREG, follow=False):
                raise HimapError(f"cannot write {path}", "it is there and is not a plain file")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as problem:
        raise HimapError(f"cannot write {path}", problem.strerror or str(problem)) from None


@contextmanager
def folder_beside(target: Path, prefix: str) -> Iterator[Path]:
    """Yields a fresh folder beside `target`, in which what becomes `target` is made; it vanishes, and so do folders
    above that were made for it, unless `target` came to be. HimapError if it cannot be."""
    parents = [p for p in target.parents if not p.exists()]
    made: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        with announced(made, *parents):
            yield made
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise HimapError(f"cannot write {target}", reason, "check its permissions and the free space") from problem
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        if not target.exists():
            for parent in parents:
                with suppress(OSError):
                    parent.rmdir()


def check_report(folder: Path, names: tuple[str, ...] = ("report.html", "report.json")) -> None:
    """Raises HimapError (usage) unless a report can go into `folder`: new or a folder that can be written, outside
    bundles, in which nothing but plain files goes by the report's `names`. Called before any work."""
    check_outside(folder)
    if _exists(folder) and not _is(folder, stat.S_ISDIR):
        raise HimapError(f"cannot write to {folder}", "it is no folder", code=Exit.USAGE)
    home = next(p for p in (folder.absolute(), *folder.absolute().parents) if _exists(p))
    if has_long_name(folder, home):
        raise HimapError(f"cannot write to {str(folder)[:80]}", os.strerror(errno.ENAMETOOLONG), code=Exit.USAGE)
    _check_writable(folder, home)
    for name in names:
        if _exists(folder / name) and not _is(folder / name, stat.S_ISREG, follow=False):
            raise HimapError(f"cannot write to {folder}", f"{name} is there and is not a plain file", code=Exit.USAGE)


def has_long_name(path: Path, home: Path) -> bool:
    """Tells whether a part of `path` is longer than names may be on the file system of the folder `home`."""
    longest = os.pathconf(home, "PC_NAME_MAX")
    return any(len(os.fsencode(part)) > longest for part in path.parts)


def _check_writable(path: Path, home: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=home).close()
    except OSError as problem:
        details = f"{home} cannot be written: {problem.strerror}"
        raise HimapError(f"cannot write {path}", details, code=Exit.USAGE) from None


def _exists(path: Path) -> bool:
    """Tells whether anything, a broken link too, has that name. HimapError (usage) if no file can have it."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as problem:
        reason = (problem.strerror if isinstance(problem, OSError) else None) or str(problem)
        raise HimapError(f"cannot write {str(path)[:80]}", reason, code=Exit.USAGE) from None
    return True


def _is(path: Path, kind: Callable[[int], bool], follow: bool = True) -> bool:
    try:
        return kind(path.stat().st_mode if follow else path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
