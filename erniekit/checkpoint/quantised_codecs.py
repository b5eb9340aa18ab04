"""How a quantised matrix lies in a weight file: the tensors that stand for it, written and read.

A codec belongs to one matrix of a model, [out, in]. Its tensors replace NAME.weight and have that name with other
endings. Those of -PT files are compressed-tensors' and the block FP8 of vLLM and transformers; those of -Paddle files,
FastDeploy's, are in quantised_paddle.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np

from erniekit.checkpoint.safetensors_header import Plan
from erniekit.precision.codes import CodeSpec, decode
from erniekit.precision.packing import pack_words, unpack_words
from erniekit.utils.bfloat16 import fp32_to_bf16

Read = Callable[[str], np.ndarray]  # a tensor by its name: floating ones as fp32, others as stored
Shape = tuple[int, int]


class Codes(NamedTuple):
    """A quantised matrix in memory, see precision.codes. `zeros`: of asymmetric codes; see precision.codes.decode."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None


@dataclass(frozen=True)
class Codec(ABC):
    """The tensors of a quantised matrix whose codes are `spec`'s.

    `is_transposed`: the file's layout has the unquantised matrix as [in, out]. `needs_range`: the file also keeps the
    largest magnitude of the matrix's inputs, from calibration or training.
    """

    spec: CodeSpec
    is_transposed: ClassVar[bool] = False
    needs_range: ClassVar[bool] = False

    @abstractmethod
    def plan(self, name: str, shape: Shape) -> Plan:
        """The tensors that stand for the matrix `name` [out, in] of `shape`, in the order of `stored`."""

    @abstractmethod
    def stored(
        self, codes: np.ndarray, scales: np.ndarray, input_range: float | None, num_out: int | None = None
    ) -> list[np.ndarray]:
        """Their values, from codes and scales (see precision.codes), and the largest magnitude of the inputs if
        `needs_range`. `num_out`: of the matrix, where `codes` are some of its rows (see `row_unit`).
        """

    def row_unit(self, shape: Shape) -> int | None:
        """Rows of a matrix of this shape can be stored by themselves, a multiple of this number or up to the end: what
        they become are rows of the tensors, in the same order, but for a tensor that has its whole shape for any rows.
        None: only the whole matrix can.
        """
        return None

    @abstractmethod
    def unstored(self, read: Read, name: str, shape: Shape) -> Codes:
        """The inverse of `stored`: the codes and scales of the matrix `name` [out, in] of `shape`."""

    def weight(self, read: Read, name: str, shape: Shape) -> np.ndarray:
        """The matrix that its tensors stand for, [out, in] fp32."""
        return self.restored(*self.unstored(read, name, shape))

    def reads_as(self, other: "Codec", shape: Shape) -> bool:
        """Whether both read the same weights from the tensors of a matrix [out, in] of `shape`. The description of the
        same scales may differ: a group of all inputs is a channel.
        """

        def meaning(codec: Codec) -> Codec:
            tiles = replace(codec.spec, group=None, block=codec.spec.tile(shape), whole=False)
            return replace(codec, spec=tiles)

        return meaning(self) == meaning(other)

    def unfit(self, shape: Shape) -> str:
        """Why a matrix [out, in] of this shape cannot be stored in this way; empty if it can."""
        return ""

    def rotated(self, weight: np.ndarray) -> np.ndarray:
        """The matrix that is quantised for a weight [out, in] fp32: rotated where the engine rotates the inputs."""
        return weight

    def rotated_inputs(self, inputs: np.ndarray) -> np.ndarray:
        """Inputs [n, in] fp32 as the engine multiplies them by what is quantised."""
        return inputs

    def restored(self, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None) -> np.ndarray:
        """The weight [out, in] fp32 that codes and scales stand for (see precision.codes.decode)."""
        return decode(codes, scales, self.spec, zeros)


