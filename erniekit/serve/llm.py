"""`erniekit.LLM`: answers prompts and conversations in the process that calls it, called as vLLM's class of this name.

It is the server without HTTP: prompts, fields, limits and the reading of answers are the same code.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from erniekit.config import load, require_supported
from erniekit.data.records.errors import BadRecord
from erniekit.generation.guided import grammar_error
from erniekit.generation.load import ChatModel
from erniekit.generation.prompt_scores import score_prompt
from erniekit.generation.request import Event, Generation, Request, TokenScore
from erniekit.serve import server_fields as fields
from erniekit.serve.guides import compiled_guide
from erniekit.serve.llm_results import CompletionOutput, Logprob, RequestOutput
from erniekit.serve.prompts import chat_prompt
from erniekit.serve.request_plan import Plan, plan, reading
from erniekit.serve.sampling_params import SamplingParams
from erniekit.serve.served_adapters import open_with_adapters
from erniekit.serve.served_model import ServedModel, context_of, engine_of, name_of
from erniekit.serve.server_errors import ApiError
from erniekit.serve.server_text import AnswerReader, Piece, Reading
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError, ConfigError, UserError
from erniekit.utils.progress import track
from erniekit.utils.wording import count_of

# vLLM's names of keys.
_KEYS = {"tokenizer": "tokenizer_name_or_path", "dtype": "compute_type"}
_DTYPES = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}
# Arguments of vLLM that ask for nothing with these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "trust_remote_code": (False, True),  # no code of a model directory is ever run
    "enable_prefix_caching": (None, True),
    "enforce_eager": (True, False),
    "revision": (None,),
}


class LLM:
    """A model that answers prompts and conversations, several at a time.

    Args:
        model: a model directory (full, in 8 or 4 bits, or a LoRA adapter), a training's output_dir, or a Hub name.
        tokenizer: another directory with a tokenizer.
        dtype: "auto", "float32", "bfloat16", "float16", or a value of the YAML's compute_type.
        keys: any key of the YAML for `erniekit server`, such as max_model_len, max_num_seqs, seed, chat_template or
            lora_modules ({name: directory} here), whose adapters requests may name.

    Raises:
        UserError: a key is unknown (the message names the nearest) or wrong, or the directory is not a model.

    Calls from several threads are answered one after another.
    """

    def __init__(self, model: str | Path, tokenizer: str | None = None, dtype: str = "auto", **keys: Any) -> None:
        for name, neutral in _NEUTRAL.items():
            if name in keys and keys.pop(name) not in neutral:
                raise ConfigError(f"{name}: LLM runs the whole model in this process; leave the argument out.")
        if isinstance(keys.get("lora_modules"), dict):
            keys["lora_modules"] = [f"{name}={path}" for name, path in keys["lora_modules"].items()]
        values = {_KEYS.get(name, name): value for name, value in (keys | {"tokenizer": tokenizer}).items()}
        if dtype != "auto":
            values["compute_type"] = _DTYPES.get(dtype, dtype)
        values[_key_of(model)] = str(model)
        cfg = load(None, {name: value for name, value in values.items() if value is not None}, command="server")
        require_supported(cfg, "server")
        for note in cfg.notes:
            log.info(note)
        chat_model = open_with_adapters(cfg)
        name = name_of(cfg, chat_model.path)
        self._served = ServedModel(
            cfg, chat_model, context_of(cfg, chat_model.model.config), chat_model.limits(cfg), name
        )
        self._engine = engine_of(cfg, chat_model)
        self._lock, self._num_requests = threading.Lock(), 0

    @property
    def chat_model(self) -> ChatModel:
        """The model, with its tokenizer and chat template."""
        return self._served.chat_model

    def get_tokenizer(self) -> Any:
        """The tokenizer."""
        return self._served.chat_model.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` and `chat` use where they are given none."""
        return SamplingParams()

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: str | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue prompts.

        Args:
            prompts: a text, token ids, {"prompt": text}, {"prompt_token_ids": ids}, or a list of these. Special tokens
                in a text are one id each; no chat template is applied (`chat` does).
            sampling_params: for all prompts, or one for each; None: SamplingParams().
            lora_request: the adapter to use, by its name in lora_modules; None: none.
            use_tqdm: show the progress.

        Returns:
            The results, in the order of the prompts. An answer that has failed has the finish_reason "error" and its
            `error`; a warning counts such answers.

        Raises:
            UserError: a prompt or a setting is wrong, and nothing has been computed; or every answer has failed.
        """
        items = _prompt_list(prompts)
        plans: list[tuple[Plan, Reading, str | None]] = []
        for item, params in zip(items, _params_list(sampling_params, len(items)), strict=True):
            text, ids = self._ids(item)
            with _as_user_errors():
                values = params.fields() | {"model": lora_request}
                grammar = compiled_guide(values, self._served)
                wanted = plan(values, [ids], self._served, params.logprobs, "prompt", grammar)
                how = reading(values, self._served, grammar, opened=False, has_thoughts=False, has_calls=False)
            plans.append((wanted, how, text))
        scores = [params.prompt_logprobs for params in _params_list(sampling_params, len(items))]
        return self._run(plans, scores, use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: str | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        tool_choice: Any = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer conversations with the model's chat template.

        Args:
            messages: a conversation (a list of {"role", "content", ...} as OpenAI's API has them), or a list of
                conversations. Pictures are parts {"type": "image_url", "image_url": {"url": a data URI or file://path}}
                or {"type": "image_pil", "image_pil": a PIL.Image.Image}.
            sampling_params: for all conversations, or one for each; None: SamplingParams().
            lora_request: the adapter to use, by its name in lora_modules; None: none.
            tools, tool_choice: the functions that the model may call, and whether, as OpenAI's API has them.
            chat_template_kwargs: {"enable_thinking": True or False}.
            use_tqdm: show the progress.

        Returns:
            The results, in the order of the conversations. `text` is the answer without thought and calls, which are
            `reasoning_content` and `tool_calls`. An answer that has failed has the finish_reason "error" and its
            `error`; a warning counts such answers.

        Raises:
            UserError: a message or a setting is wrong, and nothing has been computed; or every answer has failed.
        """
        talks = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        more = {"tools": tools, "tool_choice": tool_choice, "chat_template_kwargs": chat_template_kwargs}
        asked = {name: value for name, value in more.items() if value is not None}
        plans: list[tuple[Plan, Reading, str | None]] = []
        for talk, params in zip(talks, _params_list(sampling_params, len(talks)), strict=True):
            with _as_user_errors():
                body = {"messages": list(talk)} | {n: _plain(v) for n, v in asked.items()}
                values = fields.read_fields(body, fields.CHAT) | params.fields() | {"model": lora_request}
                prompt, how, grammar = chat_prompt(values, self._served, is_local=True)
                plans.append((plan(values, [prompt], self._served, params.logprobs, "messages", grammar), how, None))
        if any(params.prompt_logprobs is not None for params in _params_list(sampling_params, len(talks))):
            raise UserError("prompt_logprobs: `generate` scores prompts, `chat` does not.")
        return self._run(plans, [None] * len(plans), use_tqdm)

    def _ids(self, item: Any) -> tuple[str | None, list[int]]:
        """(text, token ids) of a prompt."""
        model = self._served.chat_model
        if isinstance(item, dict):
            known = [name for name in ("prompt", "prompt_token_ids") if item.get(name) is not None]
            if len(known) != 1 or set(item) - {"prompt", "prompt_token_ids"}:
                raise UserError(
                    'prompts: expected {"prompt": text} or {"prompt_token_ids": ids}, got the fields '
                    f"{', '.join(map(str, item))}. `chat` takes pictures."
                )
            item = item[known[0]]
        if isinstance(item, str):
            return item, model.tokenizer.encode(item)
        with _as_user_errors():
            if not isinstance(item, Sequence) or isinstance(item, bytes):  # whose items would be token ids
                raise UserError(f"prompts: expected a text or token ids, got {type(item).__name__}.")
            return None, fields.id_list(list(item), "prompts", model.model.config.vocab_size)

    def _run(
        self, plans: Sequence[tuple[Plan, Reading, str | None]], scores: Sequence[int | None], shows: bool
    ) -> list[RequestOutput]:
        tokenizer = self._served.chat_model.tokenizer
        with self._lock:
            prompt_scores = [
                None if num is None else self._prompt_scores(wanted.requests[0], num)
                for (wanted, _, _), num in zip(plans, scores, strict=True)
            ]
            pending = [_Answer(AnswerReader(tokenizer, how)) for wanted, how, _ in plans for _ in wanted.requests]
            generations: list[Generation] = []
            try:
                with _as_user_errors():
                    for wanted, _, _ in plans:
                        generations += [self._engine.add(request) for request in wanted.requests]
                    ends = self._answers(dict(zip(map(id, generations), pending, strict=True)))
                    for _ in track(ends, len(pending), "answers") if shows else ends:
                        pass
            finally:
                for generation in generations:
                    self._engine.cancel(generation)
            _warn_of_failed(generations)
            if self._engine.drafting is not None:
                log.info(self._engine.drafting.line)
            results, first = [], 0
            for (wanted, _, text), scored in zip(plans, prompt_scores, strict=True):
                last = first + len(wanted.requests)
                results.append(self._result(wanted, text, scored, pending[first:last], generations[first:last]))
                first = last
        return results

    def _prompt_scores(self, request: Request, num: int) -> list[TokenScore | None] | None:
        """The scores of a prompt; None, and a warning, for one that has none: the other results are kept."""
        try:
            return score_prompt(self._served.chat_model.model, request.prompt, num, request.adapter)
        except CheckpointError as error:
            log.warning(f"prompt_logprobs: a prompt of {count_of(len(request.prompt), 'token')} has none: {error}")
            return None

    def _answers(self, pending: dict[int, "_Answer"]) -> Iterator[None]:
        """Runs the engine, and gives something for each answer that has ended."""
        while not self._engine.is_idle:
            for generation in self._engine.step():
                for event in generation.new_events():
                    if pending[id(generation)].push(event):
                        self._engine.cancel(generation)  # a text of `stop` may have come
                        yield
                        break

    def _result(
        self,
        wanted: Plan,
        text: str | None,
        scored: Sequence[TokenScore | None] | None,
        pending: Sequence["_Answer"],
        generations: Sequence[Generation],
    ) -> RequestOutput:
        ids, self._num_requests = list(wanted.requests[0].prompt), self._num_requests + 1
        prompt_logprobs = None
        if scored is not None:
            prompt_logprobs = [
                None if score is None else self._logprobs(token, score)
                for token, score in zip(ids, scored, strict=True)
            ]
        return RequestOutput(
            request_id=str(self._num_requests - 1),
            prompt=text,
            prompt_token_ids=ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[
                self._output(index, answer, generation)
                for index, (answer, generation) in enumerate(zip(pending, generations, strict=True))
            ],
            num_cached_tokens=generations[0].num_reused,
        )

    def _output(self, index: int, answer: "_Answer", generation: Generation) -> CompletionOutput:
        reader, scores, logprobs, error = answer.reader, answer.scores, None, _error_of(generation)
        if generation.request.num_scores is not None:  # the end token has none
            logprobs = [self._logprobs(*pair) for pair in zip(reader.ids, scores, strict=False)]
        return CompletionOutput(
            index=index,
            text=answer.joined("text"),
            token_ids=reader.ids,
            cumulative_logprob=None if logprobs is None else sum(score.logprob for score in scores),
            logprobs=logprobs,
            finish_reason="error" if error else reader.finish_reason,
            stop_reason=None if error else reader.stop_reason,
            reasoning_content=answer.joined("thought") or None,
            tool_calls=[
                {"name": piece.call.name, "arguments": piece.call.arguments}
                for piece in answer.pieces
                if piece.call is not None
            ],
            error=error or None,
        )

    def _logprobs(self, token: int, score: TokenScore) -> dict[int, Logprob]:
        """The likeliest tokens and the one that was taken, by their ids."""
        entries = {
            number: Logprob(logprob, rank, self._served.token(number)[0])
            for rank, (number, logprob) in enumerate(score.top, 1)
        }
        if token not in entries:
            entries[token] = Logprob(score.logprob, None, self._served.token(token)[0])
        return entries


