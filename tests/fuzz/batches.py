"""Many cases in forked processes: one that dies or never comes back is a finding, and the attack goes on."""

import json
import os
import resource
import select
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fuzz.contract import Case, Outcome, check

SILENT = 120.0  # seconds without a result: it hangs where no alarm reaches
MORE_MEMORY = 4 * 10**9  # bytes of addresses beyond those of the start: then allocations fail, and the machine lives
_FIELDS = ("code", "said", "seconds", "words", "broken", "cause")


def attack(
    cases: Sequence[Case], originals: Mapping[str, Path], place: Path, expected: Mapping[str, str]
) -> Iterator[Outcome]:
    """The outcome of each case, in order."""
    done = 0
    while done < len(cases):
        for outcome in _batch(cases[done:], originals, place, expected):
            done += 1
            yield outcome


def _batch(
    cases: Sequence[Case], originals: Mapping[str, Path], place: Path, expected: Mapping[str, str]
) -> Iterator[Outcome]:
    """Those up to the first that takes its process with it, that one included."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _work(cases, originals, place, expected, writer)
        finally:
            os._exit(0)
    os.close(writer)
    finished = 0
    try:
        with os.fdopen(reader, "rb", buffering=0) as results:
            while (line := _line(results.fileno())) not in (b"", None):
                assert line is not None
                yield Outcome(cases[finished], **dict(zip(_FIELDS, json.loads(line), strict=True)))
                finished += 1
    finally:
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if finished < len(cases):
        how = "hung where no alarm reaches" if line is None else f"died of {signal.Signals(-status).name}"
        case = cases[finished]
        yield Outcome(case, broken=[f"the process {how}"], cause=f"{case.door}: the process {how}")


def _work(
    cases: Sequence[Case], originals: Mapping[str, Path], place: Path, expected: Mapping[str, str], writer: int
) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for case in cases:
        o = check(case, originals, place, expected[case.door])
        said = o.said[-2000:] if o.broken else ""
        line = json.dumps((o.code, said, o.seconds, [w[:300] for w in o.words], o.broken, o.cause)) + "\n"
        rest = memoryview(line.encode("utf-8", "backslashreplace"))
        while rest:
            rest = rest[os.write(writer, rest) :]


def _line(reader: int) -> bytes | None:
    """One line; empty at the end, None if nothing comes for too long."""
    found = bytearray()
    while not found.endswith(b"\n"):
        waiting = select.poll()  # select takes no descriptor from 1024 on, of which a long run of tests has some
        waiting.register(reader, select.POLLIN)
        if not waiting.poll(1000 * SILENT):
            return None
        part = os.read(reader, 1)
        if not part:
            return b""
        found += part
    return bytes(found)
