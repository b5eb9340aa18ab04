"""Dividing a parameter over ranks and joining it again."""

import numpy as np
import pytest

from erniekit.nn.shard import ShardSpec, shard, unshard

WHOLE = np.arange(6 * 24).reshape(6, 24)


@pytest.mark.parametrize("spec", [ShardSpec(0), ShardSpec(1), ShardSpec(1, (12, 6, 6)), ShardSpec(1, (2, 1, 1))])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_join_undoes_take(spec: ShardSpec, count: int):
    shares = [shard(WHOLE, spec, index, count) for index in range(count)]
    assert all(share.size == WHOLE.size // count for share in shares)
    np.testing.assert_array_equal(unshard(shares, spec), WHOLE)


def test_each_fused_part_is_divided_on_its_own():
    np.testing.assert_array_equal(
        shard(np.arange(8), ShardSpec(0, (4, 2, 2)), 1, 2), [2, 3, 5, 7]
    )  # q: 2 of 4, then one of the two of k and of v
