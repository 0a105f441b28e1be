"""What all commands share: how options are read, one line for a user's mistake, one exit code for each kind of end."""

import argparse
import math
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from himap_export.engines.extras import missing_extra
from himap_export.engines.scratch import clear_leftovers
from himap_export.engines.supervisor import leaves, left, supervise
from himap_export.graphs.errors import MEANINGS, Exit, HimapError, HimapWarning, suggestion

# One module each in engines/backends; named here, where nothing is imported.
BACKENDS = ("onnxruntime", "openvino", "tensorrt-rtx", "tensorrt")
DEVICES = {  # that each runs on
    "onnxruntime": ("cpu", "cuda"),
    "openvino": ("cpu", "gpu", "npu"),
    "tensorrt-rtx": ("cuda",),
    "tensorrt": ("cuda",),
}
ALL_DEVICES = tuple(dict.fromkeys(device for devices in DEVICES.values() for device in devices))
DEVICE_HELP = "onnxruntime: cpu or cuda; openvino: cpu, gpu or npu (default: the backend's choice)"
# More threads than this only wait for each other, and starting a hundred thousand takes the machine down.
MOST_THREADS = max(64, 4 * (os.cpu_count() or 1))
LONGEST = 1000  # characters of a message
NOTHING_LEFT = "nothing was left behind"
SHELLS = ("bash", "zsh", "tcsh")  # that shtab writes completions for
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line; every command's has --version and --print-completion."""

    def __init__(self, prog: str, description: str | None = None) -> None:
        codes = "; ".join(f"{int(code)} {meaning}" for code, meaning in MEANINGS.items())
        super().__init__(prog=prog, description=description, epilog=f"exit codes: {codes}")
        self._words: list[str] = []
        self.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
        self.add_argument(
            "--print-completion", action=_Completion, choices=SHELLS, help="print the shell's completion and leave"
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parses as argparse does, and refuses `--limit=--`, which that takes for an option with an empty list."""
        self._words = words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"argument {word.removesuffix('=--')}: expected one argument")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        line = shortened(self._mistyped_option(message) or message)
        self.exit(int(Exit.USAGE), f"{self.prog}: error: {line} (usage: {self.prog} --help)\n")

    def _mistyped_option(self, message: str) -> str:
        """Says what a mistyped option was meant to be, where argparse found one too many or one too few; else ""."""
        if not message.startswith(("unrecognized arguments", "the following arguments are required")):
            return ""
        options = [option for option in self._option_string_actions if option.startswith("--")]
        typed = [word.partition("=")[0] for word in self._words if word.startswith("--")]
        unknown = [word for word in typed if not any(option.startswith(word) for option in options)]
        return f"unknown option {unknown[0]}{suggestion(unknown[0], options)}" if unknown else ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            problem = f"{str(value)[:80]!r} is none of {', '.join(known)}{suggestion(str(value), known)}"
            raise argparse.ArgumentError(action, problem)


class _Version(argparse.Action):
    """Prints the installed version: looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"{parser.prog} {version('himap-export')}")
        parser.exit()


class _Completion(argparse.Action):
    """Prints what a shell reads to complete the command's options, choices and files, by shtab."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: Any, __: object = None) -> NoReturn:
        try:
            import shtab
        except ModuleNotFoundError as problem:
            missing = missing_extra(problem)
            parser.exit(int(Exit.MISSING), f"{parser.prog}: error: {missing}\n")
        for action in parser._actions:
            if action.type is Path:
                folder = action.metavar in ("DIR", "BUNDLE")
                action.complete = shtab.DIRECTORY if folder else shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell))
        parser.exit()


def whole(least: int, most: int) -> Callable[[str], int]:
    """Returns the type of an option that takes a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        if re.fullmatch(r"[+-]?\d{1,18}", text.strip(), re.ASCII) is None or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {least} to {most}")
        return int(text)

    return parse


def number(least: float, most: float) -> Callable[[str], float]:
    """Returns the type of an option that takes a number from `least` to `most`; NaN is none."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number from {least:g} to {most:g}")
        return value

    return parse


def image_size(text: str) -> tuple[int, int]:
    """Returns (height, width) of "WxH"; ArgumentTypeError for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 448x336")
    return int(found[2]), int(found[1])


