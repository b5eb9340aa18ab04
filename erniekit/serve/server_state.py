"""What the routes of a server share: the model, its engine, limits and metrics."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from erniekit.data.records.errors import BadRecord
from erniekit.serve.served_model import ServedModel
from erniekit.serve.server_engine import EngineThread, QueueFull
from erniekit.serve.server_errors import ApiError, closing
from erniekit.serve.server_metrics import Metrics
from erniekit.utils.errors import UserError
from erniekit.utils.wording import count_of

T = TypeVar("T")


@dataclass
class Served(ServedModel):
    """A model that is served, with the thread of its engine. `keys` are SHA-256 digests."""

    thread: EngineThread
    metrics: Metrics
    keys: tuple[bytes, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "prompts"))

    @property
    def max_body_bytes(self) -> int:
        """The largest body of a request."""
        return self.cfg.max_request_mb << 20

    def require_engine(self) -> None:
        """Raises ApiError with the status 503 where requests are not answered any more."""
        if self.thread.is_closing:
            raise closing()
        if not self.thread.is_alive:
            raise ApiError(503, "the engine has ended; start the server again.", code="engine_failed")

    def reserve(self, count: int) -> None:
        """Take places in the queue. Raises ApiError with the status 429 where it is full, 400 where it is too small for
        the request even when nothing is in it, 503 without an engine.
        """
        self.require_engine()
        room = self.cfg.max_num_seqs + self.cfg.max_waiting_requests
        if count > room:
            raise ApiError(
                400,
                f"n: {count_of(count, 'answer')} requested, and the server accepts at most {room} at a time "
                "(max_num_seqs + max_waiting_requests in its YAML). Ask in several requests.",
                "n",
                "invalid_value",
            )
        try:
            self.thread.reserve(count)
        except QueueFull as error:
            self.metrics.admission_rejections.inc()
            raise ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"}, repeats=False) from None

    async def in_pool(self, function: Callable[[], T]) -> T:
        """The result of a function that takes a while, such as rendering a prompt, computed beside the event loop."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, function)
        except BadRecord as error:
            raise ApiError(400, f"{error.reason}.", code="invalid_value") from None
        except UserError as error:
            raise ApiError(400, str(error), code="invalid_value") from None

    def usage(
        self, num_prompt: int, num_answer: int, num_cached: int, num_thought: int | None = None
    ) -> dict[str, Any]:
        """The numbers of tokens of a response."""
        usage: dict[str, Any] = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_answer,
            "total_tokens": num_prompt + num_answer,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }
        if num_thought is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": num_thought}
        return usage
