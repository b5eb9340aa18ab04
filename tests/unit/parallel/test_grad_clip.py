"""Norm and clipping against numbers worked out by hand; over several ranks: tests/distributed/test_sharding.py."""

import numpy as np
import paddle
import pytest

from erniekit.parallel.grad_clip import clip_, global_norm
from erniekit.parallel.process_group import ALONE
from erniekit.parallel.zero import ShardedParameters


def norm_of(gradients: dict[str, paddle.Tensor]) -> float:
    parameters = [(name, paddle.create_parameter(g.shape, "float32")) for name, g in gradients.items()]
    return global_norm(gradients, ShardedParameters.single(parameters).entries, ALONE)


def test_clipping_scales_all_gradients_by_one_factor():
    gradients = {"a": paddle.to_tensor([3.0, 0.0]), "b": paddle.to_tensor([4.0])}
    norm = norm_of(gradients)
    assert norm == pytest.approx(5.0)
    clip_(gradients, norm, 1.0)
    np.testing.assert_allclose(gradients["a"].numpy(), [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(gradients["b"].numpy(), [0.8], rtol=1e-6)


@pytest.mark.parametrize("max_norm", [0.0, 6.0])
def test_small_norms_and_zero_limits_are_not_clipped(max_norm: float):
    gradients = {"a": paddle.to_tensor([5.0])}
    clip_(gradients, norm_of(gradients), max_norm)
    assert gradients["a"].item() == 5.0


def test_without_gradients_the_norm_is_zero():
    assert norm_of({}) == 0.0
