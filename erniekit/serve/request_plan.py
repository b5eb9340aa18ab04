"""What a client asks for as requests to the engine, and how their tokens are to be read. Shared by the server and
`erniekit.LLM`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from erniekit.data.vision.prompt import PicturePrompt
from erniekit.generation.guided import Compiled
from erniekit.generation.load import sampling_of
from erniekit.generation.pictures import tables_of
from erniekit.generation.request import Limits, Request
from erniekit.generation.sampling import Sampling
from erniekit.serve.served_model import ServedModel
from erniekit.serve.server_errors import ApiError
from erniekit.serve.server_fields import bias_table, id_list, text_list
from erniekit.serve.server_text import Reading
from erniekit.utils import log

MAX_ANSWERS = 512  # of one request: n times its prompts


@dataclass(frozen=True)
class Plan:
    """The answers that a client's request asks for, `n` to each of its prompts. `headers`: what the response says about
    them.
    """

    requests: Sequence[Request]
    n: int
    headers: dict[str, str]

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(request.prompt) for request in self.requests[:: self.n])


def plan(
    values: dict[str, Any],
    prompts: Sequence[list[int] | PicturePrompt],
    served: ServedModel,
    num_scores: int | None,
    name: str,
    grammar: Compiled | None = None,
    owner: str = "",
    is_answered: bool = True,
) -> Plan:
    """The requests to the engine for the fields of a client's request. `name`: the field that has the prompts.
    `grammar`: what the answers have to follow. `owner`: whose request it is. `is_answered`: whether the prompts get
    answers; where they are scored alone they may fill the context.
    """
    n = values.get("n", 1)
    if n * len(prompts) > MAX_ANSWERS:
        raise ApiError(400, f"n: at most {MAX_ANSWERS} answers to a request.", "n", "invalid_value")
    lengths = [len(_ids(prompt)) for prompt in prompts]
    for length in lengths:
        served.check_length(length, name, is_answered)
    sampling = _sampling(values, served)
    adapter = served.adapter_of(values.get("model"))
    requests, least_room = [], served.context - max(lengths)
    asked = values.get("max_completion_tokens", values.get("max_tokens"))
    headers = {}
    if is_answered and asked is not None and asked > least_room:
        headers["x-erniekit-max-tokens"] = str(least_room)
        log.info(
            f"max_tokens: {asked} is more than the {least_room} tokens that the context has left"
            f"{' behind the longest prompt' if len(prompts) > 1 else ''}, which are used"
        )
    for row, prompt in enumerate(prompts):
        limits = _limits(values, served, max(1, served.context - lengths[row]))
        limits = limits if grammar is None else replace(limits, min_new_tokens=0)
        for number in range(n):
            draw = row * n + number
            request = Request(
                _ids(prompt),
                limits,
                sampling,
                draw,
                num_scores=num_scores,
                constraint=None if grammar is None else grammar.state(),
                adapter=adapter,
                owner=owner,
                fails_alone=True,
            )
            if isinstance(prompt, PicturePrompt):
                request = replace(request, picture_prompt=prompt, open_pictures=_Tables(prompt))
            requests.append(request)
    return Plan(requests, n, headers)


def _ids(prompt: list[int] | PicturePrompt) -> list[int]:
    return prompt.ids if isinstance(prompt, PicturePrompt) else prompt


@dataclass(frozen=True)
class _Tables:
    """Decodes the pictures of a prompt when the engine asks for them."""

    prompt: PicturePrompt

    def __call__(self, start: int) -> Any:
        return tables_of(self.prompt, start)


def _sampling(values: dict[str, Any], served: ServedModel) -> Sampling:
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    given: dict[str, Any] = {name: float(values[name]) for name in names if name in values}
    if "top_k" in values:
        given["top_k"] = max(values["top_k"], 0)
    if "logit_bias" in values:
        given["logit_bias"] = bias_table(values["logit_bias"], served.chat_model.model.config.vocab_size)
    seed = values.get("seed")
    # numpy takes seeds from 0 on
    return replace(sampling_of(served.cfg), **given, seed=None if seed is None else seed % 2**64)


def _limits(values: dict[str, Any], served: ServedModel, room: int) -> Limits:
    default = served.limits.max_new_tokens if "max_new_tokens" in served.cfg.given else room
    name = "max_completion_tokens" if "max_completion_tokens" in values else "max_tokens"
    asked = values.get(name, default)
    if asked < 1:
        raise ApiError(400, f"{name}: expected 1 or more.", name, "invalid_value")
    most = min(asked, room)
    least = values.get("min_tokens", min(served.limits.min_new_tokens, most))
    if least > most:
        raise ApiError(400, f"min_tokens: {least} is more than max_tokens, {most}.", "min_tokens", "invalid_value")
    vocab_size = served.chat_model.model.config.vocab_size
    stops = set(id_list(values.get("stop_token_ids", []), "stop_token_ids", vocab_size))
    if not values.get("ignore_eos"):
        stops |= set(served.limits.stop_ids)
    return Limits(most, least, tuple(sorted(stops)))


def reading(values: dict[str, Any], served: ServedModel, grammar: Compiled | None, **parts: bool) -> Reading:
    """How the tokens of the answers are read. `grammar`: what they have to follow; `parts`: opened, has_thoughts and
    has_calls.
    """
    return Reading(
        **parts,
        stops=text_list(values.get("stop", []), "stop"),
        includes_stop=values.get("include_stop_str_in_output", False),
        min_tokens=0 if grammar is not None else values.get("min_tokens", served.limits.min_new_tokens),
        hidden=served.hidden if values.get("skip_special_tokens", True) else frozenset(),
        scores_end=values.get("return_token_ids", False),
    )
