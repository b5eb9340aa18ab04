"""Fake quantisation of tensors: the values that codes and scales stand for, on any device.

The arithmetic is that of precision/codes.py, bit for bit: a tile's scale is its largest magnitude over half the range
of codes, rounded to the type in which files keep it, and 1 for a tile of zeros; a code is the nearest one to the value
over the scale. A value is clipped if the nearest point of a grid without end would be beyond the last code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import paddle

from erniekit.precision.fp8_tensor import Tile, from_tiles, tiles_of

CodeKind = Literal["int", "e4m3"]
ScaleType = Literal["bf16", "fp16", "fp32"]

_SCALE_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# From here on a value over its scale is nearer to the next point of a grid without end: 448 + 32 / 2 in E4M3, and half
# a step beyond the largest whole number.
_E4M3_END = 464.0


@dataclass(frozen=True)
class Grid:
    """The codes of a tensor [..., A, B]: their kind, the first and the last one, and the values that share a scale."""

    kind: CodeKind
    lowest: float
    largest: float
    tile: Tile
    scale_type: ScaleType = "fp32"

    @property
    def ends(self) -> tuple[float, float]:
        """Value over scale from which, downwards and upwards, a value is clipped."""
        return (-_E4M3_END, _E4M3_END) if self.kind == "e4m3" else (self.lowest - 0.5, self.largest + 0.5)


@paddle.no_grad()
def largest_of(x: paddle.Tensor, tile: Tile) -> paddle.Tensor:
    """The largest magnitude of each tile: [..., tiles of A, tiles of B] fp32."""
    return tiles_of(x.astype("float32"), tile).abs().max(axis=[-3, -1])


@paddle.no_grad()
def scales_for(largest: paddle.Tensor, grid: Grid) -> paddle.Tensor:
    """The scales, fp32 of the same shape, of tiles with these largest magnitudes."""
    scales = divided(largest, paddle.full_like(largest, (grid.largest - grid.lowest) / 2))
    if grid.scale_type != "fp32":
        scales = scales.astype(_SCALE_DTYPES[grid.scale_type]).astype("float32")
    return paddle.where(scales > 0, scales, paddle.ones_like(scales))


def scales_of(
    x: paddle.Tensor, grid: Grid, over_ranks: Callable[[paddle.Tensor], paddle.Tensor] | None = None
) -> paddle.Tensor:
    """The scales of a tensor's tiles; `over_ranks`: gives the largest value of all ranks that share the tiles."""
    largest = largest_of(x, grid.tile)
    return scales_for(largest if over_ranks is None else over_ranks(largest), grid)


@paddle.no_grad()
def codes_of(x: paddle.Tensor, scales: paddle.Tensor, grid: Grid) -> paddle.Tensor:
    """The numbers that the codes of a tensor stand for, before the scale: fp32 of its shape. NaN stays NaN."""
    *_, num_rows, num_columns = x.shape
    tiles = _over_scales(x, scales, grid)
    inside = tiles.clip(grid.lowest, grid.largest)
    if grid.kind == "int":
        return from_tiles(paddle.round(inside), num_rows, num_columns)
    values = inside.astype("float8_e4m3fn").astype("float32")  # on a CPU this cast makes NaN the largest value
    return from_tiles(paddle.where(paddle.isnan(tiles), tiles, values), num_rows, num_columns)


@paddle.no_grad()
def decoded(codes: paddle.Tensor, scales: paddle.Tensor, grid: Grid) -> paddle.Tensor:
    """The values of codes: fp32 of their shape."""
    *_, num_rows, num_columns = codes.shape
    return from_tiles(tiles_of(codes, grid.tile) * scales.unsqueeze(-1).unsqueeze(-3), num_rows, num_columns)


@paddle.no_grad()
def is_inside(x: paddle.Tensor, scales: paddle.Tensor, grid: Grid) -> paddle.Tensor:
    """1 where a value is not clipped, 0 where it is: uint8 of its shape. The gradient of a clipped value is 0."""
    *_, num_rows, num_columns = x.shape
    tiles, (low, high) = _over_scales(x, scales, grid), grid.ends
    return from_tiles(((tiles > low) & (tiles < high)).astype("uint8"), num_rows, num_columns)


def _over_scales(x: paddle.Tensor, scales: paddle.Tensor, grid: Grid) -> paddle.Tensor:
    tiles = tiles_of(x.astype("float32"), grid.tile)
    return divided(tiles, scales.unsqueeze(-1).unsqueeze(-3))


def divided(values: paddle.Tensor, by: paddle.Tensor) -> paddle.Tensor:
    """values / by in fp32, of shapes that broadcast, rounded once. Paddle's fp32 division on a CPU may be wrong by a
    unit in the last place; the fp64 quotient of fp32 numbers has enough bits for the rounding to be right.
    """
    if not values.place.is_cpu_place():
        return values / by
    return (values.astype("float64") / by.astype("float64")).astype("float32")