class _Answer:
    """What one answer has said so far."""

    def __init__(self, reader: AnswerReader) -> None:
        self.reader = reader
        self.pieces: list[Piece] = []
        self.scores: list[TokenScore] = []

    def joined(self, kind: str) -> str:
        """The text of all pieces of a kind."""
        return "".join(piece.text for piece in self.pieces if piece.kind == kind)

    def push(self, event: Event) -> bool:
        """Add what has come, and return whether the answer has ended."""
        self.pieces += self.reader.push(event)
        self.scores += [] if event.score is None else [event.score]
        return self.reader.is_over


def _error_of(generation: Generation) -> str:
    """Why an answer has failed; empty: it has not."""
    return generation.error or grammar_error(generation.request)


def _warn_of_failed(generations: Sequence[Generation]) -> None:
    """A warning about answers that have failed; UserError where no other is left."""
    errors = [error for error in map(_error_of, generations) if error]
    if errors and len(errors) == len(generations):
        raise UserError(f"every answer has failed: {errors[0]}")
    if errors:
        log.warning(f'{len(errors)} of {len(generations)} answers failed (finish_reason "error"): {errors[0]}')


@contextmanager
def _as_user_errors() -> Iterator[None]:
    """A context in which errors of a request become errors of the caller."""
    try:
        yield
    except ApiError as error:
        raise UserError(error.message) from None
    except BadRecord as error:
        raise UserError(f"{error.reason}.") from None


def _key_of(model: str | Path) -> str:
    """The key that names `model`: a directory is used as it is, any other name is the Hub's."""
    return "checkpoint" if Path(model).expanduser().is_dir() else "model_name_or_path"


def _prompt_list(prompts: Any) -> list[Any]:
    is_one = isinstance(prompts, str | dict) or (
        isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], int)
    )
    if not is_one and not isinstance(prompts, Sequence):
        raise UserError(f"prompts: expected a text, token ids or a list of these, got {type(prompts).__name__}.")
    return [prompts] if is_one else list(prompts)


def _params_list(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
        raise UserError("sampling_params: expected SamplingParams, or a list with one for each prompt.")
    if len(params) != count:
        raise UserError(
            f"sampling_params: got {len(params)} for {count_of(count, 'prompt')}. Give one, or one for each."
        )
    return list(params)


def _plain(value: Any) -> Any:
    """A tuple as the list that requests have."""
    return list(value) if isinstance(value, tuple) else value
