"""A process for jobs that take the GPU path (tests/support/gpu_stand_in.py), and two plain ranks."""

from collections.abc import Iterator

import pytest
from support import gpu_stand_in
from support.worlds import World


def _world(size: int) -> Iterator[World]:
    world = World(size)
    yield world
    world.stop()


@pytest.fixture(scope="session")
def gpu() -> Iterator[World]:
    """One process, apart from this one: what gpu_stand_in.start() does there cannot be undone."""
    if (missing := gpu_stand_in.why_not()) is not None:
        pytest.skip(missing)
    yield from _world(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[World]:
    """Two ranks."""
    yield from _world(2)
