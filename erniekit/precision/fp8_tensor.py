"""Tensors in FP8: codes, and a scale for each tile, from a tensor and back, by operations that any device has.

A tile's factor is the format's largest value over the tile's largest magnitude, rounded down to a power of two where
asked; codes are the values times the factor, rounded as precision/rounding.py does, and the stored scale is the
inverse of the factor. With powers of two a code times its scale is exact in bfloat16 and in fp32. The same arithmetic
is that of Paddle's fp8_quant_blockwise: a tile of zeros has factor 1, and the largest factor is 2**127. A value that is
not finite does not enter the largest magnitude and becomes NaN, so that it reaches the loss.
"""

import math
from dataclasses import dataclass
from typing import Literal

import paddle

from erniekit.precision.rounding import FORMATS

Fp8Format = Literal["e4m3", "e5m2"]

_DTYPES = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
_NAN_CODE = 0x7F  # in both formats
_MANTISSA = 1 << 23  # one unit of the exponent in the bits of an fp32 number
_LARGEST_FACTOR = 2.0**127


@dataclass(frozen=True)
class Tile:
    """The values that share a scale: that many rows and columns of a matrix; None: all of them."""

    rows: int | None
    columns: int | None


@dataclass(frozen=True)
class Quantised:
    """A tensor [..., A, B] in FP8: `codes` of its shape, `scales` [..., tiles of A, tiles of B] fp32. At the ends of
    rows and columns, tiles may be incomplete.
    """

    codes: paddle.Tensor
    scales: paddle.Tensor
    tile: Tile

    def dequantised(self) -> paddle.Tensor:
        """The values that the codes stand for, in fp32."""
        tiles = tiles_of(self.codes.astype("float32"), self.tile)
        *_, num_rows, num_columns = self.codes.shape
        return from_tiles(tiles * self.scales.unsqueeze(-1).unsqueeze(-3), num_rows, num_columns)


@paddle.no_grad()
def quantise(x: paddle.Tensor, tile: Tile, form: Fp8Format = "e4m3", pow2: bool = True) -> Quantised:
    """A floating tensor [..., A, B] in FP8. `pow2`: scales are powers of two."""
    *_, num_rows, num_columns = x.shape
    tiles, largest = tiles_of(x.astype("float32"), tile), FORMATS[form].largest
    finite = paddle.isfinite(tiles)
    # On a CPU looking is cheaper than the two selections; on other devices it would have the host wait.
    all_finite = x.place.is_cpu_place() and bool(finite.all())
    if not all_finite:
        tiles = paddle.where(finite, tiles, paddle.zeros_like(tiles))
    amax = tiles.abs().max(axis=[-3, -1], keepdim=True)
    factor = _factor(amax, form, pow2)
    # Clipped first: Paddle's cast on a CPU makes values just beyond the largest one NaN, and NaN the largest one.
    codes = (tiles * factor).clip_(-largest, largest).astype(_DTYPES[form])
    if not all_finite:
        bits = codes.view("uint8").astype("int32")
        codes = paddle.where(finite, bits, paddle.full_like(bits, _NAN_CODE)).astype("uint8").view(_DTYPES[form])
    scales = paddle.ones_like(factor) / factor
    return Quantised(from_tiles(codes, num_rows, num_columns), scales.squeeze([-3, -1]), tile)


def _factor(amax: paddle.Tensor, form: Fp8Format, pow2: bool) -> paddle.Tensor:
    """What the values of tiles are multiplied by; 1 for a tile of zeros."""
    largest = FORMATS[form].largest
    if pow2:
        # From the bits, as Paddle's division on a CPU may be wrong by a unit in the last place: that would halve the
        # factor of a tile whose quotient is a power of two. Both formats end at 1.75 times a power of two.
        bits = amax.view("int32")
        exponent, mantissa = bits // _MANTISSA, bits % _MANTISSA
        wanted = 2 * 127 + int(math.log2(largest)) - exponent - (mantissa > 0.75 * _MANTISSA).astype("int32")
        factor = (wanted.clip(max=254) * _MANTISSA).view("float32")
    else:
        factor = (paddle.full_like(amax, largest) / amax).clip(max=_LARGEST_FACTOR)
    return paddle.where(amax > 0, factor, paddle.ones_like(factor))


def tiles_of(x: paddle.Tensor, tile: Tile) -> paddle.Tensor:
    """[..., A, B] -> [..., tiles of A, rows of a tile, tiles of B, columns of a tile], padded with zeros."""
    *lead, num_rows, num_columns = x.shape
    rows, columns = tile.rows or num_rows, tile.columns or num_columns
    if missing := -num_rows % rows:
        x = paddle.concat([x, paddle.zeros([*lead, missing, num_columns], dtype=x.dtype)], axis=-2)
        num_rows += missing
    if missing := -num_columns % columns:
        x = paddle.concat([x, paddle.zeros([*lead, num_rows, missing], dtype=x.dtype)], axis=-1)
        num_columns += missing
    return x.reshape([*lead, num_rows // rows, rows, num_columns // columns, columns])


def from_tiles(tiles: paddle.Tensor, num_rows: int, num_columns: int) -> paddle.Tensor:
    """The inverse of `tiles_of`, without its padding."""
    *lead, row_tiles, rows, column_tiles, columns = tiles.shape
    whole = tiles.reshape([*lead, row_tiles * rows, column_tiles * columns])
    if whole.shape[-2] != num_rows:
        whole = whole[..., :num_rows, :]
    return whole if whole.shape[-1] == num_columns else whole[..., :num_columns]
