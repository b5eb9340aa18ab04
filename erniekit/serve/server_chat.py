"""`/v1/chat/completions`."""

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.parts import media_of
from erniekit.data.vision.plan import plan_media
from erniekit.data.vision.prompt import PicturePrompt, picture_prompt
from erniekit.data.vision.sequence import MediaTokens
from erniekit.generation.thinking import opens_thought
from erniekit.serve import server_fields as fields
from erniekit.serve.server_body import read_body
from erniekit.serve.server_errors import ApiError, json_response
from erniekit.serve.server_messages import Messages, read_tools
from erniekit.serve.server_run import Plan, Run, plan, reading, unless_client_leaves
from erniekit.serve.server_state import Served
from erniekit.serve.server_stream import EventStream
from erniekit.serve.server_text import AnswerReader, Piece, Reading
from erniekit.serve.server_video import decoded, video_options, with_videos
from erniekit.utils import log
from erniekit.utils.version import __version__

TAIL = 16  # last tokens of a prompt, among which it may open a thought


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
            "model": self.served.name,
            "system_fingerprint": fingerprint(self.served),
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
    served.check_model(values["model"])
    talk = _Chat(values, served)
    num_scores, usage = talk.num_scores(), stream_options(values)
    count = values.get("n", 1)
    served.reserve(count)
    submitted = False
    try:
        prompt, how = await served.in_pool(lambda: _prompt(values, served))
        wanted = plan(values, [prompt], served, num_scores, "messages")
        submitted = True
        run = Run(served, served.thread.submit(wanted.requests), how)
    finally:
        if not submitted:
            served.thread.release(count)
    served.metrics.request_params_n.observe(count)
    if values.get("stream"):
        return EventStream(_stream(talk, wanted, run, usage), wanted.headers)
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


def fingerprint(served: Served) -> str:
    """A word that changes with the program and the model."""
    return f"erniekit-{__version__}"


def thinking_of(values: dict[str, Any], served: Served) -> bool | None:
    """Whether the model is to think; None: as the template does by itself. Raises ApiError for what it cannot do."""
    kwargs = fields.read_fields(
        values.get("chat_template_kwargs", {}), fields.TEMPLATE_OPTIONS, "chat_template_kwargs."
    )
    given = {
        name: source["enable_thinking"]
        for name, source in (("enable_thinking", values), ("kwargs", kwargs))
        if "enable_thinking" in source
    }
    mode = kwargs.get("options", {}).get("thinking_mode")
    if mode is not None:
        if mode not in ("open", "close"):
            raise ApiError(
                400, "chat_template_kwargs.options.thinking_mode: expected open or close.", "chat_template_kwargs"
            )
        given["thinking_mode"] = mode == "open"
    if values.get("reasoning_effort") == "none":
        given["reasoning_effort"] = False
    if len(set(given.values())) > 1:
        raise ApiError(400, f"enable_thinking: {' and '.join(given)} contradict each other.", "enable_thinking")
    if not given:
        return served.chat_model.enable_thinking
    wanted = next(iter(given.values()))
    template = served.chat_model.template
    if "enable_thinking" not in template.source:
        thinks = opens_thought(template.render([{"role": "user", "content": "q"}], add_generation_prompt=True))
        if wanted != thinks:
            state = "always thinks" if thinks else "never thinks"
            raise ApiError(
                400,
                f"enable_thinking: {str(wanted).lower()}: chat template {template.name} {state}.",
                "enable_thinking",
                "unsupported_value",
            )
        return None
    return wanted


def prompt_of(values: dict[str, Any], served: Served, tools: Any, answers: bool = True) -> list[int] | PicturePrompt:
    """The prompt of a conversation. Raises ApiError, UserError or BadRecord."""
    model = served.chat_model
    reader = Messages(model.template, model.vision, served.cfg.max_request_images)
    messages = reader.read(values["messages"])
    ids = model.template.prompt_ids(messages, tools, thinking_of(values, served), answers)
    media = list(media_of(messages))
    if not media:
        return ids
    vision = model.vision
    assert vision is not None, "Messages refuses pictures for models of text"
    options = video_options(vision.video)
    files = MediaReader(Path("/nonexistent"))
    plans = with_videos(lambda: plan_media(media, files, vision.settings, options, reader.notes))
    plans = decoded(plans, served.context, reader.notes)
    for doubt in sorted(reader.notes.doubts):
        log.info(doubt)
    return picture_prompt(ids, plans, MediaTokens.of(model.tokenizer), vision)


