"""Chains of engines as CUDA graphs, over stand-ins: what is captured, launched, waited for and destroyed, in order."""

from pathlib import Path

import cuda.core
import numpy as np
import pytest
from cuda_stand_ins import FakeCuda, like
from nvinfer_stand_ins import Opened, bound, stand_ins

from himap_export.engines.nvinfer.edition import RTX, log_of
from himap_export.graphs.errors import HimapError


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    return stand_ins(tmp_path, monkeypatch)


def test_a_chain_is_enqueued_once_captured_once_and_launched_ever_after(opened: Opened) -> None:
    """Each call reads what was written before it, at the same addresses, and nobody waits before the end."""
    _, cuda, seen = opened
    engines, runs, doors = bound(opened)
    chain = engines.chain(runs)
    cuda.log.clear()
    assert not chain.captured
    each = ["run prefix", "run decode"]
    calls = [each, ["begin", *each, "end", "launch"], ["launch"], ["launch"]]
    ids = np.zeros(doors[1]["input_ids"].spec.shape, np.int64)
    for token, call in enumerate(calls):
        ids[:] = token
        doors[1]["input_ids"].write(ids)
        chain()
        assert cuda.log == ["copy in", *call]
        cuda.log.clear()
    ids[:] = 99  # the caller's array is its own again
    assert chain.captured and not chain.why_not and cuda.graphs == 1 and not seen
    doors[1]["input_ids"].read()
    assert [(name, token) for name, _, token in seen if name == "decode"] == [("decode", token) for token in range(4)]
    assert [name for name, *_ in seen] == ["prefix", "decode"] * 4 and seen[1][1] == seen[-1][1]
    cuda.log.clear()
    del chain
    assert cuda.log == ["wait", "destroy"]


@pytest.mark.parametrize("call", ["begin_building", "end_building", "complete"])
def test_a_chain_that_cuda_cannot_capture_goes_on_one_by_one(opened: Opened, call: str) -> None:
    _, cuda, seen = opened
    engines, runs, _ = bound(opened)
    cuda.failing.add(call)
    chain = engines.chain(runs)
    for _ in range(3):
        chain()
    assert not chain.captured and "unsupported" in chain.why_not and "launch" not in cuda.log
    cuda.wait()
    assert [name for name, *_ in seen] == ["prefix", "decode"] * 3  # what was captured in vain has not run
    assert cuda.log.count("begin") == 1 and not cuda.graphs  # it is tried once
    del chain
    assert "destroy" not in cuda.log


def test_a_chain_that_tensorrt_rtx_cannot_capture_is_not_tried(opened: Opened) -> None:
    _, cuda, _ = opened
    engines, runs, _ = bound(opened)
    cuda.log.clear()
    runs[1].context.capturable = False  # type: ignore[attr-defined]
    other = engines.chain(runs)
    other()
    other()
    assert not other.captured and other.why_not == "TensorRT-RTX cannot be captured in decode"
    assert cuda.log == ["run prefix", "run decode"] * 2


def test_tensorrt_is_not_asked_whether_it_can_be_captured(opened: Opened) -> None:
    engines, runs, _ = bound(opened)
    for each in runs:
        each.context.is_stream_capturable = None  # type: ignore[attr-defined]
    chain = engines.chain(runs)
    chain()
    chain()
    assert chain.captured


def test_a_run_that_fails_is_told_and_ends_the_capture(opened: Opened) -> None:
    _, cuda, _ = opened
    engines, runs, _ = bound(opened)
    chain = engines.chain(runs)
    chain()
    runs[0].context.bound.clear()  # type: ignore[attr-defined]
    cuda.log.clear()
    with pytest.raises(HimapError, match="cannot run prefix"):
        chain()
    assert cuda.log == ["begin", "run prefix", "end", "run prefix"] and not cuda.graphs and cuda.recording is None


def test_a_failure_is_told_in_its_own_words_after_a_capture_in_vain(opened: Opened) -> None:
    _, cuda, _ = opened
    engines, runs, _ = bound(opened)
    cuda.failing.add("end_building")
    chain = engines.chain(runs)
    chain()
    chain()
    log_of(RTX).errors.append("of the capture")
    runs[0].context.bound.clear()  # type: ignore[attr-defined]
    with pytest.raises(HimapError, match="cannot run prefix: it says no more"):
        chain()


def test_an_interrupt_ends_the_capture(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    _, cuda, _ = opened
    engines, runs, _ = bound(opened)
    chain = engines.chain(runs)
    chain()

    def interrupted(stream: int) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs[1].context, "execute_async_v3", interrupted)  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        chain()
    assert cuda.recording is None and not cuda.graphs
    monkeypatch.undo()
    chain()
    assert chain.captured


def test_the_stand_in_takes_only_what_cuda_core_takes() -> None:
    fake = FakeCuda()
    device = fake.Device.get_all_devices()[0]
    stream = device.create_stream(options=fake.StreamOptions(nonblocking=True))
    for wrong in (
        lambda: device.allocate(8),  # without a stream
        lambda: device.allocate(8, stream),
        lambda: stream.sync(0),
        lambda: stream.create_graph_builder().begin_building(kind="relaxed"),
        lambda: fake.Buffer.from_handle(1),
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(AssertionError, match="Stream has no synchronize"):
        like(cuda.core.Stream)(type("Stream", (), {"synchronize": lambda self: None}))