@dataclass(frozen=True)
class PackQuantized(Codec):
    """compressed-tensors' `pack-quantized`: whole numbers packed into int32 words, scales by groups or channels, or one
    of the whole matrix.

    `has_zeros`: the codes are asymmetric, and each tile has one that stands for 0; files of other tools only.
    """

    has_zeros: bool = False

    def plan(self, name: str, shape: Shape) -> Plan:
        """See Codec."""
        width = -(-shape[1] * self.spec.bits // 32)
        groups = self.spec.scale_shape(shape)
        zeros: Plan = []
        if self.has_zeros and self.spec.whole:  # a single one is not packed
            zeros = [(f"{name}.weight_zero_point", "I8", (1,))]
        elif self.has_zeros:
            zeros = [(f"{name}.weight_zero_point", "I32", (-(-shape[0] * self.spec.bits // 32), groups[1]))]
        return [
            (f"{name}.weight_packed", "I32", (shape[0], width)),
            (f"{name}.weight_scale", "BF16", groups),
            (f"{name}.weight_shape", "I64", (2,)),
            *zeros,
        ]

    def stored(
        self, codes: np.ndarray, scales: np.ndarray, input_range: float | None, num_out: int | None = None
    ) -> list[np.ndarray]:
        """See Codec."""
        shape = np.array([num_out or codes.shape[0], codes.shape[1]], np.int64)
        return [pack_words(codes, self.spec.bits), fp32_to_bf16(scales), shape]

    def row_unit(self, shape: Shape) -> int | None:
        """See Codec."""
        return None if self.has_zeros or self.spec.whole else self.spec.tile(shape)[0]

    def unstored(self, read: Read, name: str, shape: Shape) -> Codes:
        """See Codec."""
        codes = unpack_words(read(f"{name}.weight_packed"), self.spec.bits, shape[1])
        by_tile, zeros = self.spec.scale_shape(shape), None
        if self.has_zeros and self.spec.whole:
            zeros = read(f"{name}.weight_zero_point").reshape(by_tile)
        elif self.has_zeros:  # packed along the outputs
            zeros = unpack_words(read(f"{name}.weight_zero_point").T, self.spec.bits, shape[0]).T
        return Codes(codes, read(f"{name}.weight_scale").reshape(by_tile), zeros)


@dataclass(frozen=True)
class Unpacked(Codec):
    """A code an element beside its scales: compressed-tensors' `int-quantized` and `float-quantized`, with bf16 scales
    in `weight_scale`, and block FP8, with fp32 scales in `weight_scale_inv`, which multiply the codes as well.

    `has_zeros`: see PackQuantized.
    """

    scale_name: str = "weight_scale"
    has_zeros: bool = False

    def plan(self, name: str, shape: Shape) -> Plan:
        """See Codec."""
        scales = (1,) if self.spec.whole else self.spec.scale_shape(shape)
        scale_type = "BF16" if self.spec.scale_type == "bf16" else "F32"
        zeros: Plan = [(f"{name}.weight_zero_point", "I8", scales)] if self.has_zeros else []
        code_type = "I8" if self.spec.kind == "int" else "F8_E4M3"
        return [(f"{name}.weight", code_type, shape), (f"{name}.{self.scale_name}", scale_type, scales), *zeros]

    def unfit(self, shape: Shape) -> str:
        """See Codec."""
        for size, block in zip(shape, self.spec.block or (), strict=False):
            if size > block and size % block:
                return (
                    f"{size} is not a multiple of {block}, the size of a block, so transformers misreads it. Use w8a8"
                )
        return ""

    def row_unit(self, shape: Shape) -> int | None:
        """See Codec."""
        return None if self.has_zeros or self.spec.whole else self.spec.tile(shape)[0]

    def stored(
        self, codes: np.ndarray, scales: np.ndarray, input_range: float | None, num_out: int | None = None
    ) -> list[np.ndarray]:
        """See Codec."""
        return [codes, fp32_to_bf16(scales) if self.spec.scale_type == "bf16" else scales]

    def unstored(self, read: Read, name: str, shape: Shape) -> Codes:
        """See Codec."""
        by_tile = self.spec.scale_shape(shape)
        zeros = read(f"{name}.weight_zero_point").reshape(by_tile) if self.has_zeros else None
        return Codes(read(f"{name}.weight"), read(f"{name}.{self.scale_name}").reshape(by_tile), zeros)
