"""Weights in 8 or 4 bits: codes and scales, from a matrix and back, in numpy. Every other implementation is compared
with this one.

A matrix W [in, out] is stored as w = scale * level[code]. A scale belongs to an output channel or, in 4 bits, to a
group of consecutive inputs of one channel: the group's largest |w| over the largest level, so that the largest |w| is
exact. Rounding goes to the nearest level: |w - w'| <= scale * half the widest gap between levels.

Codes lie channel by channel, [out, in] or two a byte [out, ceil(in / 2)]: input 2i in the low half of byte i, input
2i + 1 in the high half. A last group may be short, and with an odd number of inputs the last high half is unused.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from erniekit.precision.codes import CodeSpec, choose_scales, decode, encode, symmetric
from erniekit.utils.arrays import transposed

_BLOCK = 1 << 20  # weights a step: bounds the temporaries


def _nf4_levels() -> np.ndarray:
    """[16] fp32, ascending, -1 to 1 with an exact 0: quantiles of the normal distribution (QLoRA: Dettmers et al. 2023,
    arXiv 2305.14314, section 3). Eight positive ones and seven negative ones are evenly spaced in probability between
    0.5 and the mean of 1 - 1/30 and 1 - 1/32, and divided by the largest.
    """
    top = 1 - (1 / 30 + 1 / 32) / 2
    positive, negative = (
        [NormalDist().inv_cdf(0.5 + (top - 0.5) * step / count) for step in range(1, count + 1)] for count in (8, 7)
    )
    levels = np.array([-value for value in reversed(negative)] + [0.0] + positive)
    return (levels / levels[-1]).astype(np.float32)


@dataclass(frozen=True)
class Scheme:
    """How a matrix is stored. `group`: the number of inputs that share a scale; None: all of them. `levels`: the values
    that the codes stand for, ascending: [16] of a 4-bit code, [255] of an 8-bit code, which begins at -127.
    """

    name: str
    bits: int
    group: int | None
    levels: tuple[float, ...]

    def groups(self, num_in: int) -> int:
        """Scales of one output channel with `num_in` inputs."""
        return 1 if self.group is None else -(-num_in // self.group)

    def width(self, num_in: int) -> int:
        """Bytes of codes of one output channel with `num_in` inputs."""
        return num_in if self.bits == 8 else -(-num_in // 2)

    def num_bytes(self, num_in: int, num_out: int) -> int:
        """Bytes of codes and fp32 scales of one matrix."""
        return num_out * (self.width(num_in) + 4 * self.groups(num_in))


INT8 = Scheme("int8", 8, None, tuple(float(k) for k in range(-127, 128)))
INT4 = Scheme("int4", 4, 64, tuple(float(k) for k in range(-8, 8)))  # -8 is not used: symmetric
NF4 = Scheme("nf4", 4, 64, tuple(_nf4_levels().tolist()))


@dataclass(frozen=True)
class Schemes:
    """The schemes of a model: one for the projections of attention, dense blocks and shared experts, and one for the
    routed experts.
    """

    projections: Scheme
    experts: Scheme


# By compute_type.
SCHEMES = {
    "wint8": Schemes(INT8, INT8),
    "wint4": Schemes(INT4, INT4),
    "wint4/8": Schemes(INT8, INT4),
    "nf4": Schemes(NF4, NF4),
}


def quantise(weight: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """weight [in, out] floating -> codes (int8 [out, in], or uint8 [out, ceil(in/2)]), scales [out, groups] fp32.

    Raises ValueError where a weight is not finite.
    """
    num_in, num_out = weight.shape
    codes = np.empty((num_out, scheme.width(num_in)), np.int8 if scheme.bits == 8 else np.uint8)
    scales = np.empty((num_out, scheme.groups(num_in)), np.float32)
    rows = max(1, _BLOCK // max(num_in, 1))
    for begin in range(0, num_out, rows):
        block = slice(begin, begin + rows)
        channels = _transposed(weight[:, block])
        if scheme is not NF4:
            spec = _spec(scheme)
            scales[block] = choose_scales(channels, spec)
            found = encode(channels, scales[block], spec)
            codes[block] = found if scheme.bits == 8 else pack(found + 8)
            continue
        grouped = _grouped(channels, scheme)
        largest = np.abs(grouped).max(axis=-1)
        if not np.isfinite(largest).all():
            raise ValueError("a weight is not finite")
        scales[block] = largest / np.float32(scheme.levels[-1])
        # Where a group is all zeros, or so small that its scale is, every code is that of 0.
        divisor = np.where(scales[block] > 0, scales[block], np.float32(np.inf))
        grouped /= divisor[..., None]
        codes[block] = _nf4_codes(grouped.reshape(grouped.shape[0], -1)[:, :num_in])
    return codes, scales


def dequantise(codes: np.ndarray, scales: np.ndarray, scheme: Scheme, num_in: int) -> np.ndarray:
    """The inverse: codes and scales as `quantise` gives them -> weight [in, out] fp32."""
    if scheme is not NF4:
        whole = codes if scheme.bits == 8 else unpack(codes, num_in).astype(np.int8) - 8
        return _transposed(decode(whole, scales, _spec(scheme)))
    grouped = _grouped(np.asarray(scheme.levels, np.float32)[unpack(codes, num_in)], scheme)
    grouped = grouped * scales[..., None]
    return _transposed(grouped.reshape(len(codes), -1)[:, :num_in])


def _spec(scheme: Scheme) -> CodeSpec:
    """The codes of a scheme of whole numbers; its scales are not rounded, as no file keeps them."""
    return symmetric(scheme.bits, scheme.group, scale_type="fp32")


def pack(codes: np.ndarray) -> np.ndarray:
    """[..., n] of 0..15 -> uint8 [..., ceil(n / 2)], the even ones in the low halves."""
    codes = codes.astype(np.uint8, copy=False)
    packed = codes[..., 0::2].copy()
    packed[..., : codes.shape[-1] // 2] |= codes[..., 1::2] << 4
    return packed


def unpack(packed: np.ndarray, length: int) -> np.ndarray:
    """uint8 [..., ceil(n / 2)] -> [..., n] of 0..15, n = `length`."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)[..., :length]


def _transposed(weight: np.ndarray) -> np.ndarray:
    """[in, out] -> [out, in] fp32."""
    return transposed(weight.astype(np.float32, copy=False))


def _grouped(rows: np.ndarray, scheme: Scheme) -> np.ndarray:
    """[out, in] -> [out, groups, group], zeros behind a short last group."""
    num_out, num_in = rows.shape
    size = scheme.group or num_in
    missing = scheme.groups(num_in) * size - num_in
    return (np.pad(rows, ((0, 0), (0, missing))) if missing else rows).reshape(num_out, -1, size)


def _nf4_codes(values: np.ndarray) -> np.ndarray:
    """Packed codes of the nearest levels for `values` [out, in] in scales."""
    levels, codes = np.asarray(NF4.levels, np.float32), np.zeros(values.shape, np.uint8)
    for border in (levels[1:] + levels[:-1]) / 2:  # ten times as fast as a binary search
        codes += values > border
    return pack(codes)
