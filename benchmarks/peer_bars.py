"""What the peers' benchmark must show: ratios within one run, each against its bar; and the floor of a decode step."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from peer_systems import FAST_BF16, OVER

from himap_export.engines.bundle import RunSpec
from himap_export.graphs.flops import BYTES, stage_costs
from himap_export.validate.speed.benchmark import Times, ratios


@dataclass(frozen=True)
class Bar:
    """`fast` must be `least` times as fast as `slow` in `phase`; "ceiling": reach that share of what FLOPs promise."""

    phase: str
    fast: str
    slow: str
    least: float
    of_ceiling: bool = False


PRUNED, FP32 = "ours-ov-bf16", "ours-ov-fp32"
WHOLE = {"ours-ort": "ours-ort-fp32", "ours-ov": f"ours-ov-{OVER}"}  # in 16 or 32 bits, by backend


def small_weights(backend: str, whole: str) -> Iterator[Bar]:
    """Yields the bars of a backend's quantised weights. Peers quantise the head, too: so does who is beside them."""
    int4, head = f"{backend}-int4", f"{backend}-int4-head"
    for each in (int4, head):
        yield Bar("decode", each, whole, 2.5)
        yield Bar("prefill", each, whole, 1 / 1.1)
    for peer in ("llama-q4_0", "ortgenai-int4", "optimum-int4", "genai-int4"):
        yield Bar("decode", head, peer, 1)
    yield Bar("decode", f"{backend}-int8", "llama-q8_0", 1)
    for each in (f"{backend}-int8", int4, head):
        yield Bar("prefill", each, f"{each}-unpruned", 0.95, of_ceiling=True)


BARS = (
    Bar("prefill", PRUNED, "torch-bf16", 3),
    Bar("prefill", PRUNED, f"{PRUNED}-unpruned", 0.97, of_ceiling=True),
    Bar("prefill", PRUNED, "llama-bf16", 8),
    Bar("prefill", PRUNED, "optimum-bf16", 2.5),
    Bar("prefill", PRUNED, "genai-bf16", 2.5),
    *(
        Bar("decode", PRUNED, peer, 1)
        for peer in (
            f"{PRUNED}-unpruned", "torch-bf16", "torch-fp32", "optimum-bf16", "optimum-fp32", "genai-bf16",
            "genai-fp32", "cdpruner-bf16", "ortgenai-fp32", "ortgenai-int4", "llama-bf16", "llama-fp32",
        )
    ),
    Bar("prefill", FP32, "ours-ort-fp32", 1.3),
    Bar("prefill", FP32, "torch-fp32", 2.4),
    *(bar for backend, whole in WHOLE.items() for bar in small_weights(backend, whole)),
    Bar("prefill", "ours-ort-int8-dynamic", "ours-ort-int8-dynamic-unpruned", 0.95, of_ceiling=True),
)  # fmt: skip
SIZES = {**BYTES, "int8": 1, "int4": 0.5}
NOT_CHOSEN = "not chosen"
FLOOR_BAR = 1.4  # times the memory floor, that a decode step of PRUNED may take
LOAD_BAR = 3.0  # seconds, that a bundle may take to open the second time
LOADED = ("ours-ort-fp32", FP32, PRUNED)


