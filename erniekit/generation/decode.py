"""The decoding loop: prompts in, tokens out, with the KV cache; finished rows leave the batch.

Several ranks may share the model, in any layout of its mesh (models/stages.py): each of them runs the loop.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import paddle

from erniekit.generation.pictures import PromptPictures
from erniekit.generation.ranks import chooses, from_chooser
from erniekit.generation.sampling import Sampling, choose
from erniekit.models.decoder import CausalLM
from erniekit.models.pictures import PictureTables
from erniekit.models.stages import finish_passes
from erniekit.parallel import comm
from erniekit.parallel.process_group import Group
from erniekit.utils import heartbeat, log
from erniekit.utils.errors import CheckpointError, UserError

_PREFILL_TOKENS = 16384  # tokens of prompts that go through the model at once
_PREFILL_STEP = 2048  # of a single long prompt
_NOT_FINITE = -1  # in the place of a token: the scores have no meaning

OnToken = Callable[[int, int], None]  # (row of the prompt, token), as each token is chosen


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


@dataclass
class Answer:
    """Generated token ids, without the prompt and without the end token.

    stop: "stop" (an end token came: `stop_id`), "length" (max_new_tokens), "context" (the model's context is full), or
    "" while it grows.
    """

    ids: list[int] = field(default_factory=list)
    stop: str = ""
    stop_id: int | None = None

    @property
    def all_ids(self) -> list[int]:
        """The ids with the end token, if there is one."""
        return self.ids if self.stop_id is None else [*self.ids, self.stop_id]


class PromptTables(Protocol):
    """The images and videos of prompts by the number of the prompt, None for text alone. They may be decoded when they
    are asked for: each is, once, for the batch that its prompt is in.
    """

    def __getitem__(self, row: int, /) -> PictureTables | None: ...


class Stepper(Protocol):
    """Computes next-token scores for growing rows."""

    def feed(
        self, tokens: Sequence[Sequence[int]], pictures: Sequence[PictureTables | None] | None = None
    ) -> paddle.Tensor | None:
        """Append tokens to each row (at least one each) -> scores after each row's last token [B, V]; None on all
        pipeline stages but the last. `pictures`: the images and videos among these tokens, one entry a row; None: there
        are none.
        """
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these rows only."""
        ...


class CachedStepper:
    """Feeds only what is new; keys and values of the rest are cached."""

    def __init__(self, model: CausalLM, batch_size: int) -> None:
        self.model = model
        self.cache = model.new_cache(batch_size)

    def feed(
        self, tokens: Sequence[Sequence[int]], pictures: Sequence[PictureTables | None] | None = None
    ) -> paddle.Tensor | None:
        """See Stepper."""
        # A long prompt goes in pieces: its activations are then never whole. Rows of a batch are short (see _batches),
        # so that only a single row needs it.
        prompt, start = None if pictures is None else PromptPictures(self.model, pictures), 0
        while len(tokens) == 1 and len(tokens[0]) > _PREFILL_STEP:
            self._extend([tokens[0][:_PREFILL_STEP]], prompt, start)
            tokens, start = [tokens[0][_PREFILL_STEP:]], start + _PREFILL_STEP
        return self._extend(tokens, prompt, start)

    def keep(self, rows: Sequence[int]) -> None:
        """See Stepper."""
        self.cache.keep(rows)

    def _extend(
        self, tokens: Sequence[Sequence[int]], prompt: PromptPictures | None, start: int
    ) -> paddle.Tensor | None:
        lengths = np.array([len(row) for row in tokens])
        step = () if prompt is None else prompt.step(start, lengths, self.cache.next_position)
        return self.model.extend(pad_right(tokens, 0), lengths, self.cache, *step)


class UncachedStepper:
    """Runs the whole of every row at each step, in one process. Slow: it is there to check the cache against."""

    def __init__(self, model: CausalLM, batch_size: int) -> None:
        assert model.mesh.degrees.world == 1, "without a cache one process has the whole model"
        self.model = model
        self.rows: list[list[int]] = [[] for _ in range(batch_size)]

    @paddle.no_grad()
    def feed(
        self, tokens: Sequence[Sequence[int]], pictures: Sequence[PictureTables | None] | None = None
    ) -> paddle.Tensor:
        """See Stepper."""
        if pictures is not None:
            raise UserError("use_cache: images and videos need the cache. Leave use_cache out.")
        for row, new in zip(self.rows, tokens, strict=True):
            row.extend(new)
        last = np.array([len(row) - 1 for row in self.rows])
        segments = pad_right([[1] * len(row) for row in self.rows], 0)
        logits = self.model(pad_right(self.rows, 0), segment_ids=segments)
        batch, width, vocab = logits.shape
        return paddle.gather(logits.reshape([batch * width, vocab]), paddle.to_tensor(np.arange(batch) * width + last))

    def keep(self, rows: Sequence[int]) -> None:
        """See Stepper."""
        self.rows = [self.rows[row] for row in rows]


def pad_right(rows: Sequence[Sequence[int]], value: int) -> np.ndarray:
    """Ragged rows as int64 [B, longest]."""
    out = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out


def _of_rows(pictures: PromptTables | None, rows: Sequence[int]) -> Sequence[PictureTables | None] | None:
    return None if pictures is None else [pictures[row] for row in rows]


def _ignore(row: int, what: object) -> None:
    """The default callback, which ignores the event."""


def decode(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    sampling: Sampling,
    *,
    batch_size: int = 128,
    use_cache: bool = True,
    on_token: OnToken = _ignore,
    on_answer: Callable[[int, Answer], None] = _ignore,
    pictures: PromptTables | None = None,
) -> list[Answer]:
    """Answer each prompt (token ids, at least one each). The result is in the order of the prompts and does not depend
    on how they share batches, nor on the ranks that hold the model.

    Prompts of similar length share a batch of up to `batch_size`; a row that has ended leaves it. Row i draws from its
    own random generator, made of (sampling.seed, i). on_token sees each token as it is chosen, the end token too;
    on_answer each finished answer. `pictures`: the images and videos of each prompt. Raises UserError for a prompt that
    does not fit the model.

    Every rank of the model's mesh calls it with the same arguments and gets all answers. Data ranks share the prompts:
    on_token and on_answer see those of this rank. A model in training mode answers in eval mode.
    """
    check_prompts(model, prompts)
    mesh, work = model.mesh, _Work(model, prompts, limits, sampling)
    by_length = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    share = by_length[mesh.data :: mesh.degrees.data]
    with _eval_mode(model):
        for rows in _batches(share, [len(prompt) for prompt in prompts], batch_size):
            stepper: Stepper = (CachedStepper if use_cache else UncachedStepper)(model, len(rows))
            tokens: list[Sequence[int]] = [prompts[row] for row in rows]
            new_pictures = _of_rows(pictures, rows)
            while rows:
                chosen = work.step(stepper.feed(tokens, new_pictures), rows)
                new_pictures = None
                for row, token in zip(rows, chosen, strict=True):
                    on_token(row, token)
                    if work.answers[row].stop:
                        on_answer(row, work.answers[row])
                going = [place for place, row in enumerate(rows) if not work.answers[row].stop]
                if going and len(going) < len(rows):
                    stepper.keep(going)
                rows, tokens = [rows[place] for place in going], [[chosen[place]] for place in going]
        finish_passes(model)
    answers = _from_data_ranks(work.answers, share, mesh.data_group)
    _report_full(answers, model)
    return answers


@contextmanager
def _eval_mode(model: CausalLM) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def _from_data_ranks(answers: list[Answer], share: Sequence[int], data_group: Group) -> list[Answer]:
    """All answers, of which each data rank has made those of its `share`."""
    if data_group.size == 1:
        return answers
    mine = [(row, answers[row].ids, answers[row].stop, answers[row].stop_id) for row in share]
    for part in comm.gather_objects(mine, data_group):
        for row, ids, stop, stop_id in part:
            answers[row] = Answer(ids, stop, stop_id)
    return answers


def decode_one(
    model: CausalLM,
    prompt: Sequence[int],
    stepper: Stepper,
    num_cached: int,
    limits: Limits,
    sampling: Sampling,
    turn: int = 0,
    pictures: PictureTables | None = None,
) -> Iterator[Answer]:
    """Answer one prompt token by token: yields the growing answer after each token, the last time with `stop` set.

    `stepper` (of one row) has cached the first `num_cached` tokens of the prompt, which are not all of it; `pictures`
    are the images and videos of the others. The random generator is made of (sampling.seed, turn). All ranks of one
    copy of the model call it alike.
    """
    check_prompts(model, [prompt])
    work = _Work(model, [prompt], limits, sampling, turn)
    answer = work.answers[0]
    new, new_pictures = prompt[num_cached:], None if pictures is None else [pictures]
    while not answer.stop:
        new = work.step(stepper.feed([new], new_pictures), [0])
        new_pictures = None
        yield answer
    _report_full([answer], model)


class _Work:
    """Prompts and their growing answers."""

    def __init__(
        self, model: CausalLM, prompts: Sequence[Sequence[int]], limits: Limits, sampling: Sampling, first: int = 0
    ) -> None:
        """`first`: the number by which the first prompt's random generator is made; the others' follow."""
        self.prompts, self.limits, self.sampling = prompts, limits, sampling
        self.answers = [Answer() for _ in prompts]
        self._mesh = model.mesh
        self._context = model.config.max_position_embeddings
        self._generators = [_generator(sampling.seed, first + row) for row in range(len(prompts))]

    def step(self, scores_BV: paddle.Tensor | None, rows: Sequence[int]) -> list[int]:
        """Choose the next token of each of `rows` and append it to its answer, or end that. The scores are read on the
        rank that chooses; every rank gets its tokens.

        Raises CheckpointError for scores that are not finite: any token chosen from them would be noise.
        """
        heartbeat.waiting(None)
        chosen = [_NOT_FINITE] * len(rows)
        if chooses(self._mesh):
            assert scores_BV is not None, "the last stage has the scores"
            if math.isfinite(float(scores_BV.astype("float32").sum())):
                chosen = self._choose(scores_BV, rows)
        chosen = from_chooser(np.array(chosen, dtype=np.int64), self._mesh).tolist()
        if _NOT_FINITE in chosen:
            raise CheckpointError(
                "the model gives scores that are not finite, so its weights are not, or are too large. "
                "Use an earlier checkpoint."
            )
        for row, token in zip(rows, chosen, strict=True):
            self._advance(row, token)
        return chosen

    def _choose(self, scores_BV: paddle.Tensor, rows: Sequence[int]) -> list[int]:
        counts = [len(self.answers[row].ids) for row in rows]
        if self.sampling.plain and min(counts) >= self.limits.min_new_tokens:
            return scores_BV.argmax(axis=-1).tolist()
        chosen = []
        for scores, row, count in zip(scores_BV.astype("float32").numpy(), rows, counts, strict=True):
            banned = self.limits.stop_ids if count < self.limits.min_new_tokens else ()
            prompt, answer = self.prompts[row], self.answers[row].ids
            chosen.append(choose(scores, prompt, answer, self.sampling, self._generators[row], banned))
        return chosen

    def _advance(self, row: int, token: int) -> None:
        answer = self.answers[row]
        if token in self.limits.stop_ids:
            answer.stop, answer.stop_id = "stop", token
            return
        answer.ids.append(token)
        if len(answer.ids) >= self.limits.max_new_tokens:
            answer.stop = "length"
        elif len(self.prompts[row]) + len(answer.ids) >= self._context:
            answer.stop = "context"


def _generator(seed: int | None, row: int) -> np.random.Generator:
    """The random generator of a row; without a seed, a fresh one."""
    return np.random.default_rng() if seed is None else np.random.default_rng([seed, row])


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
                f"prompt {row} has {len(prompt)} tokens and leaves no room for an answer: the model's context is "
                f"{config.max_position_embeddings} tokens (max_position_embeddings in its config.json). "
                "Shorten the prompt."
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise UserError(
                f"prompt {row} has token ids {min(prompt)}..{max(prompt)}, outside the model's vocabulary "
                f"0..{config.vocab_size - 1}. Use the tokenizer that belongs to the model."
            )


def _batches(rows: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers, given longest first (what does not fit in memory fails at once), in batches of at most batch_size
    rows and _PREFILL_TOKENS tokens. `lengths` are those of all rows.
    """
    batches: list[list[int]] = []
    for row in rows:
        room = (
            batches
            and len(batches[-1]) < batch_size
            and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= _PREFILL_TOKENS
        )
        if room:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _report_full(answers: Sequence[Answer], model: CausalLM) -> None:
    full = sum(answer.stop == "context" for answer in answers)
    if full:
        log.warning(
            f"{full} of {len(answers)} answers stopped because the model's context of "
            f"{model.config.max_position_embeddings} tokens (max_position_embeddings in its config.json) is full"
        )
