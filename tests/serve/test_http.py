"""himap-serve as a process: what it prints, how it drains, and how it ends when it is asked to."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from served import JSON, KEY, Served, question

from himap_export.engines.bundle import Bundle
from himap_export.serve.cli import main

# A command over a service that follows a script: an answer of so many words, one every 50 ms.
SLOW = f"""\
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
import time
from fakes import FakeService
from himap_export.engines.bundle import Bundle
from himap_export.engines.command import run_command
from himap_export.serve.app import Options, make_app
from himap_export.serve.http import Serving, listen
from himap_export.serve.logs import RequestLog

def talk(talk):
    if int(sys.argv[2]) == 0:  # the engines have died
        service.ready = False
        return talk.end("error")
    talk.begin()
    for n in range(int(sys.argv[2])):
        if talk.left.wait(0.05):
            return
        talk.say(f"{{n}} ")
    talk.end()

service = FakeService(Bundle.open(sys.argv[1], verify=False), talk)

def body():
    log = RequestLog(sys.stderr)
    place = listen("127.0.0.1", 0)
    def ready(): print(f"http://127.0.0.1:{{place.getsockname()[1]}}/v1 serves", flush=True)
    Serving(service, make_app(service, Options(log=log)), log, drain_s=float(sys.argv[3]), ready=ready).run(place)

run_command("himap-slow", body, "it no longer serves")
"""


class Running(Served):
    """A server in a process of its own."""

    process: "subprocess.Popen[str]"

    def end(self) -> tuple[int, str]:
        """Its exit code and standard error, when it has ended."""
        stderr = self.process.communicate(timeout=20)[1]
        return self.process.returncode, stderr


@contextmanager
def running(*command: object) -> Iterator[Running]:
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert " serves" in line, process.stderr.read()
        found = Running(int(line.split("/v1")[0].rpartition(":")[2]), None, None)  # type: ignore[arg-type]
        found.process = process
        yield found
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def slow(shapes: Bundle, tmp_path: Path) -> Callable[..., Any]:
    """The command over an answer of so many words, which may take so long to drain."""
    (script := tmp_path / "himap-slow").write_text(SLOW)
    return lambda words, drain_s: running(sys.executable, script, shapes.folder, words, drain_s)


def streamed(server: Running) -> http.client.HTTPResponse:
    """An answer that has begun."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", "/v1/chat/completions", json.dumps(question(model="fake", stream=True)), JSON)
    answer = connection.getresponse()
    answer.read(100)
    return answer


def test_the_command_serves_measures_and_ends_when_it_is_asked_to(shapes: Bundle, tmp_path: Path) -> None:
    (keys := tmp_path / "keys").write_text(f"{KEY}\nanother\n")
    keys.chmod(0o600)
    command = [Path(sys.executable).with_name("himap-serve"), shapes.folder, "--port", 0, "--model-name", "shapes"]
    with running(*command, "--plan", "qa", "--threads", 1, "--api-key-file", keys, "--max-queue", 8) as server:
        status, _, document = server.chat(question())
        assert status == 200 and document["choices"][0]["message"]["content"] == "C"
        assert json.loads(server.ask("GET", "/v1/models")[2])["data"][1]["id"] == "shapes:qa"
        assert server.ask("GET", "/v1/models", headers={"authorization": "Bearer none"})[0] == 401
        metrics = server.ask("GET", "/metrics")[2].decode()
        assert 'himap_request_success_total{finished_reason="stop",model_name="shapes"} 1.0' in metrics
        assert 'himap_generation_tokens_total{model_name="shapes"} 2.0' in metrics
        server.process.send_signal(signal.SIGTERM)
        code, stderr = server.end()
    lines = [json.loads(line) for line in stderr.splitlines()]
    assert code == 0, stderr
    assert [line["event"] for line in lines] == ["start", "ready", "request", "refused", "draining", "stop"]
    assert "prompt" not in lines[2] and lines[2]["finish_reason"] == "stop" and KEY not in stderr


def test_it_drains_what_is_on_its_way_and_refuses_what_is_new(slow: Callable[..., Any]) -> None:
    with slow(20, 20) as server:
        answer = streamed(server)
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGINT)  # at once: a terminal asks both processes
        until = time.monotonic() + 1
        while server.ask("GET", "/health/ready")[0] == 200 and time.monotonic() < until:
            threading.Event().wait(0.01)
        status, headers, document = server.chat(question(model="fake"))
        assert status == 503 and headers["retry-after"] and document["error"]["code"] == "service_unavailable"
        rest = answer.read().decode()
        assert "19 " in rest and rest.endswith("data: [DONE]\n\n")
        code, stderr = server.end()
    assert code == 0, stderr


@pytest.mark.slow
@pytest.mark.parametrize("again", [True, False])
def test_a_second_signal_and_a_drain_that_takes_too_long_cut_answers(slow: Callable[..., Any], again: bool) -> None:
    with slow(1000, 30 if again else 1) as server:
        answer = streamed(server)
        server.process.send_signal(signal.SIGTERM)
        if again:
            threading.Event().wait(0.8)
            server.process.send_signal(signal.SIGTERM)
        *_, last, end = answer.read().decode().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "cancelled" and end == ""
        code, stderr = server.end()
    assert code == 130, stderr
    assert "himap-slow: error: stopped before every answer had ended" in stderr and "Traceback" not in stderr


@pytest.mark.slow
def test_a_server_whose_engines_have_died_ends(slow: Callable[..., Any]) -> None:
    with slow(0, 5) as server:
        status, _, document = server.chat(question(model="fake"))
        assert status == 500 and document["error"]["code"] == "engine_error"
        code, stderr = server.end()
    assert code == 1 and "himap-slow: error: the engines answer no more" in stderr, stderr


def test_what_cannot_be_served_is_one_line(shapes: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty := tmp_path / "keys").write_text("\n \n")
    (spaced := tmp_path / "spaced").write_text("two words\n")
    with running_port() as taken:
        for flags, code, said in (
            (("--port", 70000), 2, "70000"),
            (("--model-name", "a:b"), 2, "--model-name takes letters"),
            (("--plan", "fastv"), 2, "holds no plan fastv"),
            (("--api-key-file", empty), 2, "no usable keys in --api-key-file"),
            (("--api-key-file", spaced), 2, "no usable keys in --api-key-file"),
            (("--api-key-file", tmp_path / "none"), 2, "cannot read --api-key-file"),
            (("--allow-image-host", "http://a/"), 2, "unusable image host"),
            (("--port", taken), 1, "cannot listen on 127.0.0.1:"),
            (("--host", "no.such.host.invalid"), 1, "cannot listen on no.such.host.invalid"),
        ):
            with pytest.raises(SystemExit) as left:
                main([str(word) for word in (shapes.folder, "--no-verify", *flags)])
            line = capsys.readouterr().err.splitlines()[-1]
            assert left.value.code == code and line.startswith("himap-serve: error: ") and said in line, line


@contextmanager
def running_port() -> Iterator[int]:
    """A port that somebody listens on."""
    from himap_export.serve.http import listen

    with listen("127.0.0.1", 0) as place:
        yield place.getsockname()[1]
