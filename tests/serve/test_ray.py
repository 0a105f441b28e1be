"""The service on a Ray cluster: what is said where Ray is missing; and, slow, two nodes that lose replicas.

`make test-ray` makes the environment that Ray lives in, and names it in HIMAP_RAY_PYTHON.
"""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from commands import ORT, QUESTIONS_64, SHAPES_64, Workshop, blocked_python, call
from openai import OpenAI

from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.image import load_image
from himap_export.engines.sampling import Sampling
from himap_export.exporter.cli import main as export_main
from himap_export.serve.messages import Ended, Event, Piece, Question
from himap_export.serve.service import Service

PYTHON = os.environ.get("HIMAP_RAY_PYTHON")
CLUSTER = Path(__file__).with_name("ray_cluster.py")
LETTER, QUESTION = SHAPES_64.parent / "images" / "letter.png", "what letter is in the yellow box?"
SLOTS, QUEUE = 4, 2  # of each of two replicas
LONG, SHORT = {"temperature": 2.0, "max_tokens": 500}, {"max_tokens": 4}  # tokens, most of them without text
LOOPBACK = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or else its nodes talk over the machine's outer address
}


def test_without_ray_one_line_says_how_to_get_it() -> None:
    code = "try:\n    import himap_export.serve.ray\nexcept Exception as problem:\n    print(problem)"
    done = blocked_python(code, ["ray"])
    assert done.stdout.startswith("ray is not installed (pip install 'himap-export[ray]'"), done.stderr


def asking_about(image: Path, question: str) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
    content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": "shapes", "messages": [{"role": "user", "content": content}]}


@dataclass
class Stream:
    """An answer as it comes: `text` so far, and how it ended: [DONE], or an error."""

    text: str = ""
    done: bool = False
    error: Mapping[str, Any] | None = None


@dataclass
class Cluster:
    """The cluster's driver, a process, and the door's address. `expected` remembers what a session answers."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    service: Service
    _expected: dict[int, str] = field(default_factory=dict)

    def tell(self, word: str) -> Any:
        assert self.process.stdin and self.process.stdout
        print(word, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def until(self, what: str, holds: Callable[[], bool], seconds: float = 90.0) -> None:
        """Waits until something holds, and fails if it never does."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end and self.process.poll() is None, (
                f"not {what}:\n{self.log.read_text()[-5000:]}"
            )
            time.sleep(0.2)

    def whole(self) -> "Cluster":
        """This, when both replicas run."""
        self.until("two replicas", lambda: self.tell("status")["running"] == 2 and self.ready())
        return self

    def pids(self) -> dict[str, int]:
        return {node: pids[0] for node, pids in self.tell("status")["pids"].items() if pids}

    def ready(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"{self.url}/health/ready", timeout=10).status == 200)
        except OSError:
            return False

    def gauge(self, name: str) -> float:
        lines = urllib.request.urlopen(f"{self.url}/metrics", timeout=10).read().decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"himap_{name}{{")).split()[-1])

    def post(self, **how: Any) -> Any:
        body = json.dumps(asking_about(LETTER, QUESTION) | how).encode()
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", body, {"content-type": "application/json"})
        return urllib.request.urlopen(request, timeout=120)

    def ask(self, **how: Any) -> str:
        with self.post(**how) as response:
            return str(json.load(response)["choices"][0]["message"]["content"])

    def stream(self, **how: Any) -> Iterator[Stream]:
        """Yields an answer again at each piece, and when it has ended."""
        answer = Stream()
        with self.post(stream=True, **how) as response:
            for line in response:
                if line == b"data: [DONE]\n":
                    answer.done = True
                elif line.startswith(b"data: "):
                    document = json.loads(line[6:])
                    answer.error = document.get("error")
                    pieces = [choice["delta"].get("content") or "" for choice in document.get("choices", ())]
                    answer.text += "".join(pieces)
                    if any(pieces):
                        yield answer
        yield answer

    def expected(self, seed: int) -> str:
        """What `LONG` is answered without Ray."""
        if not self._expected:
            questions = {seed: Heard() for seed in range(2 * (SLOTS + QUEUE))}
            for one, heard in questions.items():
                request = self.service.prepare("shapes", [load_image(LETTER)], QUESTION)
                how = Sampling(LONG["temperature"], seed=one)
                self.service.submit(
                    Question(str(one), "shapes", request, int(LONG["max_tokens"]), asked=0.0, sampling=how), heard.hear
                )
            self._expected |= {one: heard.text() for one, heard in questions.items()}
        return self._expected[seed]


