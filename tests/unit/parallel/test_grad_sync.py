"""One process: gradients stay where they are, and 16-bit ones are summed in fp32; several ranks: tests/distributed."""

import numpy as np
import paddle
from support.traffic import stored_gradient_bytes

from erniekit.parallel.grad_sync import GradientSync
from erniekit.parallel.zero import ShardedParameters


def test_on_one_process_nothing_is_copied_and_nothing_is_sent():
    parameters = ShardedParameters.single(
        [(name, paddle.create_parameter([2], "float32")) for name in ("a", "b", "without")]
    )
    sync = GradientSync(parameters)
    sync.begin(1)
    for name in ("a", "b"):
        parameters.tensors[name].grad = paddle.to_tensor(np.array([1.0, 2.0], np.float32))
    sync.after_backward()
    gradients = sync.finish()
    assert parameters.buckets == [] and list(gradients) == ["a", "b"]
    for name, gradient in gradients.items():
        assert gradient.data_ptr() == parameters.tensors[name].grad.data_ptr()


def test_16_bit_gradients_are_summed_in_fp32():
    """bf16 keeps 8 bits: 1 + 2^-9 is lost in it, and kept in the fp32 sum."""
    p = paddle.create_parameter([1], "bfloat16", default_initializer=paddle.nn.initializer.Constant(1.0))
    sync = GradientSync(ShardedParameters.single([("w", p)]))
    for gradient in (1.0, 2.0**-9):
        p.grad = paddle.to_tensor([gradient]).astype("bfloat16")
        sync.after_backward()
        assert p.grad is None
    assert sync.finish()["w"].item() == 1.0 + 2.0**-9
    assert stored_gradient_bytes(sync) == 4
    sync.clear()
    assert sync.finish() == {} and stored_gradient_bytes(sync) == 0
