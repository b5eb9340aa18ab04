"""The pictures of prompts and of tools' results in a batch of completions."""

from dataclasses import dataclass, field, replace

import numpy as np

from erniekit.data.packed_batch import Modality, PackedBatch, PictureTable
from erniekit.data.prompts import Prompt
from erniekit.data.vision.plan import MediaPlan
from erniekit.data.vision.prompt import PicturePrompt
from erniekit.training.rl.completions import Completion


@dataclass
class SequencePictures:
    """Collects positions, modality and pictures of the tokens of a row, segment by segment in their order."""

    positions: list[np.ndarray] = field(default_factory=list)
    modality: list[np.ndarray] = field(default_factory=list)
    plans: list[MediaPlan] = field(default_factory=list)
    first_tokens: list[int] = field(default_factory=list)
    num_tokens: int = 0

    def add_prompt(self, prompt: Prompt, count: int) -> None:
        """Add the segment of a prompt: its first `count` tokens."""
        self._add(prompt.pictures, 0, count)

    def add_completion(self, prompt: Prompt, completion: Completion, before: int) -> None:
        """Add the segment of a completion, which begins with the token number `before` of its sequence."""
        inputs = completion.short_inputs or completion.input_ids.tolist()
        self._add(prompt.continued(inputs, completion.plans), before, before + len(completion.ids))

    def fill(self, row: PackedBatch) -> PackedBatch:
        """The row with its pictures, decoded."""
        assert self.num_tokens == row.num_tokens, (self.num_tokens, row.num_tokens)
        if not self.plans:
            return row
        grid = np.array([plan.geometry.grid for plan in self.plans], np.int64)
        pictures = PictureTable(
            np.concatenate([plan.patches() for plan in self.plans]), grid, np.array(self.first_tokens, np.int64)
        )
        return replace(
            row,
            position_ids=np.concatenate(self.positions).astype(np.int64),
            modality=np.concatenate(self.modality).astype(np.int8),
            pictures=pictures,
        )

    def _add(self, sequence: PicturePrompt | None, begin: int, end: int) -> None:
        """Add the tokens [begin, end) of a sequence; None: of text alone."""
        if sequence is None:
            self.positions.append(np.repeat(np.arange(begin, end)[:, None], 3, axis=1))
            self.modality.append(np.full(end - begin, Modality.TEXT, np.int8))
        else:
            self.positions.append(sequence.positions[begin:end])
            self.modality.append(sequence.modality[begin:end])
            for plan, first in zip(sequence.plans, sequence.first_tokens.tolist(), strict=True):
                if begin <= first < end:
                    self.plans.append(plan)
                    self.first_tokens.append(self.num_tokens + first - begin)
        self.num_tokens += end - begin
