"""Encodes records by number: from a cache, in this process, or in worker processes.

A worker is a Python child process that communicates over its standard input and output. Unlike a worker of
multiprocessing it does not import the parent's main module (and with it Paddle), and it needs no
`if __name__ == "__main__"` guard in the user's script. It always ends with its parent, because its input is then
closed.
"""

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from erniekit.data.chat.encode import Encoded, Encoder, Template, Tokenizer
from erniekit.data.records.dataset import Dataset
from erniekit.data.vision.encode import VisionEncoder, VisionSpec
from erniekit.data.vision.template import VisionTemplate
from erniekit.utils import log, runtime, stop_signals
from erniekit.utils.errors import DataError, UserError

CACHE_BYTES = 256 * 2**20
_CHUNK = 32  # records per message to a worker
_SHOWN_DROPS = 3  # the others are only counted


@dataclass(frozen=True)
class EncoderSpec:
    """The arguments of an Encoder, or with `vision` of a VisionEncoder, in a form that can be sent to a worker. Plain
    text needs no `template`. `length_key`: the configuration's key that `max_seq_len` has its value from, for messages.
    """

    tokenizer: Tokenizer
    max_seq_len: int
    truncation: str = "drop"
    on_bad_line: str = "error"
    max_prompt_len: int | None = None
    template: Template | None = None
    vision: VisionSpec | None = None
    length_key: str = "max_seq_len"

    def make(self) -> Encoder | VisionEncoder:
        """The encoder."""
        if self.vision is not None:
            assert isinstance(self.template, VisionTemplate), "records with pictures need a template that shows them"
            return VisionEncoder(self.template, self.vision, self.max_seq_len, self.on_bad_line)
        return Encoder(
            self.tokenizer, self.template, self.max_seq_len, self.truncation, self.on_bad_line, self.max_prompt_len
        )


class Job(Protocol):
    """The task of a worker, in a form that can be sent to it. Its class must be in a module that can be imported."""

    def make(self) -> Callable[..., Any]:
        """The function that the worker calls with the arguments of each record."""
        ...


