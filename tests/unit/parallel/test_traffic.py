"""Bytes that a step sends, compared with numbers worked out by hand; with real steps: tests/distributed."""

import subprocess
import sys
from dataclasses import replace

from support.placements import entry, placement

from erniekit.parallel.buckets import plan_buckets
from erniekit.parallel.traffic import (
    StageLayers,
    TokenCounts,
    expert_parallel_bytes,
    gradient_sync_bytes,
    picture_bytes,
    pipeline_bytes,
    tensor_parallel_bytes,
    weight_gather_bytes,
)


def test_gradient_sync():
    """A row holds 3 elements and a flag. Sent over 4 ranks: 3 rows; gathered: 3 chunks; over 2 replicas 2 * 1/2 row."""
    buckets = plan_buckets([entry("a", 10, placement(shard=4, replica=2, copies=8))])
    once = {"reduce_scatter": 3 * 4 * 4, "all_reduce": 4 * 4, "all_gather": 3 * 3 * 4, "host": 7 * 8}
    assert gradient_sync_bytes(buckets, 1, 5, True, num_ranks=8) == once
    assert gradient_sync_bytes(buckets, 2, 5, True, num_ranks=8) == once | {"reduce_scatter": 5 * 3 * 4 * 4}
    whole = plan_buckets([entry("a", 10, placement(replica=4, copies=4), "bfloat16")])
    assert gradient_sync_bytes(whole, 2, 5, False, num_ranks=4) == {
        "reduce_scatter": 0, "all_reduce": 2 * 3 * 11 * 2 // 4, "all_gather": 0, "host": 3 * 8,
    }  # fmt: skip


def test_weights_of_a_block_are_gathered_for_each_pass_and_not_after_the_update():
    """3 chunks of 3 elements from the others, twice for each of 5 microbatches; the gradients as in stage 2."""
    divided = [replace(entry("a", 10, placement(shard=4, copies=4)), unit="0")]
    buckets = plan_buckets(divided)
    assert weight_gather_bytes(buckets, 10) == 10 * 3 * 3 * 4
    sent = gradient_sync_bytes(buckets, 3, 5, True, num_ranks=4)
    assert (sent["reduce_scatter"], sent["all_gather"]) == (5 * 3 * 4 * 4, 0)


def test_tensor_parallelism_of_a_dense_layer_is_four_all_reduces():
    """Megatron-LM's count: two in the forward pass and two in the backward pass, of [t, D] each."""
    layer = StageLayers(dense=1, has_embedding=False, has_head=False)
    sent = tensor_parallel_bytes(layer, TokenCounts(8, 8, 8), num_ranks=4, index=0, hidden_size=16, element_bytes=2)
    assert sent["all_reduce"] == 4 * (2 * 3 * 8 * 16 * 2 // 4)


def test_sequence_parallelism_sends_as_much_as_tensor_parallelism():
    """An all-gather and a reduce-scatter are together one all-reduce (Korthikanti et al. 2022, section 4.2.2)."""
    args = (StageLayers(dense=3, has_head=False), TokenCounts(8, 8, 8), 4, 0, 16)
    assert sum(tensor_parallel_bytes(*args).values()) == sum(
        tensor_parallel_bytes(*args, sequence_parallel=True).values()
    )


def test_one_tensor_rank_sends_nothing():
    assert not tensor_parallel_bytes(StageLayers(dense=2, sparse=1), TokenCounts(8, 8, 8), 1, 0, 16, 2)


def test_the_ends_of_a_pipeline_send_half_as_much():
    sent = [pipeline_bytes(stage, 3, 1, num_tokens=5, hidden_size=2) for stage in range(3)]
    assert sent == [5 * 2 * 4, 2 * 5 * 2 * 4, 5 * 2 * 4]
    interleaved = [pipeline_bytes(stage, 2, 2, num_tokens=5, hidden_size=2) for stage in range(2)]
    assert interleaved == [3 * 5 * 2 * 4] * 2


def test_experts_of_a_recomputed_layer_send_one_forward_pass_more():
    assert expert_parallel_bytes(3, 5, hidden_size=2) == 2 * 8 * 2 * 4
    assert expert_parallel_bytes(3, 5, hidden_size=2, recomputed=True, element_bytes=2) == 3 * 8 * 2 * 2
    assert expert_parallel_bytes(3, 5, hidden_size=2, takes_weights=True) == 2 * 8 * 2 * 4 + (3 + 5) * 4
    assert expert_parallel_bytes(3, 5, 2, recomputed=True, takes_weights=True) == 3 * 8 * 2 * 4 + (2 * 3 + 5) * 4


def test_pixels_go_away_and_features_and_their_gradients_come_back():
    assert picture_bytes(8, 12, features_sent=3, features_received=2, hidden_size=16) == 8 * 12 + (3 + 2) * 16 * 4
    frozen = picture_bytes(8, 12, features_sent=3, features_received=2, hidden_size=16, trained=False, element_bytes=2)
    assert frozen == 8 * 12 + 3 * 16 * 2


def test_the_formulas_need_no_paddle():
    code = "import erniekit.parallel.traffic, erniekit.parallel.memory, sys; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
