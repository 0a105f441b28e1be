"""Which selector keeps the right tokens? Every policy at four budgets of FLOPs on `shapes`, beside its baselines.

    python examples/shapes/study.py --out study --docs docs/study

writes 1,000 held-out questions of each of six types, exports one bundle per budget that holds all policies, lets
`himap-validate --dataset` answer and judge them (an interrupted study goes on where it stopped), and gathers the four
reports into tables and figures; `himap-analyze` says where the answers come from, `himap-tune` what other cuts cost.
HiMAP's two cuts set a budget; fastv and truncation cut once, where HiMAP's first cut is, and keep as many tokens as its
FLOPs allow. random and uniform are judged at the cuts of each.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dataset import write
from draw import TYPES

from himap_export.exporter.planning import describe
from himap_export.exporter.registry import resolve
from himap_export.graphs.flops import equal_keep, true_ratio
from himap_export.graphs.plan import himap
from himap_export.validate.report.charts import Datum, bars, lines

# The task's default, then cuts earlier and harder. K1 = 1 ranks by the very first layer.
BUDGETS = {
    "a": (2, 8, 0.5, 0.75),
    "b": (2, 5, 0.5, 0.75),
    "c": (1, 3, 0.5, 0.75),
    "d": (1, 3, 0.75, 0.75),
}
IMAGE_TOKENS, TEXT, BATCH = 64, 16, 16
TRIED = ("--k1", "1,2,4", "--k2", "5,6,8,9", "--r1", "0.25,0.5,0.75", "--r2", "0.5,0.75,0.9", "--min-accuracy", 0.95)
TIMED = ("--backend", "onnxruntime", "--threads", 1)
TUNED = ("flops", "time")  # figures of the tuning that go into the docs
FLOW = ("attention-shares", "label-consistency", "cam-1-decoder")  # figures of the analysis that go into the docs


@dataclass(frozen=True)
class Study:
    out: Path
    dataset: Path
    seeds: int

    def write_plans(self, name: str) -> None:
        """All policies at budget `name`, as `himap-export --plan` reads them."""
        k1, k2, r1, r2 = BUDGETS[name]
        (spec, _), plan = describe(resolve("shapes")), himap(k1, k2, r1, r2)
        keep = equal_keep(spec, k1, IMAGE_TOKENS, TEXT, true_ratio(spec, plan, plan.kept(IMAGE_TOKENS), TEXT))
        tables = [
            f'[{policy}]\npolicy = "{policy}"\nk1 = {k1}\nk2 = {k2}\nr1 = {r1}\nr2 = {r2}\n'
            for policy in ("himap", "intra-visual")
        ]
        tables += [f'[{policy}]\npolicy = "{policy}"\nk1 = {k1}\nkeep = {keep}\n' for policy in ("fastv", "truncation")]
        (self.out / f"{name}.toml").write_text("\n".join(tables))

    def judge(self, name: str) -> Path:
        """Exports and scores budget `name`; the folder of its report."""
        bundle, report = self.out / f"bundle-{name}", self.out / f"report-{name}"
        plans, budgets = self.out / f"{name}.toml", ("--text-budget", TEXT, "--max-new-tokens", 4, "--batch", BATCH)
        if not bundle.exists():
            command("himap-export", "shapes", "--backend", "onnxruntime", "--plan", plans, *budgets, "--out", bundle)
        # Two run at once: neither's times would say anything.
        flags = ("--dataset", self.dataset, "--report", report, "--seeds", self.seeds, "--threads", 1, "--no-speed")
        command("himap-validate", bundle, *flags, "--max-new-tokens", 2)
        return report

    def analyze(self) -> Path:
        """Where information flows in `shapes`, on the first of the questions; the folder of its report."""
        report = self.out / "flow"
        if not (report / "report.json").exists():
            flags = ("--dataset", self.dataset, "--limit", 120, "--threads", 2, "--overwrite")
            command("himap-analyze", "shapes", *flags, "--out", report)
        return report

    def tune(self) -> Path:
        """What other cuts of HiMAP's would cost and gain; the folder of its report."""
        report = self.out / "tuned"
        if not (report / "report.json").exists():
            command("himap-tune", "shapes", "--dataset", self.dataset, "--limit", 900, "--out", report, *TRIED, *TIMED)
        return report


def command(name: str, *arguments: object) -> None:
    """A command of ours, in the environment that runs this script."""
    line = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    print(" ".join([name, *line[1:]]), flush=True)
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


@dataclass(frozen=True)
class Judged:
    """One budget's report: {system: {type: {mean, low, high}}}, and what each system keeps of the FLOPs."""

    name: str
    flops: dict[str, float]
    accuracy: dict[str, dict[str, dict[str, object]]]

    def interval(self, system: str, kind: str) -> tuple[float, float, float]:
        """Mean, low and high, in percent."""
        found = self.accuracy[system][kind]["accuracy"]
        assert isinstance(found, dict)
        return 100 * found["mean"], 100 * found["low"], 100 * found["high"]


