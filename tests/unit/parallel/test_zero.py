"""Parameters of one process, where nothing is divided; over several ranks: tests/distributed/test_sharding.py."""

import numpy as np
import paddle

from erniekit.parallel.zero import ShardedParameters


def test_frozen_parameters_are_left_out():
    frozen, trained = (paddle.create_parameter([1], "float32") for _ in range(2))
    frozen.stop_gradient = True
    assert list(ShardedParameters.single([("frozen", frozen), ("trained", trained)]).tensors) == ["trained"]


def test_the_only_chunk_of_one_process_is_the_parameter_itself():
    p = paddle.create_parameter([2, 2], "float32")
    parameters = ShardedParameters.single([("w", p)])
    assert parameters.local_chunk("w") is p and parameters.whole("w", p) is p
    values = np.arange(4, dtype=np.float32).reshape(2, 2)
    assert parameters.scatter("w", values) is values
    np.testing.assert_array_equal(parameters.gather("w", paddle.to_tensor(values)), values)
