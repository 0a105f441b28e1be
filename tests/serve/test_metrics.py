"""Metrics as Prometheus reads them: what each event adds, and that the dashboard asks for nothing else."""

import functools
import json
import re
import threading
from importlib.resources import files
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from himap_export.engines.layout import ImageTokens
from himap_export.graphs.errors import HimapError
from himap_export.serve.messages import Began, Ended, Event, Piece, Question, Reason
from himap_export.serve.metrics import BUCKETS, Metrics
from himap_export.serve.service import Load

MODELS = {"shapes": "dart", "shapes:dart": "dart", "shapes:none": "none"}
STAGES = {"dart": {"prefix": 576, "k1": 87}, "none": {"prefix": 576}}
Labels = dict[str, str]


def service(load: Load | None = None) -> Any:
    """What metrics read of one."""
    bundle = SimpleNamespace(manifest=SimpleNamespace(digest="ab" * 32))
    return SimpleNamespace(name="shapes", models=MODELS, bundle=bundle, load=load or Load(0, 0, 8))


def question(name: str = "q", model: str = "shapes", asked: float = 100.0, tokens: int = 600) -> Question:
    stages = STAGES[MODELS[model]]
    spec = SimpleNamespace(
        plan=SimpleNamespace(stages=tuple(stages)), budget=SimpleNamespace(visual=tuple(stages.values())),
        manifest=SimpleNamespace(model=SimpleNamespace(image=ImageTokens(7))),
    )  # fmt: skip
    ids = np.where(np.arange(tokens) < stages["prefix"], 7, 0)[None]
    request = SimpleNamespace(spec=spec, inputs=SimpleNamespace(input_ids=ids))
    return Question(name, model, cast(Any, request), max_new_tokens=8, asked=asked)


def began(at: float = 101.5) -> Began:
    return Began({}, at, queue_s=0.5, prefill_s=1.0, known=1, looked=2)


def answer(tokens: int, reason: Reason = "stop") -> list[Event]:
    """The first token 1.5 s after the question, each other 0.25 s after the one before."""
    pieces = [Piece("", n + 1, 101.5 + 0.25 * n) for n in range(tokens)]
    return [began(), *pieces, Ended(reason, tokens, 101.5 + 0.25 * tokens, decode_s=0.25 * (tokens - 1))]


def scraped(metrics: Metrics, name: str = "himap_") -> dict[str, list[tuple[Labels, float]]]:
    """The samples by their names, which begin with `name`; all are told once."""
    content, kind = metrics.render()
    assert kind.startswith("text/plain; version=") and kind.endswith("charset=utf-8")
    lines = [line for line in content.decode().splitlines() if line.startswith(name)]
    found: dict[str, list[tuple[Labels, float]]] = {}
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    for named, samples in found.items():
        assert len({tuple(sorted(labels.items())) for labels, _ in samples}) == len(samples), named
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """Of the one sample that has these labels."""
    samples = scraped(metrics, f"himap_{name}{{")[f"himap_{name}"]
    (found,) = [sample for its, sample in samples if labels.items() <= its.items()]
    return found


def watch(metrics: Metrics, asked: Question, *events: Event) -> None:
    for event in events:
        metrics.watch(asked, event)


def test_an_answer() -> None:
    metrics = Metrics(service())
    watch(metrics, question(), *answer(4))
    assert value(metrics, "prompt_tokens_total", model_name="shapes") == 600
    assert value(metrics, "generation_tokens_total", model_name="shapes") == 4
    assert value(metrics, "request_success_total", model_name="shapes", finished_reason="stop") == 1
    expected = {  # how often, and seconds in all
        "time_to_first_token": (1, 1.5),
        "inter_token_latency": (3, 0.75),  # not the first
        "e2e_request_latency": (1, 2.5),
        "request_queue_time": (1, 0.5),
        "request_prefill_time": (1, 1.0),
        "request_decode_time": (1, 0.75),
    }
    for name, (count, seconds) in expected.items():
        assert value(metrics, f"{name}_seconds_count", model_name="shapes") == count
        assert value(metrics, f"{name}_seconds_sum", model_name="shapes") == seconds
        assert value(metrics, f"{name}_seconds_bucket", model_name="shapes", le="+Inf") == count
    assert value(metrics, "inter_token_latency_seconds_bucket", model_name="shapes", le="0.2") == 0
    assert value(metrics, "inter_token_latency_seconds_bucket", model_name="shapes", le="0.3") == 3
    assert all(sample == 0 for labels, sample in scraped(metrics)["himap_request_failure_total"])


