"""How AdamW's two moments, which are computed in fp32, are stored between steps: in fp32, in bf16, or in 8 bits.

A second moment changes by a thousandth a step (beta2 0.999), less than half a step of bf16 or of 8 bits. Rounded to the
nearest it would never move again, so values are rounded up or down at random, with the true value as their mean.

8 bits: blocks of 256 numbers have a common fp32 scale, the largest of them, and each number is one of 256 multiples of
it, which lie closer together the smaller they are (Dettmers et al. 2021, arXiv 2110.02861, section 2). Of the second
moment the levels are those of its square root, by which the update divides: they reach twice as many orders of
magnitude down, and a positive one is never rounded to 0. Tensors below 4096 numbers stay in fp32. A checkpoint holds
fp32 values, from which the stored ones follow exactly, unless ckpt_quant_stage rounds them (moment_codes.py).
"""

from collections.abc import Mapping, MutableMapping
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
import paddle

from erniekit.parallel.memory import MOMENT_BLOCK, is_stored_in_blocks

MomentDtype = Literal["fp32", "bf16", "8bit"]
Fields = MutableMapping[str, paddle.Tensor]


class MomentStore(Protocol):
    """Keeps one moment of one parameter among the fields of its state."""

    def read(self, fields: Mapping[str, paddle.Tensor], moment: str) -> paddle.Tensor:
        """The moment, fp32, in the parameter's shape. Where it is stored in fp32, the tensor itself."""
        ...

    def write(self, fields: Fields, moment: str, values: paddle.Tensor, at_random: bool) -> None:
        """Store fp32 values, rounded at random or, if not `at_random`, to the nearest. Values as `read` gives them are
        stored exactly.
        """
        ...


def store_of(dtype: MomentDtype, num_elements: int) -> MomentStore:
    """How the moments of a parameter, or of this rank's chunk of it, are stored."""
    if dtype == "bf16":
        return _Bfloat16()
    return _Blocks() if dtype == "8bit" and is_stored_in_blocks(num_elements) else _Float32()


class _Float32:
    def read(self, fields: Mapping[str, paddle.Tensor], moment: str) -> paddle.Tensor:
        return fields[moment]

    def write(self, fields: Fields, moment: str, values: paddle.Tensor, at_random: bool) -> None:
        fields[moment] = values


class _Bfloat16:
    def read(self, fields: Mapping[str, paddle.Tensor], moment: str) -> paddle.Tensor:
        return fields[moment].astype("float32")

    def write(self, fields: Fields, moment: str, values: paddle.Tensor, at_random: bool) -> None:
        if at_random:
            # bf16 is the upper half of fp32. What is added to the lower half carries with its share of 2^16.
            bits = values.view("int32") + paddle.randint(0, 1 << 16, values.shape, dtype="int32")
            values = paddle.bitwise_and(bits, paddle.full([1], -(1 << 16), dtype="int32")).view("float32")
        fields[moment] = values.astype("bfloat16")


class _Blocks:
    def read(self, fields: Mapping[str, paddle.Tensor], moment: str) -> paddle.Tensor:
        codes, scales = fields[moment], fields[f"{moment}_scale"]
        levels = _levels(moment)
        levels = levels.square() if moment == "moment2" else levels
        values = paddle.gather(levels, codes.reshape([-1]).astype("int32"))
        return (_blocks(values) * scales.unsqueeze(-1)).reshape([-1])[: codes.size].reshape(codes.shape)

    def write(self, fields: Fields, moment: str, values: paddle.Tensor, at_random: bool) -> None:
        blocks = _blocks(values.reshape([-1]))
        scales = blocks.abs().max(axis=-1)
        shares = blocks / scales.clip(min=1e-38).unsqueeze(-1)
        shares = shares.sqrt() if moment == "moment2" else shares
        codes = _codes(shares, _levels(moment), at_random)
        if moment == "moment2":
            codes = paddle.maximum(codes, (shares > 0).astype("int64"))
        fields[moment] = codes.reshape([-1])[: values.size].reshape(values.shape).astype("uint8")
        fields[f"{moment}_scale"] = scales


def _blocks(flat: paddle.Tensor) -> paddle.Tensor:
    """[n] -> [blocks, 256], the last one filled up with zeros."""
    missing = -len(flat) % MOMENT_BLOCK
    whole = paddle.concat([flat, paddle.zeros([missing], dtype=flat.dtype)]) if missing else flat
    return whole.reshape([-1, MOMENT_BLOCK])


def _codes(shares: paddle.Tensor, levels: paddle.Tensor, at_random: bool) -> paddle.Tensor:
    """The number of a level next to each share: int64."""
    upper = paddle.searchsorted(levels, shares.contiguous()).clip(1, len(levels) - 1)
    low, high = (paddle.gather(levels, i.reshape([-1])).reshape(shares.shape) for i in (upper - 1, upper))
    threshold = paddle.uniform(shares.shape, min=0.0, max=1.0) if at_random else 0.5
    return upper - ((shares - low) / (high - low) < threshold).astype("int64")


@lru_cache(maxsize=2)
def _levels(moment: str) -> paddle.Tensor:
    """The multiples of a scale, rising: 0, 1, and between them seven powers of ten, each with twice as many equidistant
    levels as the one below; 256 for the second moment, 127 with either sign and 0 for the first.
    """
    signed = moment != "moment2"
    positive = []
    for power in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (power + (not signed)) + 1)
        positive.append(10.0 ** (power - 6) * (edges[:-1] + edges[1:]) / 2)
    levels = np.concatenate(positive)
    if signed:
        levels[-1] = 1.0
        levels = np.concatenate([-levels[::-1], [0.0], levels])
    else:
        levels = np.concatenate([[0.0], levels, [1.0]])
    return paddle.to_tensor(levels.astype(np.float32))
