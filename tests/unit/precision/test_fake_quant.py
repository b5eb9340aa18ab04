"""Fake quantisation: bit for bit the rounding of codes.py, and the gradients that the formulas give."""

import numpy as np
import paddle
import pytest

from erniekit.precision import codes
from erniekit.precision.fake_quant import FakeQuant, InputCodes, MovingRange, Recipe, Rotation
from erniekit.precision.fake_rounding import Grid, divided
from erniekit.precision.fp8_tensor import Tile
from erniekit.precision.hadamard import rotate_rows
from erniekit.precision.rounding import round_to

SPECS = {
    "int8": codes.full_range(8),
    "int4": codes.symmetric(4),
    "int4-groups": codes.full_range(4, group=128),
    "fp8-blocks": codes.FP8_BLOCK,
    "fp8-tensor": codes.FP8_TENSOR,
}
TOKEN_INT8 = InputCodes(Grid("int", -127.0, 127.0, Tile(1, None)))
GROUP_FP8 = InputCodes(Grid("e4m3", -448.0, 448.0, Tile(1, 128)))


def draws(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 0, shape[-1])).astype(np.float32)


def static(online_steps: int = 2, rate: float = 0.25) -> InputCodes:
    return InputCodes(Grid("e4m3", -448.0, 448.0, Tile(None, None)), MovingRange(online_steps, rate))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("widths", [(), (40, 130, 60)])
def test_codes_and_scales_are_those_of_an_export(name: str, widths: tuple[int, ...]):
    """Bit for bit: what is trained with is what codes.py makes of the weight. Blocks begin anew in each fused part."""
    spec = SPECS[name]
    weight = draws(2, 300, 230)
    weight[0, :, 7] = 0.0  # a channel of zeros: scale 1
    product = FakeQuant(Recipe(spec), name, widths)
    found = product.quantized_tensors(paddle.to_tensor(weight))
    dense = product.dense(paddle.to_tensor(weight))
    ends = np.cumsum(widths)[:-1] if widths and spec.block else []
    for number, tensors in enumerate(found):
        parts = np.split(weight[number].T, ends)
        scales = [codes.choose_scales(part, spec) for part in parts]
        expected = [codes.encode(part, scale, spec) for part, scale in zip(parts, scales, strict=True)]
        bits = tensors["codes"].numpy().view(np.uint8) if spec.kind == "e4m3" else tensors["codes"].numpy()
        np.testing.assert_array_equal(bits, np.concatenate(expected))
        np.testing.assert_array_equal(tensors["scales"].numpy(), np.concatenate(scales))
        values = [codes.decode(c, s, spec) for c, s in zip(expected, scales, strict=True)]
        np.testing.assert_array_equal(dense[number], np.concatenate(values).T)


def rounded_rows(x: np.ndarray, inputs: InputCodes | None) -> np.ndarray:
    """q(x) by numpy, one scale a row and group."""
    if inputs is None:
        return x
    size, largest = inputs.grid.tile.columns or x.shape[1], np.float32(inputs.grid.largest)
    out = np.empty_like(x)
    for begin in range(0, x.shape[1], size):
        part = x[:, begin : begin + size]
        scale = np.abs(part).max(axis=1, keepdims=True) / largest
        ratio = np.clip(part / scale, -largest, largest)
        out[:, begin : begin + size] = (
            np.rint(ratio) if inputs.grid.kind == "int" else round_to(ratio, "e4m3")
        ) * scale
    return out


