"""Every alias at its real size, exported for TensorRT-RTX without weights: seconds, peak memory, size of the bundle.

Of some aliases there are several rows: several pictures, a film, a picture in tiles.

Needs no GPU, no network and no weights. `--docs FILE` puts the table between the two marks in FILE.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from real_size import memory

# What else is built of an alias, by how its name begins, besides what it sees by itself: a row each.
MORE = {
    "llava-7b": (("--images", "4"),),
    "llava-onevision": (("--frames", "16"),),
    "qwen2.5-vl": (("--frames", "16"),),
    "qwen3-vl": (("--frames", "16"),),
    "smolvlm2": (("--frames", "16", "--text-budget", "384"),),  # words stand between frames
}
MARKS = "<!-- engines-only: begin -->", "<!-- engines-only: end -->"


@dataclass(frozen=True)
class Built:
    """One alias: what a prompt shows it (`seen`, of which each image or frame has `each` tokens), its plan's tokens and
    FLOPs, and what building its five engines took. Memory is the most that the command and its children held at once,
    pages of mapped files included."""

    alias: str
    source: str
    dtype: str
    seen: str
    each: float
    tokens: tuple[int, ...]
    flops: float
    seconds: float
    peak: int
    size: int


def options(alias: str) -> Iterator[tuple[str, ...]]:
    """Yields what is asked of an alias, a row each."""
    yield ()
    yield from (each for start, more in MORE.items() if alias.startswith(start) for each in more)


def seen(image: Mapping[str, Any]) -> tuple[str, float]:
    """What a prompt shows, as the command's JSON says it, and the tokens of each image or frame."""
    size, film, images = "{1}x{0}".format(*image["size"]), image["film"], image["images"]
    if film is not None:
        return f"film of {film['frames']} frames {size}", image["tokens"] / film["frames"]
    tiles = f" in {image['tiles']} tiles" if image["tiles"] > 1 else ""
    return f"{f'{images} images ' if images > 1 else ''}{size}{tiles}", image["tokens"]


def build(alias: str, out: Path, *more: str) -> Built:
    """The real command in a process of its own, with `more` options. SystemExit if it fails."""
    plan = ("--r1", "0.5", "--r2", "0.75")
    command = ["himap-export", alias, *plan, "--backend", "tensorrt-rtx", "--engines-only", *more]
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [*command, "--json", "--out", str(out)], stdout=said, stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None:
            peak = max(peak, memory(process.pid)[1])
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if process.returncode:
            assert process.stderr is not None
            raise SystemExit(f"{' '.join(command)} failed with {process.returncode}\n{process.stderr.read()}")
        said.seek(0)
        told = json.load(said)
    return Built(
        alias, told["source"], told["dtype"], *seen(told["image"]), tuple(told["budget"]["visual"]),
        told["flops"]["ratio"], seconds, peak, told["bytes"],
    )  # fmt: skip


def table(rows: Sequence[Built]) -> str:
    """GitHub's Markdown."""
    head = (
        "alias", "checkpoint", "dtype", "prompt", "tokens each", "image tokens", "FLOPs kept", "seconds", "peak memory",
        "bundle",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * 3 + "---:|" * (len(head) - 3)]
    for r in rows:
        tokens, memory_, size = " → ".join(map(str, r.tokens)), f"{r.peak / 2**30:.2f} GiB", f"{r.size / 1e6:.0f} MB"
        cells = (
            f"`{r.alias}`", r.source, r.dtype, r.seen, f"{r.each:.4g}", tokens, f"{r.flops:.1%}", f"{r.seconds:.1f}",
            memory_, size,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def insert(docs: Path, text: str) -> None:
    """`text` in place of what stands between the marks; SystemExit if the file lacks them."""
    before, begin, rest = docs.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise SystemExit(f"{docs} lacks the lines {MARKS[0]} and {MARKS[1]}")
    docs.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> None:
    from himap_export.exporter.aliases import ALIASES

    published = [name for name, alias in ALIASES.items() if alias.config]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("aliases", nargs="*", metavar="ALIAS", help=f"default: all of {', '.join(published)}")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="Markdown file that the table goes into")
    args = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    rows = []
    with tempfile.TemporaryDirectory(prefix="himap-engines-") as folder:
        for alias in args.aliases or published:
            for n, more in enumerate(options(alias)):
                rows.append(build(alias, Path(folder) / f"{alias}-{n}", *more))
                print(
                    f"{alias} {' '.join(more)}: {rows[-1].seconds:.1f} s, {rows[-1].peak / 2**30:.2f} GiB",
                    file=sys.stderr,
                )
    print(table(rows))
    if args.docs:
        insert(args.docs, table(rows))
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
