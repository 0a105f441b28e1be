"""A bundle on disk: opened, checked byte by byte against its manifest, and its weights found."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from himap_export.engines.manifest import FILE_NAME, FileRecord, GraphRecord, Manifest, read_manifest
from himap_export.engines.weight_file import StoredTensor, read_header
from himap_export.graphs.errors import HimapError


@dataclass(frozen=True)
class Bundle:
    """A sealed bundle's folder and manifest."""

    folder: Path
    manifest: Manifest

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every stored weight by its checkpoint name."""
        return {name: t for file in self.manifest.weights for name, t in read_header(self.folder / file).items()}

    def graph(self, name: str) -> GraphRecord:
        return self.manifest.graphs[name]

    def path(self, file: str) -> Path:
        return self.folder / file


def open_bundle(folder: Path, verify: bool = True) -> Bundle:
    """The bundle in `folder`; with `verify`, every file's length and sha256 are checked first."""
    manifest = read_manifest(folder)
    if verify:
        _verify(folder, manifest)
    return Bundle(folder, manifest)


def digest(path: Path) -> FileRecord:
    with path.open("rb") as f:
        return FileRecord(hashlib.file_digest(f, "sha256").hexdigest(), path.stat().st_size)


def digests(folder: Path) -> dict[str, FileRecord]:
    """A record of every file under `folder` but the manifest, by relative path."""
    paths = sorted(_files(folder))
    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
        return dict(zip((p.relative_to(folder).as_posix() for p in paths), pool.map(digest, paths), strict=True))


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in folder.rglob("*") if p.is_file() and p.name != FILE_NAME)


def _verify(folder: Path, manifest: Manifest) -> None:
    for name in manifest.files:
        if not (folder / name).is_file():
            raise HimapError(f"{folder} lacks {name}", hint="the bundle is incomplete: copy or export it again")
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: digest(folder / name), manifest.files)
        for (name, expected), actual in zip(manifest.files.items(), found, strict=True):
            if actual != expected:
                what = f"sha256 {actual.sha256[:12]}, the manifest says {expected.sha256[:12]}"
                raise HimapError(f"{folder / name} has changed since export", what, "copy or export the bundle again")
