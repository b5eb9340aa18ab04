"""Whether a pass of generation is running, in which operations may take another path than in training.

Such a pass has few tokens and no backward pass, so its operations are chosen for how fast they start. It is declared,
not concluded from disabled gradients: activation checkpointing computes a layer first without and then with gradients,
and both must give the same bits.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import paddle


class _State(threading.local):
    is_running = False


_state = _State()


def is_running() -> bool:
    """Whether this thread computes a pass of generation."""
    return _state.is_running


@contextmanager
def running() -> Iterator[None]:
    """The passes inside are passes of generation, without gradients."""
    before, _state.is_running = is_running(), True
    try:
        with paddle.no_grad():
            yield
    finally:
        _state.is_running = before
