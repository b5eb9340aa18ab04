"""How a model is quantised: the algorithm and its settings."""

from dataclasses import dataclass
from typing import Literal

from erniekit.precision.codes import CodeSpec

Algorithm = Literal["rtn", "gptq", "awq", "smoothquant"]


@dataclass(frozen=True)
class AlgorithmOptions:
    """The settings of a quantisation with calibration (keys quantization_* of the configuration).

    `damping`, `act_order`: of GPTQ (gptq.factorise). `clip_search`: scales are searched (codes.choose_scales).
    `smoothing`: the strength of SmoothQuant. `all_experts`: the statistics of every expert come from all tokens of its
    modality, not only from those that its router sends to it.
    """

    algorithm: Algorithm = "gptq"
    damping: float = 0.01
    act_order: bool = True
    clip_search: bool = False
    smoothing: float = 0.5
    all_experts: bool = False

    def searches(self, spec: CodeSpec) -> bool:
        """Whether scales are searched: those of few bits, where it matters."""
        return self.clip_search and spec.kind == "int" and spec.bits <= 4
