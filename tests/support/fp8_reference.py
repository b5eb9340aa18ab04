"""FP8 in float64 and numpy, tile by tile, as a reference."""

import numpy as np

from erniekit.precision.fp8_tensor import Fp8Format, Tile
from erniekit.precision.rounding import FORMATS, round_to


def factor_of(largest_magnitude: float, form: Fp8Format, pow2: bool) -> float:
    """What a tile is multiplied by, in float64."""
    if largest_magnitude == 0:
        return 1.0
    factor = min(FORMATS[form].largest / float(largest_magnitude), 2.0**127)
    return 2.0 ** np.floor(np.log2(factor)) if pow2 else factor


def fp8_values(x: np.ndarray, tile: Tile, form: Fp8Format = "e4m3", pow2: bool = True) -> np.ndarray:
    """A matrix [A, B] rounded to FP8 and back, float64."""
    num_rows, num_columns = x.shape
    rows, columns = tile.rows or num_rows, tile.columns or num_columns
    out = np.empty(x.shape, np.float64)
    for begin in range(0, num_rows, rows):
        for left in range(0, num_columns, columns):
            block = np.s_[begin : begin + rows, left : left + columns]
            values = x[block].astype(np.float64)
            known = np.where(np.isfinite(values), values, 0.0)
            factor = factor_of(np.abs(known).max(), form, pow2)
            out[block] = np.where(
                np.isfinite(values), round_to(known * factor, form).astype(np.float64) / factor, np.nan
            )
    return out
