"""Quantises what was trained for the scheme (the key qat): the rounding of the training, and the ranges it kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml

from erniekit.checkpoint.product_state import DIRECTORY
from erniekit.checkpoint.stored_state import StoredState
from erniekit.quantize.quantiser import RoundToNearest
from erniekit.quantize.schemes import Matrix
from erniekit.utils import log
from erniekit.utils.errors import ConfigError, UserError
from erniekit.utils.user_files import read_text

_ENDING = ".product.range"


@dataclass(frozen=True)
class AsTrained(RoundToNearest):
    """Round to nearest, and the largest magnitudes of inputs that training kept beside the weights in `directory`. An
    expert that no token has reached has the largest range of its layer's experts.
    """

    name: str = "qat"
    directory: Path = Path()

    def input_range(self, matrix: Matrix) -> float | None:
        """See Quantiser."""
        found = _ranges(self.directory).get(matrix.logical.param.removesuffix(".weight"))
        if found is None:
            return None
        own = float(found[matrix.logical.index or 0])
        return own or float(found.max()) or None


def say_if_qat_differs(directory: Path, qat: str) -> None:
    """Log a warning if config.yaml beside the weights or the adapter says that they were trained with another `qat`."""
    try:
        settings = yaml.safe_load(read_text(directory / "config.yaml", ConfigError))
    except (OSError, UserError, yaml.YAMLError):
        return  # the file is only a hint
    trained = settings.get("qat") if isinstance(settings, dict) else None
    if isinstance(trained, str) and trained != qat:
        log.warning(
            f"{directory / 'config.yaml'}: trained with qat: {trained}, and exported with qat: {qat}: codes and scales "
            f"are not those of the training. Set qat: {trained}"
        )


@lru_cache(maxsize=1)
def _ranges(directory: Path) -> Mapping[str, np.ndarray]:
    """The ranges [E or 1] by projection; none where nothing was trained for a scheme with static inputs."""
    source = directory / DIRECTORY
    if not source.is_dir():
        return {}
    state = StoredState(source)
    return {name.removesuffix(_ENDING): state.read(name) for name in state.keys() if name.endswith(_ENDING)}  # noqa: SIM118
