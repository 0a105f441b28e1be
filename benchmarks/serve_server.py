"""The real `himap-serve` as a process: started, asked for its metrics and its memory, ended."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

OPENS_S, ENDS_S = 300, 90
ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)/v1 serves (.*)")


@dataclass(frozen=True)
class Server:
    """One that runs: the process that was started, the port that it chose, and the models it serves."""

    process: subprocess.Popen[str]
    port: int
    models: tuple[str, ...]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def metrics(self) -> dict[str, float]:
        """Returns every series by its name, labels included."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        told = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in told}

    def resident(self) -> int:
        """Returns the memory, in bytes, of the process and of those that it started, mapped files included."""
        return sum(_resident(pid) for pid in (self.process.pid, *_children(self.process.pid)))


@contextmanager
def serving(bundle: Path, log: Path, *options: str) -> Iterator[Server]:
    """Yields the server of a bundle, when it is ready; what it logs goes into a file. It is ended as systemd would.

    SystemExit if it does not start, or does not end with code 0.
    """
    script = Path(sys.executable).with_name("himap-serve")
    command = [str(script), str(bundle), "--port", "0", *options]
    with log.open("a") as held:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=held, text=True)
    try:
        assert process.stdout is not None
        found = ADDRESS.match(process.stdout.readline())  # it says nothing before, and nothing if it fails
        if found is None:
            raise SystemExit(f"{' '.join(command)} did not start: {log}")
        yield Server(process, int(found[1]), tuple(found[2].split(", ")))
        if process.poll() is not None:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {log}")
        process.send_signal(signal.SIGTERM)
        if process.wait(ENDS_S):
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {log}")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(ENDS_S)


def _children(pid: int) -> list[int]:
    found = [int(n) for file in Path(f"/proc/{pid}/task").glob("*/children") for n in file.read_text().split()]
    return [*found, *(grandchild for child in found for grandchild in _children(child))]


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0
