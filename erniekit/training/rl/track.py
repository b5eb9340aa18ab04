"""A completion while it is generated: its tokens turn by turn, with the results of tools between them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from erniekit.data.prompts import Prompt
from erniekit.data.vision.plan import MediaPlan
from erniekit.data.vision.prompt import PicturePrompt
from erniekit.training.rl.completions import Completion
from erniekit.training.rl.tools import Continuation, Dialogue, ToolLoop

_TURN_BITS = 192  # above the bits of rl.generate.draw_number


@dataclass
class Track:
    """The tokens of a completion so far. ids: what was sampled, and the results of tools. inputs: the same as the model
    reads them. short: inputs with one placeholder for each picture. is_sampled, logps: of each of the ids. experts: of
    every token that the model has read so far (generation.request.Generation), where they are recorded.
    """

    prompt: Prompt
    draw: int
    dialogue: Dialogue | None
    ids: list[int] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    short: list[int] = field(default_factory=list)
    is_sampled: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    plans: list[MediaPlan] = field(default_factory=list)
    experts: np.ndarray | None = None
    num_turns: int = 0
    is_truncated: bool = False

    @staticmethod
    def begin(prompt: Prompt, draw: int, tools: ToolLoop | None) -> "Track":
        """The beginning of a completion; `draw` is the number of its random generator."""
        return Track(prompt, draw, None if tools is None else tools.begin(prompt))

    @property
    def random_draw(self) -> int:
        """The number of the random generator of the next turn."""
        return self.draw + (self.num_turns << _TURN_BITS)

    def sequence(self) -> PicturePrompt | None:
        """Prompt and completion with their pictures; None for text alone."""
        return self.prompt.continued(self.short, self.plans)

    def add_turn(self, ids: list[int], stop_id: int | None, logps: list[float]) -> None:
        """Add what the model sampled, with the end token that ended it."""
        new = ids if stop_id is None else [*ids, stop_id]
        self.ids += new
        self.inputs += new
        self.short += new
        self.is_sampled += [True] * len(new)
        self.logps += logps
        self.num_turns += 1
        self.is_truncated = stop_id is None

    def add_results(self, continuation: Continuation) -> None:
        """Add what stands between the last turn, which has ended, and the next one."""
        self.inputs[-1] = self.short[-1] = continuation.end_input
        self.short += continuation.ids
        self.plans += continuation.plans
        new = continuation.ids
        if continuation.plans:
            whole = self.sequence()
            assert whole is not None
            new = whole.ids[len(self.prompt.ids) + len(self.inputs) :]
        self.ids += new
        self.inputs += new
        self.is_sampled += [False] * len(new)
        self.logps += [float("nan")] * len(new)

    @staticmethod
    def length_of(continuation: Continuation) -> int:
        """The tokens that a continuation adds, those of its pictures included."""
        return len(continuation.ids) + sum(plan.geometry.tokens - 1 for plan in continuation.plans)

    def finished(self) -> list[Any]:
        """The completion as JSON values, for other ranks; without pictures."""
        inputs = None if self.dialogue is None else self.inputs
        logps = [None if np.isnan(value) else value for value in self.logps]
        turns = [] if self.dialogue is None or self.plans else list(self.dialogue.turns)
        return [self.ids, inputs, [int(flag) for flag in self.is_sampled], logps, self.is_truncated, turns]


def completion_of(prompt: int, group: int, columns: list[Any]) -> Completion:
    """The completion that `Track.finished` gave."""
    ids, inputs, is_sampled, logps, is_truncated, turns = columns
    return Completion(
        prompt,
        group,
        np.array(ids, np.int32),
        np.array(is_sampled, bool),
        np.array([np.nan if value is None else value for value in logps], np.float32),
        is_truncated,
        inputs=None if inputs is None else np.array(inputs, np.int32),
        turns=tuple(turns),
    )