def read(name: str, report: Path) -> Judged:
    found = json.loads((report / "report.json").read_text())
    return Judged(name, found["flops_kept"], found["accuracy"])


# As the study names them -> as a report does: the baselines at HiMAP's cuts.
SHOWN = {
    "himap": "himap", "intra-visual": "intra-visual", "fastv": "fastv", "truncation": "truncation",
    "random": "random-himap", "uniform": "uniform-himap", "none": "none",
}  # fmt: skip


def tables(budgets: Sequence[Judged]) -> list[str]:
    """Markdown: every policy at every budget, by type; the best pruned one of each column in bold."""
    found = []
    for budget in budgets:
        k1, k2, r1, r2 = BUDGETS[budget.name]
        found += [
            "",
            f"**Budget {budget.name}**: {budget.flops['himap']:.0%} of the FLOPs; K1 {k1}, K2 {k2}, R1 {r1}, R2 {r2}",
            "",
        ]
        found += [f"| policy | all | {' | '.join(TYPES)} |", "|---" * (2 + len(TYPES)) + "|"]
        best = {kind: max(budget.interval(SHOWN[p], kind)[0] for p in SHOWN if p != "none") for kind in ("all", *TYPES)}
        for policy, system in SHOWN.items():
            cells = []
            for kind in ("all", *TYPES):
                mean, low, high = budget.interval(system, kind)
                text = f"{mean:.1f} ({low:.1f} to {high:.1f})"
                cells.append(f"**{text}**" if policy != "none" and mean == best[kind] else text)
            found.append(f"| {policy} | {' | '.join(cells)} |")
    return found


def differences(budgets: Sequence[Judged]) -> list[str]:
    """Markdown: each ranking policy against chance at its own cuts, percentage points on all questions."""
    policies = ("himap", "intra-visual", "fastv", "truncation")
    rows = [f"| over random at the same cuts | {' | '.join(policies)} |", "|---" * (1 + len(policies)) + "|"]
    for budget in budgets:
        cells = []
        for policy in policies:
            over = budget.accuracy[policy]["all"]["over"]
            assert isinstance(over, dict)
            chance = next(i for name, i in over.items() if name.startswith("random"))
            cells.append(f"{100 * chance['mean']:+.1f} ({100 * chance['low']:+.1f} to {100 * chance['high']:+.1f})")
        rows.append(f"| {budget.name}, {budget.flops['himap']:.0%} of the FLOPs | {' | '.join(cells)} |")
    return rows


def draw_figures(budgets: Sequence[Judged], folder: Path) -> None:
    """accuracy.png: all questions over FLOPs; types.png: each type at the default plan."""
    ordered = sorted(budgets, key=lambda b: b.flops["himap"])
    over = [
        Datum(policy, 100 * b.flops["himap"], *b.interval(system, "all"))
        for policy, system in SHOWN.items()
        for b in ordered
    ]
    title, right = "Right answers at equal FLOPs, 6,000 questions, with 95 % intervals", "right answers (%)"
    (folder / "accuracy.png").write_bytes(lines("accuracy", title, "", over, "FLOPs kept (%)", right).png)
    by_type = [
        Datum(policy, kind, *budgets[0].interval(system, kind)) for policy, system in SHOWN.items() for kind in TYPES
    ]
    title = "Right answers by type of question at the default plan, with 95 % intervals"
    (folder / "types.png").write_bytes(bars("types", title, "", by_type, "type", right).png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study"), help="bundles, answers and reports (default: study)")
    parser.add_argument("--docs", type=Path, help="also write the tables and figures there")
    parser.add_argument("--per-type", type=int, default=1000, help="questions of each type (default: 1000)")
    parser.add_argument("--seeds", type=int, default=5, help="of the random baseline (default: 5)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    study = Study(args.out, write(args.out, args.per_type), args.seeds)
    for name in BUDGETS:
        study.write_plans(name)
    with ThreadPoolExecutor(2) as pool:  # one of the two cores each
        budgets = [read(*found) for found in zip(BUDGETS, pool.map(study.judge, BUDGETS), strict=True)]
    found = [*tables(budgets), "", *differences(budgets)]
    print("\n".join(found))
    if args.docs is not None:
        args.docs.mkdir(parents=True, exist_ok=True)
        (args.docs / "tables.md").write_text("\n".join(["# Policies at equal FLOPs on `shapes`", *found, ""]))
        draw_figures(budgets, args.docs)
        flow, tuned = study.analyze(), study.tune()
        for folder, names in ((flow, FLOW), (tuned, TUNED)):
            for name in names:
                shutil.copyfile(folder / f"{name}.png", args.docs / f"{name}.png")


if __name__ == "__main__":
    main()
