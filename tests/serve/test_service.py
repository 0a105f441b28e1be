"""The service: who is admitted, who goes on, who leaves, and that each answer is the one that is given alone."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from commands import QUESTIONS_64
from PIL import Image

from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle, RunSpec
from himap_export.engines.image import load_image
from himap_export.engines.prefill import check_memory
from himap_export.engines.sampling import Sampling
from himap_export.engines.session import Session
from himap_export.engines.slots import Slots, graphs_of
from himap_export.graphs.errors import Exit, HimapError
from himap_export.serve.kept import describe_kept, image_tokens_kept
from himap_export.serve.messages import Began, Ended, Event, Piece, Question
from himap_export.serve.service import Draining, QueueFull, Service, Settings

ASKED = [json.loads(line) for line in QUESTIONS_64.read_text().splitlines()]
LONG = 1e9
WILD = Sampling(100.0)  # any token is as likely as any other: answers are as long as they may


class Heard(list[Event]):
    """The events of one question; `ended` waits for the last."""

    def __init__(self) -> None:
        self._done = threading.Event()
        super().__init__()

    def __call__(self, event: Event) -> None:
        self.append(event)
        if isinstance(event, Ended):
            self._done.set()

    @property
    def ended(self) -> Ended:
        assert self._done.wait(60)
        last = self[-1]
        assert isinstance(last, Ended) and sum(isinstance(e, Ended) for e in self) == 1
        return last

    @property
    def text(self) -> str:
        return "".join(event.text for event in self if isinstance(event, Piece))


@pytest.fixture(scope="module")
def bundle(shapes: Bundle) -> Bundle:
    return shapes


def opened(bundle: Bundle, **settings: Any) -> Service:
    service = Service(bundle, "shapes", opening=Opening(threads=1), settings=Settings(**settings))
    service.open()
    return service


@pytest.fixture(scope="module")
def service(bundle: Bundle) -> Iterator[Service]:
    service = opened(bundle, prefills=2)
    yield service
    service.close()


def image(n: int = 0) -> Image.Image:
    return load_image(QUESTIONS_64.parent / ASKED[n % len(ASKED)]["image"])


def question(service: Service, n: int = 0, model: str = "shapes", new: int = 12, **more: Any) -> Question:
    request = service.prepare(model, [image(n)], ASKED[n % len(ASKED)]["question"])
    return Question(f"q{n}", model, request, new, asked=time.monotonic(), **more)


def test_models_are_the_bundles_plans(service: Service) -> None:
    assert service.models == {
        "shapes": "qa", "shapes:qa": "qa", "shapes:himap": "qa", "shapes:none": "none", "shapes:random": "random",
    }  # fmt: skip
    assert service.ready and service.load.slots == 3 * 3 * 2 and service.max_new_tokens == 12


def test_a_crowd_is_answered_as_each_alone(service: Service, bundle: Bundle) -> None:
    """Plans, budgets, lengths, temperatures and seeds mixed: the text, the tokens kept, the reason."""
    rng, models = np.random.default_rng(0), list(service.models)
    asked, heard = list[Question](), list[Heard]()
    for n in range(30):
        sampling = Sampling(float(rng.choice([0, 2.0])), seed=int(rng.integers(1000)))
        model, new = str(rng.choice(models)), int(rng.integers(1, 12))
        asked.append(question(service, n, model, new, sampling=sampling))
        heard.append(Heard())
        service.submit(asked[-1], heard[-1])
    alone = {plan: Session(bundle, plan=plan, opening=Opening(threads=1)) for plan in set(service.models.values())}
    for q, h in zip(asked, heard, strict=True):
        told, how = h.ended, q.sampling
        answer = (
            alone[service.models[q.model]]
            .start(q.request, max_new_tokens=q.max_new_tokens, temperature=how.temperature, seed=how.seed)
            .answer
        )
        assert h.text == answer.text and told.tokens == len(answer.tokens[0]), q
        assert told.reason == ("stop" if answer.tokens[0, -1] in bundle.manifest.model.eos_tokens else "length")
        began = h[0]
        assert isinstance(began, Began)
        for cut, positions in began.kept.items():
            np.testing.assert_array_equal(positions, answer.outputs[cut][0])
    assert service.load.running == service.load.waiting == 0


def test_what_was_kept_is_told_in_patches(service: Service) -> None:
    heard, asked = Heard(), question(service)
    service.submit(asked, heard)
    assert heard.ended.problem is None
    began = heard[0]
    assert isinstance(began, Began)
    kept = describe_kept(asked.request, began.kept)
    (only,) = kept.pictures
    assert (only.rows, only.columns, kept.stages) == (8, 8, ("prefix", "k1", "k2"))
    assert image_tokens_kept(asked.request) == dict(zip(kept.stages, kept.image_tokens, strict=True))
    assert [len(only.kept[stage]) for stage in ("k1", "k2")] == list(kept.image_tokens[1:])
    assert set(only.kept["k2"]) < set(only.kept["k1"]) < set(range(64)) and only.box == (0, 0, 1, 1)


def test_the_smallest_budget_that_fits_answers(service: Service) -> None:
    short, long = (service.prepare("shapes", [image()], words) for words in ("circle", "circle " * 12))
    assert (short.spec.budget.text, long.spec.budget.text) == (16, 24)
    with pytest.raises(HimapError, match="text tokens: the budget is 24") as refused:
        service.prepare("shapes", [image()], "circle " * 40)
    assert refused.value.code == Exit.USAGE
    with pytest.raises(KeyError):
        service.prepare("llama", [image()], "circle")


def test_a_full_queue_refuses_and_says_when_to_come_again(bundle: Bundle) -> None:
    """One row a variant, two may wait: of a burst, more are refused than taken, and those taken are answered."""
    service, heard, refused = opened(bundle, max_batch=1, max_queue=2), list[Heard](), list[QueueFull]()
    asked = [question(service, n) for n in range(40)]
    for each in asked:
        heard.append(Heard())
        try:
            service.submit(each, heard[-1])
        except QueueFull as problem:
            heard.pop()
            refused.append(problem)
            assert service.load.waiting <= 2
    assert refused and all(problem.retry_after_s >= 1 for problem in refused)
    assert {h.ended.reason for h in heard} <= {"stop", "length"} and len(heard) + len(refused) == 40
    service.close()


class Held:
    """Keeps the engines before each decode step until they are let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self._go = threading.Semaphore(0), threading.Semaphore(0)
        step = Slots.step

        def held(slots: Slots, tokens: dict[int, int]) -> Any:
            self.rows = dict(tokens)
            self.steps.release()
            assert self._go.acquire(timeout=60)
            return step(slots, tokens)

        monkeypatch.setattr(Slots, "step", held)

    def arrived(self) -> dict[int, int]:
        """Waits for the next step; the rows that it takes."""
        assert self.steps.acquire(timeout=60)
        return self.rows

    def go(self, steps: int = 1) -> None:
        self._go.release(steps)


