"""Quantises what was trained for the scheme (the key qat): the rounding of the training, and the ranges it kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from erniekit.checkpoint.product_state import DIRECTORY
from erniekit.checkpoint.stored_state import StoredState
from erniekit.config.schema_qat import STATIC
from erniekit.config.stored import stored_settings
from erniekit.models.config import Format, ModelConfig
from erniekit.quantize.quantiser import RoundToNearest
from erniekit.quantize.schemes import Matrix, Options, Scheme, scheme_for, unfit
from erniekit.utils import log
from erniekit.utils.errors import ConfigError

_ENDING = ".product.range"
# The export that writes the codes of a training: `quantization` and `format`, where they are not its own name and pt.
_EXPORTS: dict[str, tuple[str, Format]] = {STATIC: ("fp8", "paddle"), "w4a8": ("w4a8", "paddle")}


@dataclass(frozen=True)
class AsTrained(RoundToNearest):
    """Round to nearest, and the largest magnitudes of inputs that training kept beside the weights in `directory`. An
    expert that no token has reached has the largest range of its layer's experts.
    """

    name: str = "qat"
    directory: Path = Path()

    def input_range(self, matrix: Matrix) -> float | None:
        """See Quantiser."""
        found = self._ranges.get(matrix.logical.param.removesuffix(".weight"))
        if found is None:
            return None
        own = float(found[matrix.logical.index or 0])
        return own or float(found.max()) or None

    @cached_property
    def _ranges(self) -> Mapping[str, np.ndarray]:
        """The ranges [E or 1] by projection; none where nothing was trained for a scheme with static inputs."""
        source = self.directory / DIRECTORY
        if not source.is_dir():
            return {}
        state = StoredState(source)
        return {name.removesuffix(_ENDING): state.read(name) for name in state.keys() if name.endswith(_ENDING)}  # noqa: SIM118


def check_export(qat: str, config: ModelConfig, group: int | None) -> None:
    """ConfigError if `erniekit export` has no codes of `qat` for such a model. Log a warning if it will refuse the
    model's sizes, for which training itself can be done.
    """
    if qat == "none":
        return
    name, format = _EXPORTS.get(qat, (qat, "pt"))
    command = f"qat: {qat}: `erniekit export quantization={name} format={format}` will refuse what this run trains"
    try:
        scheme = scheme_for(name, format, config, Options(group), fits=False)
    except ConfigError as error:
        raise ConfigError(f"{command}: {error}") from None
    if reason := unfit(scheme, config):
        log.warning(f"{command}: {reason}")


def say_if_qat_differs(directory: Path, qat: str) -> None:
    """Log a warning if config.yaml beside the weights or the adapter says that they were trained with another `qat`."""
    trained = (stored_settings(directory) or {}).get("qat")
    if isinstance(trained, str) and trained != qat:
        log.warning(
            f"{directory / 'config.yaml'}: trained with qat: {trained}, and exported with qat: {qat}: codes and scales "
            f"are not those of the training. Set qat: {trained}"
        )


def say_if_groups_differ(directory: Path, qat: str, scheme: Scheme, config: ModelConfig) -> None:
    """Log a warning if config.yaml beside the weights or the adapter says that they were trained for `qat` with other
    groups of inputs than those of `scheme`.
    """
    settings = stored_settings(directory) or {}
    group = settings.get("quantization_group_size")
    if settings.get("qat") != qat or qat != scheme.name or scheme.format != "pt":
        return  # another scheme or layout, of which other lines say so
    trained = _groups(scheme_for(qat, "pt", config, Options(group if isinstance(group, int) else None)), config)
    if trained != _groups(scheme, config):
        log.warning(
            f"{directory / 'config.yaml'}: trained with groups of {', '.join(map(str, trained))} inputs, and exported "
            "with others: codes and scales are not those of the training. Set quantization_group_size: "
            f"{'null' if group is None else group}"
        )


def _groups(scheme: Scheme, config: ModelConfig) -> list[int]:
    """The numbers of inputs that share a scale, where these are not all of a channel."""
    return sorted({matrix.codec.spec.group for matrix in scheme.every_matrix(config) if matrix.codec.spec.group})
