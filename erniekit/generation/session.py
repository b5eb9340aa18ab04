"""A conversation session that keeps keys and values cached between answers."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import takewhile

import numpy as np

from erniekit.data.records.fields import Notes
from erniekit.data.vision.prompt import PicturePrompt
from erniekit.generation.decode import decode_one
from erniekit.generation.pictures import num_shared, tables_of
from erniekit.generation.ranks import arrays_from_leader, from_leader
from erniekit.generation.request import Answer, Limits, check_prompts
from erniekit.generation.sampling import Sampling
from erniekit.generation.steppers import CachedStepper
from erniekit.models.decoder import CausalLM
from erniekit.models.pictures import PictureTables
from erniekit.models.stages import finish_passes


class Session:
    """Answers the prompts of one conversation. Each prompt is the whole conversation so far; what it has in common with
    the one before, and with the answer to that, is not computed again.

    Where several ranks hold the model, the one that leads has the session and the others call `follow`.

    `reused` is how many tokens of the last prompt were in the cache.
    """

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self._stepper = CachedStepper(model, 1)
        self._ids: list[int] = []  # the conversation; the cache holds its beginning
        self._pictures: PicturePrompt | None = None  # of the last prompt
        self.reused = 0

    def clear(self) -> None:
        """Forget the conversation."""
        self._ids = []
        self._pictures = None
        self.reused = 0

    def close(self) -> None:
        """End the session on the ranks that follow."""
        from_leader(None, self._model.mesh)
        finish_passes(self._model)

    def answer(
        self,
        prompt: Sequence[int] | PicturePrompt,
        limits: Limits,
        sampling: Sampling,
        turn: int = 0,
        notes: Notes | None = None,
    ) -> Iterator[Answer]:
        """Answer token by token: gives the growing answer, the last time with `stop` set. It may be left at any point.

        `prompt`: token ids, with pictures if there are any. Of pictures only those are decoded that the model has not
        seen yet; to `notes` is added what was decided then. `turn` makes the random draws of one turn differ from
        another's. Raises, at once, UserError for a prompt that does not fit the model, and BadRecord for a picture that
        cannot be decoded.
        """
        pictures = prompt if isinstance(prompt, PicturePrompt) else None
        prompt_ids = list(prompt.ids if isinstance(prompt, PicturePrompt) else prompt)
        check_prompts(self._model, [prompt_ids])
        reused = self._num_reused(prompt_ids, pictures)
        tables = None if pictures is None else tables_of(pictures, reused, lambda plan: plan.patches(notes))
        return self._answer(prompt_ids, reused, pictures, tables, limits, sampling, turn)

    def _num_reused(self, prompt_ids: list[int], pictures: PicturePrompt | None) -> int:
        """The number of tokens of a prompt that are already in the cache."""
        pairs = zip(self._ids[: int(self._stepper.cache.lengths[0])], prompt_ids, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        common = min(common, len(prompt_ids) - 1)  # the last token gives the scores of the next one
        return common if pictures is None else num_shared(self._pictures, pictures, common)

    def _answer(
        self,
        prompt_ids: list[int],
        reused: int,
        pictures: PicturePrompt | None,
        tables: PictureTables | None,
        limits: Limits,
        sampling: Sampling,
        turn: int,
    ) -> Iterator[Answer]:
        mesh = self._model.mesh
        self.reused = reused
        with _whole_step(self._model):
            from_leader(
                {
                    "prompt_ids": prompt_ids,
                    "reused": self.reused,
                    "limits": asdict(limits),
                    "sampling": asdict(sampling),
                    "turn": turn,
                    "pictures": tables is not None,
                },
                mesh,
            )
            if tables is not None:
                arrays_from_leader(_arrays(tables), mesh)
        self._ids, self._pictures = list(prompt_ids), pictures
        self._stepper.cache.truncate(self.reused)
        steps = decode_one(self._model, prompt_ids, self._stepper, self.reused, limits, sampling, turn, tables)
        ended = False
        try:
            while not ended:
                with _whole_step(self._model):
                    from_leader(True, mesh)
                    answer = next(steps)
                    ended = bool(answer.stop)
                    self._ids.append(answer.all_ids[-1])
                yield answer
        finally:
            if not ended:
                with _whole_step(self._model):
                    from_leader(False, mesh)


def follow(model: CausalLM) -> None:
    """Take part in the answers of the leading rank's session, until that is closed. A data rank that only has experts
    which the conversation needs takes part in the passes alone.
    """
    mesh = model.mesh
    if mesh.data == 0:
        stepper = CachedStepper(model, 1)
        while (turn := from_leader(None, mesh)) is not None:
            limits, sampling = turn["limits"], turn["sampling"]
            tables = PictureTables(*arrays_from_leader([], mesh)) if turn["pictures"] else None
            stepper.cache.truncate(turn["reused"])
            steps = decode_one(
                model,
                turn["prompt_ids"],
                stepper,
                turn["reused"],
                Limits(**limits | {"stop_ids": tuple(limits["stop_ids"])}),
                Sampling(**sampling),
                turn["turn"],
                tables,
            )
            while from_leader(None, mesh) and not next(steps).stop:
                pass
    finish_passes(model)


def _arrays(tables: PictureTables) -> list[np.ndarray]:
    """The arrays of `tables`, in the order of its fields."""
    return [tables.patches, tables.grid, tables.places, tables.modality, tables.positions]


@contextmanager
def _whole_step(model: CausalLM) -> Iterator[None]:
    """A context that delays Ctrl-C if other ranks take part, since an interrupt could leave half of a message."""
    if model.mesh.degrees.world == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