def decode_bytes(run: RunSpec) -> int:
    """Returns what a decode step at the end of a full prompt must read: matrices, or what is stored of them where they
    are quantised, and keys and values of the tokens that each stage keeps. The embedding, which is not the head's
    matrix, norms and biases are left out."""
    m, spec = run.manifest, run.manifest.decoder
    stored = [w for w in run.graph("decode").weights.values() if w.constant or len(w.shape) == 2]
    weights = int(sum(SIZES[w.dtype] * math.prod(w.shape) for w in stored)) - spec.vocab * spec.hidden * BYTES[m.dtype]
    costs = stage_costs(spec, run.plan, run.budget, m.dtype)
    held = zip(costs, run.budget.total, run.budget.capacity, strict=True)
    return weights + sum(cost.kv_bytes * tokens // capacity for cost, tokens, capacity in held)


def reading(threads: int, size: int = 2**30) -> Callable[[str], float]:
    """Returns what answers, whatever it is asked, the seconds that `threads` take to read a byte: the best of 2 each of
    a sum, a dot product and a matrix-vector product over `size` bytes of fp32. Nothing is written."""
    import torch

    torch.set_num_threads(threads)
    values = torch.ones(size // 4)
    half, matrix = len(values) // 2, values.view(-1, 4096)
    readers = (values.sum, lambda: torch.dot(values[:half], values[half:]), lambda: matrix @ values[:4096])
    return lambda asked: min(_seconds(read) for read in readers for _ in range(2)) / size


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Results:
    """Of one run: the times of the systems that ran and why others did not, by key; `ceiling`, the prefill speed-up
    over unpruned that FLOPs allow; `read_bytes` by a decode step of PRUNED, None if it did not run; `byte_seconds` that
    reading a byte took in each round; `features` of the CPU, comma-separated."""

    times: Mapping[str, Times]
    missing: Mapping[str, str]
    ceiling: float
    read_bytes: int | None
    byte_seconds: Sequence[float]
    features: str

    def over_floor(self, key: str, read_bytes: int) -> tuple[float, float, float]:
        """Returns a system's decode step over the time that reading `read_bytes` took, within each round: median,
        lowest, highest."""
        steps = self.times[key].seconds["decode"]
        found = [step / (read_bytes * byte) for step, byte in zip(steps, self.byte_seconds, strict=True)]
        return statistics.median(found), min(found), max(found)

    def inapplicable(self, *keys: str) -> str:
        """Returns why a bar over systems does not apply, or ""."""
        for key in keys:
            if key not in self.times:
                return f"{key}: {self.missing.get(key, NOT_CHOSEN)}"
        slow = not set(self.features.split(", ")) & set(FAST_BF16)
        return f"this CPU has neither {' nor '.join(FAST_BF16)}" if slow and any("bf16" in key for key in keys) else ""


@dataclass(frozen=True)
class Verdict:
    """A bar and what was found: `met` is None where it does not apply, then `found` is why."""

    what: str
    met: bool | None
    found: str

    def line(self) -> str:
        word = {True: "met", False: "NOT MET", None: "does not apply"}[self.met]
        return f"{word:15} {self.what}: {self.found}"


def verdicts(results: Results) -> Iterator[Verdict]:
    """Yields a verdict for each bar, in the order of the tables above."""
    for bar in BARS:
        what = f"{bar.phase}, {bar.fast} over {bar.slow}"
        if why := results.inapplicable(bar.fast, bar.slow):
            yield Verdict(what, None, why)
            continue
        unit = results.ceiling if bar.of_ceiling else 1
        middle, low, high = (
            found / unit for found in ratios(results.times[bar.fast], results.times[bar.slow], bar.phase)
        )
        share = f" of the {unit:.2f}x that FLOPs promise" if bar.of_ceiling else "x"
        told = f"{middle:.2f}{share} ({low:.2f} to {high:.2f}), the bar is {bar.least:.3g}"
        yield Verdict(what, middle >= bar.least, told)
    if why := results.inapplicable(PRUNED):
        yield Verdict(f"decode, {PRUNED}", None, why)
    elif results.read_bytes:
        over, low, high = results.over_floor(PRUNED, results.read_bytes)
        told = f"{over:.2f}x the memory floor ({low:.2f} to {high:.2f}), the bar is {FLOOR_BAR}"
        yield Verdict(f"decode, {PRUNED}", over <= FLOOR_BAR, told)
    for key in LOADED:
        why, what = results.inapplicable(key), f"second opening, {key}"
        if why:
            yield Verdict(what, None, why)
        else:
            seconds = results.times[key].open_seconds
            yield Verdict(what, seconds <= LOAD_BAR, f"{seconds:.2f} s, the bar is {LOAD_BAR}")
