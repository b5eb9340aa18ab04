"""Starts the answers to a request and reads them, within the limits of time, until the client has them or leaves."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

from starlette.requests import Request as HttpRequest

from erniekit.generation.guided import grammar_error
from erniekit.generation.request import Event
from erniekit.serve.server_engine import Answering, Job
from erniekit.serve.server_errors import ApiError, closing
from erniekit.serve.server_state import Served
from erniekit.serve.server_stream import client_left
from erniekit.serve.server_text import AnswerReader, Piece, Reading
from erniekit.utils import log
from erniekit.utils.wording import count_of

KEEP_ALIVE = 15.0  # seconds after which a silent stream gets a comment, so that proxies keep it open
T = TypeVar("T")


class Step(NamedTuple):
    """What one event of the answer `choice` has brought; `choice` is -1 where nothing came for KEEP_ALIVE seconds."""

    choice: int
    pieces: list[Piece]


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
                if event.stop:
                    _require_answer(self.job.answers[index], event)
                pieces = self.readers[index].push(event)
                self._measure_token(index)
                if self.readers[index].finish_reason:
                    self.served.thread.cancel([self.job.answers[index]])
                    self._measure_end(index)
                yield Step(index, pieces)
        finally:
            self.job.events.close()
            self.served.thread.cancel(self.job.answers)
            for index, reader in enumerate(self.readers):
                if not reader.is_over:
                    self._measure_end(index)

    async def _next(self) -> tuple[int, Event]:
        """The next event; (-1, an empty one) where none comes for a while."""
        cfg, age = self.served.cfg, time.monotonic() - self.job.came
        waits = not all(answer.read for answer in self.job.answers)
        left = min(cfg.request_timeout, cfg.queue_timeout if waits else cfg.request_timeout) - age
        if left <= 0 and self.job.events.is_empty:
            if waits and cfg.queue_timeout < cfg.request_timeout:
                raise ApiError(
                    408,
                    f"no answer has begun within {cfg.queue_timeout:g} s (queue_timeout). Try again.",
                    code="queue_timeout",
                    headers={"Retry-After": "5"},
                    repeats=False,
                )
            raise ApiError(
                408, f"the answer took more than {cfg.request_timeout:g} s (request_timeout).", code="timeout"
            )
        return await self.job.events.get(max(0.001, min(KEEP_ALIVE, left))) or (-1, Event())

    def _measure_token(self, index: int) -> None:
        now, metrics = time.monotonic(), self.served.metrics
        if self._last[index]:
            metrics.inter_token_latency.observe(now - self._last[index])
        else:
            metrics.time_to_first_token.observe(now - self.job.came)
        self._last[index] = now

    def _measure_end(self, index: int) -> None:
        metrics, reader, answer = self.served.metrics, self.readers[index], self.job.answers[index]
        has_failed = self.served.thread.failure or (answer.generation and answer.generation.error)
        metrics.ended(reader.finish_reason or ("error" if has_failed else "abort"))
        now, began = time.monotonic(), answer.generation.began if answer.generation else 0.0
        metrics.e2e_latency.observe(now - self.job.came)
        if began and answer.read:
            metrics.queue_time.observe(max(0.0, began - self.job.came))
            metrics.prefill_time.observe(answer.read - began)
            metrics.decode_time.observe(now - answer.read)
            metrics.inference_time.observe(now - began)
        metrics.generation_tokens.inc(reader.num_tokens)
        metrics.request_generation_tokens.observe(reader.num_tokens)
        metrics.request_params_max_tokens.observe(answer.request.limits.max_new_tokens)
        metrics.request_prompt_tokens.observe(len(answer.request.prompt))
        if began:  # one that was cancelled in the queue has not been read
            metrics.prompt_tokens.inc(len(answer.request.prompt))
            metrics.prefix_cache_queries.inc(len(answer.request.prompt))
            metrics.prefix_cache_hits.inc(answer.num_reused)
        if reader.num_unreadable:
            metrics.tool_calls_unreadable.inc(reader.num_unreadable)
            log.info(
                f"{count_of(reader.num_unreadable, 'tool call')} of the model could not be read, and left in its text"
            )


def _require_answer(answer: Answering, end: Event) -> None:
    """Raises ApiError for an answer that ended because it has failed."""
    if answer.generation is not None and answer.generation.error:
        raise ApiError(500, answer.generation.error, code="answer_failed")
    if end.stop == "cancelled":
        raise closing()
    if end.stop == "error":
        raise ApiError(500, end.error, code="engine_failed", repeats=False)
    if problem := grammar_error(answer.request):
        raise ApiError(500, problem, code="grammar_failed")


class Chunks(Protocol):
    """Writes the choices of a stream's chunks, and what else a chunk has beside its head and its usage."""

    def begin(self, index: int) -> dict[str, Any]:
        """The first chunk of a choice."""
        ...

    def said(self, index: int, pieces: list[Piece]) -> Iterator[dict[str, Any]]:
        """The chunks of what a step has brought to a choice."""
        ...


async def stream_of(
    run: Run, chunks: Chunks, head: dict[str, Any], usage: Callable[[], dict[str, Any]], options: dict[str, Any]
) -> AsyncGenerator[dict[str, Any] | None, None]:
    """The chunks of a streamed response, each with `head`; None where nothing came for a while. The choices begin in
    their order. `options`: stream_options; `usage`: the numbers of tokens so far.
    """

    def whole(chunk: dict[str, Any]) -> dict[str, Any]:
        if options.get("continuous_usage_stats"):
            chunk["usage"] = usage()
        elif options.get("include_usage"):
            chunk["usage"] = None
        return {**head, **chunk}

    num_begun = 0
    async for step in run.steps():
        if step.choice < 0:
            yield None
            continue
        while num_begun <= step.choice:
            yield whole(chunks.begin(num_begun))
            num_begun += 1
        for chunk in chunks.said(step.choice, step.pieces):
            yield whole(chunk)
    if options.get("include_usage"):
        yield {**head, "choices": [], "usage": usage()}


class ClientLeft(Exception):
    """Nobody waits for the response any more."""


async def unless_client_leaves(request: HttpRequest, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client closes the connection; then raises ClientLeft."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(client_left(request.receive))
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