def test_questions_side_by_side_are_told_apart() -> None:
    metrics = Metrics(service())
    one, other = question("one"), question("other", "shapes:none", asked=101.0)
    for first, second in zip(answer(3, "length"), answer(3), strict=True):
        metrics.watch(one, first)
        metrics.watch(other, second)
    for model, first_token in (("shapes", 1.5), ("shapes:none", 0.5)):
        assert value(metrics, "time_to_first_token_seconds_sum", model_name=model) == first_token
        assert value(metrics, "inter_token_latency_seconds_sum", model_name=model) == 0.5
    assert value(metrics, "request_success_total", model_name="shapes", finished_reason="length") == 1
    assert value(metrics, "request_success_total", model_name="shapes:none", finished_reason="stop") == 1


def test_image_tokens_kept_by_stage() -> None:
    metrics = Metrics(service())
    for name in ("a", "b"):
        watch(metrics, question(name), *answer(1))
    watch(metrics, question("c", "shapes:none"), *answer(1))
    samples = scraped(metrics)
    for name, expected in (
        ("image_tokens", {("shapes", "prefix"): 1152, ("shapes", "k1"): 1152, ("shapes:none", "prefix"): 576}),
        ("image_tokens_kept", {("shapes", "prefix"): 1152, ("shapes", "k1"): 174, ("shapes:none", "prefix"): 576}),
    ):
        found = samples[f"himap_{name}_total"]
        assert {(labels["model_name"], labels["stage"]): sample for labels, sample in found} == expected


def test_pictures_whose_features_were_known() -> None:
    metrics = Metrics(service())
    for result in ("hit", "miss"):
        assert value(metrics, "image_features_total", model_name="shapes:none", result=result) == 0
    for name in ("a", "b"):
        watch(metrics, question(name), *answer(1))
    assert value(metrics, "image_features_total", model_name="shapes", result="hit") == 2
    assert value(metrics, "image_features_total", model_name="shapes", result="miss") == 4


@pytest.mark.parametrize("reason", ["cancelled", "timeout", "error"])
@pytest.mark.parametrize("came", [0, 1, 3])  # events before the end: none while it waited
def test_failures_are_no_latencies(reason: Reason, came: int) -> None:
    metrics = Metrics(service())
    problem = HimapError("logits are not finite") if reason == "error" else None
    watch(metrics, question(), *answer(4)[:came], Ended(reason, max(0, came - 1), 103.0, problem=problem))
    assert value(metrics, "request_failure_total", model_name="shapes", reason=reason) == 1
    assert all(sample == 0 for _, sample in scraped(metrics)["himap_request_success_total"])
    assert value(metrics, "e2e_request_latency_seconds_count", model_name="shapes") == 0
    assert value(metrics, "request_queue_time_seconds_count", model_name="shapes") == 0
    assert value(metrics, "generation_tokens_total", model_name="shapes") == max(0, came - 1)
    assert value(metrics, "time_to_first_token_seconds_count", model_name="shapes") == (came > 1)
    watch(metrics, question(asked=200.0), began(201.0), Piece("", 1, 201.0))  # the same id again: nothing is left over
    assert value(metrics, "inter_token_latency_seconds_count", model_name="shapes") == max(0, came - 2)


def test_gauges_are_read_when_scraped() -> None:
    its = service(Load(running=3, waiting=5, slots=8))
    metrics = Metrics(its)
    for load in (its.load, Load(running=1, waiting=0, slots=8)):
        its.load = load
        assert value(metrics, "num_requests_running", model_name="shapes") == load.running
        assert value(metrics, "num_requests_waiting", model_name="shapes") == load.waiting
        assert value(metrics, "num_slots", model_name="shapes") == 8


def test_rejections_and_build() -> None:
    metrics = Metrics(service())
    metrics.rejected("queue_full")
    metrics.rejected("queue_full")
    assert value(metrics, "rejected_total", model_name="shapes", reason="queue_full") == 2
    assert value(metrics, "rejected_total", model_name="shapes", reason="draining") == 0
    assert value(metrics, "build_info", model_name="shapes", bundle_sha256="ab" * 32) == 1
    (labels, _), *_ = scraped(metrics)["himap_build_info"]
    assert re.match(r"\d+\.\d+", labels["version"])


