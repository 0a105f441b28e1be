"""Which selector keeps the right tokens? Every criterion at four budgets of FLOPs on `shapes`, beside its baselines.

    python examples/shapes/study.py --out study --docs docs/study

writes 6,000 held-out questions of seven types, fits what some selectors weigh with on others, exports two bundles that
hold all plans of two budgets each, lets `himap-validate --dataset` answer and judge them (an interrupted study goes on
where it stopped), and gathers the answers into tables and figures. At a budget all criteria cut at the same two layers
to the same counts, so that FLOPs are equal and only the choice differs; random and uniform are judged there too.

    python examples/shapes/study.py --positions renumbered --out study --docs docs/study

asks what it costs to number anew who stays: see positions.py. Which plan is worth its time is for cuts.py.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dataset import write
from tables import draw_figures, read, tables

from himap_export.engines.choice import best_backend, fast_dtype
from himap_export.engines.questions import read_dataset
from himap_export.exporter.aliases import ALIASES
from himap_export.validate.accuracy.prompter import prompter_of_checkpoint
from himap_export.validate.analysis.fit import Fitted, fit
from himap_export.validate.analysis.flow import Samples
from himap_export.validate.progress import counted
from himap_export.validate.reference.reference import Reference

MODEL, TEXT, BATCH = "shapes", 16, 16
FIT_SEED = 7  # of the questions that coefficients are fitted on
# K1, K2, R1, R2, from mild to hard. K1 = 1 ranks by the very first layer.
BUDGETS = {
    "a": (2, 8, 0.5, 0.75),
    "b": (2, 5, 0.5, 0.75),
    "c": (1, 3, 0.5, 0.75),
    "d": (1, 3, 0.75, 0.9),
}
PARTS = ("ad", "bc")  # budgets that one bundle holds, for one of the two cores: about as much work each
SELECTORS = {
    "himap": ("instruction", "image"),
    "himap-debiased": ("instruction-debiased", "image"),
    "intra-visual": ("image", "image"),
    "fastv": ("last", "last"),
    "truncation": ("boundary", "boundary"),
    "hawk": ("hawk", "hawk"),
    "dart": ("dart", "dart"),
    "key-norm": ("key-norm", "key-norm"),
    "v2drop": ("v2drop", "v2drop"),
}


@dataclass(frozen=True)
class Study:
    """Who is asked what: the questions of `dataset`, random ones with so many `seeds`; bundles and reports lie in
    `out`."""

    out: Path
    dataset: Path
    seeds: int
    report: str = "report"

    @cached_property
    def fitted(self) -> Fitted:
        """What debiasing and HAWK weigh with."""
        examples = read_dataset(write(self.out / "fit", 70, FIT_SEED)).examples
        folder = Path(ALIASES[MODEL].source)
        with counted("fit") as progress:
            return fit(Reference(folder), Samples(prompter_of_checkpoint(folder), examples), progress)

    def coefficients(self, criterion: str, layer: int) -> tuple[float, ...]:
        """What `criterion` weighs with at a cut before `layer`; HAWK's heads are of layer 0, later ones weigh alike."""
        if criterion == "instruction-debiased":
            return (self.fitted.slopes[layer - 1],)
        return self.fitted.heads if criterion == "hawk" and layer == 1 else ()

    def plans(self, budgets: str, policies: Iterable[str] = SELECTORS) -> str:
        """The policies at each of the budgets, as `himap-export --plan` reads them."""
        text = []
        for budget in budgets:
            k1, k2, r1, r2 = BUDGETS[budget]
            for policy in policies:
                cuts = [
                    f'{{layer = {k}, criterion = "{c}", remove = {r}, coefficients = {list(self.coefficients(c, k))}}}'
                    for c, k, r in zip(SELECTORS[policy], (k1, k2), (r1, r2), strict=True)
                ]
                text.append(f"[{policy}-{budget}]\ncuts = [{', '.join(cuts)}]\n")
        return "\n".join(text)

    def judged(self, *, times: bool = False) -> list[Path]:
        """Exports what there is not yet, and has everyone answer what is not answered yet, both parts at once; the
        folders of their reports."""
        for part in PARTS:
            if not (self.out / f"bundle-{part}").exists():  # what is fitted takes a minute
                (self.out / f"{part}.toml").write_text(self.plans(part))
        with ThreadPoolExecutor(len(PARTS)) as pool:  # a core each
            reports = list(pool.map(self._judge, PARTS))
        if times:
            for part in PARTS:
                self._score(part)
        return reports

    def _judge(self, part: str) -> Path:
        bundle = self.out / f"bundle-{part}"
        if not bundle.exists():
            backend = best_backend(cpu=True).backend
            built = ("--backend", backend, "--dtype", fast_dtype(backend), "--plan", self.out / f"{part}.toml")
            sizes = ("--text-budget", TEXT, "--max-new-tokens", 4, "--batch", BATCH)
            command("himap-export", MODEL, *built, *sizes, "--out", bundle)
        return self._score(part, "--no-speed")

    def _score(self, part: str, *flags: object) -> Path:
        """Answers whatever the log does not hold yet; of an answer two tokens are enough to judge it."""
        report = self.out / f"{self.report}-{part}"
        asked = ("--dataset", self.dataset, "--report", report, "--seeds", self.seeds, *flags)
        command("himap-validate", self.out / f"bundle-{part}", *asked, "--threads", 1, "--max-new-tokens", 2)
        return report


def command(name: str, *arguments: object) -> None:
    """A command of ours, in the environment that runs this script."""
    line = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    print(" ".join([name, *line[1:]]), flush=True)
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study"), help="bundles, answers and reports (default: study)")
    parser.add_argument("--docs", type=Path, help="also write the tables and figures there")
    parser.add_argument("--questions", type=int, default=6000, help="each type in turn (default: 6000)")
    parser.add_argument("--seeds", type=int, default=5, help="of the random baseline (default: 5)")
    parser.add_argument("--positions", choices=("original", "renumbered"), default="original", help="of who stays")
    args = parser.parse_args()
    if args.positions == "renumbered":
        from positions import control  # imports torch's processes

        control(args.out, args.docs)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    study = Study(args.out, write(args.out, args.questions), args.seeds)
    judged = read(study.judged(), study.dataset, tuple(SELECTORS), budgets=BUDGETS, text=TEXT)
    found = tables(judged)
    print("\n".join(found))
    if args.docs is not None:
        args.docs.mkdir(parents=True, exist_ok=True)
        (args.docs / "tables.md").write_text("\n".join([*found, ""]))
        draw_figures(judged, args.docs)


if __name__ == "__main__":
    main()
