"""Processes for jobs that take the GPU path (tests/support/gpu_stand_in.py), and two plain ranks."""

from collections.abc import Iterator

import pytest
from support import gpu_stand_in, paddle_cpp
from support.worlds import World


def _world(size: int) -> Iterator[World]:
    world = World(size)
    yield world
    world.stop()


def _skip_without_compiler() -> None:
    if (missing := paddle_cpp.why_not()) is not None:
        pytest.skip(missing)


@pytest.fixture(scope="session")
def gpu() -> Iterator[World]:
    """One process, apart from this one: what gpu_stand_in.start() does there cannot be undone."""
    _skip_without_compiler()
    yield from _world(1)


@pytest.fixture(scope="session")
def gpu_ranks() -> Iterator[World]:
    """Two ranks that take the GPU path. What both need is compiled first, which takes longer than a job may."""
    _skip_without_compiler()
    gpu_stand_in.compiled()
    yield from _world(2)


@pytest.fixture(scope="session")
def shapes() -> Iterator[World]:
    """One process in which Paddle infers the shapes of GPU operators (tests/support/gpu_shapes)."""
    _skip_without_compiler()
    yield from _world(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[World]:
    """Two ranks."""
    yield from _world(2)
