"""AdamW's two moments in 8 or 4 bits, for checkpoints (`ckpt_quant_stage`). It uses numpy only.

An update is made of the ratio u = m / sqrt(v) of the first moment m and the root of the second, so these two are coded:

* u as a signed integer, a multiple of one fp32 scale for all inputs of an output (8 bits: -127..127), or for every 32
  of them (4 bits: -7..7);
* sqrt(v) as one of 255 (15) levels between the smallest and the largest positive value of the same numbers, equally far
  apart in logarithm, so that the relative error is the same for all of them. Code 0 means that v is 0, and a positive v
  is never stored as 0, which would make an update huge.

PaddleFormers (unified_checkpoint_quantization.py), from which the key and the sizes come, codes m itself, and
1 / (sqrt(v) + 1e-8) in equal steps. The second moments of one output differ by orders of magnitude, and equal steps
leave most of them in one or two codes.

Parameters with fewer than two axes, or with fewer than 32 inputs, keep fp32 moments. Stacked experts are coded matrix
by matrix, so codes do not depend on which ranks hold which experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from erniekit.checkpoint.dtypes import STORAGE, num_bytes
from erniekit.models.weights import Shape
from erniekit.utils.errors import CheckpointError
from erniekit.utils.wording import count_of

MOMENTS = ("moment1", "moment2")
_LEAST_INPUTS = 32
_SCALE, _LOWEST, _HIGHEST = "moment1_scale", "moment2_lowest", "moment2_highest"
_BOTH = "moments"  # 4 bits: the ratio's code + 8 in the high half of a byte, the root's in the low one


class Field(NamedTuple):
    """What a file has for the moments of a parameter: header dtype and shape."""

    dtype: str
    shape: Shape


class Rounding:
    """What coding changed, summed over tensors: the relative RMS error of the ratios and of the roots, and bytes."""

    def __init__(self) -> None:
        self.tensors, self.bytes_before, self.bytes_after = 0, 0, 0
        self._squares = np.zeros(4)  # errors and values of the ratios, then of the roots

    def add(self, ratios: np.ndarray, ratio_errors: np.ndarray, roots: np.ndarray, root_errors: np.ndarray) -> None:
        """The values of one matrix and what was subtracted from them."""
        self._squares += [float(np.vdot(array, array)) for array in (ratio_errors, ratios, root_errors, roots)]

    def __str__(self) -> str:
        after, before = (size / 2**20 for size in (self.bytes_after, self.bytes_before))
        return (
            f"the moments of {count_of(self.tensors, 'parameter')} take {after:.3g} MiB instead of {before:.3g} in "
            f"this rank's files; rounding changed m / sqrt(v) by {self.ratio_error:.2%} and sqrt(v) by "
            f"{self.root_error:.2%} (relative RMS)"
        )

    @property
    def ratio_error(self) -> float:
        """The relative error of m / sqrt(v)."""
        return _relative(*self._squares[:2])

    @property
    def root_error(self) -> float:
        """The relative error of sqrt(v)."""
        return _relative(*self._squares[2:])


def _relative(error: float, value: float) -> float:
    return float(np.sqrt(error / value)) if value else 0.0


@dataclass(frozen=True)
class MomentCode:
    """How the moments of matrices [..., inputs, outputs] are coded. `group`: the inputs that share a scale; None: all
    of an output's.
    """

    name: str
    bits: int
    group: int | None

    def applies(self, shape: Shape) -> bool:
        """Whether the moments of a (whole) parameter are coded."""
        return len(shape) >= 2 and shape[-2] >= _LEAST_INPUTS and 0 not in shape

    def fields(self, shape: Shape) -> dict[str, Field]:
        """What replaces both moments of a parameter of this shape in a file, by the name of the field."""
        *stack, inputs, outputs = shape
        scales = Field("F32", (*stack, len(self._starts(inputs)), outputs))
        codes = {"moment1": Field("I8", shape), "moment2": Field("U8", shape)}
        return (codes if self.bits == 8 else {_BOTH: Field("U8", shape)}) | dict.fromkeys(
            (_SCALE, _LOWEST, _HIGHEST), scales
        )

    def encode(self, name: str, moment1: np.ndarray, moment2: np.ndarray, rounding: Rounding) -> dict[str, np.ndarray]:
        """The arrays of `fields` for the moments [..., inputs, outputs], fp32, of parameter `name`. CheckpointError if
        a moment is not finite.
        """
        if not (np.isfinite(moment1).all() and np.isfinite(moment2).all()):
            raise CheckpointError(
                f"ckpt_quant_stage: {self.name}: a moment of {name} is not finite. Lower learning_rate or "
                "max_grad_norm, or set ckpt_quant_stage: O0 to save the moments as they are."
            )
        shape = moment1.shape
        fields = self.fields(shape)
        arrays = {field: np.empty(kind.shape, STORAGE[kind.dtype]) for field, kind in fields.items()}
        matrices = {field: array.reshape(-1, *array.shape[-2:]) for field, array in arrays.items()}
        firsts, seconds = (moment.reshape(-1, *shape[-2:]) for moment in (moment1, moment2))
        for index, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
            for field, array in self._encode_matrix(first, second, rounding).items():
                matrices[field][index] = array
        rounding.tensors += 1
        rounding.bytes_before += moment1.nbytes + moment2.nbytes
        rounding.bytes_after += sum(num_bytes(*field) for field in fields.values())
        return arrays

    def decode(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Both moments, fp32, from the arrays of `fields`."""
        shape = next(iter(arrays.values())).shape
        matrices = {field: array.reshape(-1, *array.shape[-2:]) for field, array in arrays.items()}
        moments = {moment: np.empty(shape, np.float32) for moment in MOMENTS}
        flat = [moment.reshape(-1, *shape[-2:]) for moment in moments.values()]
        for index in range(len(flat[0])):
            one = {field: array[index] for field, array in matrices.items()}
            for target, values in zip(flat, self._decode_matrix(one), strict=True):
                target[index] = values
        return moments

    @property
    def _largest(self) -> int:
        """The largest code of a ratio."""
        return (1 << (self.bits - 1)) - 1

    @property
    def _levels(self) -> int:
        """The number of levels of a positive root."""
        return (1 << self.bits) - 1

    def _starts(self, inputs: int) -> np.ndarray:
        """The first input of each group."""
        return np.arange(0, inputs, self.group or inputs)

    def _spread(self, values: np.ndarray, inputs: int) -> np.ndarray:
        """[groups, outputs] -> [inputs, outputs] (or [1, outputs])."""
        return values if len(values) == 1 else np.repeat(values, self.group or inputs, axis=0)[:inputs]

    def _encode_matrix(self, moment1: np.ndarray, moment2: np.ndarray, rounding: Rounding) -> dict[str, np.ndarray]:
        inputs, starts = len(moment1), self._starts(len(moment1))
        roots = np.sqrt(moment2)
        positive = roots > 0
        ratios = np.divide(moment1, roots, out=np.zeros_like(roots), where=positive)
        scale = np.maximum.reduceat(np.abs(ratios), starts) / np.float32(self._largest)
        scale[scale == 0] = 1
        signed = np.rint(ratios / self._spread(scale, inputs))
        # A group without a positive root has levels from 1 to 1, which no code names.
        highest = np.maximum.reduceat(roots, starts)
        lowest = np.minimum.reduceat(np.where(positive, roots, np.float32(np.inf)), starts)
        none = highest == 0
        highest[none], lowest[none] = 1, 1
        steps = (np.log(highest) - np.log(lowest)) / np.float32(self._levels - 1)
        steps[steps == 0] = 1  # all positive roots are equal: they have level 1
        above = np.log(np.where(positive, roots, 1)) - self._spread(np.log(lowest), inputs)
        level = np.where(positive, 1 + np.rint(above / self._spread(steps, inputs)), 0).astype(np.uint8)
        coded = self._joined(signed.astype(np.int8), level)
        coded |= {_SCALE: scale, _LOWEST: lowest, _HIGHEST: highest}
        decoded = self._roots(level, coded)
        rounding.add(ratios, signed * self._spread(scale, inputs) - ratios, roots, decoded - roots)
        return coded

    def _decode_matrix(self, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        if self.bits == 8:
            signed, level = arrays["moment1"], arrays["moment2"]
        else:
            signed, level = (arrays[_BOTH] >> 4).astype(np.int8) - np.int8(8), arrays[_BOTH] & 15
        roots = self._roots(level, arrays)
        return signed * self._spread(arrays[_SCALE], len(signed)) * roots, np.square(roots)

    def _joined(self, signed: np.ndarray, level: np.ndarray) -> dict[str, np.ndarray]:
        if self.bits == 8:
            return {"moment1": signed, "moment2": level}
        return {_BOTH: (signed + np.int8(8)).astype(np.uint8) << 4 | level}

    def _roots(self, level: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The roots of the second moment from their levels."""
        lowest, highest = (self._spread(arrays[field], len(level)) for field in (_LOWEST, _HIGHEST))
        step = (np.log(highest) - np.log(lowest)) / np.float32(self._levels - 1)
        above = np.exp((level.astype(np.float32) - 1) * step)
        roots = np.where(level == self._levels, highest, lowest * above)  # the last level is decoded exactly
        return np.where(level > 0, roots, np.float32(0))


CODES = {code.name: code for code in (MomentCode("O1", 8, None), MomentCode("O2", 4, 32))}
