"""The order in which the records of several sources are read: a pure function of the seed, the sizes and the shares.

Randomness is counter-based (SplitMix64, Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"):
the n-th draw is a hash of (seed, ..., n). Any position in the order can therefore be computed without replaying the
draws before it, and the order does not change with a numpy release.

The order is divided into rounds. With `concat` and the two `interleave` strategies a round is an epoch; with `random`,
which has no natural end, it is a block of draws.

* concat: every record of every source once; shares are not used. With shuffling it is one permutation of all records,
  without it one source after another.
* interleave_under: each draw picks a source with the probability of its share and uses that source's next record. The
  epoch ends with the draw of the last record of any source, so the other sources are not read completely.
* interleave_over: the same draws, but an exhausted source starts again (in a new order if shuffled). The epoch ends
  with the draw that completes the last source.
* random: the same draws without an end. Every record of a source is used once, in random order, before any of them is
  used again.
"""

import threading
from collections.abc import Sequence

import numpy as np

from erniekit.utils.errors import DataError

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_BLOCK = 65536  # draws in a round of `random`
_LONGEST_EPOCH, _MANY_PASSES = 1 << 28, 100  # samples, and passes through all sources: a longer epoch is a mistake
_CHUNK = 65536  # draws made at a time while searching for the end of an epoch


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, a bijection of the 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(key: Sequence[int], start: int, stop: int) -> np.ndarray:
    """The random numbers start..stop-1 of the sequence that belongs to `key`: uint64 [stop - start]."""
    state = 0
    for number in key:
        state = int(_mix(np.array([(state ^ number) + _GOLDEN & _MASK], np.uint64))[0])
    counters = np.arange(start + 1, stop + 1, dtype=np.uint64)
    return _mix(np.uint64(state) + counters * np.uint64(_GOLDEN))


def uniform_numbers(key: Sequence[int], start: int, stop: int) -> np.ndarray:
    """The same as numbers in [0, 1), float64: their upper 53 bits, the precision of a double."""
    return (random_bits(key, start, stop) >> np.uint64(11)) * 2.0**-53


def permutation(n: int, key: Sequence[int]) -> np.ndarray:
    """A random permutation of 0..n-1, integers [n] (4 bytes each if n is below 2^32). It sorts n random numbers,
    which are all different since the hash is a bijection.
    """
    order = np.argsort(random_bits(key, 0, n))
    return order.astype(np.uint32 if n < 2**32 else np.int64)


def _require_an_end(sizes: Sequence[int], probs: Sequence[float]) -> None:
    """Raise DataError if an epoch of interleave_over, whose draws are all in memory, would be too long to begin."""
    length, size, prob = max((size / prob, size, prob) for size, prob in zip(sizes, probs, strict=True))
    if length > max(_LONGEST_EPOCH, _MANY_PASSES * sum(sizes)):
        raise DataError(
            f"train_dataset_prob: mix_strategy: interleave_over reads every source to its end, so that {size:,} "
            f"records with a share of {prob:g} make an epoch of about {length:,.0f} samples. Hint: raise that share, "
            "or set mix_strategy to interleave_under, or to random with max_steps."
        )


class Sampler:
    """The order of the records of sources with the given `sizes` and `probs` (which sum to 1). Records are numbered
    consecutively over all sources.
    """

    def __init__(self, sizes: Sequence[int], probs: Sequence[float], strategy: str, seed: int, shuffle: bool):
        self.strategy, self._sizes, self._seed, self._shuffle = strategy, list(sizes), seed, shuffle
        if strategy == "interleave_over":
            _require_an_end(sizes, probs)
        # a random number u in [0, 1) picks the source whose interval [edge, next edge) contains u
        self._edges = np.cumsum(np.asarray(probs, np.float64))[:-1]
        self._bases = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self._lock = threading.Lock()  # protects the two caches below, since several threads may ask for rounds
        # for `random`: the number of records used of each source before round r
        self._num_used = [np.zeros(len(sizes), np.int64)]
        # source -> (key, permutation) of its latest pass
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
        """The sources that draws start..stop-1 pick: uint16 [stop - start]."""
        return np.searchsorted(self._edges, uniform_numbers((*key, 1), start, stop), side="right").astype(np.uint16)

    def _random_round(self, number: int) -> np.ndarray:
        # Where a round continues in each source depends on how often earlier rounds picked it. Counting their picks is
        # cheap, and the counts are cached.
        while len(self._num_used) <= number:
            before = len(self._num_used) - 1
            picks = self._picks((self._seed,), before * _BLOCK, (before + 1) * _BLOCK)
            self._num_used.append(self._num_used[-1] + np.bincount(picks, minlength=len(self._sizes)))
        picks = self._picks((self._seed,), number * _BLOCK, (number + 1) * _BLOCK)
        return self._records(picks, self._num_used[number], (self._seed,))

    def _epoch_picks(self, number: int) -> np.ndarray:
        """The sources that the draws of an interleaved epoch pick, up to its end."""
        # Draw in chunks until one source (interleave_under) or every source (interleave_over) has had its last record
        # drawn; the earliest or the latest of these draws is the end of the epoch.
        find_end = min if self.strategy == "interleave_under" else max
        chunks: list[np.ndarray] = []
        # counts: draws of each source so far; ends: the draw that uses its last record, -1 if there is none yet
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

    def _records(self, picks: np.ndarray, num_used: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
        """The record numbers for the picks, if `num_used` records of each source have been used before."""
        ids = np.empty(len(picks), np.int64)
        for s, size in enumerate(self._sizes):
            places = np.flatnonzero(picks == s)
            # These picks are draws first..last-1 of source s. Draw d uses record d % size of pass d // size through the
            # source, and every pass has its own permutation.
            first, last = int(num_used[s]), int(num_used[s]) + len(places)
            for walk in range(first // size, -(-last // size)):
                start, stop = max(first, walk * size), min(last, (walk + 1) * size)
                within = self._walk(s, (*key, 2, s, walk)) if self._shuffle else np.arange(size)
                ids[places[start - first : stop - first]] = (
                    self._bases[s] + within[start - walk * size : stop - walk * size]
                )
        return ids

    def _walk(self, source: int, key: tuple[int, ...]) -> np.ndarray:
        """The order of a source's records in one pass through it. The latest is cached, since a pass through a large
        source spans many rounds.
        """
        if source not in self._last or self._last[source][0] != key:
            self._last[source] = (key, permutation(self._sizes[source], key))
        return self._last[source][1]
