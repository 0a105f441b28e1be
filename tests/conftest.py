"""Fixtures that every room's tests share."""

import functools
import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import Workshop
from hypothesis import settings
from vision_cache import remembering

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test talks to the hub

torch.set_num_threads(1)  # pytest-xdist's workers share the cores; more threads on models this small only wait
logging.getLogger("torch.__trace").propagate = False  # thousands of lines of the exporter's own under every failure

# The machine's speed is no property of the code; a failure must come back on the next run.
settings.register_profile("himap", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("himap")


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Checkpoints and bundles, each made once in a run, whichever of pytest-xdist's workers asks first."""
    own = tmp_path_factory.getbasetemp()
    shared: Path = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder = shared / "workshop"
    folder.mkdir(exist_ok=True)
    return Workshop(folder)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands called in this process take all cores unless told otherwise, and leave PyTorch with as many threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _imports_stay() -> Iterator[None]:
    """No collection looks at what has been imported, until the end: extension modules complain of what is left then."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _vision_graphs(work: Workshop) -> Iterator[None]:
    """Commands called in this process make each vision graph once, and list what PyTorch's exporter knows once."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from himap_export.exporter import vision

    with pytest.MonkeyPatch.context() as patch:
        known = functools.cache(ONNXRegistry.from_torchlib)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(known))
        patch.setattr(vision, "vision_graph", remembering(vision.vision_graph, work.folder))
        yield