def test_a_cancelled_question_frees_its_row_at_the_next_step(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three have the rows, a fourth waits; when one is cancelled in the middle of a step, the fourth is next."""
    service = opened(bundle, prefills=4)
    held, heard = Held(monkeypatch), [Heard() for _ in range(4)]
    with service._changed:  # all four before the thread looks
        cancels = [service.submit(question(service, 0, "shapes:none", sampling=WILD), heard[n]) for n in range(4)]
    assert len(held.arrived()) == 3 and service.load.waiting == 1
    cancels[1]()
    held.go()
    assert len(held.arrived()) == 3 and service.load.waiting == 0
    assert (heard[1].ended.reason, len(heard[3]) > 0) == ("cancelled", True)
    assert heard[1].ended.tokens == 2  # one of prefill, one of the step that was under way
    held.go(1000)
    assert {heard[n].ended.reason for n in (0, 2, 3)} <= {"stop", "length"}
    service.close()


def test_a_question_that_is_late_is_given_up_waiting_or_not(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    service, now = opened(bundle, max_batch=1), time.monotonic()
    held, running, waiting = Held(monkeypatch), Heard(), Heard()
    with service._changed:
        service.submit(question(service, 0, deadline=now + LONG), running)
        service.submit(question(service, 0, deadline=now - 1), waiting)
    held.arrived()
    assert waiting.ended == Ended("timeout", 0, waiting.ended.at)
    held.go(1000)
    assert running.ended.reason in ("stop", "length")
    service.submit(question(service, 0, sampling=WILD, deadline=time.monotonic() + 0.2), late := Heard())
    held.steps, held._go = threading.Semaphore(0), threading.Semaphore(0)
    held.arrived()
    time.sleep(0.3)
    held.go(1000)
    assert late.ended.reason == "timeout" and late.ended.tokens == 2  # it had a row, and left it after that step
    service.close()


def test_the_oldest_is_first_and_no_variant_holds_up_another(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a variant. Two of himap, then one of none: the second of himap waits, the one of none does not."""
    service = opened(bundle, max_batch=1, prefills=1)
    held, heard = Held(monkeypatch), {name: Heard() for name in ("first", "second", "other")}
    with service._changed:
        for name, model in zip(heard, ("shapes", "shapes", "shapes:none"), strict=True):
            service.submit(question(service, 0, model, sampling=WILD), heard[name])
    held.arrived()
    assert [len(h) > 0 for h in heard.values()] == [True, False, False]  # one prefill, then a step
    held.go()
    held.arrived()
    assert [len(h) > 0 for h in heard.values()] == [True, False, True]
    held.go(1000)
    assert all(h.ended.problem is None for h in heard.values())
    assert heard["second"][0].at >= heard["first"].ended.at
    service.close()


def test_draining_answers_what_was_taken_and_takes_no_more(bundle: Bundle) -> None:
    service, heard = opened(bundle), [Heard() for _ in range(8)]
    for n, h in enumerate(heard):
        service.submit(question(service, n), h)
    service.drain()
    assert all(h.ended.reason in ("stop", "length") for h in heard) and not service.ready
    with pytest.raises(Draining):
        service.submit(question(service), Heard())
    service.close()


def test_closing_cancels_what_runs_and_what_waits(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    service, heard = opened(bundle, max_batch=1), [Heard() for _ in range(5)]
    held = Held(monkeypatch)
    for n, h in enumerate(heard):
        service.submit(question(service, n), h)
    held.arrived()
    threading.Timer(0.05, held.go, (1000,)).start()
    service.close()
    assert {h.ended.reason for h in heard[1:]} == {"cancelled"} and not service.ready


def test_an_engine_that_fails_ends_its_questions_and_the_next_is_answered(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, step = opened(bundle), Slots.step
    failing = Heard()
    monkeypatch.setattr(Slots, "step", lambda *_: (_ for _ in ()).throw(HimapError("out of memory")))
    service.submit(question(service), failing)
    assert (failing.ended.reason, str(failing.ended.problem)) == ("error", "out of memory")
    monkeypatch.setattr(Slots, "step", step)
    service.submit(question(service), heard := Heard())
    assert heard.ended.reason == "stop" and service.ready and service.load.running == 0
    service.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_ends_everything_and_is_told(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    service, heard = opened(bundle), [Heard(), Heard()]
    monkeypatch.setattr(Slots, "step", lambda *_: 1 / 0)
    with service._changed:
        for h in heard:
            service.submit(question(service), h)
    assert {str(h.ended.problem) for h in heard} == {"the engines failed (the server's log says why)"}
    assert not service.ready
    with pytest.raises(Draining):
        service.submit(question(service), Heard())
    service.close()


def test_a_bundle_that_cannot_answer_does_not_open(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slots, "prefill", lambda *_: (_ for _ in ()).throw(HimapError("no engine")))
    service = Service(bundle, "shapes", opening=Opening(threads=1))
    with pytest.raises(HimapError, match="no engine"):
        service.open()
    assert not service.ready
    with pytest.raises(HimapError, match="holds no plan llama"):
        Service(bundle, "shapes", plans=["llama"])


def test_variants_that_do_not_fit_the_machine_together_are_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each alone does: half as much memory would be too little for the largest, and there are more than two."""
    service = Service(bundle, "shapes", opening=Opening(threads=1))
    largest, memory = max(service.variants, key=lambda spec: sum(spec.budget.capacity)), 1 << 12
    monkeypatch.setattr("himap_export.engines.prefill.memory_bytes", lambda: memory)
    while refused(largest):
        memory *= 2
    assert len(service.variants) > 2
    with pytest.raises(HimapError, match="the bundle is too large for this machine"):
        service.open()


def refused(spec: RunSpec) -> bool:
    try:
        check_memory("cpu", graphs_of(spec))
    except HimapError:
        return True
    return False


def test_one_thread_owns_the_engines(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, prefill, step = set[str](), Slots.prefill, Slots.step

    def watched(act: Any) -> Any:
        def run(*arguments: Any) -> Any:
            seen.add(threading.current_thread().name)
            return act(*arguments)

        return run

    monkeypatch.setattr(Slots, "prefill", watched(prefill))
    monkeypatch.setattr(Slots, "step", watched(step))
    service, heard = opened(bundle), [Heard() for _ in range(6)]
    asking = [threading.Thread(target=service.submit, args=(question(service, n), heard[n])) for n in range(6)]
    for thread in asking:
        thread.start()
    assert all(h.ended.problem is None for h in heard) and seen == {"engines"}
    service.close()
