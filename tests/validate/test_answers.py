"""The log of answers: goes on where it stopped, whatever stopped it, and refuses what it is not."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.accuracy.answers import Answered, AnswerLog, check_count, check_log, claim, read_log

HEADER = {"bundle": "12ab", "new_tokens": 8, "cuts": (2, 8)}


def answered(line: int, policy: str = "himap", seed: int = 0) -> Answered:
    return Answered(policy, seed, line, f"q{line}", "t", 'said "é"\n', "yes", line % 2 == 1)


def written(file: Path, rows: Sequence[Answered], header: dict[str, Any] = HEADER) -> Path:
    with AnswerLog(file, header) as log:
        log.append(rows)
    return file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


@pytest.fixture
def bundle_folder(tmp_path: Path) -> Path:
    """As much of a bundle as tells it from a web app with a manifest."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    parts: dict[str, dict[str, str]] = {k: {} for k in ("model", "decoder", "graphs", "engines", "toolchain", "files")}
    (folder / "manifest.json").write_text(json.dumps({"schema": 4, "command": ["himap-export"], **parts}))
    return folder


def test_every_line_is_json_and_comes_back(file: Path) -> None:
    rows = [answered(1), answered(2), answered(1, "random", 3)]
    written(file, rows)
    objects = [json.loads(line) for line in file.read_text().splitlines()]
    assert objects[0] == {"himap-validate": "answers", "bundle": "12ab", "new_tokens": 8, "cuts": [2, 8]}
    assert objects[1] == {
        "policy": "himap", "seed": 0, "line": 1, "id": "q1", "type": "t",
        "said": 'said "é"\n', "expected": "yes", "right": True,
    }  # fmt: skip
    assert read_log(file) == rows


def test_going_on(file: Path) -> None:
    with AnswerLog(file, HEADER) as log:
        assert log.done == set()
        log.append([answered(1), answered(2)])
        assert read_log(file) == [answered(1), answered(2)]  # on disk before the log is closed
        assert log.done == {("himap", 0, 1), ("himap", 0, 2)}
    with AnswerLog(file, dict(reversed(HEADER.items()))) as log:
        assert log.done == {("himap", 0, 1), ("himap", 0, 2)}
        log.append([answered(3)])
    assert read_log(file) == [answered(1), answered(2), answered(3)]


def test_a_kill_at_any_byte_loses_only_what_was_not_whole(file: Path) -> None:
    rows = [answered(1), answered(2)]
    whole = written(file, rows).read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        kept = max(sum(end <= size for end in ends) - 1, 0)
        with AnswerLog(file, HEADER) as log:
            assert log.done == {r.key for r in rows[:kept]}
            log.append(rows[kept:])
        assert file.read_bytes() == whole
    file.write_bytes(whole[:-3])
    assert read_log(file) == rows[:1]


def test_another_measurement_is_refused_and_kept(file: Path) -> None:
    before = written(file, [answered(1)]).read_bytes()
    with pytest.raises(HimapError, match="another measurement") as told:
        AnswerLog(file, {**HEADER, "new_tokens": 9, "seed": 1})
    assert told.value.code == Exit.USAGE and "another folder" in told.value.hint
    assert told.value.details == "new_tokens is 9, was 8, seed is 1, was None"
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"precious\n", b"precious", b"{}\n", b"[]\n", b"\xff\n", b'{"himap-validate": 1}\n']
)
def test_another_file_is_refused_and_kept(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(HimapError, match="no log of ours") as told:
        AnswerLog(file, HEADER)
    assert told.value.code == Exit.USAGE and file.read_bytes() == content
    with pytest.raises(HimapError, match="no log of ours"):
        read_log(file)


BAD = ["{", "[]", '{"policy": "himap"}', None, "[" * 100_000, "null", "NaN", '"\\ud800"']


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_damaged_line_is_told_by_its_number(bad: str | None, file: Path) -> None:
    lines = written(file, [answered(1), answered(2)]).read_text().splitlines()
    lines[1] = lines[1].replace("true", "1") if bad is None else bad
    file.write_text("\n".join(lines) + "\n")
    for use in (lambda: AnswerLog(file, HEADER), lambda: read_log(file)):
        with pytest.raises(HimapError, match="line 2 of") as told:
            use()
        assert told.value.code == Exit.USAGE


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", -1), ("seed", 10**30), ("line", 1.5), ("line", True), ("policy", None), ("said", 3), ("right", "true")],
)
def test_a_value_of_another_kind_is_damage(key: str, value: object, file: Path) -> None:
    row = json.loads(written(file, [answered(1)]).read_text().splitlines()[1])
    for changed in ({**row, key: value}, {**row, "more": 1}, {k: v for k, v in row.items() if k != key}):
        file.write_text(f"{json.dumps({'himap-validate': 'answers', **HEADER})}\n{json.dumps(changed)}\n")
        with pytest.raises(HimapError, match="line 2 of") as told:
            AnswerLog(file, HEADER)
        assert "the log is damaged" in told.value.details


