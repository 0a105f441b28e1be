"""What validation found, as people read it and as programs do."""

import math
from dataclasses import asdict
from typing import Any

from himap_export.engines.bundle import Bundle
from himap_export.validate.html.page import finite
from himap_export.validate.parity.compare import CutParity, Parity
from himap_export.validate.parity.tensors import TensorDiff
from himap_export.validate.speed.benchmark import PHASES
from himap_export.validate.speed.measure import UNPRUNED, Speed


def parity_lines(parity: Parity, bundle: Bundle, backend: str) -> list[str]:
    """One row per tensor, per cut, and for the answer; a mark for every gate; what else is to be said."""
    m, gates = bundle.manifest, {gate.name: gate for gate in parity.gates}
    marks = {name: "ok  " if gate.passed else "FAIL" for name, gate in gates.items()}
    lines = [
        f"{m.model.name}, {backend}, {m.dtype}, against PyTorch in fp32: {parity.prompts} prompts",
        f"      {'':10}{'max-abs':>10}{'allowed':>10}{'largest':>10}{'1 - cosine':>12}",
    ]
    for t in parity.tensors:
        far = f"{t.max_abs:>10.1e}{gates[t.name].limit:>10.1e}{t.scale:>10.1e}{max(0.0, 1 - t.cosine):>12.1e}"
        lines.append(f"{marks[t.name]}  {t.name:10}{far}")
    for c in parity.cuts:
        facts = f"{c.verdict}, {c.kept - c.swapped} of {c.kept} image tokens agree"
        if c.verdict == "tie":
            facts += " (within error: the reference's were forced)"
        if math.isfinite(c.margin):
            facts += f"; score margin {c.margin:.1e}, error {c.error:.1e}"
        lines.append(f"{marks[f'kept {c.name}']}  {f'kept {c.name}':10}  {facts}")
    a, facts = parity.answers, f"{parity.answers.equal} of {parity.answers.total} equal"
    if a.first is not None:
        facts += f"; first parts at token {a.first}, best two logits {a.margin:.1e} apart"
        facts += f" (a tie up to {gates['tokens'].limit:.1e})"
    return [*lines, f"{marks['tokens']}  {'tokens':10}  {facts}", *(f"      {note}" for note in parity.notes)]


def parity_json(parity: Parity) -> dict[str, Any]:
    """By tensor: max_abs, scale (the reference's largest value), cosine; by cut: what happened there; the answers, and
    notes."""
    tensors = {t.name.replace(" ", "_"): _without_name(t) for t in parity.tensors}
    cuts = {f"kept_{c.name}": _without_name(c) | {"forced": c.swapped > 0} for c in parity.cuts}
    found = {"prompts": parity.prompts, **tensors, **cuts, "tokens": asdict(parity.answers)}
    found["notes"] = list(parity.notes)
    return finite(found)  # type: ignore[no-any-return]


def gates_json(parity: Parity) -> list[dict[str, Any]]:
    return [finite(asdict(gate) | {"passed": gate.passed}) for gate in parity.gates]


def _without_name(row: TensorDiff | CutParity) -> dict[str, Any]:
    return {key: value for key, value in asdict(row).items() if key != "name"}


def speed_lines(speed: Speed) -> list[str]:
    """Medians side by side, then the bundle's speed-up over the others with its spread and its share of the ceiling."""
    width = max(14, *(len(t.name) + 1 for t in speed.times))
    lines = [f"      {'':{width}}{'prefill':>12}{'decode':>16}{'vision':>12}{'peak memory':>14}"]
    for t in speed.times:
        ms = {phase: t.median(phase) * 1e3 for phase in PHASES}
        cells = f"{ms['prefill']:>9.1f} ms{ms['decode']:>9.2f} ms/tok{ms['vision']:>9.1f} ms"
        lines.append(f"      {t.name:{width}}{cells}{t.peak_bytes / 2**20:>10.0f} MiB")
    for name in speed.others:
        prefill, decode = speed.over(name, "prefill"), speed.over(name, "decode")
        lines.append(
            f"      over {name}: prefill {prefill[0]:.2f}x ({prefill[1]:.2f} to {prefill[2]:.2f}), "
            f"decode {decode[0]:.2f}x ({decode[1]:.2f} to {decode[2]:.2f})"
        )
    share = speed.over(UNPRUNED, "prefill")[0] / speed.ceiling
    lines.append(f"      prefill reaches {share:.0%} of the {speed.ceiling:.2f}x that FLOPs allow")
    return [*lines, f"      {speed.note}"] if speed.note else lines


def speed_json(speed: Speed) -> dict[str, Any]:
    """Medians in seconds, peak memory in bytes, speed-ups as [median, lowest, highest] over rounds; PyTorch's name says
    its dtype and device."""
    return {
        "ceiling": speed.ceiling,
        "of_ceiling": speed.over(UNPRUNED, "prefill")[0] / speed.ceiling,
        "systems": {
            t.name: {**{phase: t.median(phase) for phase in PHASES}, "peak_bytes": t.peak_bytes} for t in speed.times
        },
        "over": {name: {phase: speed.over(name, phase) for phase in PHASES} for name in speed.others},
        "note": speed.note,
    }
