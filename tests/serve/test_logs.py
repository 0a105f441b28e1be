"""A log's lines: one event each, whatever a client wrote, from any thread; nobody's words unless asked for."""

import errno
import io
import json
import math
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from himap_export.serve.logs import RequestLog


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    text = stream.getvalue()
    assert text.isascii() and text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_one_line_for_each_event() -> None:
    stream = io.StringIO()
    log = RequestLog(stream)
    log.write("ready", url="http://127.0.0.1:8000/v1", models=("shapes", "shapes:none"))
    log.write("request", id="a", status=200, queue_ms=1.25, first_token_ms=None, image_tokens_kept={"prefix": 576})
    log.write("stop", bundle=Path("bundle"))
    ready, request, stop = lines(stream)
    stamp = str(ready["time"])
    assert stamp.endswith("Z") and abs(datetime.fromisoformat(stamp) - datetime.now(UTC)).days < 1
    assert list(ready)[:2] == ["time", "event"] and ready["event"] == "ready"
    assert ready["models"] == ["shapes", "shapes:none"]
    assert {name: request[name] for name in list(request)[2:]} == {
        "id": "a", "status": 200, "queue_ms": 1.25, "first_token_ms": None, "image_tokens_kept": {"prefix": 576},
    }  # fmt: skip
    assert stop["bundle"] == "bundle"


NASTY = 'a\nb\r\x00\x1b[2J\x7f\x85\u2028\u2029\ud800"\\{}\t\U0001f600'


def test_nothing_that_a_client_writes_breaks_a_line() -> None:
    stream = io.StringIO()
    RequestLog(stream).write("request", id=NASTY, client={NASTY: [NASTY]})
    text = stream.getvalue()
    assert text.count("\n") == 1 and not any(character < " " or character > "~" for character in text[:-1])
    assert lines(stream)[0]["id"] == NASTY and lines(stream)[0]["client"] == {NASTY: [NASTY]}


def test_numbers_that_json_cannot_spell() -> None:
    stream = io.StringIO()
    RequestLog(stream).write("request", e2e_ms=math.nan, deadline=math.inf, all_of=[-math.inf, {"x": math.nan}, 1.0])
    assert {name: value for name, value in lines(stream)[0].items() if name not in ("time", "event")} == {
        "e2e_ms": None, "deadline": None, "all_of": [None, {"x": None}, 1.0],
    }  # fmt: skip


def test_words_and_pictures_only_if_asked() -> None:
    said = {"prompt": "which letter?", "answer": "C", "image": "data:image/png;base64,AAAA"}
    silent, telling = io.StringIO(), io.StringIO()
    RequestLog(silent).write("request", id="a", **said)
    RequestLog(telling, log_prompts=True).write("request", id="a", **said)
    assert set(lines(silent)[0]) == {"time", "event", "id"} and "which" not in silent.getvalue()
    assert said.items() <= lines(telling)[0].items()


class Slow(io.StringIO):
    """Writes a character at a time, so that threads that do not wait for each other would mix their lines."""

    def write(self, text: str) -> int:
        for character in text:
            super().write(character)
        return len(text)


def test_threads_do_not_mix_their_lines() -> None:
    stream = Slow()
    log = RequestLog(stream)

    def work(name: int) -> None:
        for n in range(50):
            log.write("request", id=f"{name}-{n}")

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(str(line["id"]) for line in lines(stream)) == sorted(f"{a}-{b}" for a in range(8) for b in range(50))


class Full(io.StringIO):
    """A disk with no space left."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_takes_nothing_stops_nobody() -> None:
    closed, full = io.StringIO(), Full()
    closed.close()
    for stream in (closed, full):
        log = RequestLog(stream)
        log.write("request", id="a")
        log.write("request", id="b")
    assert [line["id"] for line in lines(full)] == ["a", "b"]  # it goes on trying
