"""The pictures of evaluation questions, decoded when their questions are asked."""

from collections.abc import Sequence

import numpy as np

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes
from erniekit.data.vision.plan import MediaPlan
from erniekit.data.vision.prompt import PicturePrompt
from erniekit.generation.pictures import tables_of
from erniekit.models.pictures import PictureTables
from erniekit.utils import log
from erniekit.utils.errors import DataError


class QuestionPictures:
    """The pictures of questions for generation.decode: those of a batch are decoded with it, so that memory holds no
    others.

    A picture that cannot be decoded raises DataError with its record's place. With `skip_bad` its question is asked
    with black pictures instead, since the other questions of the batch need an answer; `failed` has its number.
    """

    def __init__(self, prompts: Sequence[PicturePrompt | None], where: Sequence[str], skip_bad: bool):
        """`where`: the "file:line" of each prompt."""
        self._prompts, self._where, self._skip_bad = prompts, where, skip_bad
        self._said: set[str] = set()
        self.failed: list[int] = []

    def __getitem__(self, row: int) -> PictureTables | None:
        prompt, notes = self._prompts[row], Notes()
        if prompt is None:
            return None
        try:
            tables = tables_of(prompt, decode=lambda plan: plan.patches(notes))
        except BadRecord as error:
            message = f"{self._where[row]}: {error.message}"
            if not self._skip_bad:
                raise DataError(f"{message} (on_bad_line: skip counts such questions as wrong)") from None
            log.warning(f"counted as wrong: {message}")
            self.failed.append(row)
            tables = tables_of(prompt, decode=_black)
        for doubt in sorted(notes.doubts - self._said):
            self._said.add(doubt)
            log.warning(f"{self._where[row]}: {doubt} (said once)")
        return tables


def _black(plan: MediaPlan) -> np.ndarray:
    return np.zeros((plan.geometry.patches, 3 * plan.patching.patch**2), np.uint8)
