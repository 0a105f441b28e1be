"""`himap-tune`: the walk down the tree against one prefill a plan, the front by hand, and the command to its files."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ORT, QUESTIONS_64, SHAPES_64, Workshop, call
from tiny import make_inputs

from himap_export.engines.arrays import Inputs
from himap_export.engines.choice import best_backend
from himap_export.engines.questions import Example
from himap_export.exporter.plans import named_plans
from himap_export.graphs.errors import HimapError
from himap_export.graphs.plan import POLICIES, himap
from himap_export.validate.accuracy.statistics import Interval
from himap_export.validate.parity.runs import reference_cuts
from himap_export.validate.reference.criteria import Cuts, State
from himap_export.validate.reference.reference import Reference
from himap_export.validate.report.charts import Point, pareto
from himap_export.validate.report.page import Figure
from himap_export.validate.tuning.cli import main
from himap_export.validate.tuning.front import RankedPlan, choose, rank
from himap_export.validate.tuning.grid import Candidate, Values, defaults, grid
from himap_export.validate.tuning.sweep import Job, SweptExample, first_tokens

SMALL = ("--k1", "1,2", "--k2", "4", "--r1", "0.5", "--r2", "0.5,0.75", "--workers", 1)


class Counting:
    """A reference that counts the layers it runs."""

    def __init__(self, reference: Reference) -> None:
        self.reference, self.layers, self.ran = reference, reference.layers, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reference, name)

    def advance(self, state: State, layer: int, attention: bool = False) -> State:
        self.ran += layer - state.layer
        return self.reference.advance(state, layer, attention)


def reference_plans(candidates: Sequence[Candidate], tokens: int = 16) -> dict[str, Cuts]:
    return {c.name: reference_cuts(c.plan, c.plan.kept(tokens)) for c in candidates}


@pytest.mark.parametrize("policy", ["himap", "random", "fastv"])
def test_the_walk_says_what_one_prefill_a_plan_says(work: Workshop, policy: str) -> None:
    reference = Counting(work.reference("mha"))
    values = {"k1": (1, 3), "r1": (0.25, 0.5)} | ({"k2": (4, 7), "r2": (0.5, 0.75)} if policy != "fastv" else {})
    plans = {"none": ()} | reference_plans(grid(values, 10, policy))
    made = make_inputs(work.tiny("mha"), [9], [5], seed=3)
    found = first_tokens(reference, Inputs(made.input_ids, made.pixel_values), plans, (5, 8))  # type: ignore[arg-type]
    assert len(plans) == (5 if policy == "fastv" else 17) and set(found) == {
        (name, n) for name in plans for n in (0, 1)
    }
    # Twice: 10 unpruned; from each of 4 (K1, R1) on to layer 7; from each of the 16 plans' K2, or the 4 plans' K1, on.
    once = 10 + 2 * (7 - 1) + 2 * (7 - 3) + 8 * (10 - 4) + 8 * (10 - 7)
    assert reference.ran == 2 * (10 + 2 * (10 - 1) + 2 * (10 - 3) if policy == "fastv" else once)
    for (name, n), token in found.items():
        arrays = made.input_ids, made.pixel_values
        wanted = reference.reference.prefill(*arrays, cuts=plans[name], seeds=[(5, 8)[n]])
        assert token == int(wanted.logits[0].argmax())


def test_grids() -> None:
    plans = grid({"k1": (2, 1), "r1": (0.5,), "k2": (2, 4), "r2": (0.75,)}, 10)
    assert [c.name for c in plans] == ["k1-r0_5-k2-r0_75", "k1-r0_5-k4-r0_75", "k2-r0_5-k4-r0_75"]
    assert plans[0].plan == himap(1, 2, 0.5, 0.75)
    near = grid({"k1": (1,), "r1": (0.3333333, 0.3333334, 1e-7), "k2": (2,), "r2": (0.0,)}, 10)
    assert len({c.name for c in near}) == 3 and all(re.fullmatch(r"[\w-]+", c.name) for c in near)
    assert defaults(32) == ((1, 2, 4), (5, 8, 16)) and defaults(10)[0][0] == 1
    assert defaults(32, 1) == ((1, 2, 4, 5, 8, 16),)
    for layers in (3, 6, 10, 28, 40):
        for policy, cuts in (("himap", 2), ("fastv", 1)):
            assert grid({}, layers, policy) and {len(c.cuts) for c in grid({}, layers, policy)} == {cuts}
    for values, words in (
        ({"k1": (4,), "k2": (2, 4)}, "no plan is left to try"),
        ({"k1": (2,), "k2": (10,)}, "`k2` 10 is past the last layer"),
        ({"k1": (0,), "k2": (4,)}, "is below 1"),
        ({"r1": (1.0,)}, r"`r1` 1\.0 is outside"),
        ({"r2": (-0.5,)}, r"`r2` -0\.5 is outside"),
        ({"r2": (float("nan"),)}, "`r2` nan is outside"),
        ({"k1": (10,), "k2": (4,)}, "`k1` 10 is past"),
        (
            {"k1": range(1, 4), "r1": [n / 64 for n in range(64)], "k2": range(4, 10), "r2": (0.5,)},
            "1152 plans are too",
        ),
    ):
        with pytest.raises(HimapError, match=words):
            grid(values, 10)


@pytest.mark.parametrize("policy", [name for name, criteria in POLICIES.items() if criteria])
def test_every_policy_has_a_grid_whose_plans_are_read_back(policy: str, tmp_path: Path) -> None:
    found = grid({"r1": (0.5,)}, 12, policy)
    assert all(c.plan.policy == policy for c in found)
    (tmp_path / "plans.toml").write_text("\n".join(c.toml(c.name) for c in found))
    assert named_plans([str(tmp_path / "plans.toml")]) == {c.name: c.plan for c in found}


@pytest.mark.parametrize(
    ("policy", "values", "words"),
    [
        ("fastv", {"k2": (4,)}, "`k2` is not for the policy fastv"),
        ("truncation", {"r2": (0.5,)}, "it cuts once: `k1`, `r1`"),
        ("none", {}, "the policy none makes 0 cuts"),
        ("himapp", {}, "unknown policy himapp.*did you mean himap"),
    ],
)
def test_what_no_policy_has_is_refused(policy: str, values: Values, words: str) -> None:
    with pytest.raises(HimapError) as refused:
        grid(values, 10, policy)
    assert re.search(words, " ".join((refused.value.summary, refused.value.details, refused.value.hint)))


def candidate(r2: float) -> Candidate:
    return Candidate(((1, 0.5), (2, r2)))


def test_the_front_by_hand() -> None:
    """Righter by 30 of 100 is told apart, and by none; the unpruned model is on the front like any other."""
    cheap, dear, bad, tied = (candidate(r2) for r2 in (0.9, 0.25, 0.5, 0.75))
    flops = {cheap.name: 0.3, dear.name: 0.8, bad.name: 0.5, tied.name: 0.8}
    shares = {cheap.name: 40, dear.name: 70, bad.name: 35, tied.name: 70, "none": 100}
    right = {name: np.arange(100) < count for name, count in shares.items()}
    ranked, front = rank((cheap, dear, bad, tied), flops, right)
    assert front.names == (cheap.name, dear.name, "none")
    assert [j.candidate for j in ranked if j.on_front] == [cheap, dear]
    assert {j.candidate: round(j.loss.mean, 6) for j in ranked} == {cheap: 0.6, dear: 0.3, bad: 0.65, tied: 0.3}
    ranked, front = rank((cheap, dear, bad, tied), flops, {name: row[:5] for name, row in right.items()})
    assert front.names == () and not any(j.on_front for j in ranked) and "on 5 questions" in front.note


def test_the_choice_by_hand() -> None:
    def row(r2: float, flops: float, high: float) -> RankedPlan:
        return RankedPlan(candidate(r2), flops, Interval(0.9, 0.8, 1.0), Interval(high / 2, 0.0, high), True)

    ranked = [row(0.9, 0.3, 0.05), row(0.75, 0.5, 0.019), row(0.5, 0.7, 0.0)]
    chosen = choose(ranked, 1.0, 0.98)
    assert chosen.candidate == ranked[1].candidate and "50% of the FLOPs" in chosen.reason
    assert choose(ranked, 1.0, 0.99).candidate == ranked[2].candidate
    assert "validate it on others" in chosen.reason and "(0.0 to 1.9) points" in chosen.reason
    nothing = choose(ranked[:2], 1.0, 0.99)
    assert nothing.candidate is None and "may lose 1.9 points" in nothing.reason
    assert "lower --min-accuracy" in choose(ranked[:2], 1.0, 1.0).reason


@pytest.mark.parametrize(("questions", "sure"), [(5, False), (380, False), (381, True)])
def test_a_loss_that_no_question_shows_is_not_excluded(questions: int, sure: bool) -> None:
    plan, right = candidate(0.9), np.ones(questions, bool)
    ranked, _ = rank((plan,), {plan.name: 0.2}, {plan.name: right, "none": right})
    chosen = choose(ranked, 1.0, 0.99)
    assert chosen.candidate == (plan if sure else None)
    assert sure or "even without a loss it takes 381" in chosen.reason


DEAR, CHEAP = "k1-r0_5-k4-r0_5", "k1-r0_5-k4-r0_9"


def tune_made(monkeypatch: pytest.MonkeyPatch, folder: Path, right: Mapping[str, str], *flags: object) -> list[Point]:
    """Runs the command on plans that are right where a 1 stands; what is random is so in every second draw. Returns the
    points of its charts."""
    points: list[Point] = []

    def sweep(job: Job, examples: Sequence[tuple[int, Example]], workers: int) -> Iterator[SweptExample]:
        keys = [(name, n) for name in job.plans for n in range(len(job.seeds))]
        for number, example in examples:
            yield example, {(k, n): int(right.get(k, "10"[n % 2] * 99)[number]) for k, n in keys}, 1

    def drawn(*words: str, data: Sequence[Point], **labels: str) -> Figure:
        points.extend(data)
        return pareto(*words, data=data, **labels)

    monkeypatch.setattr("himap_export.validate.tuning.tune.sweep", sweep)
    monkeypatch.setattr("himap_export.validate.tuning.page.pareto", drawn)
    lines = QUESTIONS_64.read_text().splitlines()
    shutil.copytree(QUESTIONS_64.parent, folder / "data")
    data = folder / "data" / "many.jsonl"
    data.write_text("".join(f"{lines[n % len(lines)]}\n" for n in range(len(right["none"]))))
    grid_flags = ("--k1", 1, "--k2", 4, "--r1", 0.5, "--r2", "0.5,0.9", "--no-time", "--json", *flags)
    assert call(main, SHAPES_64, "--dataset", data, "--out", folder / "out", *grid_flags) == 0
    return points


@pytest.mark.parametrize("baseline", ["random", "none"])
def test_few_answers_draw_no_front_and_may_choose_a_plan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], baseline: str
) -> None:
    """The cheap one is right as often as unpruned, but on other questions: its interval is wide, the dear one's not."""
    right = {"none": "11100", CHEAP: "01110", DEAR: "11100"}
    # 3 of 5 are right: the dear plan may lose 43 points, the cheap one 55
    points = tune_made(monkeypatch, tmp_path, right, "--min-accuracy", 0.2, "--baseline", baseline)
    found = json.loads(capsys.readouterr().out)
    assert found["choice"]["name"] == DEAR and found["dtype"] == "fp32"
    assert found["front"]["names"] == [] and "Nothing can be told apart on 5 questions" in found["front"]["note"]
    assert not any(p["on_front"] for p in found["plans"]) and not any(p.on_front for p in points)
    assert set(found["over_random"]) == ({DEAR} if baseline == "random" else set())
    assert "Nothing can be told apart" in (tmp_path / "out" / "report.html").read_text()
    plans = named_plans([str(tmp_path / "out" / "plans.toml")])
    assert set(plans) == {"tuned", DEAR} and plans["tuned"] == plans[DEAR]


