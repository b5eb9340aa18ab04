"""Worlds of ranks, one of each size a session; tests/support/worlds.py says how to use them."""

from collections.abc import Iterator

import pytest
from support.worlds import World


def _world(size: int) -> Iterator[World]:
    world = World(size)
    yield world
    world.stop()


@pytest.fixture(scope="session")
def world2() -> Iterator[World]:
    yield from _world(2)


@pytest.fixture(scope="session")
def world4() -> Iterator[World]:
    yield from _world(4)
