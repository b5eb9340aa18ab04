"""Divides the vision transformer's work evenly over data ranks, whose rows have different numbers of patches. Rows stay
where they are: pixels travel to the rank that encodes them, features travel back, and their gradients the same way.

A unit of work is an image, or two frames of a video: attention stays within a frame, and the resampler joins pairs of
frames. Whole videos would be too coarse, since one of them may have more patches than all other pictures of a
microbatch together.

Legend: n ranks, U units, P patches, M tokens of pictures, D model.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import paddle

from erniekit.data.vision.positions import MERGED_FRAMES, num_tokens
from erniekit.parallel import comm
from erniekit.parallel.process_group import Group


class PatchLoad(NamedTuple):
    """Patches that the vision transformer encodes on the busiest of several ranks, summed over microbatches: if every
    rank encodes the pictures of its own rows, and as they are divided; `mean`: the mean over the ranks.
    """

    own: int = 0
    divided: int = 0
    mean: float = 0.0

    def plus(self, other: "PatchLoad") -> "PatchLoad":
        """The sum."""
        return PatchLoad(self.own + other.own, self.divided + other.divided, self.mean + other.mean)


def units_of(grid_N3: np.ndarray) -> np.ndarray:
    """The units of work of images and videos, in the order of their patches: frames, rows and columns, int64 [U, 3]."""
    units_U3 = np.repeat(grid_N3, np.maximum(grid_N3[:, 0] // MERGED_FRAMES, 1), axis=0)
    units_U3[:, 0] = np.minimum(units_U3[:, 0], MERGED_FRAMES)
    return units_U3


def divide(patches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The rank that encodes each unit, given the patches of the units of each rank: n arrays [U] -> n arrays [U].

    A rank keeps its own units, the largest first, up to the mean of all ranks. Of the others the largest goes first, to
    the rank that has least (Graham 1969, Bounds on multiprocessing timing anomalies, section 4). Where that does not
    lower the load of the busiest rank, every rank keeps its own.
    """
    own = [int(sizes.sum()) for sizes in patches]
    limit = max(-(-sum(own) // len(own)), *(int(sizes.max(initial=0)) for sizes in patches))
    encoders = [np.full(len(sizes), rank) for rank, sizes in enumerate(patches)]
    loads = [0] * len(patches)
    left: list[tuple[int, int, int]] = []  # (-patches, rank, unit)
    for rank, sizes in enumerate(patches):
        for unit in np.argsort(-sizes, kind="stable").tolist():
            size = int(sizes[unit])
            if loads[rank] + size <= limit:
                loads[rank] += size
            else:
                left.append((-size, rank, unit))
    emptiest = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(emptiest)
    for size, rank, unit in sorted(left):
        load, encoder = emptiest[0]
        heapq.heapreplace(emptiest, (load - size, encoder))
        encoders[rank][unit] = encoder
    if max(emptiest)[0] >= max(own):
        return [np.full(len(sizes), rank) for rank, sizes in enumerate(patches)]
    return encoders


@dataclass(frozen=True)
class PicturePlan:
    """How one rank of a group takes part in encoding the pictures of a microbatch. `units`: those of each rank, int64
    [U, 3]; `encoders`: the rank that encodes each of them.
    """

    group: Group
    units: Sequence[np.ndarray]
    encoders: Sequence[np.ndarray]
    merge_size: int

    @cached_property
    def _order(self) -> np.ndarray:
        """This rank's units, grouped by the rank that encodes them."""
        return np.argsort(self.encoders[self.group.index], kind="stable")

    @cached_property
    def _encoded(self) -> list[np.ndarray]:
        """The units of each rank that this rank encodes."""
        chosen = [encoders == self.group.index for encoders in self.encoders]
        return [units[mask] for units, mask in zip(self.units, chosen, strict=True)]

    @property
    def encoded_grid(self) -> np.ndarray:
        """The units that this rank encodes, of the first rank, the second, ...: int64 [U, 3]."""
        return np.concatenate(self._encoded)

    @cached_property
    def patch_counts(self) -> tuple[list[int], list[int]]:
        """Patches that this rank sends to each rank of the group, and that it receives from each."""
        sent = self._sums(self.units[self.group.index].prod(axis=1))
        return sent, [int(units.prod(axis=1).sum()) for units in self._encoded]

    @cached_property
    def token_counts(self) -> tuple[list[int], list[int]]:
        """Tokens whose features this rank sends to each rank of the group, and receives from each."""
        received = self._sums(num_tokens(self.units[self.group.index], self.merge_size))
        return [int(num_tokens(units, self.merge_size).sum()) for units in self._encoded], received

    def _sums(self, of_units: np.ndarray) -> list[int]:
        """The sum over this rank's units for each rank that encodes them."""
        own = self.encoders[self.group.index]
        return [int(of_units[own == rank].sum()) for rank in range(self.group.size)]

    def send_patches(self, patches: np.ndarray) -> paddle.Tensor:
        """The patches of this rank's pictures -> those of `encoded_grid`, uint8 [P, channels * size * size]."""
        assert patches.dtype == np.uint8, "ranks without pictures expect pixels"
        own = self.units[self.group.index].prod(axis=1)
        ordered = np.ascontiguousarray(patches[_regrouped(own, self._order)])
        return comm.all_to_all(paddle.to_tensor(ordered), *self.patch_counts, self.group)

    def return_features(self, features_MD: paddle.Tensor) -> paddle.Tensor:
        """The features of the tokens of `encoded_grid` -> those of this rank's pictures in the order of `returned`."""
        return comm.exchange_rows(features_MD, *self.token_counts, self.group)

    def returned(self, places_M: np.ndarray) -> np.ndarray:
        """One entry for each token of this rank's pictures, in the order in which features are returned."""
        counts = num_tokens(self.units[self.group.index], self.merge_size)
        return places_M[_regrouped(counts, self._order)]


def _regrouped(counts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The numbers of consecutive entries, `counts` of each unit, when the units are in another order."""
    starts = np.cumsum(counts) - counts
    moved = counts[order]
    return np.repeat(starts[order] - (np.cumsum(moved) - moved), moved) + np.arange(moved.sum())


@dataclass(frozen=True)
class PictureRanks:
    """The data ranks that divide the vision transformer's work on every microbatch."""

    group: Group
    merge_size: int

    def plan(self, grids: Sequence[np.ndarray]) -> tuple[list[PicturePlan | None], PatchLoad]:
        """The plan of each microbatch, given the grid [N, 3] of this rank's pictures in it; None where every rank
        encodes its own. All ranks call it with as many microbatches.
        """
        numbered = [np.insert(units_of(grid), 0, number, axis=1) for number, grid in enumerate(grids)]
        table = np.concatenate([np.zeros((0, 4), np.int64), *numbered])
        of_ranks = comm.gather_arrays(table, self.group)
        plans: list[PicturePlan | None] = []
        load = PatchLoad()
        for number in range(len(grids)):
            units = [table[table[:, 0] == number, 1:] for table in of_ranks]
            patches = [of_rank.prod(axis=1) for of_rank in units]
            encoders = divide(patches)
            load = load.plus(_load(patches, encoders))
            moves = any((own != rank).any() for rank, own in enumerate(encoders))
            plans.append(PicturePlan(self.group, units, encoders, self.merge_size) if moves else None)
        return plans, load


def _load(patches: Sequence[np.ndarray], encoders: Sequence[np.ndarray]) -> PatchLoad:
    divided = np.bincount(np.concatenate(encoders), np.concatenate(patches), len(patches))
    return PatchLoad(max(int(sizes.sum()) for sizes in patches), int(divided.max()), float(divided.mean()))
