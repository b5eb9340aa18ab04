"""`erniekit.SamplingParams`: how one prompt is answered, under vLLM's names."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of
from functools import wraps
from typing import Any

from erniekit.serve import server_fields
from erniekit.serve.server_errors import ApiError
from erniekit.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a prompt is answered. The fields are those of the server's requests, with vLLM's defaults: the YAML's
    temperature and top_p do not hold here.

    Args:
        n: the number of answers.
        temperature, top_p, top_k, min_p: how tokens are drawn; temperature 0 takes the likeliest. top_k 0 or -1: all.
        repetition_penalty, presence_penalty, frequency_penalty, logit_bias: see generation.sampling.Sampling.
        seed: equal seeds give equal answers; None: a fresh one.
        max_tokens: the largest number of tokens of an answer; None: what is left of the context.
        min_tokens: the number of tokens before an answer may end.
        stop: texts that end an answer (in `chat` not inside a thought). stop_token_ids: tokens that do.
        include_stop_str_in_output: whether the text that ended the answer is part of it.
        ignore_eos: whether the model's end tokens do not end an answer.
        skip_special_tokens: whether special tokens are left out of the text.
        logprobs: the number of likeliest tokens whose log-probabilities are given beside each token's; None: none are.
        prompt_logprobs: the same of the prompt's tokens (`generate` alone).
        structured_outputs: the form of the answer: one of {"json": schema}, {"json_object": True}, {"regex": pattern},
            {"choice": texts} and {"grammar": text}; needs the extra `guided`.

    Raises UserError for an unknown argument, with the nearest name, and for a value that is out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise UserError(f"logit_bias: expected {{token id: bias}}, got {type(self.logit_bias).__name__}.")
        try:
            server_fields.read_fields(self.fields(), _FIELDS)
            server_fields.read_fields({"logprobs": self.logprobs, "prompt_logprobs": self.prompt_logprobs}, _SCORES)
            server_fields.text_list(self.fields().get("stop", []), "stop")
        except ApiError as error:
            raise UserError(error.message) from None

    def fields(self) -> dict[str, Any]:
        """The fields of a request to the server."""
        values = {name: value for name, value in vars(self).items() if name in _FIELDS and value is not None}
        for name in ("stop", "stop_token_ids"):
            if isinstance(values.get(name), tuple):
                values[name] = list(values[name])
        if self.logit_bias is not None:
            values["logit_bias"] = {str(token): bias for token, bias in self.logit_bias.items()}
        return values


_SCORES = dict.fromkeys(("logprobs", "prompt_logprobs"), server_fields.COMPLETION["logprobs"])
_FIELDS = {
    field.name: server_fields.COMPLETION[field.name] for field in fields_of(SamplingParams) if field.name not in _SCORES
}


def _refuse_unknown(cls: Any) -> None:
    """Make unknown arguments of a dataclass UserErrors with the nearest name."""
    make: Callable[..., None] = cls.__init__
    names = [field.name for field in fields_of(cls)]

    @wraps(make)
    def init(self: Any, *args: Any, **values: Any) -> None:
        for name in values:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
                nearest = f" (did you mean {close[0]}?)" if close else ""
                raise UserError(f"{name}: {cls.__name__} has no such argument{nearest}.")
        make(self, *args, **values)

    cls.__init__ = init


_refuse_unknown(SamplingParams)
