"""A checkpoint's chat template, rendered where it can do no harm: in a child process of little time and memory.

The sandbox of transformers keeps a template from running code, not from looping for a year or from making a string of a
terabyte. The child is a fork of this process: it costs milliseconds, for everything is imported already.
"""

import gc
import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from himap_export.engines.documents import MEGABYTE
from himap_export.engines.supervisor import die_with_parent
from himap_export.graphs.errors import HimapError

# Published templates are up to 40 kB, take 10 ms and no memory to speak of, and a prompt has to fit a context.
MOST_TEXT = MEGABYTE  # bytes of a template, and of all that is made of it
MOST_MEMORY = 256 * MEGABYTE  # beyond what this process has
MOST_SECONDS = 3  # of a processor
MOST_WAIT = 30.0  # seconds by the clock: the machine may have much else to do


Chat = Sequence[Mapping[str, Any]]  # messages, as templates take them


def render(template: str, chats: Sequence[Chat], variables: Mapping[str, Any]) -> tuple[str | None, ...]:
    """Returns the prompts that `template` makes of `chats`, None for one that it raises at; it sees `variables`
    besides.

    HimapError for a template that raises at the first, takes too long, or takes or makes too much.
    """
    # Before the fork: the child imports nothing.
    from transformers.utils.chat_template_utils import render_jinja_template

    if len(template.encode(errors="surrogatepass")) > MOST_TEXT:
        raise _refused(f"it is longer than {MOST_TEXT} bytes")

    def text(chat: Chat) -> str:
        chats: Any = [chat]
        (made,), _ = render_jinja_template(chats, chat_template=template, add_generation_prompt=True, **variables)
        return str(made)

    def texts() -> list[str | None]:
        made: list[str | None] = [text(chats[0])]
        for chat in chats[1:]:
            try:
                made.append(text(chat))
            except MemoryError:
                raise
            except Exception:  # whatever the template raises at what it does not know
                made.append(None)
        return made

    answer = json.loads(_bounded(lambda: _said(texts)))
    if isinstance(answer, str):
        raise _refused(answer)
    return tuple(answer)


def _said(texts: Callable[[], list[str | None]]) -> bytes:
    """Returns what `texts` gives, or in one string why it gives nothing, as JSON."""
    answer: list[str | None] | str
    try:
        answer = texts()
        if len("".join(text or "" for text in answer).encode()) > MOST_TEXT:
            answer = f"it makes more than {MOST_TEXT} bytes"
    except MemoryError:
        answer = f"it takes more than {MOST_MEMORY // MEGABYTE} MB"
    except Exception as problem:  # whatever the template does or raises
        answer = " ".join(str(problem)[:1000].split()) or type(problem).__name__
    return json.dumps(answer).encode()


def _bounded(work: Callable[[], bytes]) -> bytes:
    """Returns what `work` returns in a process of its own. HimapError if that does not end in time, or not well."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(os.getpid(), writer, work))
    # What a signal asks of the parent, the child must not do in its place.
    before = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        child.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        writer.close()
    try:
        if reader.poll(MOST_WAIT):
            return reader.recv_bytes()
    except EOFError:
        pass  # killed by a limit
    finally:
        child.kill()
        child.join()
        reader.close()
    raise _refused(f"it takes more than {MOST_SECONDS} s or {MOST_MEMORY // MEGABYTE} MB")


def _in_child(parent: int, writer: Connection, work: Callable[[], bytes]) -> None:
    """Nothing that the parent has open or has caught concerns the child."""
    gc.disable()
    for caught in signal.valid_signals():
        if callable(signal.getsignal(caught)):
            signal.signal(caught, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    die_with_parent(parent)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    _limit()
    writer.send_bytes(work())


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = {
        resource.RLIMIT_AS: pages * resource.getpagesize() + MOST_MEMORY,
        resource.RLIMIT_CPU: MOST_SECONDS,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for what, most in limits.items():
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _refused(why: str) -> HimapError:
    return HimapError("the chat template cannot be rendered", why)
