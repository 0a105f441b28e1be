"""A validation as people read it: what was compared, what it may differ by, and how fast it is beside the ceiling."""

import math

from himap_export.engines.bundle import RunSpec
from himap_export.validate.parity.compare import Parity
from himap_export.validate.parity.quantised import Quantised, quantised_rows
from himap_export.validate.parity.results import tensor_rows
from himap_export.validate.report.charts import Datum, bars
from himap_export.validate.report.page import Block, Facts, Figure, Page, Section, Table
from himap_export.validate.speed.benchmark import TIMED, Times
from himap_export.validate.speed.measure import UNPRUNED, Speed
from himap_export.validate.speed.results import ratio

HOW = (
    "Everything is compared with Hugging Face's own modules in fp32, cut between their layers. A kept set may differ "
    "only where the reference's scores lie closer together than their measured error: that is a tie, and what lies "
    "behind it is compared with the reference's choice forced. Both are fed the bundle's pixels; of a "
    "picture that was given, Hugging Face's own image processor says what they should be."
)
COST = (
    "Of the weights that were quantised, all above is compared with a checkpoint that holds the same dequantised ones. "
    "Here the bundle runs as deployed, nothing forced, beside the checkpoint before rounding, and beside itself opened "
    "to multiply activations as they are. KL is that of the next token's distributions, in nats, along one answer."
)


def parity_page(
    parity: Parity,
    run: RunSpec,
    backend: str,
    *,
    quantised: Quantised | None,
    speed: Speed | None,
    made: tuple[Block, ...],
) -> Page:
    """Returns verdict, tensors, kept sets, what quantised weights cost, the times if they were measured, and what
    `made` the report."""
    m = run.manifest
    sections = [
        Section("Verdict", (_facts(parity, speed, run), HOW)),
        Section("Tensors", (_tensors(parity), *parity.notes)),
        Section("Kept image tokens and answers", (_kept(parity),)),
    ]
    if quantised is not None:
        sections.append(Section("What quantising cost", (_quantised(quantised), COST)))
    if speed is not None:
        sections.append(Section("Speed, side by side", _speed(speed)))
    sections.append(Section("How this was made", made))
    tokens = " → ".join(map(str, run.budget.visual))
    subtitle = f"{m.model.name}, {backend}, {m.dtype}; plan {run.plan_name}, image tokens {tokens}"
    return Page(f"Validation of {run.bundle.folder.name}", subtitle, tuple(sections))


def _facts(parity: Parity, speed: Speed | None, run: RunSpec) -> Facts:
    failed = [gate.name for gate in parity.gates if not gate.passed]
    items = [
        ("parity", "failed" if failed else "passed", ", ".join(failed) or f"{len(parity.gates)} gates"),
        ("prompt" if parity.prompts == 1 else "prompts", f"{parity.prompts}", "against PyTorch in fp32"),
        ("tokens equal", f"{parity.answers.equal} of {parity.answers.total}", "greedy answers"),
    ]
    if speed is not None:
        median, low, high = speed.over(UNPRUNED, "prefill")
        ceiling = f"{low:.2f} to {high:.2f}; FLOPs allow {speed.ceiling:.2f}x"
        items.append(("prefill over unpruned", f"{median:.2f}x", ceiling))
    return Facts(tuple(items))


def _tensors(parity: Parity) -> Table:
    rows = tensor_rows(parity)
    wrong = tuple(n for n, row in enumerate(rows) if row[-1] == "FAIL")
    head = ("tensor", "largest difference", "allowed", "largest value", "1 - cosine", "gate")
    return Table("tensors", head, tuple(rows), strong=wrong)


def _kept(parity: Parity) -> Table:
    rows = []
    for c in parity.cuts:
        margin = f"{c.margin:.1e}" if math.isfinite(c.margin) else "-"
        rows.append((c.name, c.verdict, f"{c.kept - c.swapped} of {c.kept}", margin, f"{c.error:.1e}"))
    head = ("cut", "verdict", "image tokens that agree", "score margin", "score error")
    return Table("kept", head, tuple(rows))


def _quantised(found: Quantised) -> Table:
    head = ("beside", "mean KL", "largest KL", "logits apart", "tokens equal", "kept tokens replaced")
    return Table("quantised", head, quantised_rows(found), found.note)


def _speed(speed: Speed) -> tuple[Block, ...]:
    rows = [
        (t.name, *(_time(t, phase) for phase in TIMED), f"{t.peak_bytes / 2**20:.0f} MiB", f"{t.open_seconds:.2f} s")
        for t in speed.times
    ]
    over = [(f"over {name}", *(ratio(speed.over(name, phase)) for phase in TIMED), "", "") for name in speed.others]
    head = ("", *TIMED, "peak memory", "opens")
    caption = "Medians with the lowest and highest repetition; ratios are taken within a repetition."
    caption += " The first token waits for vision and prefill."
    note = (speed.note,) if speed.note else ()
    return _bars(speed), Table("times", head, (*rows, *over), caption), *note


def _bars(speed: Speed) -> Figure:
    data = [
        Datum(
            t.name, "decode, a token" if phase == "decode" else phase, 1e3 * t.median(phase),
            low=1e3 * min(t.of(phase)), high=1e3 * max(t.of(phase)),
        )
        for t in speed.times
        for phase in TIMED
    ]  # fmt: skip
    title = "Time by phase, median with the lowest and highest repetition"
    how = "shorter bars are faster; a line runs from the lowest to the highest of all repetitions."
    return bars("speed", title, how=how, data=data, x_label="phase", y_label="ms")


def _time(t: Times, phase: str) -> str:
    seconds = t.of(phase)
    return f"{1e3 * t.median(phase):.1f} ms ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})"
