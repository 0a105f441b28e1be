"""What `make demo` found, as one page: the answer, the patches kept, parity, speed, engines, and what to do next."""

from typing import TYPE_CHECKING

from himap_export.validate.report.charts import Datum, bars
from himap_export.validate.report.machine import provenance
from himap_export.validate.report.page import Command, Facts, Figure, Gallery, Page, Picture, Section, Table

if TYPE_CHECKING:
    from demo import Found

PHASES = {"first_token": "first token", "vision": "vision", "prefill": "prefill", "decode": "decode, a token"}
SPEED = (
    "The first token waits for vision and prefill. Pruning makes prefill shorter, by no more than FLOPs allow, and "
    "leaves vision as it is. Pruned and unpruned engines take turns in one run; where the repetitions of a ratio lie "
    "on both sides of 1, no difference is measurable."
)
RTX = (
    "TensorRT-RTX engines are built ahead of time for NVIDIA's RTX GPUs, without one: the bundle `shapes-rtx`, beside "
    "this page, can be copied to such a machine and asked there."
)


def demo_page(found: "Found", kept: bytes) -> Page:
    """Returns the page; `kept` is the picture of the patches that each cut kept, as PNG."""
    v = found.validation
    sections = (
        Section(found.question, (_facts(found), _kept(found, kept))),
        Section("Does it compute what PyTorch computes?", (_parity(found),)),
        Section("Is it faster?", (SPEED, _bars(found), _speed(found))),
        Section("Engines for RTX GPUs", (RTX, found.rtx.told(), *([_engines(found)] if found.rtx.engines else []))),
        Section("Next", tuple(map(Command, found.next_commands))),
        Section("How this was made", provenance(("make", "demo"), {"engines": found.measured_on})),
    )
    subtitle = f"{v['backend']}, {v['dtype']}; image tokens {found.tokens}"
    return Page("himap-export: a demonstration", subtitle.replace("->", "→"), sections)


def _facts(found: "Found") -> Facts:
    others = ", ".join(f"{who}: {answer}" for who, answer in found.answers.items() if who != "pruned")
    right = f"right: {found.expected}; {others}"
    speed, tokens = found.validation["speed"], found.validation["image_tokens"]
    median, low, high = speed["over"]["unpruned"]["prefill"]
    return Facts((
        ("answer, pruned", found.answers["pruned"], right),
        ("image tokens kept", f"{tokens[-1]}", f"of {tokens[0]}, from layer {found.cuts[-1]} on"),
        ("parity gates ok", found.gates, "against PyTorch in fp32"),
        ("prefill over unpruned", "≈ 1x" if low <= 1 <= high else f"{median:.2f}x",
         f"{low:.2f} to {high:.2f}; FLOPs allow {speed['ceiling']:.2f}x"),
    ))  # fmt: skip


def _kept(found: "Found", kept: bytes) -> Gallery:
    caption = f"The patches behind each cut of “{found.question}”: {found.answers['pruned']}."
    return Gallery((Picture("kept", kept, caption),), wide=True)


def _parity(found: "Found") -> Table:
    rows = [
        (gate["name"], f"{gate['value']:.1e}", f"{gate['limit']:.1e}", "ok" if gate["passed"] else "FAIL")
        for gate in found.validation["gates"]
    ]
    wrong = tuple(n for n, row in enumerate(rows) if row[-1] == "FAIL")
    caption = "Largest difference; all else that was compared is in `report/report.html`."
    return Table("gates", ("gate", "difference", "allowed", ""), tuple(rows), caption, strong=wrong)


def _bars(found: "Found") -> Figure:
    data = [
        Datum(name, label, 1e3 * times[phase], *(1e3 * end for end in times["range"][phase]))
        for name, times in found.validation["speed"]["systems"].items()
        for phase, label in PHASES.items()
    ]
    how = "shorter bars are faster; a line runs from the lowest to the highest of all repetitions."
    return bars("speed", "Milliseconds by phase, side by side", how=how, data=data, x_label="phase", y_label="ms")


def _speed(found: "Found") -> Table:
    speed = found.validation["speed"]
    rows = (
        ("first token", found.speed_up("first_token"), f"{speed['first_token_ceiling']:.2f}x"),
        ("prefill", found.speed_up("prefill"), f"{speed['ceiling']:.2f}x"),
    )
    return Table("speed-ups", ("", "pruned over unpruned", "FLOPs allow"), rows, found.measured_on)


def _engines(found: "Found") -> Table:
    rows = tuple((graph, f"{size / 2**20:.1f} MiB") for graph, size in found.rtx.engines.items())
    return Table("engines", ("graph", "engine"), rows)
