"""Times and speed-ups as lines of text and as JSON."""

from typing import Any

from himap_export.validate.speed.benchmark import FIRST_TOKEN, PHASES, TIMED
from himap_export.validate.speed.measure import UNPRUNED, Speed


def speed_lines(speed: Speed) -> list[str]:
    """Returns medians side by side, then the bundle's speed-up over the others with its spread and its share of the
    ceiling."""
    width = max(14, *(len(t.name) + 1 for t in speed.times))
    lines = [f"      {'':{width}}{'prefill':>12}{'decode':>16}{'vision':>12}{'peak memory':>14}{'opens':>10}"]
    for t in speed.times:
        ms = {phase: t.median(phase) * 1e3 for phase in PHASES}
        cells = f"{ms['prefill']:>9.1f} ms{ms['decode']:>9.2f} ms/tok{ms['vision']:>9.1f} ms"
        lines.append(f"      {t.name:{width}}{cells}{t.peak_bytes / 2**20:>10.0f} MiB{t.open_seconds:>8.2f} s")
    for name in speed.others:
        over = (f"{phase} {ratio(speed.over(name, phase))}" for phase in (FIRST_TOKEN, "prefill", "decode"))
        lines.append(f"      over {name}: {', '.join(over)}")
    share = speed.over(UNPRUNED, "prefill")[0] / speed.ceiling
    lines.append(f"      prefill reaches {share:.0%} of the {speed.ceiling:.2f}x that FLOPs allow")
    return [*lines, f"      {speed.note}"] if speed.note else lines


def ratio(found: tuple[float, float, float]) -> str:
    """Returns a speed-up and its spread, 2.01x (1.98 to 2.05), or that it is none: the spread holds 1."""
    median, low, high = found
    if low <= 1 <= high:
        return f"no difference measurable here ({low:.2f} to {high:.2f})"
    return f"{median:.2f}x ({low:.2f} to {high:.2f})"


def speed_json(speed: Speed) -> dict[str, Any]:
    """Returns medians in seconds, their `range` as [lowest, highest] of all repetitions, peak memory in bytes, seconds
    to open, speed-ups as [median, lowest, highest]; `first_token` is vision and prefill, `ceiling` the
    prefill's; PyTorch's names say dtype and device."""
    phases = {phase.replace(" ", "_"): phase for phase in TIMED}
    return {
        "repetitions": len(speed.times[0].of("prefill")),
        "ceiling": speed.ceiling,
        "first_token_ceiling": speed.first_token_ceiling,
        "of_ceiling": speed.over(UNPRUNED, "prefill")[0] / speed.ceiling,
        "systems": {
            t.name: {
                **{key: t.median(phase) for key, phase in phases.items()},
                "range": {key: (min(t.of(phase)), max(t.of(phase))) for key, phase in phases.items()},
                "peak_bytes": t.peak_bytes,
                "open_s": t.open_seconds,
            }
            for t in speed.times
        },
        "over": {name: {key: speed.over(name, phase) for key, phase in phases.items()} for name in speed.others},
        "note": speed.note,
    }
