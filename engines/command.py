"""What all commands share: one line for a user's mistake, one exit code for each kind of end."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from himap_export.graphs.errors import Exit, HimapError

# One module each in engines/backends; named here, where nothing is imported.
BACKENDS = ("onnxruntime", "tensorrt-rtx", "tensorrt")


def image_size(text: str) -> tuple[int, int]:
    """(height, width) from "WxH"; ArgumentTypeError for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 448x336")
    return int(found[2]), int(found[1])


def run_command(name: str, body: Callable[[], Exit | None], interrupted: str = "nothing was left behind") -> NoReturn:
    """Runs `body` and leaves the process with its exit code; only bugs keep their traceback."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        code = body() or Exit.OK
        sys.stdout.flush()
    except HimapError as problem:
        print(f"{name}: error: {' '.join(str(problem).split())}", file=sys.stderr)  # one line, whatever was quoted
        code = problem.code
    except KeyboardInterrupt:
        print(f"{name}: interrupted, {interrupted}", file=sys.stderr)
        code = Exit.INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left: so do we, quietly
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.FAILURE
    sys.exit(int(code))