@pytest.mark.parametrize("name", ["int8", "int4-groups", "fp8-blocks"])
@pytest.mark.parametrize(("rotation", "normalised"), [(None, False), (4, False), (8, True)])
def test_gradients_pass_straight_through(name: str, rotation: int | None, normalised: bool):
    """y, dx and dW of experts, one of them without rows, against the formulas in float64; 1e-5 for fp32 sums."""
    inputs = {"int8": TOKEN_INT8, "fp8-blocks": GROUP_FP8}.get(name)
    counts, (num_in, num_out) = [3, 0, 5], (136, 20)
    weight, rows, dy = draws(3, num_in, num_out), draws(8, num_in, seed=1), draws(8, num_out, seed=2)
    product = FakeQuant(Recipe(SPECS[name], inputs, None if rotation is None else Rotation(rotation, normalised)), name)
    w, x = (paddle.to_tensor(value, stop_gradient=False) for value in (weight, rows))
    y = product(x, w, counts)
    y.backward(paddle.to_tensor(dy))
    order = np.ones((1, 1)) if rotation is None else hadamard(rotation)
    big = np.kron(np.eye(num_in // len(order)), order)
    by = np.float32(np.sqrt(len(order)) if normalised else len(order))
    turned = weight if rotation is None else rotate_rows(weight, rotation) / by
    of_x = np.float32(np.sqrt(len(order)) if normalised else 1)
    q_x = rounded_rows((rows @ big).astype(np.float32) / of_x, inputs).astype(np.float64)
    spec, begin = SPECS[name], 0
    for expert, count in enumerate(counts):
        span = slice(begin, begin + count)
        begin += count
        scales = codes.choose_scales(turned[expert].T, spec)
        q_w = codes.decode(codes.encode(turned[expert].T, scales, spec), scales, spec).T.astype(np.float64)
        close(y.numpy()[span], q_x[span] @ q_w)
        close(x.grad.numpy()[span], dy[span] @ q_w.T @ big / of_x)
        close(w.grad.numpy()[expert], big @ (q_x[span].T @ dy[span]) / by)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    if expected.size:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max() + 1e-12)


def hadamard(order: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def test_a_rotation_is_a_hadamard_matrix_in_blocks():
    weight = np.random.default_rng(0).integers(-8, 8, [64, 3]).astype(np.float32)  # sums are exact
    np.testing.assert_array_equal(rotate_rows(weight, 16), np.kron(np.eye(4), hadamard(16)) @ weight)


def test_clipped_inputs_have_no_gradient():
    """With a static scale, what rounds beyond 448 is clipped; 463 still rounds to 448, so its gradient passes."""
    product = FakeQuant(Recipe(codes.FP8_TENSOR, static(online_steps=1)), "fp8")
    product.range.set_value(paddle.full([1], 448.0))
    product.updates.set_value(paddle.ones([1]))
    product.eval()
    x = paddle.to_tensor([[1.0, 463.0, 464.5, -900.0]], stop_gradient=False)
    weight = paddle.ones([4, 2])
    y = product(x, weight)
    np.testing.assert_array_equal(y.numpy(), np.full((1, 2), 1.0 + 448 + 448 - 448, np.float32))
    y.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [[2.0, 2.0, 0.0, 0.0]])


def test_the_range_is_a_mean_at_first_and_then_moves():
    product = FakeQuant(Recipe(codes.FP8_TENSOR, static(online_steps=2, rate=0.25)), "fp8", num_experts=2)
    expected, weight = [], paddle.ones([2, 4, 1])
    for largest in (8.0, 16.0, 32.0):
        rows = paddle.to_tensor([[largest, 1.0, 1.0, 1.0]])
        for _ in range(2):  # a second microbatch, or a pass that is computed again
            product(rows, weight, [1, 0])
        product.update_range(product.present)
        expected.append(product.range.numpy().tolist())
    assert expected == [[8.0, 0.0], [12.0, 0.0], [12.0 * 0.75 + 32.0 * 0.25, 0.0]]
    assert product.updates.numpy().tolist() == [3.0, 0.0] and product.present.numpy().tolist() == [0.0, 0.0]
    product.eval()
    product(paddle.full([2, 4], 100.0), weight, [1, 1])
    assert product.present.numpy().tolist() == [0.0, 0.0]  # evaluations move nothing


def test_online_steps_multiply_by_the_present_range():
    """Before the range is known, and for `online_steps` in training, inputs are rounded with their own scale."""
    product = FakeQuant(Recipe(codes.FP8_TENSOR, static(online_steps=2)), "fp8")
    x, weight = paddle.to_tensor([[1.0, 900.0]]), paddle.ones([2, 1])
    for _ in range(2):
        assert product(x, weight).item() == pytest.approx(901.0, rel=0.07)
        product.update_range(paddle.to_tensor([448.0]))
    assert product(x, weight).item() == 1.0 + 448.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["int8", "fp8-blocks"])
def test_what_is_not_finite_reaches_the_loss(bad: float, name: str):
    product = FakeQuant(Recipe(SPECS[name], TOKEN_INT8 if name == "int8" else GROUP_FP8), name)
    x = np.ones((2, 4), np.float32)
    x[1, 2] = bad
    y = product(paddle.to_tensor(x), paddle.ones([4, 3])).numpy()
    assert np.isfinite(y[0]).all() and not np.isfinite(y[1]).any()


def test_gradients_are_rounded_to_e5m2_where_asked():
    """Each product on its own: 1.1 is no number of E5M2, and 57344 / 1.75 of a scale is exact."""
    dy = np.array([[1.1, 1.75]], np.float32)
    scale = np.float32(1.75) / np.float32(57344)
    rounded = round_to(dy / scale, "e5m2") * scale
    assert (rounded != dy).any()
    for on_input, on_weight in ((True, False), (False, True)):
        recipe = Recipe(codes.full_range(8), None, None, on_input, on_weight)
        x, w = (paddle.to_tensor(np.eye(2, dtype=np.float32)[:n], stop_gradient=False) for n in (1, 2))
        FakeQuant(recipe, "int8")(x, w).backward(paddle.to_tensor(dy))
        q_w = FakeQuant(recipe, "int8").dense(w)
        np.testing.assert_allclose(x.grad.numpy(), (rounded if on_input else dy) @ q_w.T, rtol=1e-6)
        np.testing.assert_allclose(w.grad.numpy()[0], (rounded if on_weight else dy)[0], rtol=1e-6)


def test_division_is_rounded_once():
    """Paddle's own fp32 division on a CPU is wrong by a unit in the last place for one quotient of 300."""
    rng = np.random.default_rng(0)
    values, by = rng.standard_normal(1 << 17).astype(np.float32), rng.uniform(1e-3, 3, 1 << 17).astype(np.float32)
    np.testing.assert_array_equal(divided(paddle.to_tensor(values), paddle.to_tensor(by)).numpy(), values / by)
