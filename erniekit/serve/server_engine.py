"""The thread that owns the engine of a server: requests come in by calls from the event loop, tokens go back to it."""

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from erniekit.generation.engine import Engine
from erniekit.generation.request import Event, Generation, Request
from erniekit.serve.server_errors import closing
from erniekit.serve.server_wait import Inbox
from erniekit.utils import log
from erniekit.utils.errors import UserError


class QueueFull(UserError):
    """The queue of answers is full."""


@dataclass(eq=False)
class Answering:
    """One answer that is being generated, as the event loop sees it; `index` is its number in its job. `read` is the
    time (time.monotonic) of its first token, 0 before.
    """

    request: Request
    index: int
    job: "Job"
    read: float = 0.0
    is_ended: bool = False
    generation: Generation | None = None

    @property
    def num_reused(self) -> int:
        """Tokens of the prompt that did not have to be computed."""
        return 0 if self.generation is None else self.generation.num_reused


@dataclass(eq=False)
class Job:
    """The answers to one request of a client. `events` are theirs: (index of the answer, event). came: the time
    (time.monotonic) at which it was submitted.
    """

    answers: list[Answering] = field(default_factory=list)
    events: Inbox[tuple[int, Event]] = field(default_factory=Inbox)
    came: float = field(default_factory=time.monotonic)


class EngineThread:
    """Runs an engine in a thread of its own. All methods are called from one event loop, which `start` names.

    max_waiting: how many answers may wait beside those that run; `reserve` counts an answer before its prompt is
    rendered, so that a burst is refused before any work is done for it. num_running: answers that are
    read or generated.
    """

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        self.failure = ""
        self.num_reserved = 0
        self.num_running = self._num_queued = self._num_cached = 0  # of the engine, as its thread has last counted them
        self._open = 0  # answers that have been submitted and have not ended
        self._wake = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._answers: dict[int, Answering] = {}  # by id of the generation; belongs to the thread
        self.is_closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self.failure and not self.is_closing

    @property
    def num_waiting(self) -> int:
        """Answers that wait, those whose prompt is being rendered included."""
        return self._num_queued + self.num_reserved

    @property
    def kv_usage(self) -> float:
        """The share of the tokens that all running answers may have in the cache that they have."""
        return self._num_cached / (self.engine.max_running * self.engine.model.config.max_position_embeddings)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to answer; events go to queues of `loop`."""
        self._loop = loop
        self._thread.start()

    def end(self) -> None:
        """Answer no more: answers that have not ended are cancelled, and so are later ones."""
        with self._wake:
            self.is_closing = True
            self._wake.notify()

    def close(self) -> None:
        """End the thread."""
        if self.engine.drafting is not None and self.engine.drafting.num_drafts:
            log.info(self.engine.drafting.line)
        self.end()
        self._thread.join(timeout=30)

    def reserve(self, count: int) -> None:
        """Take places in the queue for `count` answers. Raises QueueFull. Followed by `submit` or `release`."""
        if self._open + self.num_reserved + count > self.engine.max_running + self.max_waiting:
            raise QueueFull(
                f"answers that run or wait: {self._open + self.num_reserved}; at most "
                f"{self.engine.max_running + self.max_waiting} may (max_num_seqs + max_waiting_requests). Try again."
            )
        self.num_reserved += count

    def release(self, count: int) -> None:
        """Give places back that were not used."""
        self.num_reserved -= count

    def submit(self, requests: Sequence[Request]) -> Job:
        """Begin to answer requests for which places were reserved."""
        self.num_reserved -= len(requests)
        job = Job()
        job.answers = [Answering(request, index, job) for index, request in enumerate(requests)]
        self._open += len(requests)
        if self.is_closing:
            self._deliver([(answer, Event(stop="cancelled")) for answer in job.answers])
        else:
            self._call(lambda: self._add(job.answers))
        return job

    def cancel(self, answers: Sequence[Answering]) -> None:
        """End answers that nobody reads any more, within one step."""
        open_ones = [answer for answer in answers if not answer.is_ended]
        if open_ones:
            self._call(lambda: self._cancel(open_ones))

    async def run(self, function: Callable[[], Any]) -> Any:
        """The result of a function that uses the model, called in the engine's thread between two steps. Raises
        ApiError after `end`.
        """
        if self.is_closing:
            raise closing()
        future: Future[Any] = Future()

        def call() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._call(call)
        return await asyncio.wrap_future(future)

    def _call(self, function: Callable[[], None]) -> None:
        with self._wake:
            self._calls.append(function)
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._calls or self.is_closing) and (self.failure or self.engine.is_idle):
                    self._wake.wait()
                calls, self._calls, is_last = self._calls, deque(), self.is_closing
            try:
                for call in calls:
                    call()
                self._count()
                if is_last:
                    return self._end_all(Event(stop="cancelled"))
                if not self.failure:
                    advanced = self.engine.step()
                    self._count()  # before anybody hears of an answer's end
                    self._send(advanced)
            except Exception as error:  # the thread lives on, to tell later requests
                self.failure = f"{type(error).__name__}: {error}"
                log.warning(f"the engine has failed, and the server answers no more: {self.failure}")
                if not isinstance(error, UserError):
                    log.warning("".join(traceback.format_exception(error)))
                self._end_all(Event(stop="error", error=self.failure))

    def _count(self) -> None:
        engine = self.engine
        self.num_running, self._num_queued, self._num_cached = engine.num_running, engine.num_waiting, engine.num_cached

    def _add(self, answers: Sequence[Answering]) -> None:
        for answer in answers:
            try:
                if self.failure:
                    raise UserError(self.failure)
                answer.generation = self.engine.add(answer.request)
            except UserError as error:
                self._post([(answer, Event(stop="error", error=str(error)))])
                continue
            self._answers[id(answer.generation)] = answer

    def _cancel(self, answers: Sequence[Answering]) -> None:
        ended = []
        for answer in answers:
            if answer.generation is not None and self._answers.pop(id(answer.generation), None) is not None:
                self.engine.cancel(answer.generation)
                ended.append((answer, Event(stop="cancelled")))
        self._post(ended)

    def _send(self, advanced: Sequence[Generation]) -> None:
        events = []
        for generation in advanced:
            answer = self._answers[id(generation)]
            events += [(answer, event) for event in generation.new_events()]
            if generation.error:
                log.warning(f"an answer has failed: {generation.error}")
            if generation.answer.stop:
                del self._answers[id(generation)]
        self._post(events)

    def _end_all(self, event: Event) -> None:
        self._post([(answer, event) for answer in self._answers.values()])
        self._answers = {}

    def _post(self, events: list[tuple[Answering, Event]]) -> None:
        """Hand all events of a step to the event loop by one call."""
        if events and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list[tuple[Answering, Event]]) -> None:
        now = time.monotonic()
        for answer, event in events:
            answer.read = answer.read or now
            if event.stop and not answer.is_ended:
                answer.is_ended = True
                self._open -= 1
            answer.job.events.put((answer.index, event))
