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

FLAGS = (*ORT, "--slots", 4, "--policy", "himap", "--policy", "none", "--text-budget", 40, "--max-new-tokens", 16)


@pytest.fixture(scope="session")
def shapes(work: Workshop) -> Bundle:
    """The small model in two plans, pruned and not, with four slots."""
    with work._once("served-shapes-64") as (folder, missing):
        if missing:
            assert call(export_main, SHAPES_64, *FLAGS, "--out", folder) == 0
    return Bundle.open(folder)


@pytest.fixture(scope="session")
def door(shapes: Bundle) -> Iterator[Served]:
    """The small model behind a key, that waits half a second for a body."""
    service = Service(shapes, "shapes", opening=Opening(threads=1))
    service.open()
    with served(service, keys=("another", KEY), pictures=PictureLimits(max_bytes=200_000), body_s=0.5) as server:
        yield server
    service.close()
