"""How a quantised matrix lies in a -Paddle file: the tensors that FastDeploy 2 reads, written and read."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from erniekit.checkpoint.quantised_codecs import Codec, Codes, Read, Shape
from erniekit.checkpoint.safetensors_header import Plan
from erniekit.precision.codes import FP8_TENSOR, decode, symmetric
from erniekit.precision.hadamard import rotate_rows
from erniekit.precision.packing import (
    pack_for_kernels,
    pack_input_pairs,
    unpack_for_kernels,
    unpack_input_pairs,
)
from erniekit.utils.arrays import transposed
from erniekit.utils.bfloat16 import fp32_to_bf16

# Orders of the Hadamard blocks by which FastDeploy's kernels rotate inputs.
FP8_ROTATION, W4A8_ROTATION = 32, 128


@dataclass(frozen=True)
class WeightOnly(Codec):
    """`wint8` and `wint4`: codes of a channel's scale, in the order of the weight-only kernels."""

    is_transposed: ClassVar[bool] = True

    def plan(self, name: str, shape: Shape) -> Plan:
        """See Codec."""
        rows = shape[0] * self.spec.bits // 8
        return [(f"{name}.quant_weight", "I8", (rows, shape[1])), (f"{name}.weight_scale", "BF16", shape[:1])]

    def unfit(self, shape: Shape) -> str:
        """See Codec."""
        fits = shape[0] % 16 == 0 and shape[1] % 64 == 0
        needed = "FastDeploy's kernels need a multiple of 64 inputs and of 16 outputs"
        return "" if fits else f"{needed}. Use wint8 or wint4 with format: pt"

    def row_unit(self, shape: Shape) -> int | None:
        """See Codec."""
        return 16

    def stored(
        self, codes: np.ndarray, scales: np.ndarray, input_range: float | None, num_out: int | None = None
    ) -> list[np.ndarray]:
        """See Codec."""
        return [pack_for_kernels(codes, self.spec.bits), fp32_to_bf16(scales[:, 0])]

    def unstored(self, read: Read, name: str, shape: Shape) -> Codes:
        """See Codec."""
        codes = unpack_for_kernels(read(f"{name}.quant_weight"), self.spec.bits)
        return Codes(codes, read(f"{name}.weight_scale")[:, None])


WINT8, WINT4 = WeightOnly(symmetric(8)), WeightOnly(symmetric(4))


@dataclass(frozen=True)
class W4A8(Codec):
    """`w4a8` experts that no kernel has ordered (is_permuted: false). The file keeps the largest magnitudes that the
    weights of a channel and the inputs can have: 7 scales, and `input_range`.

    `is_rotated`: of down_proj, whose inputs the kernel rotates by normalised Hadamard blocks.
    """

    is_rotated: bool = False
    is_transposed: ClassVar[bool] = True
    needs_range: ClassVar[bool] = True

    def plan(self, name: str, shape: Shape) -> Plan:
        """See Codec."""
        return [
            (f"{name}.quant_weight", "I8", (shape[1] // 2, shape[0])),
            (f"{name}.weight_scale", "F32", shape[:1]),
            (f"{name}.activation_scale", "F32", (1,)),
        ]

    def unfit(self, shape: Shape) -> str:
        """See Codec."""
        unit = W4A8_ROTATION if self.is_rotated else 2
        return "" if shape[1] % unit == 0 else f"w4a8 needs a multiple of {unit} inputs here. Use wint4/8"

    def stored(
        self, codes: np.ndarray, scales: np.ndarray, input_range: float | None, num_out: int | None = None
    ) -> list[np.ndarray]:
        """See Codec. 7 times a bf16 scale is exact in fp32."""
        assert input_range is not None
        return [pack_input_pairs(codes), scales[:, 0] * np.float32(7), _kept_range(input_range)]

    def unstored(self, read: Read, name: str, shape: Shape) -> Codes:
        """See Codec."""
        codes = unpack_input_pairs(read(f"{name}.quant_weight"))
        return Codes(codes, read(f"{name}.weight_scale")[:, None] / np.float32(7))

    def rotated(self, weight: np.ndarray) -> np.ndarray:
        """See Codec."""
        if not self.is_rotated:
            return weight
        return _rotate(weight, W4A8_ROTATION) / np.float32(math.sqrt(W4A8_ROTATION))

    def rotated_inputs(self, inputs: np.ndarray) -> np.ndarray:
        """See Codec."""
        return self.rotated(inputs)

    def restored(self, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None) -> np.ndarray:
        """See Codec: a normalised rotation is its own inverse."""
        return self.rotated(decode(codes, scales, self.spec, zeros))


W4A8_UP_GATE, W4A8_DOWN = W4A8(symmetric(4)), W4A8(symmetric(4), is_rotated=True)


@dataclass(frozen=True)
class TensorWiseFp8(Codec):
    """`tensor_wise_fp8`: one scale for the matrix and one for its inputs. The engine rotates all inputs by blocks of 32
    whose entries are 1 and -1, so the codes are those of H W / 32.
    """

    is_transposed: ClassVar[bool] = True
    needs_range: ClassVar[bool] = True

    def plan(self, name: str, shape: Shape) -> Plan:
        """See Codec."""
        return [
            (f"{name}.quant_weight", "I8", shape[::-1]),
            (f"{name}.weight_scale", "F32", (1,)),
            (f"{name}.activation_scale", "F32", (1,)),
        ]

    def unfit(self, shape: Shape) -> str:
        """See Codec."""
        fits = shape[1] % FP8_ROTATION == 0
        return "" if fits else f"{shape[1]} inputs do not divide into the engine's blocks of {FP8_ROTATION}"

    def stored(
        self, codes: np.ndarray, scales: np.ndarray, input_range: float | None, num_out: int | None = None
    ) -> list[np.ndarray]:
        """See Codec."""
        assert input_range is not None
        scale = _kept_range(input_range) / np.float32(self.spec.largest)
        return [transposed(codes).view(np.int8), scales.reshape(1), scale]

    def unstored(self, read: Read, name: str, shape: Shape) -> Codes:
        """See Codec."""
        codes = transposed(read(f"{name}.quant_weight")).view(np.uint8)
        return Codes(codes, read(f"{name}.weight_scale").reshape(1, 1))

    def rotated(self, weight: np.ndarray) -> np.ndarray:
        """See Codec."""
        return _rotate(weight, FP8_ROTATION) / np.float32(FP8_ROTATION)

    def rotated_inputs(self, inputs: np.ndarray) -> np.ndarray:
        """See Codec."""
        return _rotate(inputs, FP8_ROTATION)

    def restored(self, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None) -> np.ndarray:
        """See Codec."""
        return _rotate(decode(codes, scales, self.spec, zeros), FP8_ROTATION)


TENSOR_WISE_FP8 = TensorWiseFp8(FP8_TENSOR)


def _kept_range(input_range: float) -> np.ndarray:
    """The largest magnitude of a matrix's inputs as a tensor, by which an engine divides them: 1 where all inputs are
    0, as the scale of a tile of zeros is.
    """
    return np.array([input_range or 1.0], np.float32)


def _rotate(weight: np.ndarray, block: int) -> np.ndarray:
    """H W of a weight [out, in], in blocks of inputs."""
    return transposed(rotate_rows(transposed(weight), block))
