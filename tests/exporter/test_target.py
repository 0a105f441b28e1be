"""Where a bundle goes: nothing that is not a bundle of ours is replaced, and nothing is lost on the way."""

import errno
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from himap_export.engines import supervisor
from himap_export.engines.manifest import is_bundle
from himap_export.engines.scratch import locked
from himap_export.exporter import target
from himap_export.exporter.target import clear_beside, exchange, settle_target, work_folder
from himap_export.graphs.errors import Exit, HimapError

RECORD = {"sha256": "0" * 64, "bytes": 3}
OUTLINE = {
    "schema": 4, "model": {}, "decoder": {}, "graphs": {}, "engines": {}, "toolchain": {}, "command": [],
    "files": {"k1.onnx": RECORD, "weights/model.safetensors": RECORD},
}  # fmt: skip


def make_bundle(folder: Path, text: str = "old") -> Path:
    """What every schema of ours looks like from outside."""
    (folder / "weights").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(OUTLINE))
    (folder / "k1.onnx").write_text(text)
    (folder / "weights" / "model.safetensors").write_text(text)
    return folder


def listing(folder: Path) -> dict[str, bytes | None]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refuses(out: Path, words: str) -> None:
    """With --overwrite and without, and leaves what is there alone."""
    for overwrite in (False, True):
        with pytest.raises(HimapError) as caught:
            settle_target(out, overwrite)
        assert caught.value.code == Exit.USAGE and words in str(caught.value)


# --- what may be replaced ---


@pytest.mark.parametrize(
    "manifest",
    [
        {"short_name": "shop", "icons": [], "start_url": "."},  # a web app's
        {**OUTLINE, "schema": "4"},
        {**OUTLINE, "schema": 99},
        {**OUTLINE, "files": ["k1.onnx"]},
        {"schema": 4, "files": {}},
        [],
    ],
)
def test_a_folder_with_another_manifest_is_not_replaced(tmp_path: Path, manifest: object) -> None:
    folder = make_bundle(tmp_path / "app")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before = listing(tmp_path)
    refuses(folder, "is not empty and holds no bundle")
    assert not is_bundle(folder) and listing(tmp_path) == before


def test_odd_manifests_are_nobodys_bundle(tmp_path: Path) -> None:
    for name, make in (
        ("folder", lambda p: p.mkdir()),
        ("pipe", os.mkfifo),
        ("loop", lambda p: p.symlink_to(p)),
        ("cut", lambda p: p.write_text('{"schema": 4')),
        ("deep", lambda p: p.write_text("[" * 100_000)),
    ):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "manifest.json")
        refuses(tmp_path / name, "is not empty and holds no bundle")


def test_a_bundle_with_a_file_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    assert settle_target(bundle, True) == bundle
    (bundle / "weights" / "notes.txt").write_text("mine")
    with pytest.raises(HimapError, match=r"it holds weights/notes\.txt: move that out first"):
        settle_target(bundle, True)
    (bundle / "weights" / "notes.txt").unlink()
    (bundle / "link").symlink_to(tmp_path)
    with pytest.raises(HimapError, match="it holds link"):
        settle_target(bundle, True)


def test_a_bundle_without_overwrite_stays(tmp_path: Path) -> None:
    with pytest.raises(HimapError, match="`overwrite` replaces it"):
        settle_target(make_bundle(tmp_path / "bundle"), False)


# --- where it may go ---


def test_places_where_no_bundle_can_go_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "link").symlink_to(bundle)
    (tmp_path / "nowhere").symlink_to(tmp_path / "nothing")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = listing(tmp_path)
    for name, words in (
        ("link", "it is a link"),
        ("nowhere", "it is a link"),
        ("package", "it is a Python package"),
        ("file", "it is a file"),
        ("new/..", "does not end in a name"),
        ("bundle/inside", "is a bundle, which holds what its manifest lists"),
        ("x" * 300, "File name too long"),
        ("new/" + "x" * 300, "File name too long"),
    ):
        refuses(tmp_path / name, words)
    refuses(Path("/proc"), "it is a mount point")
    for unwritable in (Path("/proc/himap"), tmp_path / "file" / "bundle"):
        with pytest.raises(HimapError, match=f"cannot write {unwritable}"):
            settle_target(unwritable, False)
    monkeypatch.chdir(tmp_path / "empty")
    refuses(Path(), "does not end in a name")
    refuses(tmp_path / "empty", "it is the folder you are in")
    assert listing(tmp_path) == before


def test_good_places_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    assert settle_target(Path("../link/bundle"), False) == tmp_path / "real" / "bundle"
    assert settle_target(Path("deep/er/bundle"), False) == tmp_path / "real" / "deep" / "er" / "bundle"
    assert settle_target(tmp_path / ("x" * 250), False).name == "x" * 250
    assert not any((tmp_path / "real").iterdir())  # what was tried out is gone


# --- how it gets there ---