class Worker:
    """A worker process. It is sent a chunk only after its previous answer was read, so that both sides can never block
    on full pipes at the same time.
    """

    def __init__(self, spec: Job):
        command = runtime.python_command("from erniekit.data.workers import serve; serve()")
        with stop_signals.blocked():
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.send(spec)

    def send(self, message: Any) -> None:
        """Send a chunk: a list of records, each as the arguments of one call."""
        assert self.process.stdin is not None
        try:
            pickle.dump(message, self.process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):  # ValueError: closed by stop()
            pass  # the worker has ended; receive() will raise the error

    def receive(self) -> tuple[list[Any], Exception | None]:
        """The results for the records of the chunk up to the first wrong record, and the error of that record."""
        assert self.process.stdout is not None
        try:
            return pickle.load(self.process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            code = self.process.wait()
            return [], DataError(
                f"a data worker ended unexpectedly (exit code {code}). Hint: it may have run out of memory; use fewer "
                "(dataloader_num_workers; 0 encodes in the main process)."
            )

    def stop(self) -> None:
        """Kill the process; a receive() that waits in another thread returns."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:
                pass  # data that is still buffered for it is discarded


def serve() -> None:
    """The main function of a worker: reads the job, then chunks of records, and answers each chunk with the results up
    to the first wrong record and the error of that record.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the trainer, which then ends its workers
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # printed text must not get into the stream of answers
    encoder: Callable[..., Any] | None = None
    try:
        spec: Job = pickle.load(source)
        while True:
            done: list[Any] = []
            error: Exception | None = None
            records = pickle.load(source)
            try:
                encoder = encoder or spec.make()
                for record in records:
                    done.append(encoder(*record))
            except UserError as wrong:
                error = wrong
            except Exception:
                error = RuntimeError("in a data worker:\n" + traceback.format_exc())
            pickle.dump((done, error), sink, protocol=pickle.HIGHEST_PROTOCOL)
            sink.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent has closed the pipes; a normal exit would try to flush the broken pipe


@dataclass
class _Chunk:
    """Consecutive record numbers of a stream: `encoded` has finished records, and `worker` encodes the
    `missing` ones.
    """

    numbers: list[int]
    encoded: dict[int, Encoded]
    missing: list[int]
    worker: Worker | None = None
    error: Exception | None = None

    def results(self) -> Iterator[Encoded]:
        """The records in the order of `numbers`. Raises the worker's error at the first one that is missing."""
        for number in self.numbers:
            if number not in self.encoded:
                assert self.error is not None
                raise self.error
            yield self.encoded[number]


class EncodingService:
    """Encodes the records of a data set by number. With `remember`, encoded records are cached in memory up to
    CACHE_BYTES, so that later epochs need not encode them again.
    """

    def __init__(self, dataset: Dataset, spec: EncoderSpec, num_workers: int = 0, remember: bool = False):
        self._dataset, self._spec, self._num_workers = dataset, spec, num_workers
        self._encoder = spec.make()
        self._cache: dict[int, Encoded] = {}
        self._room = CACHE_BYTES if remember else 0
        self._workers: set[Worker] = set()
        self._drops, self._length_key = 0, spec.length_key

    def stream(self, numbers: Iterable[int], num_workers: int | None = None) -> Generator[Encoded, None, None]:
        """Yields the encoded records in the order of `numbers`, which may be endless, since it is read only a little
        ahead. Close the generator to end its workers. `num_workers`: the minimum number of workers for this stream.
        """
        workers = max(self._num_workers, num_workers or 0)
        if workers:
            yield from self._stream_from_workers(iter(numbers), workers)
            return
        for number in numbers:
            encoded = self._cache.get(number)
            if encoded is None:
                encoded = self._keep(number, self._encoder(*self._dataset.record(number)))
            yield encoded

    def lengths_depend_on(self) -> dict[str, Any]:
        """Everything except the record itself that its number of tokens depends on, as plain JSON values."""
        spec, template = self._spec, self._encoder.template
        return {
            "tokenizer": spec.tokenizer.fingerprint,
            "template": None if template is None else template.source,
            "max_seq_len": spec.max_seq_len,
            "truncation": spec.truncation,
            "on_bad_line": spec.on_bad_line,
            "max_prompt_len": spec.max_prompt_len,
            "pictures": None if spec.vision is None else repr(spec.vision),
        }

    def stop(self) -> None:
        """End the workers of all streams, even while another thread waits for them."""
        for worker in list(self._workers):
            worker.stop()

    def _stream_from_workers(self, numbers: Iterator[int], num_workers: int) -> Generator[Encoded, None, None]:
        """Sends chunks to free workers, and collects the answers in the order of the chunks, so that the stream is the
        same for any number of workers.
        """
        mine: list[Worker] = []
        free: list[Worker] = []
        waiting: deque[_Chunk] = deque()
        try:
            while chunk := self._next_chunk(numbers):
                waiting.append(chunk)
                if chunk.missing:
                    if not free and len(mine) < num_workers:
                        mine.append(Worker(self._spec))
                        self._workers.add(mine[-1])
                        free.append(mine[-1])
                    elif not free:
                        free.append(self._collect(waiting[0]))
                    chunk.worker = free.pop()
                    chunk.worker.send([self._dataset.record(number) for number in chunk.missing])
                if len(waiting) > 2 * num_workers and waiting[0].worker is not None:
                    free.append(self._collect(waiting[0]))  # limit how far chunks that need no worker run ahead
                while waiting and waiting[0].worker is None:
                    yield from waiting.popleft().results()
            while waiting:
                if waiting[0].worker is not None:
                    self._collect(waiting[0])
                yield from waiting.popleft().results()
        finally:
            for worker in mine:
                worker.stop()
                self._workers.discard(worker)

    def _next_chunk(self, numbers: Iterator[int]) -> _Chunk | None:
        chunk = list(islice(numbers, _CHUNK))
        encoded = {number: self._cache[number] for number in chunk if number in self._cache}
        return _Chunk(chunk, encoded, [n for n in dict.fromkeys(chunk) if n not in encoded]) if chunk else None

    def _collect(self, chunk: _Chunk) -> Worker:
        """Wait for the answer to a chunk, and return its worker, which is then free."""
        worker, chunk.worker = chunk.worker, None
        assert worker is not None
        done, chunk.error = worker.receive()
        for number, encoded in zip(chunk.missing, done, strict=False):
            chunk.encoded[number] = self._keep(number, encoded)
        return worker

    def _keep(self, number: int, encoded: Encoded) -> Encoded:
        if encoded.dropped:
            self._drops += 1
            if self._drops <= _SHOWN_DROPS:
                reason = encoded.dropped.replace("max_seq_len", self._length_key)
                log.warning(
                    f"{encoded.where}: sample dropped: {reason}"
                    + (" (further ones are only counted)" if self._drops == _SHOWN_DROPS else "")
                )
        # 600: about the bytes of the objects around the arrays
        size = 600 + sum(document.num_bytes for document in encoded.documents)
        if size <= self._room:
            self._room -= size
            self._cache[number] = encoded
        return encoded