def test_many_answers_draw_a_front_beside_several_draws_of_chance(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = {"none": "1" * 40, CHEAP: "1" * 10 + "0" * 30, DEAR: "1" * 30 + "0" * 10}
    points = tune_made(monkeypatch, tmp_path, right, "--seeds", 4)
    found = json.loads(capsys.readouterr().out)
    assert found["front"] == {"names": [CHEAP, DEAR, "none"], "note": ""} and found["draws"] == 4
    assert {p["name"]: p["on_front"] for p in found["plans"]} == {CHEAP: True, DEAR: True}
    assert {p.label for p in points if p.on_front} == {CHEAP, DEAR, "none"}
    assert {name: i["mean"] for name, i in found["over_random"].items()} == {CHEAP: -0.25, DEAR: 0.25}
    assert found["choice"]["name"] is None and set(named_plans([str(tmp_path / "out" / "plans.toml")])) == {CHEAP, DEAR}
    log = [json.loads(line) for line in (tmp_path / "out" / "sweep.jsonl").read_text().splitlines()[1:]]
    assert {a["seed"] for a in log if a["policy"] == f"random-{DEAR}"} == {0, 1, 2, 3}


def test_chance_is_not_its_own_baseline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = {"none": "1" * 40, CHEAP: "1" * 10 + "0" * 30, DEAR: "1" * 30 + "0" * 10}
    tune_made(monkeypatch, tmp_path, right, "--policy", "random")
    found = json.loads(capsys.readouterr().out)
    assert found["policy"] == "random" and found["draws"] == 0 and found["over_random"] == {}
    plans = named_plans([str(tmp_path / "out" / "plans.toml")])
    assert {plan.policy for plan in plans.values()} == {"random"}
    log = [json.loads(line) for line in (tmp_path / "out" / "sweep.jsonl").read_text().splitlines()[1:]]
    assert {(a["policy"], a["seed"]) for a in log} == {("none", 0), (CHEAP, 0), (DEAR, 0)}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("tune") / "out"
    flags = ("--dataset", QUESTIONS_64, "--out", out, *SMALL, "--iterations", 2, "--min-accuracy", 0.1)
    flags += ("--threads", 1, "--seeds", 2)
    assert call(main, SHAPES_64, *flags) == 0
    yield out


def test_plans_can_be_exported(tuned: Path) -> None:
    found = json.loads((tuned / "report.json").read_text())
    plans = named_plans([str(tuned / "plans.toml")])
    chosen = found["choice"]["name"]
    assert list(plans) == ["tuned", chosen] and plans["tuned"] == plans[chosen]
    values = {"k1": (1, 2), "r1": (0.5,), "k2": (4,), "r2": (0.5, 0.75)}
    assert plans[chosen] == {c.name: c.plan for c in grid(values, 10)}[chosen]
    assert set(found["times"]) == {"none", chosen} and found["times"]["none"]["speed_up"] == [1, 1, 1]
    assert found["timed_on"] == {"backend": best_backend().backend, "threads": 1}
    assert set(found["over_random"]) == {chosen} and found["questions"] == 5 and found["draws"] == 2
    assert found["front"]["names"] == [] and "on 5 questions" in found["front"]["note"]
    text = re.sub("<[^>]*>", "", (tuned / "report.html").read_text())
    assert f"himap-export {SHAPES_64} --plan" in text
    assert (tuned / "flops.png").is_file() and (tuned / "time.png").is_file()


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = Path(shutil.copytree(tuned, tmp_path / "again"))
    lines = (again / "sweep.jsonl").read_text().splitlines(keepends=True)
    (again / "sweep.jsonl").write_text("".join(lines[:8]) + lines[8][:9])
    flags = (
        "--dataset",
        QUESTIONS_64,
        "--out",
        again,
        *SMALL,
        "--no-time",
        "--seeds",
        2,
        "--min-accuracy",
        0.1,
        "--json",
    )
    assert call(main, SHAPES_64, *flags) == 0
    assert sorted((again / "sweep.jsonl").read_text().splitlines()) == sorted(line.strip() for line in lines)
    before, after = json.loads((tuned / "report.json").read_text()), json.loads(capsys.readouterr().out)
    assert after["plans"] == before["plans"] and after["times"] == {} and after["timed_on"] is None


def test_what_is_refused(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    data = ("--dataset", QUESTIONS_64)
    for flags, words in (
        ((*data, "--out", tmp_path / "full"), "is neither empty nor ours"),
        ((*data, "--out", tuned, *SMALL, "--seed", 1), "logs another measurement: seed is 1, was 0"),
        ((*data, "--out", tuned, *SMALL, "--r1", "0.25"), "grid is {'k1': [1, 2], 'r1': [0.25], "),
        ((*data, "--out", tmp_path / "a", "--dtype", "bf16", *ORT), "do not compute in bf16"),
        ((*data, "--out", tmp_path / "a", "--k1", "4", "--k2", "2"), "no plan is left to try"),
        ((*data, "--out", tmp_path / "a", "--k2", "10"), "--k2 10 is past the last layer"),
        ((*data, "--out", tmp_path / "a", "--r1", "1"), "is outside [0, 1)"),
        ((*data, "--out", tmp_path / "a", "--policy", "fastv", "--k2", "4"), "--k2 is not for the policy fastv"),
        ((*data, "--out", tmp_path / "a", "--policy", "none"), "the policy none makes 0 cuts"),
        ((*data, "--out", tmp_path / "a", "--policy", "himap-debiased"), "has 0 coefficients for instruction-debiased"),
        ((*data, "--out", tuned, *SMALL, "--policy", "intra-visual"), "policy is 'intra-visual', was 'himap'"),
        (("--dataset", tmp_path / "none.jsonl", "--out", tmp_path / "a"), "cannot read data set"),
        ((*data, "--out", tmp_path / ("x" * 300)), "File name too long"),
    ):
        assert call(main, SHAPES_64, *flags) == 2, flags
        err = capsys.readouterr().err
        assert words in err.splitlines()[-1] and "Traceback" not in err, flags
    assert not (tmp_path / "a").exists()
    baseline = shutil.copytree(SHAPES_64, tmp_path / "baseline")
    assert call(main, baseline, *data, "--out", tuned, *SMALL) == 2
    assert "logs another measurement: model is" in capsys.readouterr().err


def test_options_are_bounded_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = ",".join(f"0.{n:04}" for n in range(4000))
    for option, value, words in (
        ("--r1", many, "4000 values are too many"),
        ("--r1", "1.5", "'1.5' is not a number from 0 to 1"),
        ("--r1", "0.5,nan", "'nan' is not a number"),
        ("--r2", "inf", "'inf' is not a number"),
        ("--r2", "0.5,,0.6", "'' is not a number"),
        ("--k1", "", "'' is not a whole number"),
        ("--k1", "two", "'two' is not a whole number"),
        ("--k2", "1e3", "'1e3' is not a whole number"),
        ("--k2", "1" * 300, "is not a whole number"),
        ("--min-accuracy", "2", "'2' is not a number from 0.001 to 1"),
        ("--min-accuracy", "nan", "'nan' is not a number"),
        ("--limit", 0, "'0' is not a whole number"),
        ("--workers", 100_000, "'100000' is not a whole number from 1 to "),
        ("--backend", "onnx", "'onnx' is none of onnxruntime, "),
        ("--threads", 100_000, "'100000' is not a whole number from 1 to "),
        ("--iterations", 10**9, "is not a whole number from 1 to 1000"),
        ("--seed", -1, "'-1' is not a whole number"),
    ):
        assert call(main, SHAPES_64, "--dataset", "none", "--out", tmp_path / "a", f"{option}={value}") == 2
        err = capsys.readouterr().err
        assert words in err and len(err.splitlines()) == 1 and f"argument {option}" in err, option
    fractions = ",".join(f"{n / 64}" for n in range(64))
    flags = ("--dataset", QUESTIONS_64, "--out", tmp_path / "a", "--r1", fractions, "--r2", fractions)
    assert call(main, SHAPES_64, *flags) == 2
    assert "plans are too many to try: at most 1000" in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_where_the_results_go_is_checked_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(model: str) -> Path:
        raise AssertionError("the model was fetched first")

    monkeypatch.setattr("himap_export.validate.checkpoint.checkpoint_folder", fetch)
    for name in ("plans.toml", "report.html", "report.json"):
        out = tmp_path / f"beside-{name}"
        (out / name).mkdir(parents=True)
        (out / "sweep.jsonl").touch()
        assert call(main, SHAPES_64, "--dataset", QUESTIONS_64, "--out", out) == 2
        assert f"{name} is there and is not a plain file" in capsys.readouterr().err
    assert call(main, SHAPES_64, "--dataset", tmp_path / "none", "--out", tmp_path / "a") == 2
    assert "cannot read data set" in capsys.readouterr().err
