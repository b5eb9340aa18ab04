"""Quantised directories of tiny models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erniekit.checkpoint.model_io import save_model
from erniekit.export.export import export_checkpoint
from erniekit.export.quantise import Quantisation, QuantisedReport
from erniekit.models.config import Format
from erniekit.quantize.quantiser import RoundToNearest
from erniekit.quantize.schemes import Matrix, Options
from support.tiny_models import tiny_model

# Multiples of what every scheme needs.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "moe_intermediate_size": 128,
}


@dataclass(frozen=True)
class WithRanges(RoundToNearest):
    """Round to nearest, with a made-up range of inputs."""

    def input_range(self, matrix: Matrix) -> float:
        """See Quantiser."""
        return 3.5


def quantisation(name: str, search: bool = False, group: int | None = None, ranges: bool = True) -> Quantisation:
    """A scheme by round to nearest."""
    quantiser = (WithRanges if ranges else RoundToNearest)(search)
    return Quantisation(name, Options(group), lambda source, scheme: quantiser)


def saved_model(path: Path, kind: str = "moe", dtype: str = "bfloat16", **changes: Any) -> Path:
    """A tiny model of SIZES on disk."""
    save_model(tiny_model(kind, **SIZES | changes), path, dtype=dtype)
    return path


def quantised_model(source: Path, target: Path, name: str, format: Format = "pt", **options: Any) -> QuantisedReport:
    """A directory exported in a scheme."""
    report = export_checkpoint(source, target, format, copy_tokenizer=False, quantisation=quantisation(name, **options))
    assert isinstance(report, QuantisedReport)
    return report
