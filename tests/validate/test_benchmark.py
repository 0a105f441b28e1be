"""The interleaved benchmark: everyone on the device and in the dtype asked for, and what becomes of who cannot run."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Workshop

from himap_export.engines.bundle import Bundle, RunSpec
from himap_export.engines.pipeline import Pipeline
from himap_export.engines.scratch import scratch_place
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.spec import Dtype
from himap_export.validate.parity.page import _speed as blocks_of
from himap_export.validate.reference import reference
from himap_export.validate.reference.criteria import reference_himap
from himap_export.validate.speed import benchmark as timing
from himap_export.validate.speed import measure as speed
from himap_export.validate.speed.benchmark import FIRST_TOKEN, OPENED, PHASES, System, Times, _doing, benchmark
from himap_export.validate.speed.measure import Speed, measure, torch_device, uncut_variant
from himap_export.validate.speed.results import speed_json, speed_lines

CUTS = reference_himap(2, 4, 0.5, 0.5)


def bundle_of(work: Workshop, dtype: str = "fp32") -> RunSpec:
    return Bundle.open(work.bundle("gqa2", "--dtype", dtype, cuts=CUTS), verify=False).select()


def test_the_bundle_is_opened_on_the_device_asked_for(work: Workshop) -> None:
    """This machine's onnxruntime has no CUDA: who asks for it must be told, not timed on the CPU."""
    system = System("pruned", "bundle", bundle_of(work), work.checkpoint("gqa2"), "onnxruntime", "cuda")
    with pytest.raises(HimapError, match="no CUDA provider") as refused:
        benchmark([system], iterations=1, warm_up=0, threads=1, phases=("prefill",))
    assert refused.value.code == Exit.MISSING


@pytest.mark.parametrize(
    ("dtype", "asked", "wanted"),
    [("fp16", None, torch.float16), ("fp32", None, torch.float32), ("fp16", "fp32", torch.float32)],
)
def test_pytorch_computes_in_its_own_dtype_or_the_bundles_on_its_device(
    work: Workshop, monkeypatch: pytest.MonkeyPatch, dtype: str, asked: Dtype | None, wanted: torch.dtype
) -> None:
    loaded: list[reference.Reference] = []

    class Seen(reference.Reference):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            loaded.append(self)

    monkeypatch.setattr(reference, "Reference", Seen)
    system = System("PyTorch", "torch", bundle_of(work, dtype), work.checkpoint("gqa2"), "", "cpu", asked)
    do = _doing(system, 1)
    assert all(do(phase) > 0 for phase in PHASES) and do(OPENED) > 0
    (model,) = loaded
    assert {p.dtype for p in model.adapter.whole.parameters()} == {wanted} and model.device == "cpu"


def test_a_bug_in_a_system_is_told_as_what_it_is(work: Workshop, capfd: pytest.CaptureFixture[str]) -> None:
    system = System("pruned", "bundle", bundle_of(work), work.checkpoint("gqa2"), "onnxruntime", "cpu")
    with pytest.raises(HimapError, match=r"timing pruned failed: KeyError: 'dance'") as told:
        benchmark([system], iterations=1, warm_up=0, threads=1, phases=("dance",))
    assert "memory" not in str(told.value) and "Traceback" in capfd.readouterr().err


