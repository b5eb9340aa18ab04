"""Pictures of a run beside its numbers, drawn while it trains."""

import time
from pathlib import Path
from typing import Any

from erniekit.training.reporting.base import Callback, RunInfo
from erniekit.utils import log

SECONDS_BETWEEN = 60  # between the drawings at saves, since training waits for them


class Picture(Callback):
    """Draws output_dir/`name`, of which there may be several, at saves, at most once in SECONDS_BETWEEN, and at the end
    of the run.

    A drawing that fails is a warning, since the numbers are in the file `numbers`.
    """

    name: str
    numbers: str

    def __init__(self) -> None:
        self._directory: Path | None = None
        self._drawn_at = 0.0

    def on_start(self, run: RunInfo) -> None:
        """Remember the run's directory."""
        self._directory, self._drawn_at = run.output_dir, time.monotonic()

    def on_save(self, step: int, path: Path) -> None:
        """Draw the run so far."""
        if time.monotonic() - self._drawn_at >= SECONDS_BETWEEN:
            self._draw()

    def on_end(self, summary: dict[str, Any]) -> None:
        """Draw the whole run."""
        self._draw()

    def draw_run(self, directory: Path) -> None:
        """Replace `name` in the run's directory; nothing where there is nothing to draw."""
        raise NotImplementedError

    def _draw(self) -> None:
        if self._directory is None:  # the run ended before it began
            return
        try:
            self.draw_run(self._directory)
        except Exception as error:  # any error of the drawing library: a picture must not end a run
            path = self._directory / self.name
            log.warning(f"{path}: not drawn ({type(error).__name__}: {error}); the numbers are in {self.numbers}")
        self._drawn_at = time.monotonic()
