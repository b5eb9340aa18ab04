"""What `erniekit.LLM` returns, under vLLM's names."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Logprob:
    """The log-probability of a token in the model's distribution, before temperature and penalties. rank: its place
    among the likeliest, from 1; None: beyond those that were asked for.
    """

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One answer.

    text: without thought and calls where `chat` made it. token_ids: all tokens, the end token included. logprobs: for
    each token of the text the likeliest ones and itself, by id. finish_reason: "stop", "length", "tool_calls" or
    "error"; stop_reason: the text or the token id that ended it. tool_calls: {"name", "arguments": JSON text} each.
    error: why the answer has failed, so that it breaks off (scores that are not finite, or a grammar that is too
    complex to be followed further); None: it has not.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: str | int | None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """The answers to one prompt. prompt: its text, where it was given as text. prompt_logprobs: as those of an answer,
    None for the first token. num_cached_tokens: tokens of the prompt that did not have to be computed.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    finished: bool = True
