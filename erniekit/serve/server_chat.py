"""`/v1/chat/completions`."""

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from erniekit.serve import server_fields as fields
from erniekit.serve.prompts import chat_prompt
from erniekit.serve.request_plan import Plan, plan
from erniekit.serve.server_body import read_body
from erniekit.serve.server_errors import ApiError
from erniekit.serve.server_responses import json_response
from erniekit.serve.server_run import Run, stream_of, unless_client_leaves
from erniekit.serve.server_state import Served
from erniekit.serve.server_stream import EventStream
from erniekit.serve.server_text import AnswerReader, Piece
from erniekit.utils.version import __version__

FINGERPRINT = f"erniekit-{__version__}"  # of responses: a word that changes with the program


@dataclass
class _Chat:
    """A request for answers, and what its response says about itself."""

    values: dict[str, Any]
    served: Served
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.values.get("model", self.served.name),
            "system_fingerprint": FINGERPRINT,
        }

    def num_scores(self) -> int | None:
        """How many likeliest tokens are sent beside each; None: no log-probabilities are."""
        values = self.values
        if values.get("top_logprobs") and not values.get("logprobs"):
            raise ApiError(400, "top_logprobs: it needs logprobs: true.", "top_logprobs", "invalid_value")
        return values.get("top_logprobs", 0) if values.get("logprobs") else None


async def chat(request: HttpRequest, served: Served) -> Response:
    """Answer a conversation, whole or in pieces."""
    body = await read_body(request, served.max_body_bytes)
    values = fields.read_fields(body, fields.CHAT)
    served.adapter_of(values.get("model"))
    talk = _Chat(values, served)
    num_scores, usage = talk.num_scores(), stream_options(values)
    count = values.get("n", 1)
    served.reserve(count)
    submitted = False
    try:
        prompt, how, grammar = await served.in_pool(lambda: chat_prompt(values, served))
        wanted = plan(values, [prompt], served, num_scores, "messages", grammar, request.scope["owner"])
        submitted = True
        run = Run(served, served.thread.submit(wanted.requests), how)
    finally:
        if not submitted:
            served.thread.release(count)
    served.metrics.request_params_n.observe(count)
    if values.get("stream"):
        chunks = _ChatChunks(talk, run, list(wanted.requests[0].prompt))
        head = talk.head("chat.completion.chunk")
        return EventStream(stream_of(run, chunks, head, partial(_usage, wanted, run), usage), wanted.headers)
    body = await unless_client_leaves(request, _whole(talk, wanted, run))
    return json_response(body, headers=wanted.headers)


def stream_options(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of stream_options. Raises ApiError where there is no stream."""
    options = values.get("stream_options")
    if options is None:
        return {}
    if not values.get("stream"):
        raise ApiError(400, "stream_options: it needs stream: true.", "stream_options", "invalid_value")
    return fields.read_fields(options, fields.STREAM_OPTIONS, "stream_options.")


async def _whole(talk: _Chat, wanted: Plan, run: Run) -> dict[str, Any]:
    """The response to a request that is not streamed: the pieces of a stream, joined."""
    parts: list[dict[str, Any]] = [{"thought": "", "text": "", "call": []} for _ in run.readers]
    async for step in run.steps():
        for piece in step.pieces:
            parts[step.choice][piece.kind] += piece.text if piece.call is None else [piece]
    choices = [
        _choice(talk, index, reader, said) for index, (reader, said) in enumerate(zip(run.readers, parts, strict=True))
    ]
    body = {**talk.head("chat.completion"), "choices": choices, "usage": _usage(wanted, run)}
    if talk.values.get("return_token_ids"):
        body["prompt_token_ids"] = list(wanted.requests[0].prompt)
    return body


def _choice(talk: _Chat, index: int, reader: AnswerReader, said: dict[str, Any]) -> dict[str, Any]:
    calls = [_call(piece) for piece in said["call"]]
    if talk.values.get("parallel_tool_calls") is False:
        calls = calls[:1]
    message: dict[str, Any] = {"role": "assistant", "content": said["text"] or None}
    if not said["text"] and not calls and not said["thought"]:
        message["content"] = ""
    if said["thought"]:
        message |= {"reasoning": said["thought"], "reasoning_content": said["thought"]}
    if calls:
        message["tool_calls"] = calls
    logprobs = _logprobs(talk, reader.tokens) if talk.values.get("logprobs") else None
    choice = {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": reader.finish_reason,
        "stop_reason": reader.stop_reason,
    }
    return choice | ({"token_ids": reader.ids} if talk.values.get("return_token_ids") else {})


class _ChatChunks:
    """Writes the chunks of a streamed chat. Each choice begins with its role."""

    def __init__(self, talk: _Chat, run: Run, prompt_ids: list[int]) -> None:
        self._talk, self._readers, self._prompt_ids = talk, run.readers, prompt_ids
        self._returns_ids = bool(talk.values.get("return_token_ids"))
        self._all_calls = talk.values.get("parallel_tool_calls") is not False
        count = len(run.readers)
        self._num_scored, self._num_ids, self._num_calls = [0] * count, [0] * count, [0] * count

    def begin(self, index: int) -> dict[str, Any]:
        """See Chunks."""
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return {"choices": [choice]} | ({"prompt_token_ids": self._prompt_ids} if self._returns_ids else {})

    def said(self, index: int, pieces: list[Piece]) -> Iterator[dict[str, Any]]:
        """See Chunks."""
        for piece in pieces:
            delta = self._delta(index, piece)
            if delta:
                yield {"choices": [self._choice(index, delta)]}
        reader = self._readers[index]
        if reader.is_over:
            end = {"finish_reason": reader.finish_reason, "stop_reason": reader.stop_reason}
            yield {"choices": [self._choice(index, {}) | end]}

    def _choice(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        reader = self._readers[index]
        if self._talk.values.get("logprobs"):
            choice["logprobs"] = _logprobs(self._talk, reader.tokens[self._num_scored[index] :])
            self._num_scored[index] = len(reader.tokens)
        if self._returns_ids:
            choice["token_ids"] = reader.ids[self._num_ids[index] :]
            self._num_ids[index] = len(reader.ids)
        return choice

    def _delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """The delta of a piece; empty for a call that the client does not want."""
        if piece.kind == "thought":
            return {"reasoning": piece.text, "reasoning_content": piece.text}
        if piece.kind == "text":
            return {"content": piece.text}
        self._num_calls[index] += 1
        if self._num_calls[index] > 1 and not self._all_calls:
            return {}
        return {"tool_calls": [{"index": self._num_calls[index] - 1, **_call(piece)}]}


def _call(piece: Piece) -> dict[str, Any]:
    assert piece.call is not None
    function = {"name": piece.call.name, "arguments": piece.call.arguments}
    return {"id": f"chatcmpl-tool-{uuid.uuid4().hex}", "type": "function", "function": function}


def _logprobs(talk: _Chat, tokens: list[Any]) -> dict[str, Any]:
    def entry(number: int, logprob: float) -> dict[str, Any]:
        text, content = talk.served.token(number)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": content}

    return {
        "content": [
            {**entry(number, score.logprob), "top_logprobs": [entry(*pair) for pair in score.top]}
            for number, score in tokens
        ],
        "refusal": None,
    }


def _usage(wanted: Plan, run: Run) -> dict[str, Any]:
    answer = sum(reader.num_tokens for reader in run.readers)
    thought = sum(reader.num_thought_tokens for reader in run.readers)
    return run.served.usage(wanted.num_prompt_tokens, answer, run.num_cached(wanted.n), thought)
