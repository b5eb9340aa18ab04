"""One process: gradients stay where they are, norm and clipping against numpy; several are in tests/distributed."""

import numpy as np
import paddle
import pytest

from erniekit.parallel.grad_sync import GradientSync


def parameter(values):
    values = np.asarray(values, np.float32)
    p = paddle.create_parameter(list(values.shape), "float32")
    p.set_value(values)
    return p


def sync_with(**gradients):
    sync = GradientSync.single([(name, parameter(np.zeros_like(g))) for name, g in gradients.items()])
    for name, gradient in gradients.items():
        sync.parameters[name].grad = paddle.to_tensor(np.asarray(gradient, np.float32))
    return sync


def test_on_one_process_nothing_is_copied_and_nothing_is_sent():
    sync = sync_with(a=[1.0, 2.0], b=[[3.0]])
    sync.begin(1)
    sync.after_backward()
    sync.finish()
    assert sync.buckets == []
    for name, gradient in sync.gradients().items():
        assert gradient.data_ptr() == sync.parameters[name].grad.data_ptr()
        assert sync.own(name) is sync.parameters[name]


def test_clipping_scales_all_gradients_by_one_factor():
    sync = sync_with(a=[3.0, 0.0], b=[4.0])
    norm = sync.global_norm()
    assert norm == pytest.approx(5.0)
    sync.clip(norm, 1.0)
    np.testing.assert_allclose(sync.gradients()["a"].numpy(), [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(sync.gradients()["b"].numpy(), [0.8], rtol=1e-6)


@pytest.mark.parametrize("max_norm", [0.0, 6.0])
def test_small_norms_and_zero_limits_are_not_clipped(max_norm):
    sync = sync_with(a=[5.0])
    sync.clip(sync.global_norm(), max_norm)
    assert sync.gradients()["a"].item() == 5.0


def test_frozen_parameters_have_no_part_in_it():
    frozen = parameter([1.0])
    frozen.stop_gradient = True
    assert GradientSync.single([("frozen", frozen)]).parameters == {}


def test_16_bit_gradients_are_summed_in_fp32():
    """bf16 keeps 8 bits: 1 + 2^-9 is lost in it, and kept in the fp32 sum."""
    p = paddle.create_parameter([1], "bfloat16", default_initializer=paddle.nn.initializer.Constant(1.0))
    sync = GradientSync.single([("w", p)])
    for gradient in (1.0, 2.0**-9):
        p.grad = paddle.to_tensor([gradient]).astype("bfloat16")
        sync.after_backward()
        assert p.grad is None
    assert sync.gradients()["w"].item() == 1.0 + 2.0**-9
    assert sync.held_bytes() == 4
    sync.clear()
    assert sync.gradients() == {} and sync.held_bytes() == 0
