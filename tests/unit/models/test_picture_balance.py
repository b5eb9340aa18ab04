"""How data ranks divide the pictures of a microbatch: evenly, whole, and with as little moved as that needs."""

import numpy as np
import pytest

from erniekit.models.picture_balance import PatchLoad, PicturePlan, PictureRanks, divide, units_of
from erniekit.parallel.process_group import Group


def loads(patches: list[list[int]]) -> tuple[list[int], int]:
    """Patches of each rank after the division, and how many units moved."""
    arrays = [np.array(sizes, np.int64) for sizes in patches]
    encoders = divide(arrays)
    moved = sum(int((of_rank != rank).sum()) for rank, of_rank in enumerate(encoders))
    total = np.bincount(np.concatenate(encoders), np.concatenate(arrays), len(patches))
    return total.astype(int).tolist(), moved


def test_the_units_are_images_and_pairs_of_frames():
    units = units_of(np.array([[1, 4, 6], [6, 2, 2], [2, 8, 8]]))
    assert units.tolist() == [[1, 4, 6], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 8, 8]]
    assert units_of(np.zeros((0, 3), np.int64)).shape == (0, 3)


def test_work_moves_from_the_busy_to_the_idle():
    assert loads([[4, 4, 4, 4], [], []]) == ([8, 4, 4], 2)
    assert loads([[8, 8, 8, 8], []]) == ([16, 16], 2)
    assert loads([[16, 4, 4], [4]]) == ([16, 12], 2)


@pytest.mark.parametrize("patches", [[[6, 4], [6, 4]], [[16], [4, 4]], [[5, 5, 5], [6, 6, 5]], [[], []], [[7], [7]]])
def test_nothing_moves_where_that_would_not_help(patches: list[list[int]]):
    assert loads(patches) == ([sum(sizes) for sizes in patches], 0)


def test_no_division_is_worse_than_none_or_far_from_even():
    """A list schedule is at most the mean and one unit (Graham 1969)."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        patches = [(4 * rng.integers(1, 40, rng.integers(0, 9))).tolist() for _ in range(rng.integers(2, 9))]
        found, _ = loads(patches)
        own = [sum(sizes) for sizes in patches]
        largest = max((size for sizes in patches for size in sizes), default=0)
        assert sum(found) == sum(own) and max(found) <= max(own)
        assert max(found) <= sum(own) / len(own) + largest


def plans(grids: list[np.ndarray]) -> list[PicturePlan]:
    """The plan of a microbatch as each rank has it."""
    units = [units_of(grid) for grid in grids]
    encoders = divide([of_rank.prod(axis=1) for of_rank in units])
    return [PicturePlan(Group(tuple(range(len(grids))), i), units, encoders, 2) for i in range(len(grids))]


def test_the_plans_of_all_ranks_fit_together():
    of_ranks = plans([np.array([[1, 4, 4], [8, 2, 4], [1, 2, 2]]), np.zeros((0, 3), np.int64), np.array([[1, 2, 6]])])
    for i, here in enumerate(of_ranks):
        for j, there in enumerate(of_ranks):
            assert here.patch_counts[0][j] == there.patch_counts[1][i]
            assert here.token_counts[0][j] == there.token_counts[1][i]
        assert here.encoded_grid.prod(axis=1).sum() == sum(here.patch_counts[1])
    assert sum(len(plan.encoded_grid) for plan in of_ranks) == 1 + 4 + 1 + 1


def test_features_come_back_grouped_by_the_rank_that_encodes_them():
    """Of one rank's three pictures the large one stays; the two small ones come back behind it."""
    here, there = plans([np.array([[1, 2, 2], [1, 4, 4], [1, 2, 2]]), np.zeros((0, 3), np.int64)])
    assert here.encoders[0].tolist() == [1, 0, 1] and there.encoded_grid.tolist() == [[1, 2, 2], [1, 2, 2]]
    assert here.returned(np.array([3, 10, 11, 12, 13, 20])).tolist() == [10, 11, 12, 13, 3, 20]
    assert here.patch_counts == ([16, 8], [16, 0]) and here.token_counts == ([4, 0], [4, 2])


def test_one_rank_divides_nothing():
    found, load = PictureRanks(Group((0,), 0), 2).plan([np.array([[1, 4, 4]]), np.zeros((0, 3), np.int64)])
    assert found == [None, None] and load == PatchLoad(16, 16, 16.0)
