"""The requests that a model answers, their limits, and the growing answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from erniekit.data.vision.prompt import PicturePrompt
from erniekit.generation.drawing import DrawSettings
from erniekit.generation.sampling import Sampling
from erniekit.models.decoder import CausalLM
from erniekit.models.pictures import PictureTables
from erniekit.utils import log
from erniekit.utils.errors import UserError
from erniekit.utils.wording import count_of

# Tokens whose scores become -inf: a function of the answer so far, which gives a mask [V] (True: allowed) or None.
Constraint = Callable[[Sequence[int]], np.ndarray | None]


@dataclass(frozen=True)
class Limits:
    """When an answer ends: at a token of `stop_ids` (not before `min_new_tokens`), at `max_new_tokens`, or where the
    model's context is full.
    """

    max_new_tokens: int = 1024
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: expected 1 or more, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(
                f"min_new_tokens: expected 0 to max_new_tokens ({self.max_new_tokens}), got {self.min_new_tokens}"
            )


@dataclass(frozen=True)
class TokenScore:
    """The log-probability of a chosen token in the model's distribution, before penalties and filters; `top` are the
    likeliest tokens with theirs, likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Answer:
    """Generated token ids, without the prompt and without the end token.

    stop: "stop" (an end token came: `stop_id`), "length" (max_new_tokens), "context" (the model's context is full),
    "cancelled", "error" (Generation.error), or "" while it grows. scores: one for each of `all_ids`, where the request
    asks for them.
    """

    ids: list[int] = field(default_factory=list)
    stop: str = ""
    stop_id: int | None = None
    scores: list[TokenScore] = field(default_factory=list)

    @property
    def all_ids(self) -> list[int]:
        """The ids with the end token, if there is one."""
        return self.ids if self.stop_id is None else [*self.ids, self.stop_id]


@dataclass(frozen=True)
class Request:
    """A prompt (token ids, at least one) that the model is to continue.

    draw: the answer's random generator is made of (sampling.seed, draw).
    picture_prompt: the prompt with its images and videos, from which beginnings are recognised and reused.
    open_pictures: gives the images and videos among the prompt's tokens from a given one on, decoded when the request
        is admitted; None: there are none.
    num_scores: None for an answer without scores; otherwise the number of likeliest tokens whose log-probabilities are
        kept beside that of each chosen token.
    score_temperature: the log-probabilities are those of the scores divided by it.
    constraint: restricts the tokens that may be chosen.
    never: tokens that are never chosen.
    adapter: the name of the adapter that the model has for this answer (lora.several); None: none.
    owner: whose request it is. Requests of different owners are read in turns, and share no keys and values.
    fails_alone: scores that are not finite end this answer with an error, and no other.
    """

    prompt: Sequence[int]
    limits: Limits
    sampling: Sampling
    draw: int = 0
    picture_prompt: PicturePrompt | None = None
    open_pictures: Callable[[int], PictureTables | None] | None = None
    num_scores: int | None = None
    score_temperature: float = 1.0
    constraint: Constraint | None = None
    never: tuple[int, ...] = ()
    adapter: str | None = None
    owner: str = ""
    fails_alone: bool = False


class Event(NamedTuple):
    """One token of an answer, if it is part of it, its score, and why the answer ended ("" while it grows); `stop_id`
    is the end token, whose score it then has. `error`: the answer has failed.
    """

    token: int | None = None
    score: TokenScore | None = None
    stop: str = ""
    stop_id: int | None = None
    error: str = ""