def fill(work: Path, text: str = "new") -> None:
    (work / "manifest.json").write_text(json.dumps(OUTLINE))
    (work / "k1.onnx").write_text(text)


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As the kernel exchanges, and as where it cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(target, "exchange", lambda a, b: False)
    return str(request.param)


def test_a_bundle_takes_the_place_of_another(tmp_path: Path, way: str) -> None:
    out = make_bundle(tmp_path / "bundle")
    with work_folder(out, True) as work:
        fill(work)
        assert (out / "k1.onnx").read_text() == "old"
    assert (out / "k1.onnx").read_text() == "new"
    assert sorted(p.name for p in out.iterdir()) == ["k1.onnx", "manifest.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_failure_leaves_what_was_there(tmp_path: Path, way: str) -> None:
    out = make_bundle(tmp_path / "bundle")
    before = listing(tmp_path)
    with pytest.raises(ZeroDivisionError), work_folder(out, True) as work:
        fill(work)
        raise ZeroDivisionError
    assert listing(tmp_path) == before
    with pytest.raises(ZeroDivisionError), work_folder(tmp_path / "deep" / "er" / "bundle") as work:
        raise ZeroDivisionError
    assert listing(tmp_path) == before


def test_what_appears_at_out_meanwhile_is_not_replaced(tmp_path: Path, way: str) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(HimapError, match="it is not empty"), work_folder(out) as work:
        fill(work)
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    assert listing(tmp_path) == {"bundle": None, "bundle/mine.txt": b"mine"}


def test_a_folder_of_another_export_is_left_alone(tmp_path: Path) -> None:
    """In containers every process has the same id: names by it meet."""
    other = tmp_path / ".bundle.partial-abcdefgh"
    (other / "bundle").mkdir(parents=True)
    with locked(other), work_folder(tmp_path / "bundle") as work:
        assert work.parent != other
        fill(work)
        assert other.is_dir()
    assert other.is_dir()


def test_what_looks_like_a_leftover_and_is_not_stays(tmp_path: Path) -> None:
    mine = tmp_path / ".bundle.partial-notes"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert clear_beside(tmp_path / "bundle") == [] and (mine / "notes.txt").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from himap_export.exporter import target
out, seam = Path(sys.argv[1]), sys.argv[2]
if seam == "old":  # after the first of two renames
    target.exchange = lambda a, b: False
    rename = Path.rename
    def killed(self, to):
        rename(self, to)
        os.kill(os.getpid(), signal.SIGKILL)
    Path.rename = killed
with target.work_folder(out, True) as work:
    (work / "manifest.json").write_text((out / "manifest.json").read_text())
    (work / "k1.onnx").write_text("new")
    if seam == "work":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("seam", ["work", "old"])
def test_the_next_export_puts_right_what_a_killed_one_left(tmp_path: Path, seam: str) -> None:
    out = make_bundle(tmp_path / "bundle")
    before = listing(tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, out, seam], check=False)
    assert done.returncode == -signal.SIGKILL
    assert out.exists() == (seam == "work") and len(list(tmp_path.iterdir())) > (seam == "work")
    said = clear_beside(out)
    assert listing(tmp_path) == before
    assert ("put back" in said[0]) == (seam == "old") and "cleared away" in said[-1]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_exchange_comes_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, sent: signal.Signals
) -> None:
    out, put = make_bundle(tmp_path / "bundle"), target._put

    def interrupted(wrapper: Path, to: Path) -> None:
        os.kill(os.getpid(), sent)
        put(wrapper, to)
        os.kill(os.getpid(), sent)

    monkeypatch.setattr(target, "_put", interrupted)
    with pytest.raises(KeyboardInterrupt), work_folder(out, True) as work:
        fill(work)
    assert supervisor.left() == f"after the bundle was complete: it is in place at {out}"
    assert (out / "k1.onnx").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_exchange(tmp_path: Path) -> None:
    a, b = make_bundle(tmp_path / "a", "a"), make_bundle(tmp_path / "b", "b")
    assert exchange(a, b)
    assert ((a / "k1.onnx").read_text(), (b / "k1.onnx").read_text()) == ("b", "a")
    with pytest.raises(OSError, match="No such file") as caught:
        exchange(a, tmp_path / "c")
    assert caught.value.errno == errno.ENOENT


def test_the_parent_process_clears_what_was_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a child that it had to kill."""
    folders: dict[str, Callable[[], object]] = {"gone": lambda: None, "kept": (tmp_path / "kept" / "old").mkdir}
    for name, prepare in folders.items():
        monkeypatch.setattr(supervisor, "_board", mmap.mmap(-1, supervisor._BOARD))
        (tmp_path / name).mkdir()
        prepare()
        with supervisor.announced(tmp_path / name, tmp_path / "no"):
            supervisor._clear()
        assert (tmp_path / name).exists() == (name == "kept")
        supervisor._clear()  # nothing is announced any more
