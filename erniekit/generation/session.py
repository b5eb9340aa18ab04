"""A conversation whose keys and values stay cached from answer to answer."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import takewhile

from erniekit.generation.decode import Answer, CachedStepper, Limits, check_prompts, decode_one
from erniekit.generation.ranks import from_leader
from erniekit.generation.sampling import Sampling
from erniekit.models.decoder import CausalLM
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
        self.reused = 0

    def clear(self) -> None:
        """Forget the conversation."""
        self._ids = []
        self.reused = 0

    def close(self) -> None:
        """Let the ranks that follow end."""
        from_leader(None, self._model.mesh)
        finish_passes(self._model)

    def answer(self, prompt_ids: Sequence[int], limits: Limits, sampling: Sampling, turn: int = 0) -> Iterator[Answer]:
        """Answer token by token: gives the growing answer, the last time with `stop` set. It may be left at any point.

        `turn` makes the random draws of one turn differ from another's. Raises UserError, at once, for a prompt that
        does not fit the model.
        """
        check_prompts(self._model, [prompt_ids])
        return self._answer(list(prompt_ids), limits, sampling, turn)

    def _answer(self, prompt_ids: list[int], limits: Limits, sampling: Sampling, turn: int) -> Iterator[Answer]:
        mesh = self._model.mesh
        pairs = zip(self._ids[: int(self._stepper.cache.lengths[0])], prompt_ids, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.reused = min(common, len(prompt_ids) - 1)  # the last token gives the scores of the next one
        with _whole_step(self._model):
            from_leader(
                {
                    "prompt_ids": prompt_ids,
                    "reused": self.reused,
                    "limits": asdict(limits),
                    "sampling": asdict(sampling),
                    "turn": turn,
                },
                mesh,
            )
        self._ids = list(prompt_ids)
        self._stepper.cache.truncate(self.reused)
        steps = decode_one(self._model, prompt_ids, self._stepper, self.reused, limits, sampling, turn)
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
            stepper.cache.truncate(turn["reused"])
            steps = decode_one(
                model,
                turn["prompt_ids"],
                stepper,
                turn["reused"],
                Limits(**limits | {"stop_ids": tuple(limits["stop_ids"])}),
                Sampling(**sampling),
                turn["turn"],
            )
            while from_leader(None, mesh) and not next(steps).stop:
                pass
    finish_passes(model)


@contextmanager
def _whole_step(model: CausalLM) -> Iterator[None]:
    """Ctrl-C waits for the end of the block where other ranks take part in it: half a message would be left."""
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
