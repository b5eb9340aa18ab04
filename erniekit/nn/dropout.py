"""Dropout of attention weights whose masks follow from what is masked, not from where or when it is computed.

Whether a weight is dropped is a hash of (seed, step, layer, head, document, query position, key position): counters in
place of a generator's state (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). A document stands for
its tokens and positions count from its beginning. So packing, microbatches, the division over ranks, recomputation and
resuming change no mask, and nothing has to be saved. Two documents with the same tokens in one step share their mask.
"""

from dataclasses import dataclass

import numpy as np
import paddle

from erniekit.nn.attention_mask import AttentionPlan, Bucket

# Odd constants that keep the parts of a counter apart; the first is 2^64 over the golden ratio.
_STRIDE = np.uint64(0x9E3779B97F4A7C15)
_STEP, _LAYER, _HEAD = np.uint64(0xD1B54A32D192ED03), np.uint64(0x8CB92BA72F3D8DD7), np.uint64(0xABC98388FB8FAC03)


@dataclass(frozen=True)
class DropoutStep:
    """What a training step asks for. `rate`: the share of weights that a layer behind the last would drop; layer i of n
    drops i / n of it (the first none), as ERNIEKit does.
    """

    rate: float
    seed: int
    step: int

    def rate_of(self, layer: int, num_layers: int) -> float:
        """The share that a layer drops. Multi-token-prediction blocks are numbered behind the layers."""
        return self.rate * min(layer, num_layers) / num_layers


@dataclass(frozen=True)
class AttentionDropout:
    """Dropout of one batch: `documents` uint64 [documents] from `number_documents`, `first_head` the number of this
    process's first query head in the whole model.
    """

    step: DropoutStep
    num_layers: int
    documents: np.ndarray
    first_head: int = 0

    def rate_of(self, layer: int) -> float:
        """The share that a layer drops."""
        return self.step.rate_of(layer, self.num_layers)

    def masks(self, layer: int, plan: AttentionPlan, num_heads: int, num_kv_heads: int) -> "LayerMasks | None":
        """The masks of a layer, or None where it drops nothing."""
        rate = self.rate_of(layer)
        if rate == 0.0:
            return None
        with np.errstate(over="ignore"):  # counters wrap around
            heads = self._head_numbers(layer, num_heads)
            buckets = [_counters(bucket, plan, self.documents, heads) for bucket in plan.buckets]
        return LayerMasks(rate, num_kv_heads, buckets)

    def seed_of(self, layer: int) -> int:
        """The seed, below 2^63, for a kernel that draws the masks of a whole batch itself. It follows from everything
        that decides a mask except the positions.
        """
        with np.errstate(over="ignore"):
            order = np.arange(len(self.documents), dtype=np.uint64)
            batch = mix(self.documents + order * _STRIDE).sum(dtype=np.uint64)
            return int(mix(self._head_numbers(layer, 1)[0] + batch) >> np.uint64(1))

    def _head_numbers(self, layer: int, num_heads: int) -> np.ndarray:
        """A number for each of this process's first heads in a layer and step: uint64 [num_heads]."""
        start = mix(np.uint64(self.step.seed) * _STRIDE + np.uint64(self.step.step) * _STEP)
        start = mix(start + np.uint64(layer) * _LAYER)
        numbers: np.ndarray = np.arange(self.first_head, self.first_head + num_heads, dtype=np.uint64)
        return mix(start + numbers * _HEAD)


@dataclass(frozen=True)
class LayerMasks:
    """`buckets`: for each of the plan's buckets the counters of its queries [N, H, L] and of the tokens that they see
    [N, F + L], uint32.
    """

    rate: float
    num_kv_heads: int
    buckets: list[tuple[np.ndarray, np.ndarray]]

    def block(self, bucket: int, start: int, stop: int) -> paddle.Tensor:
        """What the weights at the query positions [start, stop) of a bucket are multiplied with: 0, or 1 / (1 - rate)
        for those that are kept. fp32 [N, G, (stop - start) * r, F + stop]; rows run position by position, r heads each.
        """
        queries, keys = self.buckets[bucket]
        num_documents, num_heads, length = queries.shape
        groups, repeat = self.num_kv_heads, num_heads // self.num_kv_heads
        rows = queries[:, :, start:stop].reshape(num_documents, groups, repeat, stop - start)
        rows = rows.transpose(0, 1, 3, 2).reshape(num_documents, groups, -1)
        columns = keys[:, : keys.shape[1] - length + stop]
        out = np.empty((num_documents, groups, rows.shape[2], columns.shape[1]), np.float32)
        scale, threshold = np.float32(1.0 / (1.0 - self.rate)), np.uint32(min(round(self.rate * 2**32), 2**32 - 1))
        for document in range(num_documents):
            for group in range(groups):
                bits = mix32(rows[document, group][:, None] + columns[document])
                np.multiply(bits >= threshold, scale, out=out[document, group])
        return paddle.to_tensor(out)


def number_documents(input_ids_T: np.ndarray, plan: AttentionPlan, prefixes: np.ndarray | None) -> np.ndarray:
    """A number for each document, from its tokens and those of its prefix: uint64 [documents]."""
    with np.errstate(over="ignore"):
        words = mix(input_ids_T.astype(np.uint64) * _STEP + plan.position_in_document.astype(np.uint64) * _STRIDE)
        starts = np.flatnonzero(np.diff(plan.document_of_token, prepend=-1))
        numbers = mix(np.add.reduceat(words, starts))
        if prefixes is not None:
            branches = np.flatnonzero(prefixes >= 0)
            numbers[branches] = mix(numbers[branches] + numbers[prefixes[branches]] * _LAYER)
    return numbers


def _counters(
    bucket: Bucket, plan: AttentionPlan, documents: np.ndarray, heads: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """See LayerMasks.buckets."""
    own = documents[plan.document_of_token[bucket.tokens[:, 0]]]
    position = plan.position_in_document.astype(np.uint64)
    queries = mix(own[:, None] + position[bucket.tokens] * _STRIDE)
    queries = mix(queries[:, None] + heads[:, None])
    seen = np.concatenate([position[bucket.prefix], position[bucket.tokens]], axis=1)
    keys = mix(own[:, None] * _HEAD + seen * _STRIDE + _LAYER)
    return (queries >> np.uint64(32)).astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)


def mix(x: np.ndarray) -> np.ndarray:
    """A uint64 whose bits all depend on all bits of x (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix32(x: np.ndarray) -> np.ndarray:
    """Mix the bits of uint32 numbers in place (the finaliser of MurmurHash3)."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x
