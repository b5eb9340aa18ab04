"""Products in FP8 against float64: forward and both gradients, for one matrix and for experts."""

import numpy as np
import paddle
import pytest
from support.fp8_reference import fp8_values
from support.memory_truth import allocated
from support.numeric import numeric_gradient

from erniekit.precision.fp8_emulated import Emulated, Recipe
from erniekit.precision.fp8_product import Fp8Product

SCALINGS = pytest.mark.parametrize("scaling", ["blockwise", "rowwise", "tensorwise"])
RANDOM = np.random.default_rng(0)


def product(scaling: str = "blockwise", stores_fp8: bool = False, **recipe: object) -> Fp8Product:
    return Fp8Product(Emulated(Recipe(scaling, **recipe)), "FP8", stores_fp8)


def run(fp8: Fp8Product, x: np.ndarray, w: np.ndarray, dy: np.ndarray, counts: list[int] | None = None):
    """(y, dx, dw)."""
    tensors = [paddle.to_tensor(array.astype(np.float32), stop_gradient=False) for array in (x, w)]
    y = fp8(*tensors, counts)
    (y * paddle.to_tensor(dy.astype(np.float32))).sum().backward()
    return y.numpy(), tensors[0].grad.numpy(), tensors[1].grad.numpy()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative RMS error."""
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


@SCALINGS
@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize("gradients", ["e4m3", "e5m2"])
def test_all_three_products_are_those_of_quantised_operands(scaling: str, pow2: bool, gradients: str):
    """The sums in fp32 of products of values that the reference rounds in float64."""
    x, w, dy = (RANDOM.standard_normal(shape) for shape in ((150, 200), (200, 100), (150, 100)))
    x, w, dy = (array.astype(np.float32) for array in (x, w, dy))
    recipe = Recipe(scaling, pow2, gradients)
    y, dx, dw = run(Fp8Product(Emulated(recipe), "FP8", False), x, w, dy)

    def q(array: np.ndarray, tile, form: str = "e4m3") -> np.ndarray:
        return fp8_values(array, tile, form, pow2)

    expected = q(x, recipe.rows()) @ q(w, recipe.weight(True))
    tolerance = 1e-6 if pow2 else 1e-4  # a quotient in fp32 may move a few values by one step
    assert error(y, expected) < tolerance
    assert error(dx, q(dy, recipe.rows(), gradients) @ q(w, recipe.weight(False)).T) < tolerance
    assert error(dw, q(x, recipe.columns()).T @ q(dy, recipe.columns(), gradients)) < tolerance


@SCALINGS
@pytest.mark.parametrize("stores_fp8", [True, False])
def test_gradients_are_close_to_finite_differences_of_the_plain_product(scaling: str, stores_fp8: bool):
    """A product of two operands of 3 bits of mantissa has a relative error of 3.8 %; stated bound: 5 %."""
    x, w, dy = (RANDOM.standard_normal(shape) for shape in ((12, 9), (9, 7), (12, 7)))
    y, *ours = run(product(scaling, stores_fp8), x, w, dy)
    assert error(y, x @ w) < 0.05
    for which, found in enumerate(ours):
        assert error(found, numeric_gradient(lambda x, w: x @ w, [x, w], which, dy)) < 0.05


@pytest.mark.parametrize("counts", [[130, 0, 20], [0, 0, 150], [50, 50, 50]], ids=str)
@pytest.mark.parametrize("stores_fp8", [True, False])
@SCALINGS
def test_experts_are_products_of_their_own_rows(scaling: str, stores_fp8: bool, counts: list[int]):
    """Tiles never cross from one expert's rows to another's, in the gradient of the weights either."""
    if scaling == "tensorwise" and counts != [0, 0, 150]:
        pytest.skip("one scale for the rows of all experts")
    x, w, dy = (RANDOM.standard_normal(shape) for shape in ((150, 40), (3, 40, 24), (150, 24)))
    y, dx, dw = run(product(scaling, stores_fp8), x, w, dy, counts)
    begin = 0
    for expert, count in enumerate(counts):
        rows = slice(begin, begin + count)
        begin += count
        if not count:
            assert not dw[expert].any()
            continue
        alone = run(product(scaling, stores_fp8), x[rows], w[expert], dy[rows])
        for ours, theirs in zip((y[rows], dx[rows], dw[expert]), alone, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_no_rows_at_all():
    y, dx, dw = run(product(), np.zeros((0, 40)), np.ones((3, 40, 24)), np.zeros((0, 24)), [0, 0, 0])
    assert y.shape == (0, 24) and dx.shape == (0, 40) and not dw.any()


def test_a_frozen_weight_has_no_gradient_and_a_frozen_input_none_either():
    x, w = (paddle.to_tensor(RANDOM.standard_normal(shape).astype(np.float32)) for shape in ((5, 6), (6, 4)))
    x.stop_gradient = False
    product()(x, w).sum().backward()
    assert x.grad is not None and w.grad is None
    x, w = x.detach(), w.detach()
    w.stop_gradient = False
    product()(x, w).sum().backward()
    assert w.grad is not None and x.grad is None


@pytest.mark.parametrize("stores_fp8", [True, False])
def test_nothing_is_kept_of_the_input_of_a_frozen_weight(stores_fp8: bool):
    fp8, x, w = product(stores_fp8=stores_fp8), paddle.ones([64, 128]), paddle.ones([128, 128])
    x.stop_gradient = False
    before = allocated()
    y = fp8(x * 2, w)
    assert allocated() - before == y.size * 4


def test_nan_and_infinity_reach_the_result():
    x = RANDOM.standard_normal((4, 6))
    x[1, 2], x[2, 0] = np.nan, np.inf
    y, _, _ = run(product(), x, np.ones((6, 3)), np.ones((4, 3)))
    assert np.isnan(y[1:3]).all() and np.isfinite(y[[0, 3]]).all()


def test_codes_and_scales_stand_for_what_is_multiplied():
    w = paddle.to_tensor(RANDOM.standard_normal((2, 130, 140)).astype(np.float32))
    tensors = product().quantized_tensors(w)
    assert [list(each["codes"].shape) for each in tensors] == [[130, 140]] * 2
    assert [list(each["scales"].shape) for each in tensors] == [[2, 2]] * 2
    assert product().num_bytes(w) == 2 * (130 * 140 + 4 * 4)
    x = RANDOM.standard_normal((7, 130)).astype(np.float32)
    expected = fp8_values(x, Recipe("blockwise").rows()) @ product().dense(w)[1]
    y, _, _ = run(product(), x, w.numpy(), np.ones((7, 140)), [0, 7])
    assert error(y, expected) < 1e-6
