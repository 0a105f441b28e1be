"""The models that himap-serve --triton writes, on the real tritonserver 2.51 (`make test-triton`).

HIMAP_TRITON is the environment that the Makefile makes: the client and this package with NumPy 2, as a deployment has
it; in server/ the server, and in numpy1/ the same packages with NumPy 1.26, which is what its Python stub was compiled
for. HIMAP_TRITON_BUNDLE: `shapes` in two plans, with four slots. No PyTorch anywhere.
"""

import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from himap_export.engines.bundle import Bundle
from himap_export.engines.session import Session
from himap_export.serve.triton.repository import write_repository

TRITON, BUNDLE = (os.environ.get(name) for name in ("HIMAP_TRITON", "HIMAP_TRITON_BUNDLE"))
if not TRITON or not BUNDLE:
    pytest.skip("`make test-triton` makes the environment", allow_module_level=True)
pytestmark = pytest.mark.slow

from tritonserver import Server, Stream, inputs, tensor, tritonserver  # noqa: E402

STREAM, BATCH = "shapes-stream", "shapes-batch"
IMAGES = Path(__file__).parents[2] / "examples" / "shapes" / "images"
LETTER, QUESTION = (IMAGES / "letter.png").read_bytes(), "which letter is in the yellow box?"
LONG = {"TEMPERATURE": 50.0, "MAX_NEW_TOKENS": 250}  # nonsense, mostly without an end
ECHO = """
import hashlib
import numpy as np
from himap_export.serve.triton.tensors import check_stub, numbers, response, texts

class TritonPythonModel:
    def initialize(self, args):
        check_stub()

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        sent, words = numbers(request, "BYTES"), texts(request, "WORDS")
        digest = hashlib.sha256(sent.tobytes()).hexdigest()
        return response({"DIGEST": [digest], "WORDS": words, "LENGTHS": np.array([sent.size, len(words)], np.int32)},
                        (-1,))
"""
ECHO_CONFIG = """
backend: "python"
input [ { name: "BYTES" data_type: TYPE_UINT8 dims: [ -1 ] }, { name: "WORDS" data_type: TYPE_STRING dims: [ -1 ] } ]
output [
  { name: "DIGEST" data_type: TYPE_STRING dims: [ 1 ] }, { name: "WORDS" data_type: TYPE_STRING dims: [ -1 ] },
  { name: "LENGTHS" data_type: TYPE_INT32 dims: [ 2 ] }
]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "models"
    write_repository(Bundle.open(BUNDLE), folder, name="shapes")
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    echo = repository / "echo" / "1"
    echo.mkdir(parents=True)
    (echo / "model.py").write_text(ECHO)
    (echo.parent / "config.pbtxt").write_text(ECHO_CONFIG)
    log = tmp_path_factory.mktemp("log") / "log"
    with tritonserver(Path(TRITON, "server"), repository, Path(TRITON, "numpy1"), log) as started:
        assert started.is_ready(), started.said
        yield started


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Bundle.open(BUNDLE).session(plan="dart", threads=1) as opened:
        yield opened


@pytest.fixture
def stream(server: Server) -> Iterator[Stream]:
    opened = Stream(server.grpc)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def seeds(server: Server) -> list[int]:
    """Nine of which the answers are LONG."""
    opened = Stream(server.grpc)
    for seed in range(24):
        opened.ask(STREAM, f"{seed}", inputs(LETTER, QUESTION, SEED=seed, **LONG))
    found = [int(id) for id, answer in opened.all().items() if answer.reason == "length"]
    opened.close()
    return found[:9]


def expected(session: Session, prompt: str = QUESTION, image: bytes = LETTER) -> str:
    return session.ask(Image.open(io.BytesIO(image)), prompt).text


def test_bytes_and_strings_arrive_as_they_were_sent(server: Server, stream: Stream) -> None:
    random = np.random.default_rng(0)
    words = ["", "grün ✓", "a\0b", "x" * 70_000]
    strings = np.array([word.encode() for word in words], object)
    for size in (1, 255, 100_001, 5_000_000):
        sent = random.integers(0, 256, size, np.uint8)
        asked = [tensor("BYTES", "UINT8", sent), tensor("WORDS", "BYTES", strings)]
        got = stream.client.infer("echo", asked)
        assert got.as_numpy("DIGEST")[0].decode() == hashlib.sha256(sent.tobytes()).hexdigest()
        assert [word.decode() for word in got.as_numpy("WORDS")] == words
        assert got.as_numpy("LENGTHS").tolist() == [size, len(words)]


def test_answers_over_grpc_are_the_sessions(stream: Stream, session: Session) -> None:
    lines = [json.loads(line) for line in (IMAGES / "questions.jsonl").read_text().splitlines()]
    for n, line in enumerate(lines):
        image = (IMAGES / line["image"]).read_bytes()
        stream.ask(STREAM, f"{n}", inputs(image, line["question"]))
        answer = stream.all()[f"{n}"]
        assert answer.text == expected(session, line["question"], image) == line["answer"]
        assert (answer.reason, answer.kept) == ("stop", session.bundle.select("dart").budget.visual)
    stream.ask(STREAM, "unpruned", inputs(LETTER, QUESTION, PLAN="none"))
    assert stream.all()["unpruned"].kept == session.bundle.select("none").budget.visual
    assert stream.answers["unpruned"].text == "C"


def test_answers_over_http_are_the_sessions(server: Server, stream: Stream, session: Session) -> None:
    def ask(model: str, door: str, **how: Any) -> str:
        status, said = server.get(f"/v2/models/{model}/{door}", {"PROMPT": QUESTION, "IMAGE": [*LETTER], **how})
        assert status == 200, said
        return said

    events = [json.loads(line.removeprefix("data: ")) for line in ask(STREAM, "generate_stream").splitlines() if line]
    assert "".join(event["TEXT"] for event in events) == expected(session) == "C"
    assert events[-1]["FINISH_REASON"] == "stop" and "FINISH_REASON" not in events[0]
    assert json.loads(ask(BATCH, "generate"))["TEXT"] == "C"
    sampled = {"TEMPERATURE": 50.0, "TOP_P": 0.9, "SEED": 4, "MAX_NEW_TOKENS": 12}
    stream.ask(STREAM, "grpc", inputs(LETTER, QUESTION, **sampled))
    lines = [line for line in ask(STREAM, "generate_stream", **sampled).splitlines() if line]
    assert "".join(json.loads(line.removeprefix("data: "))["TEXT"] for line in lines) == stream.all()["grpc"].text
    assert json.loads(ask(BATCH, "generate", **sampled))["TEXT"] == stream.answers["grpc"].text and len(lines) > 5


def test_questions_share_one_instance_and_no_answer_depends_on_it(stream: Stream) -> None:
    for seed in range(7):
        stream.ask(STREAM, f"{seed}", inputs(LETTER, QUESTION, SEED=seed, **LONG))
    answers = [stream.all()[f"{seed}"] for seed in range(7)]
    for seed, answer in enumerate(answers):
        stream.ask(STREAM, f"{seed} alone", inputs(LETTER, QUESTION, SEED=seed, **LONG))
        assert stream.all()[f"{seed} alone"].text == answer.text
    ordered = sorted(answers, key=lambda answer: answer.times[0])
    together = [sum(a.times[0] < b.times[0] < a.times[-1] for a in ordered[:n]) for n, b in enumerate(ordered)]
    assert max(together) == 3, together  # the others that are under way when one begins: four slots


def test_a_short_answer_does_not_wait_for_long_ones(stream: Stream, seeds: list[int]) -> None:
    for n in seeds[:3]:
        stream.ask(STREAM, f"long {n}", inputs(LETTER, QUESTION, SEED=n, **LONG))
    while not all(answer.pieces for answer in stream.answers.values()):
        stream.read()
    stream.ask(STREAM, "short", inputs(LETTER, QUESTION))
    while not stream.answers["short"].reason:
        stream.read()
    assert stream.answers["short"].text == "C"
    assert not any(answer.reason for id, answer in stream.answers.items() if id != "short")
    stream.all()


def test_a_cancelled_stream_frees_its_slots_and_its_places(server: Server, stream: Stream, seeds: list[int]) -> None:
    leaving = Stream(server.grpc)
    for n, seed in enumerate(seeds):  # more than there are slots
        leaving.ask(STREAM, f"leaving-{n}", inputs(LETTER, QUESTION, SEED=seed, **LONG))
    while not any(len(answer.pieces) > 2 for answer in leaving.answers.values()):
        leaving.read()
    leaving.close(cancel=True)
    stream.ask(STREAM, "after", inputs(LETTER, QUESTION))
    assert stream.all()["after"].text == "C"

    def ended() -> list[int]:
        return [int(count) for count in re.findall(r"request 'leaving-\d' cancelled: (\d+) tokens", server.said)]

    assert server.waits_for(lambda: len(ended()) == 9), ended()
    assert max(ended()) < LONG["MAX_NEW_TOKENS"] and 0 in ended()  # who waited never began


def test_a_client_that_disconnects_frees_its_slot(server: Server, seeds: list[int]) -> None:
    asked = {"id": "gone", "PROMPT": QUESTION, "IMAGE": [*LETTER], "SEED": seeds[0], **LONG}
    body = json.dumps(asked).encode()
    head = f"POST /v2/models/{STREAM}/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.http)) as connection:
        connection.sendall(head.encode() + body)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    assert server.waits_for(lambda: "request 'gone' cancelled: " in server.said)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"image": b"no image"}, "not an image that is PNG, JPEG: IMAGE"),
        ({"image": LETTER[:100]}, "image is damaged: IMAGE"),
        ({"prompt": "what " * 999}, "text tokens: the budget is"),
        ({"PLAN": "dort"}, "there is no plan dort: there are dart, none; did you mean dart?"),
        ({"MAX_NEW_TOKENS": 100_000}, "MAX_NEW_TOKENS is 100000: the bundle's budget allows 1 to 256"),
        ({"TOP_P": 2.0}, "top_p 2.0 is outside (0, 1]"),
    ],
)
def test_bad_requests_are_told_in_one_line(server: Server, stream: Stream, how: dict[str, Any], said: str) -> None:
    asked = {"image": LETTER, "prompt": QUESTION} | how
    stream.ask(STREAM, "bad", inputs(**asked))
    problem = stream.all()["bad"].problem
    assert said in problem and "\n" not in problem and str(BUNDLE) not in problem
    body = {"PROMPT": asked.pop("prompt"), "IMAGE": [*asked.pop("image")], **asked}
    status, content = server.get(f"/v2/models/{BATCH}/generate", body)
    assert status == 400 and said in content
    stream.ask(STREAM, "good", inputs(LETTER, QUESTION))
    assert stream.all()["good"].text == "C"


def test_a_timeout_ends_an_answer(stream: Stream, seeds: list[int]) -> None:
    stream.ask(STREAM, "late", inputs(LETTER, QUESTION, SEED=seeds[0], **LONG), timeout=30_000)
    answer = stream.all()["late"]
    assert re.fullmatch(r".*the request's timeout has passed after \d+ tokens", answer.problem), answer


def test_triton_gathers_what_the_batching_model_answers(server: Server, stream: Stream, session: Session) -> None:
    lines = [json.loads(line) for line in (IMAGES / "questions.jsonl").read_text().splitlines()] * 4
    images = [(IMAGES / line["image"]).read_bytes() for line in lines]
    assert len({len(image) for image in images}) > 3  # their files are of different length

    def ask(n: int, **optional: Any) -> str:
        asked = inputs(images[n], lines[n]["question"], batched=True, **optional)
        return str(stream.client.infer(BATCH, asked).as_numpy("TEXT")[0, 0].decode())

    def counts() -> tuple[int, int]:
        (found,) = stream.client.get_inference_statistics(BATCH).model_stats
        return found.inference_count, found.execution_count

    before = counts()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(len(lines)))) == [line["answer"] for line in lines]
    assert server.waits_for(lambda: counts()[0] - before[0] >= len(lines))  # Triton counts behind its responses
    asked, executed = np.subtract(counts(), before)
    assert executed < asked
    options: list[dict[str, Any]] = [{}, {"MAX_NEW_TOKENS": 16}, {"PLAN": "dart", "SEED": 1}, {"TOP_P": 0.5}]
    with ThreadPoolExecutor(8) as pool:  # Triton does not gather requests of different inputs, and answers them all
        mixed = [pool.submit(ask, n, **options[n % 4]) for n in range(len(lines))]
        assert [answer.result() for answer in mixed] == [line["answer"] for line in lines]
    other = (IMAGES / "count.png").read_bytes()
    files = np.zeros((2, max(len(LETTER), len(other))), np.uint8)
    for row, image in zip(files, (LETTER, other), strict=True):
        row[: len(image)] = np.frombuffer(image, np.uint8)
    prompts = np.array([[QUESTION.encode()], [b"how many circles?"]], object)
    got = stream.client.infer(BATCH, [tensor("PROMPT", "BYTES", prompts), tensor("IMAGE", "UINT8", files)])
    assert [text.decode() for text in got.as_numpy("TEXT")[:, 0]] == [
        "C",
        expected(session, "how many circles?", other),
    ]
    assert got.as_numpy("IMAGE_TOKENS_KEPT").tolist() == [[*session.bundle.select("dart").budget.visual]] * 2


def test_the_readmes_example_runs(server: Server, repository: Path, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.S)
    Image.open(IMAGES / "letter.png").convert("RGB").save(tmp_path / "photo.jpg", quality=95)
    code = example.replace("127.0.0.1:8001", f"127.0.0.1:{server.grpc}").replace("What is this?", QUESTION)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "C"), done.stderr


def test_a_stub_that_corrupts_arrays_loads_no_model(repository: Path, tmp_path: Path) -> None:
    with tritonserver(Path(TRITON, "server"), repository, Path(TRITON), tmp_path / "log") as refused:
        assert refused.process.wait(120) != 0
    assert "[0, 1, 2, 3] comes back [0, 0, 0, 0] (use Triton 24.11 or newer" in refused.said


def test_only_an_answer_proves_that_a_model_lives(server: Server) -> None:
    def probed(model: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "himap_export.serve.triton.probe", model, f"http://127.0.0.1:{server.http}"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert [probed(model).returncode for model in (STREAM, BATCH)] == [0, 0]
    (stub,) = server.stubs(STREAM)
    os.kill(stub, signal.SIGKILL)
    assert server.get(f"/v2/models/{STREAM}/ready")[0] == 200  # says Triton
    dead = probed(STREAM)
    assert dead.returncode == 1 and dead.stderr.count("\n") == 1, dead.stderr
    assert probed(BATCH).returncode == 0
    assert probed("nix").returncode == 1 and "unknown model" in probed("nix").stderr
