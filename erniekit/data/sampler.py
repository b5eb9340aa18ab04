"""In which order the records of several sources are read: a pure function of the seed, the sizes and the shares.

Randomness is counter-based (SplitMix64, Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"):
the n-th draw is a hash of (seed, ..., n), so any place of the order can be found again without replaying what came
before it, and the order does not change with a numpy release.

The order comes in rounds. With `concat` and the two `interleave` strategies a round is an epoch; with `random`, which
has no natural end, it is a block of draws.

* concat: every record of every source once; shares are not used. Shuffled: one permutation over all sources together.
  Not shuffled: source after source.
* interleave_under: each draw picks a source with the probability of its share and takes that source's next record; the
  epoch ends with the draw that takes some source's last record, so the others are not seen whole.
* interleave_over: the same draws, but a source that has run out starts over (in a new order if shuffled); the epoch
  ends with the draw by which every source has been seen whole.
* random: the same draws without an end. Each source is walked through whole, in an order of its own, before any of its
  records comes again.
"""

import threading
from collections.abc import Sequence

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_BLOCK = 65536  # draws in a round of `random`
_CHUNK = 65536  # draws made at a time while looking for the end of an epoch


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(key: Sequence[int], start: int, stop: int) -> np.ndarray:
    """Numbers start..stop-1 of the random sequence of `key`: uint64 [stop - start]."""
    state = 0
    for part in key:
        state = int(_mix(np.array([(state ^ part) + _GOLDEN & _MASK], np.uint64))[0])
    counters = np.arange(start + 1, stop + 1, dtype=np.uint64)
    return _mix(np.uint64(state) + counters * np.uint64(_GOLDEN))


def permutation(n: int, key: Sequence[int]) -> np.ndarray:
    """A random permutation of 0..n-1: the order of n random numbers, which are all different (the hash is a bijection).
    Integers [n], 4 bytes each below 2^32 records.
    """
    order = np.argsort(random_bits(key, 0, n))
    return order.astype(np.uint32 if n < 2**32 else np.int64)


class Sampler:
    """The order of the records of sources with these `sizes` and `probs` (which sum to 1). A record's number counts
    through all sources.
    """

    def __init__(self, sizes: Sequence[int], probs: Sequence[float], strategy: str, seed: int, shuffle: bool):
        self.strategy, self._sizes, self._seed, self._shuffle = strategy, list(sizes), seed, shuffle
        # a draw u in [0, 1) picks the source whose interval holds it
        self._edges = np.cumsum(np.asarray(probs, np.float64))[:-1]
        self._bases = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self._lock = threading.Lock()  # the two below are shared by the threads that ask
        self._taken = [np.zeros(len(sizes), np.int64)]  # random: records taken of each source before round r
        # source -> its most recent permutation, and the key of it
        self._last: dict[int, tuple[tuple[int, ...], np.ndarray]] = {}

    @property
    def endless(self) -> bool:
        """Whether rounds are blocks of an endless stream rather than epochs."""
        return self.strategy == "random"

    def round(self, number: int) -> np.ndarray:
        """The record numbers of a round in order, int64 [N]."""
        with self._lock:
            return self._round(number)

    def _round(self, number: int) -> np.ndarray:
        if self.strategy == "concat":
            total = sum(self._sizes)
            ids = permutation(total, (self._seed, number)) if self._shuffle else np.arange(total)
            return ids.astype(np.int64)
        if self.strategy == "random":
            return self._random_round(number)
        picks = self._epoch_picks(number)
        return self._records(picks, np.zeros(len(self._sizes), np.int64), (self._seed, number))

    def _picks(self, key: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """The sources of draws start..stop-1: uint16 [stop - start]."""
        uniform = (random_bits((*key, 1), start, stop) >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(self._edges, uniform, side="right").astype(np.uint16)

    def _random_round(self, number: int) -> np.ndarray:
        while len(self._taken) <= number:
            before = len(self._taken) - 1
            picks = self._picks((self._seed,), before * _BLOCK, (before + 1) * _BLOCK)
            self._taken.append(self._taken[-1] + np.bincount(picks, minlength=len(self._sizes)))
        picks = self._picks((self._seed,), number * _BLOCK, (number + 1) * _BLOCK)
        return self._records(picks, self._taken[number], (self._seed,))

    def _epoch_picks(self, number: int) -> np.ndarray:
        """The sources that an interleaved epoch draws from, up to its end."""
        find_end = min if self.strategy == "interleave_under" else max
        chunks: list[np.ndarray] = []
        # ends: the draw that takes a source's last record
        counts, ends = np.zeros(len(self._sizes), np.int64), [-1] * len(self._sizes)
        enough = 1 if self.strategy == "interleave_under" else len(self._sizes)
        while sum(end >= 0 for end in ends) < enough:
            start = len(chunks) * _CHUNK
            chunks.append(self._picks((self._seed, number), start, start + _CHUNK))
            for s, size in enumerate(self._sizes):
                drawn = np.flatnonzero(chunks[-1] == s)
                if ends[s] < 0 and counts[s] + len(drawn) >= size:
                    ends[s] = start + int(drawn[size - counts[s] - 1])
                counts[s] += len(drawn)
        return np.concatenate(chunks)[: find_end(end for end in ends if end >= 0) + 1]

    def _records(self, picks: np.ndarray, taken: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
        """Record numbers for the picked sources, of which `taken` records have been taken before."""
        ids = np.empty(len(picks), np.int64)
        for s, size in enumerate(self._sizes):
            places = np.flatnonzero(picks == s)
            # these are the source's first-th to (last - 1)-th draws
            first, last = int(taken[s]), int(taken[s]) + len(places)
            for walk in range(first // size, -(-last // size)):
                start, stop = max(first, walk * size), min(last, (walk + 1) * size)
                within = self._walk(s, (*key, 2, s, walk)) if self._shuffle else np.arange(size)
                ids[places[start - first : stop - first]] = (
                    self._bases[s] + within[start - walk * size : stop - walk * size]
                )
        return ids

    def _walk(self, source: int, key: tuple[int, ...]) -> np.ndarray:
        """The order of a source's records in one walk through it; the latest is kept, since a big source's walk spans
        many rounds.
        """
        if source not in self._last or self._last[source][0] != key:
            self._last[source] = (key, permutation(self._sizes[source], key))
        return self._last[source][1]