def test_every_series_that_will_be_is_there_from_the_start() -> None:
    samples = scraped(Metrics(service()))
    assert {labels["model_name"] for labels, _ in samples["himap_request_success_total"]} == set(MODELS)
    assert all("model_name" in labels for found in samples.values() for labels, _ in found)
    bounds = [
        float(labels["le"])
        for labels, _ in samples["himap_time_to_first_token_seconds_bucket"]
        if labels["model_name"] == "shapes"
    ]
    assert bounds == [*BUCKETS, float("inf")] and sorted(set(BUCKETS)) == list(BUCKETS)


def test_two_servers_in_one_process_share_nothing() -> None:
    first, second = Metrics(service()), Metrics(service())
    watch(first, question(), *answer(2))
    assert value(first, "generation_tokens_total", model_name="shapes") == 2
    assert value(second, "generation_tokens_total", model_name="shapes") == 0


def test_scraped_while_the_engines_work() -> None:
    metrics, over = Metrics(service()), threading.Event()

    def scrape() -> None:
        while not over.is_set():
            metrics.render()
            metrics.rejected("draining")

    thread = threading.Thread(target=scrape)
    thread.start()
    for n in range(300):
        watch(metrics, question(str(n)), *answer(4))
    over.set()
    thread.join()
    assert value(metrics, "generation_tokens_total", model_name="shapes") == 1200
    assert value(metrics, "request_success_total", model_name="shapes", finished_reason="stop") == 300


DASHBOARD = json.loads(files("himap_export.serve").joinpath("grafana.json").read_text())
FROM_PROMETHEUS = {"instance", "job"}  # labels that it adds itself


def expressions() -> list[tuple[str, str, str]]:
    """(panel, expression, legend) of each line that the dashboard draws."""
    return [(p["title"], t["expr"], t["legendFormat"]) for p in DASHBOARD["panels"] for t in p["targets"]]


@functools.cache
def told() -> dict[str, set[str]]:
    """By name the labels of every sample that a server has when it has answered by a plan that cuts."""
    metrics = Metrics(service())
    watch(metrics, question(), *answer(2))
    return {name: {label for labels, _ in found for label in labels} for name, found in scraped(metrics).items()}


@pytest.mark.parametrize(("panel", "expression", "legend"), expressions())
def test_the_dashboard_asks_for_what_is_there(panel: str, expression: str, legend: str) -> None:
    known = told()
    used = re.findall(r"(himap_\w+)\{([^}]*)\}", expression)
    assert used and len(used) == len(re.findall("himap_", expression)), panel  # each one has a selector
    for name, selector in used:
        matchers = re.findall(r"(\w+)(?:=~|!~|!=|=)\"", selector)
        assert matchers and {*matchers} <= known[name], (panel, name)
        if name.endswith(("_total", "_bucket", "_sum", "_count")):
            assert re.search(rf"rate\({name}\{{[^}}]*\}}\[\$__rate_interval\]\)", expression), panel
    grouped = {label.strip() for labels in re.findall(r"by \(([^)]*)\)", expression) for label in labels.split(",")}
    labels = set[str].intersection(*(known[name] for name, _ in used)) | FROM_PROMETHEUS
    assert grouped <= labels and set(re.findall(r"\{\{(\w+)\}\}", legend)) <= labels, panel
    assert ("histogram_quantile" in expression) <= ("le" in grouped)
    assert expression.count("(") == expression.count(")")


def test_the_dashboard_can_be_imported() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    known = told()
    for name, variable in variables.items():
        if name != "datasource":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
            assert label in known[metric] and variable["datasource"]["uid"] == "${datasource}"
    text = json.dumps(DASHBOARD["panels"])
    assert set(re.findall(r"\$(?!__)\{?(\w+)", text)) == set(variables) == {"datasource", "server", "model_name"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}" and panel["description"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


def test_the_dashboard_shows_all_but_creation_times() -> None:
    """Every other metric is drawn somewhere, but for how often features were known."""
    drawn = {name for _, text, _ in expressions() for name in re.findall(r"himap_\w+", text)}
    parts = {re.sub("_(bucket|sum|count)$", "", name) for name in told() if not name.endswith("_created")}
    parts.remove("himap_image_features_total")
    assert parts == {re.sub("_(bucket|sum|count)$", "", name) for name in drawn}
