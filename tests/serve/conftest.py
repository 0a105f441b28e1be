"""What tests of the serve room share: the small model with slots, and servers that run in a thread."""

from collections.abc import Iterator

import pytest
from commands import ORT, SHAPES_64, Workshop, call
from served import KEY, Served, served

from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle
from himap_export.exporter.cli import main as export_main
from himap_export.serve.pictures import PictureLimits
from himap_export.serve.service import Service

POLICIES = ("--policy", "himap", "--policy", "none", "--policy", "random")
FLAGS = (*ORT, "--slots", 3, *POLICIES, "--text-budget", 16, 24, "--max-new-tokens", 12)


@pytest.fixture(scope="session")
def shapes(work: Workshop) -> Bundle:
    """The small model in three plans and two text budgets, with three slots."""
    with work._once("serve-shapes-64") as (folder, missing):
        if missing:
            assert call(export_main, SHAPES_64, *FLAGS, "--out", folder) == 0
    return Bundle.open(folder)


@pytest.fixture(scope="session")
def several(work: Workshop) -> Bundle:
    """The small model for prompts of two and three pictures, pruned and not."""
    with work._once("serve-shapes-64-several") as (folder, missing):
        if missing:
            policies, budgets = POLICIES[:4], ("--text-budget", 32, "--max-new-tokens", 8)
            flags = (*ORT, *policies, *budgets, "--images", 2, 3, "--slots", 2)
            assert call(export_main, SHAPES_64, *flags, "--out", folder) == 0
    return Bundle.open(folder)


@pytest.fixture(scope="session")
def door(shapes: Bundle) -> Iterator[Served]:
    """The small model behind a key, that waits half a second for a body."""
    service = Service(shapes, "shapes", plans=("qa", "none"), opening=Opening(threads=1))
    service.open()
    with served(service, keys=("another", KEY), pictures=PictureLimits(max_bytes=200_000), body_s=0.5) as server:
        yield server
    service.close()