class Generation:
    """A request and its growing answer. num_reused: tokens of the prompt that did not have to be computed. began: the
    time (time.monotonic) at which the model began to read the prompt, 0 before. draft: the token that may come behind
    the next one (generation.speculative). turn: requests are read in the order of their turns. experts: of an answer
    that has ended, where the engine records them, the experts of all tokens of prompt and answer that the model has
    read, unsigned [n, sparse layers of this process, K]; nobody reads the last chosen token. error: why the answer has
    failed; empty: it has not.
    """

    def __init__(self, request: Request, context: int) -> None:
        """`context`: the number of tokens that the model can take."""
        self.request = request
        self.answer = Answer()
        self.num_reused = 0
        self.began = 0.0
        self.error = ""
        self.draft = self.turn = 0
        self.experts: np.ndarray | None = None
        self._context = context
        self.generator = _generator(request.sampling.seed, request.draw)
        self._num_reported = 0  # of the tokens, by new_events
        self._draw_settings = _draw_settings(request)

    @property
    def is_choice_plain(self) -> bool:
        """Whether the next token is simply the one with the highest score."""
        request, count = self.request, len(self.answer.ids)
        restricted = request.constraint is not None or bool(request.never)
        return request.sampling.plain and count >= request.limits.min_new_tokens and not restricted

    @property
    def draw_settings(self) -> DrawSettings | None:
        """How the next token is drawn, if rows of a batch can share it (generation.drawing); None otherwise."""
        return self._draw_settings if len(self.answer.ids) >= self.request.limits.min_new_tokens else None

    def append(self, token: int, score: TokenScore | None = None) -> None:
        """Add a chosen token to the answer, or end it."""
        answer, limits = self.answer, self.request.limits
        if score is not None:
            answer.scores.append(score)
        if token in limits.stop_ids:
            answer.stop, answer.stop_id = "stop", token
            return
        answer.ids.append(token)
        if len(answer.ids) >= limits.max_new_tokens:
            answer.stop = "length"
        elif len(self.request.prompt) + len(answer.ids) >= self._context:
            answer.stop = "context"

    def fail(self, error: str) -> None:
        """End the answer with an error."""
        self.answer.stop, self.error = "error", error

    def new_events(self) -> list[Event]:
        """What has come since the last call, an event for each token; the last one says how the answer ended."""
        answer, first = self.answer, self._num_reported
        self._num_reported = len(answer.ids)
        scores = answer.scores[first:] if answer.scores else []
        events = [Event(token, scores[place] if scores else None) for place, token in enumerate(answer.ids[first:])]
        if answer.stop_id is not None:
            events.append(Event(None, scores[-1] if scores else None, answer.stop, answer.stop_id))
        elif answer.stop:
            events[-1:] = [(events[-1] if events else Event())._replace(stop=answer.stop, error=self.error)]
        return events


def _draw_settings(request: Request) -> DrawSettings | None:
    """How an answer's tokens are drawn, if it is from the whole distribution."""
    sampling, temperature = request.sampling, request.sampling.temperature
    if request.constraint is not None or sampling.penalises or sampling.filters or request.num_scores:
        return None
    score_temperature = None if request.num_scores is None else request.score_temperature
    if score_temperature is not None and temperature not in (0, score_temperature):
        return None
    return DrawSettings(temperature, request.never, score_temperature)


def _generator(seed: int | None, draw: int) -> np.random.Generator:
    """The random generator of an answer; without a seed, a fresh one."""
    return np.random.default_rng() if seed is None else np.random.default_rng([seed, draw])


def check_prompts(model: CausalLM, prompts: Sequence[Sequence[int]]) -> None:
    """Raise UserError for a prompt that is empty, too long for the model's context, or not of its vocabulary."""
    config = model.config
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(
                f"prompt {row} has no tokens. Give at least one (the begin-of-sentence token, for instance)."
            )
        if len(prompt) >= config.max_position_embeddings:
            raise UserError(
                f"prompt {row} has {count_of(len(prompt), 'token')} and leaves no room for an answer: the model's "
                f"context is {config.max_position_embeddings} tokens (max_position_embeddings in its config.json). "
                "Shorten the prompt."
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise UserError(
                f"prompt {row} has token ids {min(prompt)}..{max(prompt)}, outside the model's vocabulary "
                f"0..{config.vocab_size - 1}. Use the tokenizer that belongs to the model."
            )


def report_full(answers: Sequence[Answer], model: CausalLM) -> None:
    """A warning if answers stopped because the model's context was full."""
    full = sum(answer.stop == "context" for answer in answers)
    if full:
        log.warning(
            f"{full} of {count_of(len(answers), 'answer')} stopped because the model's context of "
            f"{model.config.max_position_embeddings} tokens (max_position_embeddings in its config.json) is full"
        )
