"""Which plan is worth its time on `shapes`? All selectors at the study's cuts, and HiMAP's at others.

    python examples/shapes/cuts.py --out study --docs docs/study

asks questions of a split of their own. `himap-validate --dataset` answers and times every plan of the study's bundles;
the best is the fastest that leaves 95 % of the unpruned accuracy, by the interval of its loss. `himap-tune` tries other
cuts, by HiMAP's criteria and by the best's: what it chooses of the latter is the plan of `make demo`. `himap-analyze`
says where the answers come from.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset import write
from study import BUDGETS, MODEL, PARTS, SELECTORS, TEXT, Study, command
from tables import UNPRUNED, Judged, read, table

from himap_export.engines.choice import best_backend, fast_dtype
from himap_export.graphs.plan import POLICIES
from himap_export.validate.accuracy.evaluate import percent, points
from himap_export.validate.accuracy.statistics import Interval
from himap_export.validate.speed.results import ratio

SEED, QUESTIONS, KEPT = 9, 700, 0.95
TRIED = {  # by the number of a policy's cuts
    1: ("--k1", "1,2,3,5", "--r1", "0.5,0.75,0.8,0.85,0.9"),
    2: ("--k1", "1,2,3", "--k2", "5,6,8", "--r1", "0.25,0.5,0.75", "--r2", "0.5,0.75,0.9"),
}


@dataclass(frozen=True)
class Timed:
    """A plan's right answers, what it loses against unpruned ones, and how many times faster its prefill is: median,
    least, most."""

    policy: str
    budget: str
    right: Interval
    loss: Interval
    faster: tuple[float, float, float]

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.budget}"


def timed(budgets: Sequence[Judged], reports: Sequence[Path]) -> list[Timed]:
    """Every selector at every budget, fastest first."""
    costs: dict[str, Any] = {}
    for report in reports:
        costs |= json.loads((report / "report.json").read_text())["costs"]["systems"]
    found = list[Timed]()
    for b in budgets:
        for policy in SELECTORS:
            faster = costs[f"{policy}-{b.name}"]["over_unpruned"]["prefill"]
            found.append(Timed(policy, b.name, b.accuracy(policy), b.over(UNPRUNED, policy), tuple(faster)))
    return sorted(found, key=lambda t: -t.faster[0])


def choice(plans: Sequence[Timed], unpruned: float) -> Timed | None:
    """The fastest that leaves KEPT of the unpruned accuracy, by the interval of its loss."""
    return next((t for t in plans if t.loss.high <= (1 - KEPT) * unpruned), None)


def told(plans: Sequence[Timed], unpruned: Interval, best: Timed | None) -> list[str]:
    """Markdown."""
    lines = [f"# Plans by measured time on `shapes`, {QUESTIONS} questions of a split of their own", ""]
    lines += [
        f"Unpruned, {percent(unpruned)} % are right. Faster: prefill of a batch of 16, one thread, over unpruned."
    ]
    rows = [(t.name, ratio(t.faster), percent(t.right), points(t.loss)) for t in plans]
    lines += ["", *table(("plan", "faster", "right (%)", "lost (points)"), rows), ""]
    lost = f"leaves at least {KEPT:.0%} of the unpruned accuracy, by the 95 % interval of its loss"
    return [*lines, f"{best.name} is the fastest that {lost}." if best else f"None {lost}."]


def tune(out: Path, policy: str, split: Path) -> None:
    """Other cuts by a policy: the front, timed, and the cheapest that leaves KEPT of the unpruned accuracy."""
    dtype = fast_dtype(best_backend(cpu=True).backend)
    flags = ("--limit", 350, "--min-accuracy", KEPT, "--threads", 1, "--dtype", dtype, *TRIED[len(POLICIES[policy])])
    command("himap-tune", MODEL, "--policy", policy, "--dataset", split, *flags, "--out", out)
    print((out / "plans.toml").read_text(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study"), help="bundles, answers and reports (default: study)")
    parser.add_argument("--docs", type=Path, help="also write the table and figures there")
    args = parser.parse_args()
    split = write(args.out / "choice", QUESTIONS, SEED)
    study = Study(args.out, split, seeds=5, report="choice")
    reports = study.judged(times=True)
    budgets = read(reports, split, tuple(SELECTORS), budgets=BUDGETS, text=TEXT)
    plans, unpruned = timed(budgets, reports), budgets[0].accuracy(UNPRUNED)
    best = choice(plans, unpruned.mean)
    lines = told(plans, unpruned, best)
    print("\n".join(lines), flush=True)
    policies = dict.fromkeys(("himap", best.policy if best else "himap"))
    for policy in policies:
        tune(args.out / f"tuned-{policy}", policy, split)
    command("himap-analyze", MODEL, "--dataset", split, "--limit", 70, "--overwrite", "--out", args.out / "flow")
    if args.docs is not None:
        args.docs.mkdir(parents=True, exist_ok=True)
        (args.docs / "cuts.md").write_text("\n".join([*lines, ""]))
        for part, report in zip(PARTS, reports, strict=True):
            shutil.copyfile(report / "worth.png", args.docs / f"worth-{part}.png")
        for name in ("attention-shares", "label-consistency", "cam-1-decoder"):
            shutil.copyfile(args.out / "flow" / f"{name}.png", args.docs / f"{name}.png")
        for policy in policies:
            shutil.copyfile(args.out / f"tuned-{policy}" / "time.png", args.docs / f"time-{policy}.png")


if __name__ == "__main__":
    main()
