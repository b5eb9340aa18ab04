"""A conversation whose keys and values stay cached from answer to answer."""

from collections.abc import Iterator, Sequence
from itertools import takewhile

from erniekit.generation.decode import Answer, CachedStepper, Limits, check_prompts, decode_one
from erniekit.generation.sampling import Sampling
from erniekit.models.decoder import CausalLM


class Session:
    """Answers the prompts of one conversation. Each prompt is the whole conversation so far; what it has in common with
    the one before, and with the answer to that, is not computed again.

    `reused` is how many tokens of the last prompt were in the cache.
    """

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self._stepper = CachedStepper(model, 1)
        self._ids: list[int] = []  # the conversation; the cache holds its beginning
        self.reused = 0

    def answer(self, prompt_ids: Sequence[int], limits: Limits, sampling: Sampling, turn: int = 0) -> Iterator[Answer]:
        """Answer token by token: gives the growing answer, the last time with `stop` set. It may be left at any point.

        `turn` makes the random draws of one turn differ from another's. Raises UserError, at once, for a prompt that
        does not fit the model.
        """
        check_prompts(self._model, [prompt_ids])
        return self._answer(prompt_ids, limits, sampling, turn)

    def _answer(self, prompt_ids: Sequence[int], limits: Limits, sampling: Sampling, turn: int) -> Iterator[Answer]:
        cache = self._stepper.cache
        pairs = zip(self._ids[: int(cache.lengths[0])], prompt_ids, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.reused = min(common, len(prompt_ids) - 1)  # the last token gives the scores of the next one
        cache.truncate(self.reused)
        self._ids = list(prompt_ids)
        for answer in decode_one(self._model, prompt_ids, self._stepper, self.reused, limits, sampling, turn):
            self._ids.append(answer.all_ids[-1])
            yield answer