@dataclass
class Heard:
    """What comes of one question, text by text."""

    texts: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def hear(self, event: Event) -> None:
        if isinstance(event, Piece):
            self.texts.append(event.text)
        elif isinstance(event, Ended):
            self.over.set()

    def text(self) -> str:
        assert self.over.wait(120)
        return "".join(self.texts)


@pytest.fixture(scope="module")
def bundle(work: Workshop) -> Bundle:
    """The small model, whose answers end where they must: the token that would say so does not exist."""
    with work._once("endless-shapes-64") as (folder, missing):
        if missing:
            source = folder.with_name("endless-checkpoint")
            shutil.copytree(SHAPES_64, source)
            for file in (source / "config.json", source / "generation_config.json"):
                file.write_text(file.read_text().replace('"eos_token_id": 2', '"eos_token_id": 100000'))
            flags = ("--policy", "himap", "--text-budget", 40, "--max-new-tokens", 1500, "--slots", SLOTS)
            assert call(export_main, source, *ORT, *flags, "--out", folder) == 0
    return Bundle.open(folder)


def surroundings(bundle: Bundle, scratch: str) -> dict[str, str]:
    """The environment of the cluster, which is told there what to serve; `scratch` is short: sockets lie below it."""
    given = {"BUNDLE": bundle.folder, "MODEL_NAME": "shapes", "REPLICAS": 2, "MAX_QUEUE": QUEUE, "DRAIN_TIMEOUT": 5}
    return (
        os.environ | LOOPBACK | {f"HIMAP_{name}": str(value) for name, value in given.items()} | {"RAY_TMPDIR": scratch}
    )


def built(folder: Path, port: int, variables: Mapping[str, str]) -> Path:
    """What `serve build` writes, changed: for this machine alone, the door at its proxy, a replica on each node."""
    serve, written = Path(str(PYTHON)).with_name("serve"), folder / "built.yaml"
    command: list[Any] = [serve, "build", "himap_export.serve.ray:app", "-o", written]
    subprocess.run(command, check=True, timeout=120, env=variables, cwd=folder)
    config = yaml.safe_load(written.read_text())
    assert config["http_options"]["host"] == "0.0.0.0"  # docs/serve.md has users change it
    (application,) = config["applications"]
    assert application["import_path"] == "himap_export.serve.ray:app" and application["route_prefix"] == "/"
    deployments = {d["name"]: d for d in application["deployments"]}
    assert set(deployments) == {"Door", "Engine"} and deployments["Engine"]["num_replicas"] == 2
    assert deployments["Engine"]["ray_actor_options"]["num_cpus"] == 1
    assert deployments["Engine"]["max_ongoing_requests"] >= SLOTS + QUEUE
    deployments["Engine"]["max_replicas_per_node"] = 1
    deployments["Door"]["ray_actor_options"]["resources"] = {"head": 0.1}
    config |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    return folder / "serve.yaml"


@pytest.fixture(scope="module")
def cluster(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if PYTHON is None:
        pytest.skip("HIMAP_RAY_PYTHON is not set: make test-ray")
    folder = tmp_path_factory.mktemp("ray")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ray") as scratch, (folder / "log").open("w") as log:
        variables = surroundings(bundle, scratch)
        command: list[Any] = [PYTHON, CLUSTER, built(folder, port, variables)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=variables,
            start_new_session=True,
        )  # fmt: skip
        service = Service(bundle, "shapes", opening=Opening(threads=1))
        service.open()
        try:
            yield Cluster(process, f"http://127.0.0.1:{port}", folder / "log", service).whole()
        finally:
            service.close()
            assert process.stdin
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@dataclass
class Asking:
    """Streams and whole answers, by seed, that are read by threads of their own."""

    cluster: Cluster
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(32))
    streams: dict[int, Stream] = field(default_factory=dict)
    futures: list[Future[None]] = field(default_factory=list)
    wholes: dict[int, Future[str]] = field(default_factory=dict)

    def stream(self, seeds: Sequence[int], **how: Any) -> None:
        """Begins to read streams; returns when each has a first piece."""
        for seed in seeds:
            self.futures.append(self.pool.submit(self._read, seed, how))
        self.cluster.until("all streams begun", lambda: set(seeds) <= set(self.streams))

    def whole(self, seeds: Sequence[int], **how: Any) -> None:
        self.wholes |= {seed: self.pool.submit(self.cluster.ask, seed=seed, **how) for seed in seeds}

    def _read(self, seed: int, how: Mapping[str, Any]) -> None:
        for answer in self.cluster.stream(seed=seed, **how):
            self.streams[seed] = answer

    def ended(self) -> None:
        """Waits for all of them; raises what one raised."""
        for future in self.futures:
            future.result(120)
        for seed, whole in self.wholes.items():
            assert whole.result(120) == self.cluster.expected(seed)


