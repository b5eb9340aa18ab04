"""How moments are stored: what comes back, that rounding has no bias, and that a checkpoint restores the same bits."""

import numpy as np
import paddle
import pytest

from erniekit.parallel.memory import moment_bytes
from erniekit.training.moment_codes import MOMENTS
from erniekit.training.moments import store_of

FORMATS = ("fp32", "bf16", "8bit")
# Largest relative error of a number of at least a hundredth of the largest: one step of what can be stored.
ERROR = {"fp32": 0.0, "bf16": 2.0**-7, "8bit": 0.3}


def values_of(moment: str, size: int = 5000, seed: int = 0) -> paddle.Tensor:
    """Like real moments: orders of magnitude apart, the second one positive."""
    random = np.random.default_rng(seed)
    values = random.normal(size=size) * 10.0 ** random.uniform(-3, 0, size)
    return paddle.to_tensor((values**2 if moment == "moment2" else values).astype(np.float32))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("at_random", [False, True])
def test_what_is_read_is_near_what_was_written(dtype: str, moment: str, at_random: bool):
    store, values, fields = store_of(dtype, 5000), values_of(moment), {}
    store.write(fields, moment, values, at_random)
    found = store.read(fields, moment)
    assert found.dtype == paddle.float32 and found.shape == values.shape
    large = values.abs().numpy() > values.abs().max().item() * 1e-2
    np.testing.assert_allclose(found.numpy()[large], values.numpy()[large], rtol=ERROR[dtype])
    np.testing.assert_allclose(found.numpy(), values.numpy(), atol=values.abs().max().item() * 0.015)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_what_was_read_is_stored_exactly(dtype: str, moment: str):
    store, fields, again = store_of(dtype, 5000), {}, {}
    store.write(fields, moment, values_of(moment), at_random=True)
    store.write(again, moment, paddle.to_tensor(store.read(fields, moment).numpy()), at_random=False)
    assert fields.keys() == again.keys()
    for name, tensor in fields.items():
        assert tensor.numpy().tobytes() == again[name].numpy().tobytes(), name


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("dtype", ["bf16", "8bit"])
def test_rounding_at_random_has_the_true_mean(dtype: str, moment: str):
    """Of 5000 equal numbers, half a step from any that can be stored, the mean is right to a twentieth of the step."""
    paddle.seed(1)
    values = np.full(5120, 0.30127, np.float32)
    values[::256] = 1.0  # the largest of each block
    store, fields = store_of(dtype, len(values)), {}
    store.write(fields, moment, paddle.to_tensor(values), at_random=True)
    found = store.read(fields, moment).numpy()[values < 1]
    assert len(np.unique(found)) == 2
    step = np.ptp(found)
    assert abs(found.mean() - 0.30127) < 0.05 * step + 1e-6
    store.write(fields, moment, paddle.to_tensor(values), at_random=False)
    assert len(np.unique(store.read(fields, moment).numpy()[values < 1])) == 1


@pytest.mark.parametrize("dtype", ["bf16", "8bit"])
def test_a_second_moment_decays(dtype: str):
    """By a thousandth a step, which rounding to the nearest would undo for ever."""
    paddle.seed(2)
    size = 5120
    store, fields = store_of(dtype, size), {}
    store.write(fields, "moment2", values_of("moment2", size), at_random=False)
    before = store.read(fields, "moment2").numpy()
    for _ in range(100):
        store.write(fields, "moment2", store.read(fields, "moment2") * 0.999, at_random=True)
    after = store.read(fields, "moment2").numpy()
    assert after.sum() / before.sum() == pytest.approx(0.999**100, abs=0.02)


def test_a_positive_second_moment_is_never_zero():
    values = np.full(4096, 1e-14, np.float32)
    values[0], values[1] = 1.0, 0.0
    store, fields = store_of("8bit", 4096), {}
    store.write(fields, "moment2", paddle.to_tensor(values), at_random=False)
    found = store.read(fields, "moment2").numpy()
    assert found[1] == 0.0 and found[0] == 1.0 and (found[2:] > 0).all()


@pytest.mark.parametrize("moment", MOMENTS)
def test_blocks_of_zeros_and_of_one_sign_stay_what_they_are(moment: str):
    values = np.zeros(4097, np.float32)
    values[300] = 3.0 if moment == "moment2" else -3.0
    store, fields = store_of("8bit", 4097), {}
    store.write(fields, moment, paddle.to_tensor(values), at_random=False)
    np.testing.assert_allclose(store.read(fields, moment).numpy(), values, rtol=1e-6)


@pytest.mark.parametrize("size", [100, 4095, 4096, 5000])
@pytest.mark.parametrize("dtype", FORMATS)
def test_the_bytes_are_those_of_the_formula(dtype: str, size: int):
    store, fields = store_of(dtype, size), {}
    store.write(fields, "moment1", values_of("moment1", size), at_random=False)
    assert sum(t.size * t.element_size() for t in fields.values()) == moment_bytes(size, dtype)
