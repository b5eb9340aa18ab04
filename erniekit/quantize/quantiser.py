"""What turns a weight into codes and scales while a model is written: round to nearest, or another algorithm."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from erniekit.models.weights import Logical
from erniekit.precision.codes import quantise
from erniekit.quantize.schemes import Matrix


class Quantiser(Protocol):
    """An algorithm. The writer asks for the model's weights in the order of the file, so one layer after another: an
    algorithm can work on a layer when the first weight of it is asked for.
    """

    @property
    def name(self) -> str:
        """Its name in the report."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether each matrix is quantised by itself, and `plain` changes nothing: then the writer may ask for codes in
        any order, and from several threads at a time.
        """
        ...

    def plain(self, logical: Logical, weight: np.ndarray) -> np.ndarray:
        """A weight that is not quantised (fp32, our layout), as it is to be written: scales may be moved into it."""
        ...

    def codes(self, matrix: Matrix, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales (see precision.codes) of `weight` [out, in] fp32, which is the matrix as in the file, and
        rotated where `matrix.codec` rotates. ValueError where it is not finite.
        """
        ...

    def input_range(self, matrix: Matrix) -> float | None:
        """The largest magnitude of the inputs of a matrix, rotated as its weight; None where it is not known."""
        ...

    def error(self, matrix: Matrix) -> float | None:
        """|W' - W| / |W| where W is not the source's weight, because scales were moved into it; None: it is."""
        ...

    def measured(self) -> dict[str, Any] | None:
        """What calibration measured, for the report; None without calibration."""
        ...

    def finish(self) -> None:
        """The files are complete and verified: remove what was kept for an interrupted run."""
        ...


@dataclass(frozen=True)
class RoundToNearest:
    """Every weight by itself: the nearest code. `search`: also find the scale with the least error, where a code has 4
    bits.
    """

    search: bool = True
    name: str = "rtn"
    is_local: bool = True

    def plain(self, logical: Logical, weight: np.ndarray) -> np.ndarray:
        """See Quantiser."""
        return weight

    def codes(self, matrix: Matrix, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See Quantiser."""
        spec = matrix.codec.spec
        return quantise(weight, spec, search=self.search and spec.kind == "int" and spec.bits == 4)

    def input_range(self, matrix: Matrix) -> float | None:
        """See Quantiser."""
        return None

    def error(self, matrix: Matrix) -> float | None:
        """See Quantiser."""
        return None

    def measured(self) -> dict[str, Any] | None:
        """See Quantiser."""
        return None

    def finish(self) -> None:
        """See Quantiser."""
