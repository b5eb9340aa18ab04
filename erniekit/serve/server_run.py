"""Starts the answers to a request and reads them, within the limits of time, until the client has them or leaves."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from starlette.requests import Request as HttpRequest

from erniekit.data.vision.prompt import PicturePrompt
from erniekit.generation.load import sampling_of
from erniekit.generation.pictures import tables_of
from erniekit.generation.request import Limits, Request
from erniekit.serve.server_engine import Event, Job
from erniekit.serve.server_errors import ApiError
from erniekit.serve.server_fields import id_list, text_list
from erniekit.serve.server_state import Served
from erniekit.serve.server_text import AnswerReader, Piece, Reading
from erniekit.utils import log

KEEP_ALIVE = 15.0  # seconds after which a silent stream gets a comment, so that proxies keep it open
MAX_ANSWERS = 512  # of one request: n times its prompts
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """The answers that a request asks for. `prompts` are token ids, or a prompt with pictures; each gets `n` answers.
    `headers`: what the response says about them.
    """

    prompts: Sequence[Sequence[int] | PicturePrompt]
    requests: Sequence[Request]
    n: int
    headers: dict[str, str]

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(request.prompt) for request in self.requests[:: self.n])


class Step(NamedTuple):
    """What one event of the answer `choice` has brought; `choice` is -1 where nothing came for KEEP_ALIVE seconds."""

    choice: int
    pieces: list[Piece]


def plan(
    values: dict[str, Any],
    prompts: Sequence[list[int] | PicturePrompt],
    served: Served,
    num_scores: int | None,
    name: str,
) -> Plan:
    """The requests to the engine for the fields of a client's request. `name`: the field that has the prompts."""
    n = values.get("n", 1)
    if n * len(prompts) > MAX_ANSWERS:
        raise ApiError(400, f"n: at most {MAX_ANSWERS} answers to a request.", "n", "invalid_value")
    lengths = [len(prompt.ids if isinstance(prompt, PicturePrompt) else prompt) for prompt in prompts]
    for length in lengths:
        served.check_length(length, name)
    sampling = _sampling(values, served)
    requests, room = [], served.context - max(lengths)
    limits = _limits(values, served, room)
    asked = values.get("max_completion_tokens", values.get("max_tokens"))
    headers = {}
    if asked is not None and asked > room:
        headers["x-erniekit-max-tokens"] = str(room)
        log.info(f"max_tokens: {asked} is more than the {room} tokens that the context has left, which are used")
    for row, prompt in enumerate(prompts):
        for number in range(n):
            draw = row * n + number
            if isinstance(prompt, PicturePrompt):
                request = Request(prompt.ids, limits, sampling, draw, prompt, _Tables(prompt), num_scores)
            else:
                request = Request(prompt, limits, sampling, draw, num_scores=num_scores)
            requests.append(request)
    return Plan(prompts, requests, n, headers)


@dataclass(frozen=True)
class _Tables:
    """Decodes the pictures of a prompt when the engine asks for them."""

    prompt: PicturePrompt

    def __call__(self, start: int) -> Any:
        return tables_of(self.prompt, start)


