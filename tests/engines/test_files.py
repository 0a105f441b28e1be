"""What a command writes goes over nothing that is not an older output, and never into a bundle."""

import os
from pathlib import Path

import numpy as np
import pytest
from commands import Workshop

from himap_export.engines.files import check_output, check_outside, check_report, write_file
from himap_export.graphs.errors import Exit, HimapError

NPZ = b"PK\x03\x04"


def refuses(path: Path, words: str, *inputs: Path) -> None:
    with pytest.raises(HimapError) as caught:
        check_output(path, ".npz", *inputs)
    assert caught.value.code == Exit.USAGE and words in str(caught.value)


def test_outputs_go_over_older_ones_only(tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    check_output(out, ".npz")
    out.write_bytes(NPZ)
    check_output(out, ".npz", None, tmp_path / "in.npz")
    refuses(out, "it is an input of this command", out)
    out.write_text("my thesis")
    refuses(out, "it is there and is not a .npz file")
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "link.npz").symlink_to(out)
    (tmp_path / "dangling.npz").symlink_to(tmp_path / "none")
    for name in ("pipe.npz", "folder.npz", "link.npz", "dangling.npz"):
        refuses(tmp_path / name, "is not a plain file")
    for device in ("/dev/null", "/dev/full"):
        refuses(Path(device), "is not a plain file")
    for name in ("photo.jpg", "model.safetensors", "noname"):
        (tmp_path / name).write_text("not ours")
        refuses(tmp_path / name, "is not a .npz file")
    refuses(Path("/proc/out.npz"), "/proc cannot be written")
    refuses(tmp_path / "no" / "out.npz", "is no folder")
    refuses(tmp_path / ("x" * 300), "File name too long")
    assert out.read_text() == "my thesis"


def test_bundles_are_not_written_into(work: Workshop, tmp_path: Path) -> None:
    bundle = work.bundle("golden", "--k2", 5)
    (tmp_path / "link").symlink_to(bundle)
    for name in ("manifest.json", "new.npz", "weights/new.npz"):
        refuses(bundle / name, "is a bundle")
        refuses(tmp_path / "link" / name, "is a bundle")
    for folder in (bundle, bundle / "report"):
        for check in (check_report, check_outside):
            with pytest.raises(HimapError, match="is a bundle"):
                check(folder)


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    out.write_bytes(NPZ)
    with pytest.raises(ZeroDivisionError):
        write_file(out, lambda f: f.write(b"half") // 0)
    assert out.read_bytes() == NPZ and [p.name for p in tmp_path.iterdir()] == ["out.npz"]
    write_file(out, lambda f: np.savez(f, a=np.ones(3)))
    assert np.load(out)["a"].sum() == 3 and out.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o022))


def test_a_device_that_appears_meanwhile_stays_one(tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    with pytest.raises(HimapError, match="is not a plain file"):
        write_file(out, lambda f: os.mkfifo(out))
    assert out.is_fifo() and [p.name for p in tmp_path.iterdir()] == ["out.npz"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    def fill(_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(HimapError, match=r"cannot write .*No space left on device"):
        write_file(tmp_path / "out.npz", fill)
    assert not list(tmp_path.iterdir())


def test_reports(tmp_path: Path) -> None:
    check_report(tmp_path / "new" / "report")
    (tmp_path / "report.html").write_text("older")
    check_report(tmp_path)
    (tmp_path / "report.json").symlink_to("/dev/null")
    with pytest.raises(HimapError, match=r"report\.json is there and is not a plain file"):
        check_report(tmp_path)
    with pytest.raises(HimapError, match="it is no folder"):
        check_report(tmp_path / "report.html")
    with pytest.raises(HimapError, match="cannot be written"):
        check_report(Path("/proc/report"))
