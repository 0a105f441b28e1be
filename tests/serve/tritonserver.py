"""The real tritonserver out of the nvidia-pytriton wheel, on loopback, and one question asked by gRPC or HTTP."""

import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as grpc

HOST = "127.0.0.1"
TYPES = {
    "MAX_NEW_TOKENS": ("INT32", np.int32),
    "TEMPERATURE": ("FP32", np.float32),
    "TOP_P": ("FP32", np.float32),
    "SEED": ("UINT32", np.uint32),
}


@dataclass
class Server:
    """A running server: its ports, its log, and its process."""

    http: int
    grpc: int
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def said(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace")

    def waits_for(self, what: Callable[[], bool]) -> bool:
        """Whether something comes true, as long as the server lives, for three minutes."""
        for _ in range(1800):
            if what():
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.1)
        return False

    def get(self, path: str, body: Any = None) -> tuple[int, str]:
        """Status and content of an HTTP request; of a POST if it has a body."""
        connection = http.client.HTTPConnection(HOST, self.http, timeout=60)
        try:
            connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def is_ready(self) -> bool:
        try:
            return self.get("/v2/health/ready")[0] == 200
        except OSError:
            return False

    def stubs(self, model: str) -> list[int]:
        """The ids of the Python processes of a model."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        found = [int(pid) for file in children for pid in file.read_text().split()]
        return [pid for pid in found if f"/{model}/" in Path(f"/proc/{pid}/cmdline").read_text()]


@contextmanager
def tritonserver(folder: Path, repository: Path, environment: Path, log: Path) -> Iterator[Server]:
    """The server in `folder`, with the Python of `environment` for its models. It has ended if none loads."""
    places = [socket.create_server((HOST, 0)) for _ in range(3)]
    ports = [place.getsockname()[1] for place in places]
    for place in places:
        place.close()
    doors = [
        f"--{door}-{what}={value}"
        for door, port in zip(("http", "grpc", "metrics"), ports, strict=True)
        for what, value in (("address", HOST), ("port", port))
    ]
    triton = folder / "pytriton" / "tritonserver"
    variables = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder / "nvidia_pytriton.libs"),
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",  # the stub finds its packages by the first python there
    }
    command = [
        triton / "bin" / "tritonserver", f"--model-repository={repository}", f"--backend-directory={triton}/backends",
        f"--cache-directory={triton}/caches", *doors, "--allow-gpu-metrics=false", "--exit-timeout-secs=3",
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=variables, start_new_session=True)
    server = Server(ports[0], ports[1], log, process)
    try:
        server.waits_for(server.is_ready)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def tensor(name: str, kind: str, values: npt.NDArray[Any]) -> Any:
    made = grpc.InferInput(name, list(values.shape), kind)
    made.set_data_from_numpy(values)
    return made


def inputs(image: bytes, prompt: str, batched: bool = False, **how: float | str) -> list[Any]:
    """The tensors of one question, with a dimension of rows if `batched`."""
    made: list[tuple[str, str, npt.NDArray[Any]]] = [
        ("PROMPT", "BYTES", np.array([prompt.encode()], object)),
        ("IMAGE", "UINT8", np.frombuffer(image, np.uint8)),
    ]
    for name, value in how.items():
        kind, dtype = TYPES.get(name, ("BYTES", object))
        made.append((name, kind, np.array([value.encode() if isinstance(value, str) else value], dtype)))
    return [tensor(name, kind, values[None] if batched else values) for name, kind, values in made]


@dataclass
class Answer:
    """What came for one request: pieces and when each came, in seconds; how it ended, or what was wrong."""

    pieces: list[str]
    times: list[float]
    reason: str = ""
    kept: tuple[int, ...] = ()
    problem: str = ""

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Stream:
    """A gRPC stream of one client, and the answers of the requests that it sent, by their ids."""

    def __init__(self, port: int) -> None:
        self.answers: dict[str, Answer] = {}
        self._came = queue.SimpleQueue[tuple[Any, Any]]()
        self.client = grpc.InferenceServerClient(f"{HOST}:{port}")
        self.client.start_stream(lambda result, error: self._came.put((result, error)))

    def ask(self, model: str, id: str, asked: list[Any], timeout: int | None = None) -> None:
        """Sends a request; `timeout` in microseconds."""
        self.answers[id] = Answer([], [])
        self.client.async_stream_infer(model, asked, request_id=id, timeout=timeout)

    def read(self) -> Answer:
        """Waits for the next response, and returns the answer that it is of. The client's errors tell no id: they are
        of the only request that is open."""
        result, error = self._came.get(timeout=60)
        if error is not None:
            (answer,) = [a for a in self.answers.values() if not a.reason and not a.problem]
            answer.problem = error.message()
            return answer
        answer = self.answers[result.get_response().id]
        if text := result.as_numpy("TEXT")[0].decode():
            answer.pieces.append(text)
            answer.times.append(time.perf_counter())
        if (reason := result.as_numpy("FINISH_REASON")) is not None:
            answer.reason, answer.kept = reason[0].decode(), tuple(result.as_numpy("IMAGE_TOKENS_KEPT").tolist())
        return answer

    def all(self) -> dict[str, Answer]:
        """Waits until all answers are whole."""
        while any(not answer.reason and not answer.problem for answer in self.answers.values()):
            self.read()
        return self.answers

    def close(self, cancel: bool = False) -> None:
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()
