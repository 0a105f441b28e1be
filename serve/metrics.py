"""What a server does, as Prometheus scrapes it: vLLM's names behind `himap_`, with the same meanings, and the pruning.

As vLLM's (its IterationStats): the time to the first token and the whole latency count from when a request arrived; the
inter-token latency is between two tokens of one answer, its first not among them; queue, prefill and decode times are
of answers that came to their end. Tokens are counted as they come, an answer's that was given up included.
"""

from collections.abc import Mapping
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from himap_export.serve.kept import image_tokens_kept
from himap_export.serve.messages import Began, Ended, Event, Piece, Question
from himap_export.serve.service import Service

FEATURES = ("hit", "miss")
FINISHED, FAILED, REJECTED = ("stop", "length"), ("cancelled", "timeout", "error"), ("queue_full", "draining")
# Seconds, from a small model's token on a CPU to the end of a long queue; neighbours are at most a factor of two apart,
# which is how far a quantile may be off.
BUCKETS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0),
)
GAUGES = {
    "num_requests_running": "Requests that have a slot now.",
    "num_requests_waiting": "Requests that wait for a slot now.",
    "num_slots": "Requests that can be answered at a time.",
}
COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "prompt_tokens": ("Prompt tokens prefilled, image tokens among them.", ()),
    "generation_tokens": ("Tokens generated.", ()),
    "request_success": ("Requests answered to the end.", ("finished_reason",)),
    "request_failure": ("Requests taken in and not answered to the end.", ("reason",)),
    "rejected": ("Requests not taken in.", ("reason",)),
    "image_tokens": ("Image tokens of prefilled pictures, counted once for each stage.", ("stage",)),
    "image_tokens_kept": ("Image tokens of prefilled pictures that each stage still has.", ("stage",)),
    "image_features": (
        "Prefilled pictures: of a hit the features were known, at a miss the tower looked.",
        ("result",),
    ),
}
HISTOGRAMS = {
    "time_to_first_token": "From a request's arrival to its first token.",
    "inter_token_latency": "From one token of an answer to the next.",
    "e2e_request_latency": "From a request's arrival to the end of its answer.",
    "request_queue_time": "From when a request was taken in, its picture prepared, to its prefill.",
    "request_prefill_time": "From the start of a request's prefill to its first token.",
    "request_decode_time": "From the first token of an answer to its last.",
}


class Metrics:
    """A service's numbers, in a registry of their own; every series carries `model_name`, those of the whole server
    (gauges, rejections, build) the server's."""

    def __init__(self, service: Service) -> None:
        self._service, self._registry = service, CollectorRegistry()
        self._began, self._last = dict[str, Began](), dict[str, float]()  # of questions under way, by their id
        model = ("model_name",)
        self._gauges = {
            name: Gauge(f"himap_{name}", text, model, registry=self._registry).labels(service.name)
            for name, text in GAUGES.items()
        }
        self._counters = {
            name: Counter(f"himap_{name}", text, model + labels, registry=self._registry)
            for name, (text, labels) in COUNTERS.items()
        }
        self._seconds = {
            name: Histogram(f"himap_{name}_seconds", text, model, registry=self._registry, buckets=BUCKETS)
            for name, text in HISTOGRAMS.items()
        }
        build = Info("himap_build", "What runs here.", model, registry=self._registry).labels(service.name)
        build.info({"version": version("himap-export"), "bundle_sha256": service.bundle.manifest.digest})
        self._begin_at_zero()

    def watch(self, question: Question, event: Event) -> None:
        """Counts an event; the service calls it, on the engines' thread."""
        match event:
            case Began():
                self._prefilled(question, event)
            case Piece():
                self._token(question, event.at)
            case Ended():
                self._ended(question, event)

    def rejected(self, reason: str) -> None:
        """Counts a request that was not taken in: one of REJECTED, or another fixed word. Any thread may call it."""
        self._counters["rejected"].labels(self._service.name, reason).inc()

    def render(self) -> tuple[bytes, str]:
        """Returns all of it as text, and the text's media type. Any thread may call it."""
        load = self._service.load
        for name, value in zip(GAUGES, (load.running, load.waiting, load.slots), strict=True):
            self._gauges[name].set(value)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _begin_at_zero(self) -> None:
        """Makes the series that will surely be: one that appears with its first event hides that event from rates."""
        for reason in REJECTED:
            self._counters["rejected"].labels(self._service.name, reason)
        for model in self._service.models:
            for name, labels in (
                ("request_success", FINISHED), ("request_failure", FAILED), ("image_features", FEATURES),
            ):  # fmt: skip
                for label in labels:
                    self._counters[name].labels(model, label)
            for metric in (self._counters["prompt_tokens"], self._counters["generation_tokens"]):
                metric.labels(model)
            for histogram in self._seconds.values():
                histogram.labels(model)

    def _prefilled(self, question: Question, event: Began) -> None:
        self._began[question.id] = event
        self._counters["prompt_tokens"].labels(question.model).inc(question.prompt_tokens)
        for result, count in zip(FEATURES, (event.known, event.looked), strict=True):
            self._counters["image_features"].labels(question.model, result).inc(count)
        kept = image_tokens_kept(question.request)
        for stage, count in kept.items():
            self._counters["image_tokens"].labels(question.model, stage).inc(kept["prefix"])
            self._counters["image_tokens_kept"].labels(question.model, stage).inc(count)

    def _token(self, question: Question, at: float) -> None:
        last = self._last.get(question.id)
        self._last[question.id] = at
        self._counters["generation_tokens"].labels(question.model).inc()
        if last is None:
            self._observe(question, "time_to_first_token", at - question.asked)
        else:
            self._observe(question, "inter_token_latency", at - last)

    def _ended(self, question: Question, event: Ended) -> None:
        began, _ = self._began.pop(question.id, None), self._last.pop(question.id, None)
        if event.reason not in FINISHED:
            self._counters["request_failure"].labels(question.model, event.reason).inc()
            return
        self._counters["request_success"].labels(question.model, event.reason).inc()
        self._observe(question, "e2e_request_latency", event.at - question.asked)
        self._observe(question, "request_decode_time", event.decode_s)
        if began is not None:  # always, behind an answer
            self._observe(question, "request_queue_time", began.queue_s)
            self._observe(question, "request_prefill_time", began.prefill_s)

    def _observe(self, question: Question, name: str, seconds: float) -> None:
        self._seconds[name].labels(question.model).observe(seconds)