def test_pipes_and_devices_are_no_logs_and_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", Path("/dev/null"), tmp_path):
        with pytest.raises(HimapError, match="cannot write") as told:
            AnswerLog(file, HEADER)
        assert told.value.code == Exit.USAGE
        with pytest.raises(HimapError, match="cannot read"):
            read_log(file)


def test_a_huge_log_is_not_read(file: Path) -> None:
    content = written(file, [answered(1)]).read_bytes()
    with file.open("r+b") as stream:
        stream.truncate(10**12)  # of no blocks
    for use in (lambda: AnswerLog(file, HEADER), lambda: read_log(file), lambda: check_log(file, HEADER)):
        with pytest.raises(HimapError, match="too large"):
            use()
    with file.open("rb") as stream:
        assert stream.read(len(content)) == content and file.stat().st_size == 10**12


def test_no_log_is_made_in_a_bundle(bundle_folder: Path) -> None:
    before = sorted(bundle_folder.iterdir())
    for file in (bundle_folder / "log.jsonl", bundle_folder / "new" / "log.jsonl"):
        with pytest.raises(HimapError, match="is a bundle"):
            AnswerLog(file, HEADER)
    with pytest.raises(HimapError, match="is a bundle"):
        claim(bundle_folder / "report", "log.jsonl")
    assert sorted(bundle_folder.iterdir()) == before


def test_a_folder_is_claimed_before_any_work(tmp_path: Path) -> None:
    claim(tmp_path / "new" / "deep", "log.jsonl")
    claim(tmp_path, "log.jsonl")
    (tmp_path / "plans.toml").mkdir()
    (tmp_path / "log.jsonl").touch()
    claim(tmp_path, "log.jsonl")
    for folder, others, words in (
        (tmp_path, ("plans.toml",), "is not a plain file"),
        (tmp_path / "log.jsonl", (), "it is no folder"),
        (tmp_path / ("x" * 300), (), "File name too long"),
        (tmp_path / "plans.toml" / "..", ("plans.toml",), "is not a plain file"),
    ):
        with pytest.raises(HimapError) as told:
            claim(folder, "log.jsonl", *others)
        assert told.value.code == Exit.USAGE and words in told.value.details
    (tmp_path / "plans.toml" / "other").touch()
    with pytest.raises(HimapError, match="neither empty nor ours"):
        claim(tmp_path / "plans.toml", "log.jsonl")


def test_a_log_is_checked_before_all_of_its_header_is_known(file: Path) -> None:
    check_log(file, {"bundle": "other"})  # there is none yet
    written(file, [answered(1)])
    before = file.read_bytes()
    check_log(file, {"bundle": "12ab", "cuts": (2, 8)})
    with pytest.raises(HimapError, match="another measurement") as told:
        check_log(file, {"bundle": "34cd", "cuts": (2, 8)})
    assert told.value.details == "bundle is '34cd', was '12ab'"
    file.write_bytes(before + b"{}\n")
    with pytest.raises(HimapError, match="line 3 of"):
        check_log(file, {"bundle": "12ab"})
    file.write_bytes(b"precious\n")
    with pytest.raises(HimapError, match="no log of ours"):
        check_log(file, {})


def test_more_answers_than_a_log_takes_are_not_begun() -> None:
    check_count(2_000_000)
    with pytest.raises(HimapError, match="2000001 answers are too many") as told:
        check_count(2_000_001)
    assert told.value.code == Exit.USAGE


def test_two_runs_do_not_share_a_log(file: Path) -> None:
    with AnswerLog(file, HEADER), pytest.raises(HimapError, match="in use"):
        AnswerLog(file, HEADER)
    AnswerLog(file, HEADER).close()


def test_files_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "no" / "log.jsonl"):
        with pytest.raises(HimapError, match="cannot write") as told:
            AnswerLog(file, HEADER)
        assert told.value.code == Exit.USAGE
    with pytest.raises(HimapError, match="cannot read"):
        read_log(tmp_path / "none")


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs /dev/full")
def test_a_full_disk(file: Path) -> None:
    log = AnswerLog(file, HEADER)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._stream.fileno())
    with pytest.raises(HimapError, match="cannot write"):
        log.append([answered(1)])
    assert log.done == set()
    log.close()
    os.close(full)
