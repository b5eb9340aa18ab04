"""The experts as one step in FP8, against the two products of their projections and against the formula."""

import numpy as np
import paddle
import pytest
from support.memory_truth import allocated
from support.numeric import numeric_gradient

from erniekit.moe.experts import Experts
from erniekit.precision.fp8_emulated import Emulated, Recipe
from erniekit.precision.fp8_experts import Fp8Experts
from erniekit.precision.fp8_product import Fp8Product

COUNTS = [[2, 3, 1], [0, 6, 0], [0, 0, 6]]
EVERY_COUNT = pytest.mark.parametrize("counts", COUNTS, ids=str)
BACKEND = Emulated(Recipe("blockwise"))


def experts(block: Fp8Experts | None, product: Fp8Product | None = None) -> Experts:
    paddle.seed(0)
    made = Experts(3, 8, 10, init_std=0.5)
    for projection in (made.up_gate_proj, made.down_proj):
        projection.product = product
    made.block = block
    return made


def run(model: Experts, counts: list[int], weighted: bool) -> list[np.ndarray]:
    """The result and the gradients of rows, both weights and the routing weights."""
    random = np.random.default_rng(1)
    rows = paddle.to_tensor(random.normal(size=(sum(counts), 8)).astype(np.float32), stop_gradient=False)
    weights = paddle.to_tensor(random.uniform(size=(sum(counts), 1)).astype(np.float32), stop_gradient=False)
    dy = paddle.to_tensor(random.normal(size=(sum(counts), 8)).astype(np.float32))
    y = model(rows, counts, weights if weighted else None)
    (y * dy).sum().backward()
    tensors = [rows, model.up_gate_proj.weight, model.down_proj.weight, *([weights] if weighted else [])]
    return [y.numpy(), *(tensor.grad.numpy() for tensor in tensors)]


@EVERY_COUNT
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("recomputes", [True, False])
def test_one_step_equals_two_products(counts: list[int], weighted: bool, recomputes: bool):
    """Nothing is quantised once more or less, with inputs that are kept as they are."""
    one = run(experts(Fp8Experts(BACKEND, False, recomputes)), counts, weighted)
    two = run(experts(None, Fp8Product(BACKEND, "FP8", False)), counts, weighted)
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@EVERY_COUNT
def test_what_is_computed_again_from_fp8_is_what_was_computed(counts: list[int]):
    kept, again = (run(experts(Fp8Experts(BACKEND, True, recomputes)), counts, True) for recomputes in (False, True))
    for ours, theirs in zip(again, kept, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_are_close_to_finite_differences_of_the_plain_block(weighted: bool):
    """Three products and two gradients deep: stated bound 12 % relative RMS."""
    counts = [40, 0, 24]
    model = experts(Fp8Experts(BACKEND))
    y, *found = run(model, counts, weighted)
    random = np.random.default_rng(1)
    rows, weights = random.normal(size=(64, 8)), random.uniform(size=(64, 1))
    dy = random.normal(size=(64, 8))
    values = [rows, *(p.numpy().astype(np.float64) for p in (model.up_gate_proj.weight, model.down_proj.weight))]
    values += [weights] if weighted else []

    def formula(rows, up_gate, down, weights=1.0):
        of_row = np.repeat(np.arange(3), counts)
        gate, up = np.split(np.einsum("rd,rdf->rf", rows, up_gate[of_row]), 2, axis=-1)
        return np.einsum("rf,rfd->rd", gate / (1 + np.exp(-gate)) * up * weights, down[of_row])

    def error(ours: np.ndarray, theirs: np.ndarray) -> float:
        return float(np.sqrt(((ours - theirs) ** 2).mean() / (theirs**2).mean()))

    assert error(y, formula(*values)) < 0.12
    for which, ours in enumerate(found):
        assert error(ours, numeric_gradient(formula, values, which, dy)) < 0.12, which


def test_no_rows_and_frozen_weights():
    y, dx, *gradients = run(experts(Fp8Experts(BACKEND)), [0, 0, 0], True)
    assert y.shape == dx.shape == (0, 8) and not any(gradient.any() for gradient in gradients)
    model = experts(Fp8Experts(BACKEND))
    for parameter in model.parameters():
        parameter.stop_gradient = True
    rows = paddle.ones([3, 8])
    rows.stop_gradient = False
    model(rows, [1, 1, 1]).sum().backward()
    assert rows.grad is not None and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("num_rows", [0, 3])
def test_constant_routing_weights_have_no_gradient(num_rows: int):
    """As those of a frozen router in front of which nothing is trained."""
    model = experts(Fp8Experts(BACKEND))
    y = model(paddle.ones([num_rows, 8]), [num_rows, 0, 0], paddle.ones([num_rows, 1]))
    (y.sum() + 0.0).backward()
    gradient = model.up_gate_proj.weight.grad
    assert gradient is not None and bool(gradient.abs().sum() > 0) == (num_rows > 0)


def test_nothing_is_kept_of_the_input_of_frozen_experts():
    model, given = experts(Fp8Experts(BACKEND)), paddle.ones([64, 8])
    for parameter in model.parameters():
        parameter.stop_gradient = True
    given.stop_gradient = False
    before = allocated()
    y = model(given * 2, [20, 0, 44])
    gate_up = 64 * 2 * 10
    assert allocated() - before == 4 * (y.size + gate_up)
