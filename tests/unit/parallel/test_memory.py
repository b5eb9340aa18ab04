"""Bytes of optimizer state and gradients; that a real run has as many: tests/distributed/test_traffic.py."""

from dataclasses import replace

import pytest
from support.placements import entry, placement

from erniekit.parallel.memory import gradient_bytes, state_bytes, unit_bytes, weight_bytes

ENTRIES = [
    entry("a", 10, placement(shard=4)),
    entry("b", 10, placement(shard=4), "bfloat16"),
    entry("c", 10, placement()),
]


def test_state_is_divided_and_its_powers_are_not():
    """Over 4 ranks: 10 elements are chunks of 3; moments 2 * 4 bytes, a master copy 4, two powers 8 a parameter."""
    assert state_bytes(ENTRIES) == (3 * 8 + 8) + (3 * 12 + 8) + (10 * 8 + 8)
    assert state_bytes(ENTRIES, divided=False) == (10 * 8 + 8) + (10 * 12 + 8) + (10 * 8 + 8)


def test_weights_of_blocks_are_divided_and_one_block_is_whole():
    """Chunks of 3 of what a block has, 10 of the other; whole, a block has 4 chunks a parameter, the padding too."""
    first, second, other = ENTRIES
    entries = [replace(first, unit="0"), replace(second, unit="0"), replace(second, unit="1"), other]
    assert weight_bytes(entries) == 3 * 4 + 3 * 2 + 3 * 2 + 10 * 4
    assert unit_bytes(entries) == 12 * 4 + 12 * 2
    assert unit_bytes(ENTRIES) == 0


@pytest.mark.parametrize(
    ("zero_stage", "master_grad", "expected"),
    [(1, True, 120), (1, False, 100), (2, True, 72), (2, False, 64), (3, True, 72)],
)
def test_gradients_between_microbatches(zero_stage: int, master_grad: bool, expected: int):
    """Stage 2 keeps a chunk of 3 and a flag of what is divided: (3 + 1) * 4 instead of 10 * 4 bytes."""
    assert gradient_bytes(ENTRIES, zero_stage, master_grad) == expected