@pytest.mark.slow
def test_answers_are_those_of_a_session(cluster: Cluster, bundle: Bundle) -> None:
    client = OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    examples = [json.loads(line) for line in QUESTIONS_64.read_text().splitlines()]
    with bundle.session(threads=1) as session, ThreadPoolExecutor(8) as pool:
        files = [QUESTIONS_64.parent / example["image"] for example in examples]
        asked: list[Any] = [asking_about(file, e["question"]) for file, e in zip(files, examples, strict=True)]
        create: Any = client.chat.completions.create
        wholes = [pool.submit(create, **body, max_tokens=8) for body in asked]
        for example, file, whole in zip(examples, files, wholes, strict=True):
            answer = whole.result().choices[0].message.content
            assert answer == session.ask(file, example["question"], max_new_tokens=8).text != ""
    how: Any = {**asking_about(LETTER, QUESTION), **LONG, "seed": 1, "stream_options": {"include_usage": True}}
    chunks: list[Any] = list(create(**how, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == cluster.expected(1) and len(chunks) > 10
    assert chunks[-1].usage.completion_tokens == LONG["max_tokens"]


@pytest.mark.slow
def test_the_queue_is_bounded(cluster: Cluster) -> None:
    """All slots and places of both replicas; one more is refused, and told to come again."""
    asking = Asking(cluster)
    asking.whole(range(2 * (SLOTS + QUEUE)), **LONG)
    cluster.until("full", lambda: cluster.gauge("num_requests_waiting") >= 2 * QUEUE)
    with pytest.raises(urllib.error.HTTPError) as refused:
        cluster.ask(**SHORT)
    assert refused.value.code == 429 and int(refused.value.headers["retry-after"]) >= 1
    assert json.load(refused.value)["error"]["type"] == "rate_limit_error"
    asking.ended()


@pytest.mark.slow
def test_who_leaves_gives_the_slot_back(cluster: Cluster) -> None:
    """All slots are taken by answers of one length. The first is read to its end, and others begin before that: as
    many as its replica has slots beside it, wherever they go."""
    longest, witness, asking = {**LONG, "max_tokens": 1400}, Asking(cluster), Asking(cluster)
    witness.stream([0], **longest)
    leavers = [cluster.stream(seed=0, **longest) for _ in range(2 * SLOTS - 1)]
    for leaver in leavers:
        next(leaver)
    for leaver in leavers:
        cast(Any, leaver).close()
    asking.stream(range(1, SLOTS), **LONG)
    assert not witness.streams[0].done
    asking.ended()
    assert all(answer.text == cluster.expected(seed) for seed, answer in asking.streams.items())
    witness.ended()
    assert witness.streams[0].done


@pytest.mark.slow
def test_what_a_frozen_replica_holds_is_asked_again_when_it_dies(cluster: Cluster) -> None:
    """Both stand still, so that nothing of any answer is sent; one is killed, the other goes on."""
    dying, other = cluster.whole().pids().values()
    for pid in (dying, other):
        os.kill(pid, signal.SIGSTOP)
    asking = Asking(cluster)
    try:
        asking.whole(range(3), **LONG)
        for seed in range(3, 6):
            asking.futures.append(asking.pool.submit(asking._read, seed, LONG))
        cluster.until("all under way", lambda: cluster.gauge("num_requests_waiting") == 6)
        os.kill(dying, signal.SIGKILL)
    finally:
        os.kill(other, signal.SIGCONT)
    asking.ended()
    for seed in range(3, 6):
        assert asking.streams[seed].done and asking.streams[seed].text == cluster.expected(seed)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["replica", "node"])
def test_what_is_lost_in_the_middle(cluster: Cluster, lost: str) -> None:
    """Streams that were cut say so and hold the beginning of their answer; whole answers are right; all comes back."""
    pids, asking = cluster.whole().pids(), Asking(cluster)
    asking.stream(range(6), **LONG)
    asking.whole(range(6, 8), **LONG)
    cluster.until("all begun", lambda: cluster.gauge("num_requests_running") == 8)
    if lost == "replica":
        os.kill(pids["second"], signal.SIGKILL)
    else:
        cluster.tell("remove")
    asking.ended()
    cut = {seed for seed, answer in asking.streams.items() if not answer.done}
    assert 0 < len(cut) < 6
    for seed, answer in asking.streams.items():
        expected = cluster.expected(seed)
        assert expected.startswith(answer.text) if seed in cut else answer.text == expected
        assert (answer.error is not None and "lost" in answer.error["message"]) == (seed in cut)
    if lost == "node":
        cluster.tell("add")
    assert cluster.whole().pids()["second"] != pids["second"]
    assert cluster.ask(**SHORT) == "C"
