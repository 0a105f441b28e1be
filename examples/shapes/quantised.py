"""Does quantising change which tokens matter? Some selectors, in every form of the weights, on `shapes`.

    python examples/shapes/quantised.py --out study --docs docs/study

exports one bundle for each form of the weights, with these selectors at one budget of FLOPs, asks all of them the
same held-out questions, as deployed on onnxruntime, and writes docs/study/quantised.md: right answers, paired
differences to the same policy with weights in fp32, and how many of the kept image tokens another one replaced. What a
form has answered is kept in OUT/quantised-FORM.npz: an interrupted study goes on behind it.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dataset import write
from draw import TYPES
from numpy.typing import NDArray
from study import BATCH, BUDGETS, TEXT, Study, command

from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.pipeline import Pipeline
from himap_export.engines.prefill import Seen
from himap_export.engines.questions import Example, read_dataset
from himap_export.validate.accuracy.choices import is_right
from himap_export.validate.accuracy.evaluate import percent, points
from himap_export.validate.accuracy.prompter import prompter_of_bundle
from himap_export.validate.accuracy.statistics import accuracy_interval, paired_difference
from himap_export.validate.accuracy.systems import padded

CALIBRATION_SEED = 5  # of questions that are neither trained on nor asked
FORMS: Mapping[str, tuple[object, ...]] = {
    "fp32": (),
    "int8": ("--quantize", "int8"),
    "int8-dynamic": ("--quantize", "int8-dynamic"),
    "int4/32": ("--quantize", "int4", "--block", 32),
    "int4/64": ("--quantize", "int4", "--block", 64),
    "int4/64 AWQ": ("--quantize", "int4", "--block", 64, "--calibrate"),
}
BUDGET, ASKED = "b", ("himap", "himap-debiased", "fastv", "key-norm")
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Told:
    """What one form of the weights answered: by plan, which questions [n] were right, and by plan and cut
    ("himap k1") which image tokens [n,576] were kept."""

    right: Mapping[str, Bools]
    kept: Mapping[str, Bools]

    def save(self, file: Path) -> None:
        right = {f"right {plan}": found for plan, found in self.right.items()}
        np.savez_compressed(file, **right, **{f"kept {cut}": found for cut, found in self.kept.items()})


def load(file: Path) -> Told:
    with np.load(file) as found:
        by_kind = {
            kind: {name.removeprefix(kind): found[name] for name in found.files if name.startswith(kind)}
            for kind in ("right ", "kept ")
        }
    return Told(by_kind["right "], by_kind["kept "])


def export(study: Study, form: str) -> Bundle:
    """The bundle of one form: the selectors at their budget, and random, uniform and no cuts beside them."""
    out = study.out / f"bundle-{form.replace('/', '-').replace(' ', '-')}"
    if not out.exists():
        k1, k2, r1, r2 = BUDGETS[BUDGET]
        plans = study.out / "quantised.toml"
        chance = "".join(
            f'\n[{policy}]\npolicy = "{policy}"\nk1 = {k1}\nk2 = {k2}\nr1 = {r1}\nr2 = {r2}\n'
            for policy in ("random", "uniform")
        )
        plans.write_text('[none]\npolicy = "none"\n\n' + study.plans(BUDGET, ASKED) + chance)
        flags = [*FORMS[form]]
        if "--calibrate" in flags:
            flags.append(write(study.out / "calibration", 35, CALIBRATION_SEED))
        budgets = ("--text-budget", TEXT, "--max-new-tokens", 4, "--batch", BATCH)
        command("himap-export", "shapes", "--backend", "onnxruntime", "--plan", plans, *budgets, *flags, "--out", out)
    return Bundle.open(out)


def ask(bundle: Bundle, examples: Sequence[Example]) -> Told:
    """Asks all plans of a bundle; random ones draw question n by n, whatever the form."""
    prompter, stop = prompter_of_bundle(bundle), bundle.manifest.model.eos_tokens
    pipelines = dict[str, Pipeline]()
    for variant in bundle.manifest.variants:
        run, beside = bundle.select(variant.plan_name), next(iter(pipelines.values()), None)
        pipelines[variant.plan_name] = Pipeline(run, "onnxruntime", Opening(threads=1), beside)
    right = {plan: np.zeros(len(examples), bool) for plan in pipelines}
    kept = {
        f"{plan} {stage}": np.zeros((len(examples), p.spec.budget.visual[0]), bool)
        for plan, p in pipelines.items()
        for stage in p.stages[1:]
    }
    for at in range(0, len(examples), BATCH):
        asked = examples[at : at + BATCH]
        arrays = [prompter.arrays(e) for e in asked]
        ids, mask = padded(arrays)
        pixels, seeds = np.concatenate([a.pixel_values for a in arrays]), np.arange(at, at + len(asked))
        seen: Seen | None = None
        for plan, p in pipelines.items():
            prefilled, layout = p.prefill(ids, seen or pixels, mask, seeds)
            seen = seen or p.seen()
            for cut, positions in prefilled.kept.items():
                found = kept[f"{plan} {cut.removeprefix('kept_')}"]
                for row, own in enumerate(positions):
                    image = np.flatnonzero(bundle.manifest.model.image.find(ids[row]))
                    found[at + row] = np.isin(image, own)
            tokens = np.stack(list(p.generate(prefilled, layout, 2)), axis=1)
            for row, (e, answer) in enumerate(zip(asked, tokens.tolist(), strict=True)):
                right[plan][at + row] = is_right(e, prompter.processor.text(answer, stop))
    return Told(right, kept)


def tables(told: Mapping[str, Told]) -> list[str]:
    """Markdown: right answers, differences to fp32, kept tokens replaced; a row for each form, a column for each
    policy."""
    first = told["fp32"]
    plans, head = [*first.right], "| weights | {} |"
    lines = [head.format(" | ".join(plans)), "|---" * (1 + len(plans)) + "|"]
    for form, found in told.items():
        lines.append(f"| {form} | {' | '.join(percent(accuracy_interval(found.right[p])) for p in plans)} |")
    lines += ["", "Points over the same policy in fp32:", "", *lines[:2]]
    for form, found in told.items():
        if form != "fp32":
            differences = (points(paired_difference(found.right[p], first.right[p])) for p in plans)
            lines.append(f"| {form} | {' | '.join(differences)} |")
    cuts = [cut for cut in first.kept if not cut.startswith(("random", "uniform"))]  # which ask nobody's scores
    lines += ["", "Of the image tokens that fp32 keeps, replaced by another:", ""]
    lines += [head.format(" | ".join(cuts)), "|---" * (1 + len(cuts)) + "|"]
    for form, found in told.items():
        if form != "fp32":
            lines.append(f"| {form} | {' | '.join(replaced(found.kept[c], first.kept[c]) for c in cuts)} |")
    return lines


def replaced(own: Bools, other: Bools) -> str:
    """Of the tokens [n,V] that `other` keeps, the share that `own` does not, in percent; and of how many questions one
    is."""
    lost = other & ~own
    return f"{100 * lost.sum() / other.sum():.1f} % (in {100 * lost.any(axis=1).mean():.0f} % of questions)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study"), help="bundles and answers (default: study)")
    parser.add_argument("--docs", type=Path, help="also write the tables there")
    parser.add_argument("--questions", type=int, default=420, help="each type in turn (default: 420)")
    parser.add_argument("--form", action="append", choices=FORMS, help="of the weights; repeatable (default: all)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    study = Study(args.out, write(args.out / f"quantised-{args.questions}", args.questions), seeds=1)
    examples, told = read_dataset(study.dataset).examples, dict[str, Told]()
    for form in dict.fromkeys(("fp32", *(args.form or FORMS))):
        file = args.out / f"quantised-{args.questions}" / f"{form.replace('/', '-').replace(' ', '-')}.npz"
        if not file.exists():
            ask(export(study, form), examples).save(file)
        told[form] = load(file)
        print(f"{form}: " + ", ".join(f"{p} {r.mean():.1%}" for p, r in told[form].right.items()), flush=True)
    found = tables(told)
    print("\n".join(found))
    if args.docs is not None:
        title = f"# Pruning and quantised weights on `shapes`, {len(examples)} questions of {len(TYPES)} types"
        (args.docs / "quantised.md").write_text("\n".join([title, "", *found, ""]))


if __name__ == "__main__":
    main()