def _sampling(values: dict[str, Any], served: Served) -> Any:
    names = ("temperature", "top_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    given: dict[str, Any] = {name: float(values[name]) for name in names if name in values}
    if "top_k" in values:
        given["top_k"] = max(values["top_k"], 0)
    seed = values.get("seed")
    # numpy takes seeds from 0 on
    return replace(sampling_of(served.cfg), **given, seed=None if seed is None else seed % 2**64)


def _limits(values: dict[str, Any], served: Served, room: int) -> Limits:
    default = served.limits.max_new_tokens if "max_new_tokens" in served.cfg.given else room
    asked = values.get("max_completion_tokens", values.get("max_tokens", default))
    if asked < 1:
        raise ApiError(400, "max_tokens: expected 1 or more.", "max_tokens", "invalid_value")
    most = min(asked, room)
    least = values.get("min_tokens", min(served.limits.min_new_tokens, most))
    if least > most:
        raise ApiError(400, f"min_tokens: {least} is more than max_tokens, {most}.", "min_tokens", "invalid_value")
    vocab_size = served.chat_model.model.config.vocab_size
    stops = set(id_list(values.get("stop_token_ids", []), "stop_token_ids", vocab_size))
    if not values.get("ignore_eos"):
        stops |= set(served.limits.stop_ids)
    return Limits(most, least, tuple(sorted(stops)))


def reading(values: dict[str, Any], served: Served, **parts: bool) -> Reading:
    """How the tokens of the answers are read; `parts`: opened, has_thoughts and has_calls."""
    return Reading(
        **parts,
        stops=text_list(values.get("stop", []), "stop"),
        includes_stop=values.get("include_stop_str_in_output", False),
        min_tokens=values.get("min_tokens", 0),
        hidden=served.hidden if values.get("skip_special_tokens", True) else frozenset(),
    )


class Run:
    """The answers to a request while they are generated. `readers` has what each of them has said."""

    def __init__(self, served: Served, job: Job, how: Reading) -> None:
        self.served, self.job = served, job
        self.readers = [AnswerReader(served.chat_model.tokenizer, how) for _ in job.answers]
        self._last = [0.0] * len(job.answers)

    def num_cached(self, n: int) -> int:
        """Tokens of the prompts that did not have to be computed; each prompt, which has `n` answers, counts once."""
        return sum(answer.num_reused for answer in self.job.answers[::n])

    async def steps(self) -> AsyncIterator[Step]:
        """What each event brings, until all answers have ended. When the caller leaves, they are cancelled. Raises
        ApiError for answers that fail or take too long.
        """
        try:
            while not all(reader.is_over for reader in self.readers):
                index, event = await self._next()
                if index < 0:
                    yield Step(index, [])
                    continue
                if self.readers[index].is_over:
                    continue  # the engine was a step further
                if event.stop in ("error", "cancelled"):
                    raise ApiError(500, event.error or "the server is closing.", code="engine_failed", repeats=False)
                pieces = self.readers[index].push(event)
                self._measure_token(index)
                if self.readers[index].finish_reason:
                    self.served.thread.cancel([self.job.answers[index]])
                    self._measure_end(index)
                yield Step(index, pieces)
        finally:
            self.served.thread.cancel(self.job.answers)

    async def _next(self) -> tuple[int, Event]:
        """The next event; (-1, an empty one) where none comes for a while."""
        cfg, age = self.served.cfg, time.monotonic() - self.job.came
        waits = not all(answer.read for answer in self.job.answers)
        left = min(cfg.request_timeout, cfg.queue_timeout if waits else cfg.request_timeout) - age
        if left <= 0 and self.job.events.empty():
            if waits and cfg.queue_timeout < cfg.request_timeout:
                raise ApiError(
                    408,
                    f"no answer has begun within {cfg.queue_timeout:g} seconds (queue_timeout). Try again.",
                    code="queue_timeout",
                    headers={"Retry-After": "5"},
                    repeats=False,
                )
            raise ApiError(
                408, f"the answer takes more than {cfg.request_timeout:g} seconds (request_timeout).", code="timeout"
            )
        try:
            return await asyncio.wait_for(self.job.events.get(), max(0.001, min(KEEP_ALIVE, left)))
        except asyncio.TimeoutError:
            return -1, Event()

    def _measure_token(self, index: int) -> None:
        now, metrics = time.monotonic(), self.served.metrics
        if self._last[index]:
            metrics.inter_token_latency.observe(now - self._last[index])
        else:
            metrics.time_to_first_token.observe(now - self.job.came)
        self._last[index] = now

    def _measure_end(self, index: int) -> None:
        metrics, reader, answer = self.served.metrics, self.readers[index], self.job.answers[index]
        metrics.ended(reader.finish_reason or "")
        metrics.e2e_latency.observe(time.monotonic() - self.job.came)
        metrics.generation_tokens.inc(reader.num_tokens)
        metrics.request_generation_tokens.observe(reader.num_tokens)
        metrics.prompt_tokens.inc(len(answer.request.prompt))
        metrics.request_prompt_tokens.observe(len(answer.request.prompt))
        metrics.request_params_max_tokens.observe(answer.request.limits.max_new_tokens)
        metrics.prefix_cache_queries.inc(len(answer.request.prompt))
        metrics.prefix_cache_hits.inc(answer.num_reused)
        if reader.num_unreadable:
            metrics.tool_calls_unreadable.inc(reader.num_unreadable)
            log.info(f"{reader.num_unreadable} calls of the model could not be read, and stay in its text")


class ClientLeft(Exception):
    """Nobody waits for the response any more."""


async def unless_client_leaves(request: HttpRequest, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client closes the connection; then raises ClientLeft."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    finally:
        for pending in (task, leaving):
            if not pending.done():
                pending.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _left(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
