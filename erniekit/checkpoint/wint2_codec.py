"""How a matrix in 2 bits lies in a -Paddle file: FastDeploy's `wint2` (see precision.convolutional_code)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from erniekit.checkpoint.quantised_codecs import Codec, Codes, Read, Shape
from erniekit.checkpoint.safetensors_header import Plan
from erniekit.precision.codes import WINT2
from erniekit.precision.convolutional_code import PACKED, WORD, Scales, from_file, to_file
from erniekit.utils.bfloat16 import fp32_to_bf16

# The endings of a matrix's tensors.
PARTS = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")


@dataclass(frozen=True)
class Wint2(Codec):
    """FastDeploy's `wint2`. Codes and scales are those of precision.codes for the spec WINT2."""

    is_transposed: ClassVar[bool] = True

    def plan(self, name: str, shape: Shape) -> Plan:
        """See Codec."""
        num_out, num_in = shape
        return [
            (f"{name}.quant_weight", "U8", (num_in // WORD, num_out)),
            (f"{name}.weight_scale", "U8", (num_in // PACKED, num_out)),
            (f"{name}.super_scales", "BF16", (num_out,)),
            (f"{name}.code_scale", "F32", (num_out,)),
            (f"{name}.code_zp", "F32", (num_out,)),
        ]

    def unfit(self, shape: Shape) -> str:
        """See Codec."""
        return "" if shape[1] % PACKED == 0 else f"2-bit codes need a multiple of {PACKED} inputs. Use wint4"

    def stored(
        self, codes: np.ndarray, scales: np.ndarray, input_range: float | None, num_out: int | None = None
    ) -> list[np.ndarray]:
        """See Codec."""
        tensors = to_file(codes, Scales.from_array(scales))
        tensors["super_scales"] = fp32_to_bf16(tensors["super_scales"])
        return [tensors[part] for part in PARTS]

    def unstored(self, read: Read, name: str, shape: Shape) -> Codes:
        """See Codec."""
        codes, scales = from_file({part: read(f"{name}.{part}") for part in PARTS})
        assert codes.shape == (shape[0], shape[1] // WORD), (name, codes.shape, shape)
        return Codes(codes, scales.to_array())


CODEC = Wint2(WINT2)
