"""NEFTune: noise on the embeddings while training (Jain et al. 2023, arXiv 2310.05914, algorithm 1).

The noise is made of counters, as the masks of nn/dropout.py are: a number is a hash of (seed, step, document, position,
feature). So packing, microbatches, the division over ranks and resuming change none of it.

Legend: T tokens, D model.
"""

from dataclasses import dataclass

import numpy as np

from erniekit.nn.attention_mask import AttentionPlan
from erniekit.nn.dropout import mix, mix32, number_documents

# Odd constants that keep the parts of a counter apart.
_STEP, _FEATURE = np.uint64(0x9FB21C651E98DF25), np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True)
class NoiseStep:
    """What a training step asks for: noise of the strength `alpha`."""

    alpha: float
    seed: int
    step: int


@dataclass(frozen=True)
class EmbeddingNoise:
    """The noise of one pass: `bounds` fp32 [T], the largest number for each token, and `counters` uint32 [T]."""

    bounds: np.ndarray
    counters: np.ndarray

    def part(self, own: np.ndarray, padding: int) -> "EmbeddingNoise":
        """That of the tokens `own`, and none on the padding behind them."""
        return EmbeddingNoise(*(np.pad(values[own], (0, padding)) for values in (self.bounds, self.counters)))

    def rows(self, start: int, stop: int, width: int) -> np.ndarray:
        """The noise of the tokens [start, stop), fp32 [stop - start, D]: uniform between the bounds."""
        with np.errstate(over="ignore"):  # counters wrap around
            features = (mix(np.arange(width, dtype=np.uint64) * _FEATURE) >> np.uint64(32)).astype(np.uint32)
            bits = mix32(self.counters[start:stop, None] + features)
        unit = bits.astype(np.float32) * np.float32(2.0**-31) - np.float32(1.0)
        unit *= self.bounds[start:stop, None]
        return unit


def make_noise(
    wanted: NoiseStep, input_ids_T: np.ndarray, plan: AttentionPlan, prefixes: np.ndarray | None, width: int
) -> EmbeddingNoise:
    """The noise of a packed batch, between +-alpha / sqrt(length * D) in each document."""
    lengths = np.bincount(plan.document_of_token)[plan.document_of_token]
    bounds = (wanted.alpha / np.sqrt(lengths * width)).astype(np.float32)
    documents = number_documents(input_ids_T, plan, prefixes)
    with np.errstate(over="ignore"):  # counters wrap around
        start = mix(np.uint64(wanted.seed) * _FEATURE + np.uint64(wanted.step) * _STEP)
        counters = mix(documents[plan.document_of_token] + start + plan.position_in_document.astype(np.uint64) * _STEP)
    return EmbeddingNoise(bounds, (counters >> np.uint64(32)).astype(np.uint32))