def test_each_opens_alone_before_any_is_timed(work: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Stub:
        def __init__(self, what: str) -> None:
            self.what = what
            told.append(f"{what} starts")

        def ask(self, asked: str) -> float:
            told.append(f"{self.what} {asked}")
            return float(len(told))

    monkeypatch.setattr(timing, "child", lambda what, *arguments: nullcontext(Stub(what)))
    systems = [System(name, "bundle", bundle_of(work), work.checkpoint("gqa2"), "onnxruntime") for name in ("a", "b")]
    found = benchmark(systems, iterations=1, warm_up=0, threads=1, phases=("prefill",))
    assert told[:4] == ["timing a starts", "timing a opened", "timing b starts", "timing b opened"]
    assert [t.open_seconds for t in found] == [2, 4] and "opened" not in "".join(told[4:])


def test_pytorch_follows_the_engines_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [torch_device(d) for d in ("cpu", "cuda", "NVIDIA H200")] == ["cpu", "cuda", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [torch_device(d) for d in ("cpu", "cuda", "NVIDIA H200")] == ["cpu", "cpu", "cpu"]
    assert [torch_device(d) for d in ("gpu", "npu")] == ["cpu", "cpu"]
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert [torch_device(d) for d in ("gpu", "npu")] == ["xpu", "cpu"]


def not_timed(monkeypatch: pytest.MonkeyPatch) -> list[System]:
    """Which systems would be timed, when they are."""
    timed: list[System] = []

    def no_benchmark(systems: Sequence[System], **repetitions: int) -> list[Times]:
        timed.extend(systems)
        return [Times(c.name, dict.fromkeys(PHASES, (1.0, 2.0)), 2**20, 0.25) for c in systems]

    monkeypatch.setattr(speed, "benchmark", no_benchmark)
    return timed


def all_timed(
    work: Workshop, monkeypatch: pytest.MonkeyPatch, dtype: str, device: str, asked: str | None
) -> tuple[list[System], Speed, Path]:
    """Which systems are timed, what is found of them, and where the baseline was."""
    timed = not_timed(monkeypatch)
    place: list[Path] = []
    monkeypatch.setattr(
        speed, "export_baseline", lambda *a, **named: place.append(named["out"]) or bundle_of(work, dtype).bundle
    )
    found = measure(
        bundle_of(work, dtype), work.checkpoint("gqa2"), "onnxruntime", device, asked=asked,
        iterations=1, warm_up=0, threads=1,
    )  # fmt: skip
    return timed, found, place[0]


@pytest.mark.parametrize(
    ("device", "cuda", "asked", "name", "note"),
    [
        ("cpu", False, "cpu", "PyTorch SDPA fp16, cpu", ""),
        ("cpu", False, None, "PyTorch SDPA fp16, cpu", ""),
        ("cuda", True, "cuda", "PyTorch SDPA fp16, cuda", ""),
        ("NVIDIA H200", True, None, "PyTorch SDPA fp16, cuda", ""),
        ("cuda", False, "cuda", "PyTorch SDPA fp16, cpu", "PyTorch has no CUDA here: it ran on the CPU"),
        ("npu", False, "npu", "PyTorch SDPA fp16, cpu", "PyTorch has no support of it here: it ran on the CPU"),
    ],
)
def test_who_is_timed_where_and_what_is_said_of_it(
    work: Workshop, monkeypatch: pytest.MonkeyPatch, device: str, cuda: bool, asked: str | None, name: str, note: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    timed, found, place = all_timed(work, monkeypatch, "fp16", device, asked)
    whole = name.replace("fp16", "fp32")
    assert [c.device for c in timed] == [asked, asked, name.split()[-1], name.split()[-1]]
    assert [c.dtype for c in timed] == [None, None, "fp16", "fp32"]
    assert found.others == ("unpruned", name, whole)
    assert found.note.startswith(note) and bool(found.note) == bool(note)
    assert scratch_place() in place.parents  # where a killed command's leftovers are cleared away
    assert list(speed_json(found)["systems"]) == ["pruned", "unpruned", name, whole]
    assert {times["open_s"] for times in speed_json(found)["systems"].values()} == {0.25}
    assert set(speed_json(found)["over"]) == {"unpruned", name, whole}
    text = "\n".join(speed_lines(found))
    assert note in text and note in repr(blocks_of(found)) and text.count(" 0.25 s") == 4
    for each in (name, whole):
        assert f"{each} " in text and f"over {each}: " in text and f"over {each}" in repr(blocks_of(found))


def test_pytorch_is_timed_once_beside_a_bundle_in_fp32(work: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    timed, found, _ = all_timed(work, monkeypatch, "fp32", "cpu", None)
    assert [c.dtype for c in timed] == [None, None, "fp32"] and found.others == ("unpruned", "PyTorch SDPA fp32, cpu")


def test_what_would_not_fit_into_memory_is_left_out_and_said(work: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "memory_bytes", lambda: 1000)
    _, found, _ = all_timed(work, monkeypatch, "fp16", "cpu", None)
    assert found.others == ("unpruned", "PyTorch SDPA fp16, cpu") and found.note.startswith(
        "PyTorch in fp32 was left out"
    )
    _, found, _ = all_timed(work, monkeypatch, "fp16", "npu", None)
    assert "on npu; PyTorch in fp32 was left out" in found.note


def test_memory_is_reckoned_with_quantised_weights_as_they_are_stored(
    work: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both bundles hold them so; PyTorch, in two dtypes, multiplied out."""
    run = Bundle.open(work.bundle("gqa2", "--quantize", "int8", "--dtype", "fp16", cuts=CUTS), verify=False).select()
    stored = sum(t.nbytes for t in run.bundle.weights().values())
    plain = bundle_of(work, "fp16").bundle.weights()
    numbers = sum(t.nbytes // 2 for t in plain.values())
    needed = 2 * stored + numbers * (2 + 4)
    for memory, left_out in ((needed - 1, True), (needed, False)):
        monkeypatch.setattr(speed, "memory_bytes", lambda memory=memory: memory)
        assert bool(speed._dtypes_of_pytorch(run, "cpu")[1]) == left_out


def test_decode_takes_as_many_steps_however_short_an_answer_may_be(
    work: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate over fewer than eight steps says nothing."""
    found = Bundle.open(work.bundle("gqa2", "--max-new-tokens", 3, cuts=CUTS), verify=False).select()
    steps: list[int] = []
    monkeypatch.setattr(Pipeline, "step", lambda self, tokens, positions: steps.append(int(positions[0])))
    system = System("pruned", "bundle", found, work.checkpoint("gqa2"), "onnxruntime", "cpu")
    assert _doing(system, 1)("decode") > 0
    assert len(steps) == 16 and len(set(steps)) == 3


def test_the_first_token_waits_for_vision_and_prefill() -> None:
    pruned = Times("pruned", {"vision": (1.0, 1.0, 2.0), "prefill": (1.0, 2.0, 2.0), "decode": (1.0,) * 3}, 1, 1.0)
    unpruned = Times("unpruned", {"vision": (1.0, 1.0, 1.0), "prefill": (3.0, 5.0, 3.0), "decode": (1.0,) * 3}, 1, 1.0)
    speed = Speed(1.5, (pruned, unpruned))
    assert pruned.of(FIRST_TOKEN) == (2.0, 3.0, 4.0) and speed.over("unpruned", FIRST_TOKEN) == (2.0, 1.0, 2.0)
    assert speed.first_token_ceiling == pytest.approx((1 + 3) / (1 + 3 / 1.5))
    found = speed_json(speed)
    assert found["repetitions"] == 3 and found["first_token_ceiling"] == speed.first_token_ceiling
    assert found["systems"]["pruned"]["first_token"] == 3.0
    assert found["systems"]["pruned"]["range"]["first_token"] == (2.0, 4.0)
    assert found["over"]["unpruned"]["first_token"] == (2.0, 1.0, 2.0)
    assert (
        "over unpruned: first token no difference measurable here (1.00 to 2.00), prefill 2.50x (1.50 to 3.00)"
        in "\n".join(speed_lines(speed))
    )


def test_a_bundle_that_holds_a_plan_without_cuts_is_its_own_baseline(
    work: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Bundle.open(work.bundle("gqa2", "--policy", "himap", "--policy", "none", cuts=CUTS), verify=False)
    run = made.select("himap")
    baseline = uncut_variant(run)
    assert baseline is not None and baseline.plan_name == "none" and baseline.bundle is made
    assert (baseline.image, baseline.budget.text) == (run.image, run.budget.text)
    assert uncut_variant(bundle_of(work)) is None
    timed = not_timed(monkeypatch)
    monkeypatch.setattr(speed, "export_baseline", None)  # not called
    measure(run, work.checkpoint("gqa2"), "onnxruntime", "cpu", iterations=1, warm_up=0, threads=1)
    assert [c.run.plan_name for c in timed][:2] == ["custom", "none"]


def test_names_of_any_length_stand_in_columns() -> None:
    times = tuple(Times(n, dict.fromkeys(PHASES, (1.0,)), 2**20, 1.0) for n in ("pruned", "unpruned", "PyTorch " * 5))
    lines = speed_lines(Speed(2.0, times))
    assert len({line.rindex("MiB") for line in lines[1:4]}) == 1
