"""Temporary folders, all in one place: whoever starts next clears away what a killed command left there.

Each folder is locked by the process that uses it. A lock ends with its process, however that ends: a folder that nobody
locks is a leftover. The place is the user's own, TMPDIR/himap-UID.
"""

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = "lock"
_BEING_MADE = 60.0  # seconds in which a folder may be without its lock


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Makes an empty folder that vanishes at the end, or at the next start of a command if this one is killed."""
    place = scratch_place()
    folder = Path(tempfile.mkdtemp(prefix=f"{purpose}-", dir=place))
    try:
        with locked(folder):
            work = folder / "work"
            work.mkdir()
            yield work
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch_place() -> Path | None:
    """Returns TMPDIR/himap-UID, made if it is not there; None if somebody else owns it: then there is no one place."""
    place = Path(tempfile.gettempdir()) / f"himap-{os.getuid()}"
    with suppress(FileExistsError):
        place.mkdir(mode=0o700)
    found = place.lstat()
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return place if ours else None


def clear_leftovers() -> list[Path]:
    """Removes the temporary folders that killed commands left; returns which."""
    place = scratch_place()
    if place is None:
        return []
    left = [folder for folder in place.iterdir() if folder.is_dir() and not folder.is_symlink() and abandoned(folder)]
    for folder in left:
        shutil.rmtree(folder, ignore_errors=True)
    return left


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock: as long as this process lives nobody takes it for a leftover."""
    with (folder / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def abandoned(folder: Path) -> bool:
    """Tells whether nobody holds the lock of a folder that `locked` knows."""
    try:
        with (folder / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except FileNotFoundError:
        with suppress(OSError):
            return time.time() - folder.stat().st_mtime > _BEING_MADE
        return False
    except OSError:
        return False