@contextmanager
def held_signals() -> Iterator[None]:
    """Holds back signals while something must be done as a whole; one that came is raised behind it."""
    if threading.current_thread() is not threading.main_thread():  # where signals never arrive
        yield
        return
    came: list[int] = []
    before = {sent: signal.signal(sent, lambda number, _: came.append(number)) for sent in SIGNALS}
    try:
        yield
    finally:
        for sent, handler in before.items():
            signal.signal(sent, handler)
    if came:
        _interrupt()


def run_command(name: str, body: Callable[[], Exit | None], interrupted: str = NOTHING_LEFT) -> NoReturn:
    """Runs `body` and leaves the process with its exit code; only bugs keep their traceback.

    `interrupted`: what an interrupted command leaves. A process that was started as this command works in a child.
    """
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there are handlers, in both processes
    if alone := Path(sys.argv[0]).name == name:
        supervise(name, interrupted)
    before = {sent: signal.signal(sent, _interrupt) for sent in SIGNALS}
    leaves("")
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        warnings.showwarning = partial(_show_warning, name, warnings.showwarning)
        _check_words(sys.argv)
        clear_leftovers()
        code = body() or Exit.OK
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as problem:
        line, code = _ending(problem, interrupted)
        if line:
            _say(f"{name}: {line}")
    finally:
        for sent, handler in before.items():
            signal.signal(sent, handler)
    _abandon_output()
    if alone and code == Exit.INTERRUPTED:
        os._exit(int(code))  # an interpreter with torch in it takes its time to end
    sys.exit(int(code))


def _ending(problem: BaseException, interrupted: str) -> tuple[str, Exit]:
    """Returns what is said of `problem`, and the exit code; a bug is raised again and keeps its traceback."""
    if isinstance(problem, ModuleNotFoundError):
        problem = missing_extra(problem) or problem
    match problem:
        case HimapError():
            return f"error: {as_options(str(problem))}", problem.code
        case KeyboardInterrupt():
            return f"interrupted, {left() or interrupted}", Exit.INTERRUPTED
        case BrokenPipeError():  # the reader of our output has left: so do we, quietly
            return "", Exit.FAILURE
        case MemoryError():
            return "error: the machine has too little memory for this", Exit.FAILURE
        case OSError():  # full disks, full standard output, files that changed under our hands
            where = f"{problem.filename}: " if problem.filename else ""
            return f"error: {where}{problem.strerror or problem}", Exit.FAILURE
    raise problem


def as_options(text: str) -> str:
    """Returns a library's message in a command's words: the parameter `text_budget` is its option --text-budget."""
    return re.sub("`([a-z][a-z0-9_]*)`", lambda found: "--" + found[1].replace("_", "-"), text)


def _interrupt(*_: object) -> NoReturn:
    """Ends the command once; what it then clears away is not interrupted again."""
    for sent in SIGNALS:
        signal.signal(sent, signal.SIG_IGN)
    raise KeyboardInterrupt


def _check_words(words: list[str]) -> None:
    """Refuses names that are no text: they can be opened, but not printed or written into a report."""
    for n, word in enumerate(words[1:], 1):
        try:
            word.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(word).decode("utf-8", "backslashreplace")
            hint = "rename the file, or give other words"
            raise HimapError(f"argument {n} is not valid UTF-8", shown, hint, Exit.USAGE) from None


def shortened(text: str) -> str:
    """Returns `text` as one line that a person can read, whatever it quotes."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} .. {line[-LONGEST // 2 :]}"


def _say(line: str) -> None:
    """Prints one line; a standard error that nobody can write to is no reason to fail."""
    try:
        print(shortened(line), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return


def _show_warning(name: str, others: Callable[..., None], message: Warning | str, *about: Any) -> None:
    """Prints ours as one line; `others` shows those of libraries."""
    if isinstance(message, HimapWarning):
        _say(f"{name}: {as_options(str(message))}")
    else:
        others(message, *about)


def _abandon_output() -> None:
    """Drops what cannot be written: Python flushes standard output once more at its end, and complains."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
