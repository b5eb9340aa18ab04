"""How a quantised matrix lies in a weight file: the tensors that stand for it, written and read.

A codec belongs to one matrix of a model, which is [out, in] in -PT files. Its tensors replace NAME.weight and have
that name with other endings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from erniekit.checkpoint.safetensors_header import Plan
from erniekit.precision.codes import CodeSpec, decode
from erniekit.precision.packing import pack_words, unpack_words
from erniekit.utils.bfloat16 import fp32_to_bf16

Read = Callable[[str], np.ndarray]  # a tensor by its name: floating ones as fp32, others as stored


class Codec(Protocol):
    """The tensors of a quantised matrix."""

    spec: CodeSpec

    def plan(self, name: str, shape: tuple[int, int]) -> Plan:
        """The tensors that stand for the matrix `name` [out, in], `shape`, in the order of `stored`."""
        ...

    def stored(self, codes: np.ndarray, scales: np.ndarray) -> list[np.ndarray]:
        """Their values, from codes [out, in] and scales (see precision.codes)."""
        ...

    def weight(self, read: Read, name: str, shape: tuple[int, int]) -> np.ndarray:
        """The matrix that they stand for, [out, in] fp32."""
        ...


@dataclass(frozen=True)
class PackQuantized:
    """compressed-tensors' `pack-quantized`: whole numbers packed into int32 words, bf16 scales by groups or channels.

    `has_zeros`: the codes are asymmetric, and each group has one that stands for 0; files of other tools only.
    """

    spec: CodeSpec
    has_zeros: bool = False

    def plan(self, name: str, shape: tuple[int, int]) -> Plan:
        """See Codec."""
        width = -(-shape[1] * self.spec.bits // 32)
        groups = self.spec.scale_shape(shape)
        zeros: Plan = []
        if self.has_zeros:
            zeros = [(f"{name}.weight_zero_point", "I32", (-(-shape[0] * self.spec.bits // 32), groups[1]))]
        return [
            (f"{name}.weight_packed", "I32", (shape[0], width)),
            (f"{name}.weight_scale", "BF16", groups),
            (f"{name}.weight_shape", "I64", (2,)),
            *zeros,
        ]

    def stored(self, codes: np.ndarray, scales: np.ndarray) -> list[np.ndarray]:
        """See Codec."""
        return [pack_words(codes, self.spec.bits), fp32_to_bf16(scales), np.array(codes.shape, np.int64)]

    def weight(self, read: Read, name: str, shape: tuple[int, int]) -> np.ndarray:
        """See Codec."""
        codes = unpack_words(read(f"{name}.weight_packed"), self.spec.bits, shape[1])
        zeros = None
        if self.has_zeros:  # packed along the outputs
            zeros = unpack_words(read(f"{name}.weight_zero_point").T, self.spec.bits, shape[0]).T
        scales = read(f"{name}.weight_scale").reshape(self.spec.scale_shape(shape))
        return decode(codes, scales, self.spec, zeros)
