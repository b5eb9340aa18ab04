"""What shows that a command streams: a model of many tensors, and the most memory that numpy has while it runs."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

from erniekit.checkpoint.model_io import save_model
from erniekit.models.weights import our_shapes
from support.tiny_models import tiny_model


def model_of_many_tensors(directory: Path) -> tuple[int, int]:
    """Save a dense model in fp32 -> (bytes of all its tensors, bytes of the largest one)."""
    model = tiny_model(vocab_size=4000, num_hidden_layers=12, hidden_size=96, intermediate_size=512)
    sizes = [parameter.size * 4 for parameter in model.parameters()]
    assert len(sizes) == len(our_shapes(model.config))
    save_model(model, directory)
    return sum(sizes), max(sizes)


def peak_bytes(action: Callable[[], object]) -> int:
    """The most bytes that were allocated at one time while `action` ran."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