def _prompt(values: dict[str, Any], served: Served) -> tuple[list[int] | PicturePrompt, Reading]:
    tools = read_tools(values.get("tools", []), values.get("tool_choice"))
    prompt = prompt_of(values, served, tools)
    ids = prompt.ids if isinstance(prompt, PicturePrompt) else prompt
    opened = opens_thought(served.chat_model.tokenizer.decode(ids[-TAIL:]))
    return prompt, reading(values, served, opened=opened, has_thoughts=True, has_calls=tools is not None)


async def _whole(talk: _Chat, wanted: Plan, run: Run) -> dict[str, Any]:
    """The response to a request that is not streamed: the pieces of a stream, joined."""
    parts: list[dict[str, Any]] = [{"thought": "", "text": "", "call": []} for _ in run.readers]
    async for step in run.steps():
        for piece in step.pieces:
            parts[step.choice][piece.kind] += piece.text if piece.call is None else [piece]
    choices = [
        _choice(talk, index, reader, said) for index, (reader, said) in enumerate(zip(run.readers, parts, strict=True))
    ]
    return {**talk.head("chat.completion"), "choices": choices, "usage": _usage(wanted, run)}


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
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": reader.finish_reason,
        "stop_reason": reader.stop_reason,
    }


async def _stream(
    talk: _Chat, wanted: Plan, run: Run, usage: dict[str, Any]
) -> AsyncGenerator[dict[str, Any] | None, None]:
    """The chunks of a streamed response. Each choice begins with its role, in the order of the choices."""
    head = talk.head("chat.completion.chunk")
    each = usage.get("continuous_usage_stats")
    num_begun, num_scored = 0, [0] * len(run.readers)
    writers = [_Deltas(talk.values.get("parallel_tool_calls") is not False) for _ in run.readers]

    def chunk(
        index: int, delta: dict[str, Any], reader: AnswerReader | None = None, ends: bool = False
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if reader is not None and talk.values.get("logprobs"):
            choice["logprobs"] = _logprobs(talk, reader.tokens[num_scored[index] :])
            num_scored[index] = len(reader.tokens)
        if reader is not None and ends:
            choice |= {"finish_reason": reader.finish_reason, "stop_reason": reader.stop_reason}
        piece = {**head, "choices": [choice]}
        if each:
            piece["usage"] = _usage(wanted, run)
        elif usage.get("include_usage"):
            piece["usage"] = None
        return piece

    async for step in run.steps():
        if step.choice < 0:
            yield None
            continue
        while num_begun <= step.choice:
            yield chunk(num_begun, {"role": "assistant", "content": ""})
            num_begun += 1
        reader = run.readers[step.choice]
        for piece in step.pieces:
            delta = writers[step.choice].delta(piece)
            if delta:
                yield chunk(step.choice, delta, reader)
        if reader.is_over:
            yield chunk(step.choice, {}, reader, ends=True)
    if usage.get("include_usage"):
        yield {**head, "choices": [], "usage": _usage(wanted, run)}


@dataclass
class _Deltas:
    """Writes the pieces of one choice as deltas."""

    all_calls: bool
    num_calls: int = 0

    def delta(self, piece: Piece) -> dict[str, Any]:
        """The delta of a piece; empty for a call that the client does not want."""
        if piece.kind == "thought":
            return {"reasoning": piece.text, "reasoning_content": piece.text}
        if piece.kind == "text":
            return {"content": piece.text}
        self.num_calls += 1
        if self.num_calls > 1 and not self.all_calls:
            return {}
        return {"tool_calls": [{"index": self.num_calls - 1, **_call(piece)}]}


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
