"""A model cut into stages gives what one process gives: losses, gradients, and no more activations kept than foretold.

Tolerance 1e-10 in float64: the same operations on the same numbers, but the ranks' math library may add up in another
order than the test's own process.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
import pytest
from support.worlds import World

from erniekit.parallel import backend, comm
from erniekit.parallel.pipeline import run
from erniekit.parallel.pipeline_schedule import Action, forward_plan, peak_live, plan
from erniekit.parallel.pipeline_split import split_layers

NUM_LAYERS, WIDTH = 9, 6
FROZEN_INPUT = tuple(range(5))  # layers: the first stages have nothing to train, whichever way the model is cut
TOLERANCE = 1e-10


class Toy:
    """Layers h -> h + tanh(h W), each with a small loss of its own (as routers have), and a target at the end."""

    def __init__(
        self,
        stage: int,
        stages: int,
        chunks: int,
        frozen: Sequence[int] = (),
        own_losses: bool = True,
        without_target: Sequence[int] = (),
    ) -> None:
        pieces = split_layers(NUM_LAYERS, stages * chunks)
        self.pieces = [pieces[chunk * stages + stage] for chunk in range(chunks)]
        self.own_losses, self.without_target = own_losses, without_target
        self.weights = {}
        for layer in (layer for piece in self.pieces for layer in piece):
            values = np.random.default_rng(layer).normal(size=(WIDTH, WIDTH)) / 2
            self.weights[layer] = paddle.to_tensor(values, stop_gradient=layer in frozen)
        self.loss = 0.0
        self.backward_passes: list[int] = []
        self.recorded: list[bool] = []

    @staticmethod
    def batch(microbatch: int) -> paddle.Tensor:
        """[rows, WIDTH]; the number of rows differs from one microbatch to the next."""
        rows = 1 + microbatch * 2 % 5
        return paddle.to_tensor(np.random.default_rng(100 + microbatch).normal(size=(rows, WIDTH)))

    def forward(
        self, chunk: int, microbatch: int, x: paddle.Tensor | None
    ) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        h = self.batch(microbatch) if x is None else x
        assert (x is None) == (self.pieces[chunk][0] == 0)
        losses = []
        for layer in self.pieces[chunk]:
            h = h + paddle.tanh(h @ self.weights[layer])
            if self.own_losses and layer % 2:
                losses.append(0.1 * (h**2).mean())
        is_last = self.pieces[chunk][-1] == NUM_LAYERS - 1
        if is_last and microbatch not in self.without_target:
            losses.append(((h - 1.0) ** 2).sum())
        self.recorded.append(not h.stop_gradient)
        loss = paddle.add_n(losses) if losses else None
        self.loss += 0.0 if loss is None else loss.item()
        return None if is_last else h, loss

    def input_shape(self, chunk: int, microbatch: int) -> tuple[list[int], Any]:
        return self.batch(microbatch).shape, paddle.float64

    def after_backward(self, chunk: int, microbatch: int) -> None:
        self.backward_passes.append(microbatch)


def gradients(toy: Toy) -> dict[int, np.ndarray]:
    return {layer: w.grad.numpy() for layer, w in toy.weights.items() if w.grad is not None}


def on_a_rank(lists: list[list[Action]], chunks: int, **options: Any) -> dict[str, Any]:
    """One rank of a pipeline through all ranks."""
    ranks = backend.world_group().ranks
    stage = backend.world().rank
    backend.open_channels([(a, b) for a in ranks for b in ranks if a != b])
    toy = Toy(stage, len(ranks), chunks, **options)
    peak = run(lists[stage], toy, ranks)
    return {
        "loss": toy.loss,
        "gradients": gradients(toy),
        "peak": peak,
        "backward_passes": toy.backward_passes,
        "recorded": toy.recorded,
    }


def in_one_piece(microbatches: int, **options: Any) -> tuple[float, dict[int, np.ndarray]]:
    """The same without a schedule: Paddle's own backward pass over each microbatch."""
    toy = Toy(0, 1, 1, **options)
    for microbatch in range(microbatches):
        _, loss = toy.forward(0, microbatch, None)
        if loss is not None:
            loss.backward()
    return toy.loss, gradients(toy)


