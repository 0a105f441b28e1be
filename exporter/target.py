"""Where a bundle goes: settled before any work, built in a folder beside it, and put in place by one exchange.

    .NAME.partial-XXXXXXXX/     made by this process alone, locked as long as it lives
        lock
        bundle/                 what is being built; after the exchange the bundle that was replaced
        old/                    only where the file system cannot exchange: the bundle that is being replaced

Killed at any point, --out is the old bundle or the new one. What a killed export left is put right or cleared away by
the next one to the same place.
"""

import ctypes
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from himap_export.engines.command import held_signals
from himap_export.engines.files import folder_beside, has_long_name
from himap_export.engines.manifest import FILE_NAME, foreign_files, is_bundle
from himap_export.engines.scratch import LOCK, abandoned, locked
from himap_export.engines.supervisor import leaves
from himap_export.graphs.errors import Exit, HimapError

BUNDLE, OLD = "bundle", "old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h


def settle_target(out: Path, overwrite: bool) -> Path:
    """Returns the absolute path of the bundle's folder `out`; HimapError if a bundle cannot go there.

    It is a new or an empty folder or, with `overwrite`, a bundle of ours in which nothing else lies; no link, no mount
    point, no Python package, not the folder that one stands in; and the folder around it can be written.
    """
    if out.name in ("", ".."):
        raise _refused(out, "it does not end in a name", "name the bundle's own folder")
    try:
        home = Path(os.path.realpath(out.parent))
        target = home / out.name
        if has_long_name(target, next(p for p in target.parents if p.exists())):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        kind = _obstacle(target, overwrite) if os.path.lexists(target) else ""
        if inside := next((p for p in target.parents if is_bundle(p)), None):
            kind = f"{inside} is a bundle, which holds what its manifest lists"
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise _refused(Path(str(out)[:300]), f"{reason}", "give another `out`") from None
    if kind:
        raise _refused(out, kind, "give another `out`, a new folder; what is there is left alone")
    _check_writable(target)
    return target


def _refused(out: Path, details: str, hint: str) -> HimapError:
    return HimapError(f"{out} cannot become a bundle", details, hint, Exit.USAGE)


def _obstacle(target: Path, overwrite: bool) -> str:
    """Returns what stands in the way at a path that is there; "" for nothing."""
    if target.is_symlink():
        return "it is a link"
    if not target.is_dir():
        return "it is a file"
    if os.path.ismount(target):
        return "it is a mount point, which nothing can replace: name a folder in it"
    if target == Path.cwd() or target in Path.cwd().parents:
        return "it is the folder you are in"
    if (target / "__init__.py").exists():
        return "it is a Python package"
    if not any(target.iterdir()):
        return ""
    if not is_bundle(target):
        return "it is not empty and holds no bundle"
    if not overwrite:
        return "it already holds a bundle: `overwrite` replaces it"
    if foreign := foreign_files(target):
        return f"beside the bundle's own files it holds {foreign[0]}: move that out first"
    return ""


def _check_writable(target: Path) -> None:
    """Checks that a folder can be made beside `target`, where the bundle will be built."""
    home = next(p for p in target.parents if p.exists())
    try:
        with held_signals():
            Path(tempfile.mkdtemp(prefix=_prefix(target), dir=home)).rmdir()
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise HimapError(f"cannot write {target}", reason, "check its permissions and the free space") from None


@contextmanager
def work_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a fresh folder that becomes `out` (as `settle_target` gave it) on success, and vanishes on any failure.

    A signal that comes too late says so: the bundle is in place then.
    """
    with folder_beside(out, _prefix(out)) as wrapper, locked(wrapper):
        clear_beside(out)
        (wrapper / BUNDLE).mkdir()
        yield wrapper / BUNDLE
        settle_target(out, overwrite)  # hours later: it may be somebody else's by now
        with held_signals():
            _put(wrapper, out)
            leaves(f"after the bundle was complete: it is in place at {out}")
            shutil.rmtree(wrapper, ignore_errors=True)


def _put(wrapper: Path, out: Path) -> None:
    """Puts wrapper/bundle at `out`, and what was there into the wrapper."""
    new = wrapper / BUNDLE
    if not (out / FILE_NAME).exists():
        new.rename(out)  # onto nothing, or onto an empty folder
    elif not exchange(new, out):
        out.rename(wrapper / OLD)  # killed here, the next export puts it back
        new.rename(out)


def exchange(a: Path, b: Path) -> bool:
    """Exchanges two folders in one step, or returns False where kernel or file system cannot. OSError otherwise."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def clear_beside(out: Path) -> list[str]:
    """Puts right what killed exports to `out` left beside it: a replaced bundle goes back if nothing took its place,
    everything else goes. Returns what it did, in words."""
    done = []
    for left in sorted(out.parent.glob(f"{glob.escape(_prefix(out))}*")):
        if left.is_symlink() or not _is_ours(left) or not abandoned(left):
            continue
        if (left / OLD).is_dir() and not out.exists():
            (left / OLD).rename(out)
            done.append(f"put back the bundle at {out}, which a killed export was replacing")
        shutil.rmtree(left, ignore_errors=True)
        done.append(f"cleared away what a killed export left in {left.name}")
    return done


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and {p.name for p in folder.iterdir()} <= {LOCK, BUNDLE, OLD}


def _prefix(out: Path) -> str:
    """.NAME.partial-, shortened where the name alone is as long as names may be."""
    return f".{os.fsdecode(os.fsencode(out.name)[:200])}.partial-"
