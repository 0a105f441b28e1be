"""Parity as lines of text and as JSON."""

import math
from dataclasses import asdict
from typing import Any

from himap_export.engines.bundle import Bundle
from himap_export.validate.parity.compare import CutParity, Parity
from himap_export.validate.parity.tensors import TensorDiff
from himap_export.validate.report.page import finite


def parity_lines(parity: Parity, bundle: Bundle, backend: str) -> list[str]:
    """Returns one row per tensor, per cut, and for the answer; a mark for every gate; what else is to be said."""
    m, marks = bundle.manifest, {gate.name: "ok  " if gate.passed else "FAIL" for gate in parity.gates}
    prompts = f"{parity.prompts} prompt{'s' * (parity.prompts > 1)}"
    lines = [
        f"{m.model.name}, {backend}, {m.dtype}, against PyTorch in fp32: {prompts}",
        f"      {'':10}{'max-abs':>10}{'allowed':>10}{'largest':>10}{'1 - cosine':>12}",
    ]
    for name, *far, cosine, mark in tensor_rows(parity):
        lines.append(f"{mark:4}  {name:10}{''.join(f'{cell:>10}' for cell in far)}{cosine:>12}")
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
        facts += f" (a tie up to {next(gate.limit for gate in parity.gates if gate.name == 'tokens'):.1e})"
    return [*lines, f"{marks['tokens']}  {'tokens':10}  {facts}", *(f"      {note}" for note in parity.notes)]


def tensor_rows(parity: Parity) -> list[tuple[str, ...]]:
    """Returns, of each tensor, its name, largest difference, what is allowed, largest value, 1 - cosine and verdict."""
    gates, rows = {gate.name: gate for gate in parity.gates}, []
    for t in parity.tensors:
        numbers = t.max_abs, gates[t.name].limit, t.scale, max(0.0, 1 - t.cosine)
        rows.append((t.name, *(f"{number:.1e}" for number in numbers), "ok" if gates[t.name].passed else "FAIL"))
    return rows


def parity_json(parity: Parity) -> dict[str, Any]:
    """Returns, by tensor, max_abs, scale (the reference's largest value) and cosine; by cut, what happened there; the
    answers, and notes."""
    tensors = {t.name.replace(" ", "_"): _without_name(t) for t in parity.tensors}
    cuts = {f"kept_{c.name}": _without_name(c) | {"forced": c.swapped > 0} for c in parity.cuts}
    found = {"prompts": parity.prompts, **tensors, **cuts, "tokens": asdict(parity.answers)}
    found["notes"] = list(parity.notes)
    return finite(found)  # type: ignore[no-any-return]


def gates_json(parity: Parity) -> list[dict[str, Any]]:
    """Returns name, value, limit and verdict of every gate."""
    return [finite(asdict(gate) | {"passed": gate.passed}) for gate in parity.gates]


def _without_name(row: TensorDiff | CutParity) -> dict[str, Any]:
    return {key: value for key, value in asdict(row).items() if key != "name"}
