"""`/v1/completions`: continues texts or token ids, and scores them (echo with logprobs)."""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from erniekit.data.chat.tokenizer import StreamDecoder
from erniekit.generation.prompt_scores import score_prompt
from erniekit.generation.request import TokenScore
from erniekit.serve import server_fields as fields
from erniekit.serve.guides import compiled_guide
from erniekit.serve.request_plan import MAX_ANSWERS, Plan, plan, reading
from erniekit.serve.server_body import read_body
from erniekit.serve.server_chat import FINGERPRINT, stream_options
from erniekit.serve.server_errors import ApiError
from erniekit.serve.server_responses import json_response
from erniekit.serve.server_run import Run, stream_of, unless_client_leaves
from erniekit.serve.server_state import Served
from erniekit.serve.server_stream import EventStream
from erniekit.serve.server_text import AnswerReader, Piece
from erniekit.utils.errors import CheckpointError

MAX_SCORED = 8192  # tokens of a prompt whose scores are asked for; other answers wait while they are computed

Scored = Sequence[tuple[int, TokenScore | None]]


@dataclass
class _Completion:
    """A request for continuations, and what its response says about itself. `prompts`: token ids."""

    values: dict[str, Any]
    served: Served
    prompts: list[list[int]]

    def __post_init__(self) -> None:
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.values.get("model", self.served.name),
            "system_fingerprint": FINGERPRINT,
        }
        self.num_scores: int | None = self.values.get("logprobs")
        self.echoes = bool(self.values.get("echo"))
        self.returns_ids = bool(self.values.get("return_token_ids"))

    def echoed(self, index: int, n: int) -> str:
        """The text of the prompt of a choice, if it is part of the answer."""
        return self.served.chat_model.tokenizer.decode(self.prompts[index // n]) if self.echoes else ""

    def prompt_ends(self, row: int) -> list[int]:
        """The number of characters up to each token of a prompt; a part of a character has none."""
        decoder = StreamDecoder(self.served.chat_model.tokenizer)
        return list(accumulate(len(decoder.push(number)) for number in self.prompts[row]))


async def complete(request: HttpRequest, served: Served) -> Response:
    """Continue prompts, whole or in pieces."""
    values = fields.read_fields(await read_body(request, served.max_body_bytes), fields.COMPLETION)
    served.adapter_of(values.get("model"))
    usage = stream_options(values)
    only_scores = bool(values.get("echo")) and values.get("max_tokens") == 0
    if only_scores and (values.get("stream") or values.get("n", 1) > 1):
        raise ApiError(400, "max_tokens: 0 works with n: 1 and without stream only.", "max_tokens", "invalid_value")
    if isinstance(values["prompt"], list) and len(values["prompt"]) == 0:
        raise ApiError(400, "prompt: the list is empty.", "prompt", "invalid_value")
    count = values.get("n", 1) * _num_prompts(values["prompt"])
    if count > MAX_ANSWERS:
        raise ApiError(400, f"n: at most {MAX_ANSWERS} answers to a request.", "n", "invalid_value")
    served.reserve(count)
    submitted = False
    try:
        prompts = await served.in_pool(lambda: _prompts(values["prompt"], served))
        grammar = await served.in_pool(lambda: compiled_guide(values, served))
        ask = _Completion(values, served, prompts)
        asked = values | ({"max_tokens": 1} if only_scores else {})
        owner = request.scope["owner"]
        wanted = plan(asked, prompts, served, ask.num_scores, "prompt", grammar, owner, is_answered=not only_scores)
        how = reading(values, served, grammar, opened=False, has_thoughts=False, has_calls=False)
        scored = await unless_client_leaves(request, _scores_of_prompts(ask))
        if only_scores:
            return json_response(_only_scores(ask, scored), headers=wanted.headers)
        submitted = True
        run = Run(served, served.thread.submit(wanted.requests), how)
    finally:
        if not submitted:
            served.thread.release(count)
    served.metrics.request_params_n.observe(wanted.n)
    if values.get("stream"):
        chunks = _CompletionChunks(ask, wanted, run, scored)
        return EventStream(stream_of(run, chunks, ask.head, partial(_usage, ask, wanted, run), usage), wanted.headers)
    return json_response(await unless_client_leaves(request, _whole(ask, wanted, run, scored)), headers=wanted.headers)


def _num_prompts(prompt: Any) -> int:
    is_one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
    return 1 if is_one else len(prompt)


def _prompts(prompt: Any, served: Served) -> list[list[int]]:
    """The token ids of the prompts. Special tokens in a text are one id each: the caller writes the template."""
    model = served.chat_model
    items = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    prompts = []
    for item in items:
        if isinstance(item, str):
            prompts.append(model.tokenizer.encode(item))
        elif isinstance(item, list):
            prompts.append(fields.id_list(item, "prompt", model.model.config.vocab_size))
        else:
            raise ApiError(
                400, f"prompt: expected texts or lists of ids, got {fields.type_name(item)}.", "prompt", "invalid_type"
            )
    return prompts


async def _scores_of_prompts(ask: _Completion) -> list[list[TokenScore | None]]:
    """The scores of each prompt, where they are asked for."""
    if not ask.echoes or ask.num_scores is None:
        return []
    scored, model, adapter = [], ask.served.chat_model.model, ask.served.adapter_of(ask.values.get("model"))
    for ids in ask.prompts:
        if len(ids) > MAX_SCORED:
            raise ApiError(400, f"prompt: at most {MAX_SCORED} tokens with echo and logprobs.", "prompt")
        try:
            scored.append(await ask.served.thread.run(partial(score_prompt, model, ids, ask.num_scores, adapter)))
        except CheckpointError as error:
            raise ApiError(500, str(error), code="answer_failed") from None
    return scored


def _only_scores(ask: _Completion, scored: list[list[TokenScore | None]]) -> dict[str, Any]:
    """The response to a request that echoes its prompts and continues none."""
    choices = []
    for index, ids in enumerate(ask.prompts):
        logprobs = (
            _logprobs(ask, list(zip(ids, scored[index], strict=True)), ask.prompt_ends(index)) if scored else None
        )
        choice = {"index": index, "text": ask.echoed(index, 1), "logprobs": logprobs, "finish_reason": "length"}
        choices.append(choice | ({"prompt_token_ids": ids, "token_ids": []} if ask.returns_ids else {}))
    return {**ask.head, "choices": choices, "usage": ask.served.usage(sum(map(len, ask.prompts)), 0, 0)}


async def _whole(ask: _Completion, wanted: Plan, run: Run, scored: list[list[TokenScore | None]]) -> dict[str, Any]:
    texts = [ask.echoed(index, wanted.n) for index in range(len(run.readers))]
    async for step in run.steps():
        for piece in step.pieces:
            texts[step.choice] += piece.text
    choices = []
    for index, reader in enumerate(run.readers):
        tokens: list[tuple[int, TokenScore | None]] = list(reader.tokens)
        ends = [len(ask.echoed(index, wanted.n)) + end for end in reader.ends]
        if scored:
            row = index // wanted.n
            tokens = [*zip(ask.prompts[row], scored[row], strict=True), *tokens]
            ends = [*ask.prompt_ends(row), *ends]
        logprobs = None if ask.num_scores is None else _logprobs(ask, tokens, ends)
        ids = {"prompt_token_ids": ask.prompts[index // wanted.n], "token_ids": reader.ids} if ask.returns_ids else {}
        choices.append({"index": index, "text": texts[index], "logprobs": logprobs, **_end(reader), **ids})
    return {**ask.head, "choices": choices, "usage": _usage(ask, wanted, run)}


class _CompletionChunks:
    """Writes the chunks of streamed continuations. Each choice begins with its prompt, if that is echoed."""

    def __init__(self, ask: _Completion, wanted: Plan, run: Run, scored: list[list[TokenScore | None]]) -> None:
        self._ask, self._n, self._readers, self._scored = ask, wanted.n, run.readers, scored
        count = len(run.readers)
        self._num_scored, self._num_ids, self._num_echoed = [0] * count, [0] * count, [0] * count

    def begin(self, index: int) -> dict[str, Any]:
        """See Chunks."""
        row = index // self._n
        prompt, echoed = self._ask.prompts[row], self._ask.echoed(index, self._n)
        self._num_echoed[index] = len(echoed)
        tokens = list(zip(prompt, self._scored[row], strict=True)) if self._scored else []
        ends = self._ask.prompt_ends(row) if self._scored else []
        choice = self._choice(index, echoed, tokens, ends, 0) | {"finish_reason": None}
        return {"choices": [choice | ({"prompt_token_ids": prompt} if self._ask.returns_ids else {})]}

    def said(self, index: int, pieces: list[Piece]) -> Iterator[dict[str, Any]]:
        """See Chunks."""
        reader, text = self._readers[index], "".join(piece.text for piece in pieces)
        if text or reader.is_over:
            first, echoed = self._num_scored[index], self._num_echoed[index]
            ends = [echoed + end for end in reader.ends[first:]]
            begin = echoed + (reader.ends[first - 1] if first else 0)
            self._num_scored[index] = len(reader.tokens)
            end = _end(reader) if reader.is_over else {"finish_reason": None}
            yield {"choices": [self._choice(index, text, reader.tokens[first:], ends, begin) | end]}

    def _choice(self, index: int, text: str, tokens: Scored, ends: Sequence[int], begin: int) -> dict[str, Any]:
        logprobs = None if self._ask.num_scores is None else _logprobs(self._ask, tokens, ends, begin)
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": logprobs}
        if self._ask.returns_ids:
            ids = self._readers[index].ids
            choice["token_ids"] = ids[self._num_ids[index] :]
            self._num_ids[index] = len(ids)
        return choice


def _end(reader: AnswerReader) -> dict[str, Any]:
    return {"finish_reason": reader.finish_reason, "stop_reason": reader.stop_reason}


def _usage(ask: _Completion, wanted: Plan, run: Run) -> dict[str, Any]:
    answer = sum(reader.num_tokens for reader in run.readers)
    return ask.served.usage(wanted.num_prompt_tokens, answer, run.num_cached(wanted.n))


def _logprobs(ask: _Completion, tokens: Scored, ends: Sequence[int], begin: int = 0) -> dict[str, Any]:
    """The scores of tokens, in the older form. `ends`: the number of characters up to each of them; `begin`: up to the
    first one. A token that is a part of a character begins where that character does.
    """
    texts, offsets, tops = [], [], []
    for (number, score), end in zip(tokens, ends, strict=True):
        texts.append(_shown(ask, number))
        offsets.append(max(begin, end - len(ask.served.token(number)[0])))
        begin = end
        tops.append(None if score is None else _top(ask, number, score))
    return {
        "tokens": texts,
        "token_logprobs": [None if score is None else max(score.logprob, -9999.0) for _, score in tokens],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _top(ask: _Completion, number: int, score: TokenScore) -> dict[str, float]:
    """The likeliest tokens by their text or id, and the chosen one; of two with one text the likelier is shown."""
    top: dict[str, float] = {}
    for candidate, logprob in (*score.top, (number, score.logprob)):
        top.setdefault(_shown(ask, candidate), max(logprob, -9999.0))
    return top


def _shown(ask: _Completion, number: int) -> str:
    """The text of a token, or its id."""
    return f"token_id:{number}" if ask.values.get("return_tokens_as_token_ids") else ask.served.token(number)[0]