def compare(results: list[dict[str, Any]], microbatches: int, **options: Any) -> None:
    loss, expected = in_one_piece(microbatches, **options)
    assert sum(result["loss"] for result in results) == pytest.approx(loss, rel=TOLERANCE)
    found = {layer: g for result in results for layer, g in result["gradients"].items()}
    assert {layer for layer, g in found.items() if g.any()} == expected.keys()
    for layer, gradient in expected.items():
        np.testing.assert_allclose(found[layer], gradient, rtol=TOLERANCE, atol=TOLERANCE)


CASES = [
    ("1f1b", 1, 5),
    ("1f1b", 1, 1),
    ("interleaved", 2, 8),
    ("interleaved", 2, 5),
    ("memory_efficient", 2, 7),
    ("memory_efficient", 2, 3),
]


@pytest.mark.parametrize("blocking_sends", [False, True], ids=["sent at once", "in one order"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("schedule", "chunks", "microbatches"), CASES)
def test_stages_equal_one_process(
    request, size: int, schedule: str, chunks: int, microbatches: int, blocking_sends: bool
):
    world: World = request.getfixturevalue(f"world{size}")
    lists = plan(schedule, size, microbatches, chunks, blocking_sends)
    results = world.run(on_a_rank, lists=lists, chunks=chunks)
    compare(results, microbatches)
    for stage, result in enumerate(results):
        assert result["peak"] == peak_live(schedule, stage, size, microbatches, chunks)
        assert sorted(result["backward_passes"]) == sorted(list(range(microbatches)) * chunks)


@pytest.mark.parametrize("own_losses", [True, False])
def test_stages_without_trainable_weights(world4: World, own_losses: bool):
    options = {"frozen": FROZEN_INPUT, "own_losses": own_losses}
    results = world4.run(on_a_rank, lists=plan("1f1b", 4, 5), chunks=1, **options)
    compare(results, 5, **options)
    assert not results[0]["gradients"] and not any(results[0]["recorded"])


def test_microbatches_without_a_loss_on_the_last_stage(world2: World):
    options = {"own_losses": False, "without_target": [0, 2]}
    compare(world2.run(on_a_rank, lists=plan("1f1b", 2, 4), chunks=1, **options), 4, **options)


def test_everything_frozen_but_the_first_layer(world2: World):
    options = {"frozen": range(1, NUM_LAYERS)}
    compare(world2.run(on_a_rank, lists=plan("1f1b", 2, 3), chunks=1, **options), 3, **options)


@pytest.mark.parametrize("chunks", [1, 2])
def test_forward_only_records_nothing(world2: World, chunks: int):
    results = world2.run(on_a_rank, lists=forward_plan(2, 4, chunks), chunks=chunks)
    assert sum(result["loss"] for result in results) == pytest.approx(in_one_piece(4)[0], rel=TOLERANCE)
    for result in results:
        assert result["peak"] == 0 and not result["gradients"] and not any(result["recorded"])


def test_a_single_stage_keeps_one_microbatch_and_equals_plain_backward_bit_for_bit():
    toy = Toy(0, 1, 1)
    assert run(plan("1f1b", 1, 4)[0], toy, [0]) == 1
    loss, expected = in_one_piece(4)
    assert toy.loss == loss and toy.backward_passes == [0, 1, 2, 3]
    for layer, gradient in gradients(toy).items():
        np.testing.assert_array_equal(gradient, expected[layer])


def bytes_sent(lists: list[list[Action]]) -> int:
    comm.traffic.take()
    on_a_rank(lists, 1)
    return comm.traffic.take().get("send", 0)


def test_only_activations_and_their_gradients_are_sent(world2: World):
    rows = sum(1 + i * 2 % 5 for i in range(5))
    assert world2.run(bytes_sent, lists=plan("1f1b", 2, 5)) == [rows * WIDTH * 8] * 2
