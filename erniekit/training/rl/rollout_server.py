"""The server of others that generates completions: what it is asked, and what its answers have to contain.

It speaks OpenAI's protocol with vLLM's additions: prompts as token ids, `return_token_ids`, and for LoRA the routes
/v1/load_lora_adapter and /v1/unload_lora_adapter. `erniekit server` has all of them.
"""

import contextlib
import hashlib
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erniekit.config.schema import Config
from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.utils import heartbeat, log, runtime
from erniekit.utils.errors import ConfigError, TrainError
from erniekit.utils.http_json import JsonClient, RequestFailed

_MAX_BYTES = 64 << 20  # of an answer
_PROBE = "Was ist 12,5 + 7? 二十五加十六等于几？\n<think>x_1 = 3</think> ok"  # every tokenizer writes it in its own way
_ID_PREFIX = "token_id:"
_POLL = 1.0  # seconds between two attempts to reach a server that starts
_ABSENT = (404, 405, 501)  # statuses of a route that a server does not have


@dataclass(frozen=True)
class ServedTurn:
    """What a server generated: ids without the end token, the end token (None: the answer was truncated), and the
    log-probability of each of both.
    """

    ids: list[int]
    stop_id: int | None
    logps: list[float]


class RolloutServer:
    """The server at rollout_base_url. Only the first rank of a run talks to it; its methods may be called from several
    threads. num_retries: attempts that were repeated.
    """

    def __init__(self, cfg: Config, tokenizer: Tokenizer) -> None:
        assert cfg.rollout_base_url is not None
        self._cfg, self._tokenizer, self.url = cfg, tokenizer, cfg.rollout_base_url.rstrip("/")
        self.num_retries = 0
        key = runtime.rollout_api_key()
        if not key:
            log.info(f"rollout server: no key: the environment variable {runtime.ROLLOUT_KEY_VARIABLE} is not set")
        limits = (key, cfg.rollout_timeout, cfg.rollout_max_retries, _MAX_BYTES)
        self._client = JsonClient(self.url, *limits, self._retried)
        self._root = JsonClient(self.url.removesuffix("/v1"), *limits, self._retried)
        self._once = JsonClient(self.url, key, min(cfg.rollout_timeout, 10.0), 0, _MAX_BYTES)
        self.base_model = cfg.rollout_model or ""
        self.model = self.base_model  # that requests name: the base, or the newest adapter

    def check(self) -> None:
        """Raise ConfigError if the server cannot be reached, does not have the model, or has another tokenizer."""
        try:
            names = self._client.ask("/models", read=_names)
        except RequestFailed as error:
            raise ConfigError(f"rollout_base_url: {self.url} cannot be used: {error}. Start the server.") from None
        self._choose_model(names)
        tokenizer = self._tokenizer
        try:
            ids = self._root.ask("/tokenize", {"model": self.base_model, "prompt": _PROBE}, lambda a: list(a["tokens"]))
        except RequestFailed as error:
            if error.status not in _ABSENT:
                raise ConfigError(f"rollout_base_url: {self.url}: /tokenize: {error}") from None
            log.warning(f"rollout_base_url: {self.url} has no /tokenize, so its tokenizer was not compared")
            return
        if ids not in (tokenizer.encode(_PROBE), [tokenizer.bos_id, *tokenizer.encode(_PROBE)]):
            raise ConfigError(
                f"rollout_base_url: {self.url} serves {self.base_model} with another tokenizer than this run's: "
                f"{_PROBE[:20]!r}... are {ids[:8]}... there and {tokenizer.encode(_PROBE)[:8]}... here. Serve the "
                "model of model_name_or_path."
            )

    def _choose_model(self, names: Sequence[str]) -> None:
        wanted = self._cfg.rollout_model
        if not names or (wanted and wanted not in names):
            raise ConfigError(
                f"rollout_model: {wanted or '(not given)'}: {self.url} serves {', '.join(names) or 'no model'}"
            )
        self.base_model = self.model = wanted or names[0]

    def load_adapter(self, name: str, directory: Path) -> None:
        """Let the server load an adapter; requests name it from now on, and the one before is unloaded."""
        before = self.model
        self._forget(name)  # left from a run that was killed
        body = {"lora_name": name, "lora_path": str(directory)}
        try:
            self._client.post("/load_lora_adapter", body)
        except RequestFailed as error:
            raise TrainError(
                f"rollout_base_url: {self.url} does not load {directory}: {error}. Hint: `erniekit server` needs "
                "lora_directory, vLLM needs --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            ) from None
        self.model = name
        if before not in (self.base_model, name):
            self._forget(before)

    def _forget(self, name: str) -> None:
        with contextlib.suppress(RequestFailed):  # it was not there
            self._once.post("/unload_lora_adapter", {"lora_name": name})

    def run_command(self, directory: Path) -> None:
        """Run rollout_update_command, and wait until the server answers. Raises TrainError."""
        cfg = self._cfg
        assert cfg.rollout_update_command is not None
        words = [word.replace("{directory}", str(directory)) for word in shlex.split(cfg.rollout_update_command)]
        try:
            done = subprocess.run(words, capture_output=True, timeout=cfg.rollout_timeout, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise TrainError(f"rollout_update_command: {error}") from None
        if done.returncode:
            tail = (done.stderr or done.stdout).decode(errors="replace").strip()[-300:]
            raise TrainError(f"rollout_update_command: ended with {done.returncode}: {tail}")
        deadline = time.monotonic() + cfg.rollout_timeout
        while True:
            heartbeat.waiting(None)
            try:
                self._once.ask("/models", read=_names)
                break
            except RequestFailed as error:
                if time.monotonic() > deadline:
                    raise TrainError(
                        f"rollout_base_url: {self.url} does not answer {cfg.rollout_timeout:g} s after "
                        f"rollout_update_command: {error}"
                    ) from None
            time.sleep(_POLL)
        self.check()

    def complete(
        self, prompt: Sequence[int], max_tokens: int, stops: Sequence[int], banned: Sequence[int], draw: int
    ) -> ServedTurn:
        """Continue a prompt. `stops` end it, `banned` ids are not chosen, `draw` is the number of its random generator.
        Raises TrainError for an answer without token ids or log-probabilities.
        """
        cfg = self._cfg
        seed = cfg.seed if cfg.rollout_seed is None else cfg.rollout_seed
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 1.0,
            "top_p": cfg.top_p,
            "top_k": cfg.top_k or -1,
            "repetition_penalty": cfg.repetition_penalty,
            "seed": _number(seed, draw),
            "stop_token_ids": list(stops),
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        } | ({"logit_bias": {str(token): -100 for token in banned}} if banned else {})
        try:
            choice = self._client.ask("/completions", body, lambda answer: answer["choices"][0])
        except RequestFailed as error:
            raise TrainError(f"rollout_base_url: {self.url}: {error}") from None
        return self._turn(choice, prompt, stops)

    def _turn(self, choice: Any, prompt: Sequence[int], stops: Sequence[int]) -> ServedTurn:
        where, scores = f"rollout_base_url: {self.url}", choice.get("logprobs") or {}
        logps = scores.get("token_logprobs")
        if not logps or any(not isinstance(value, int | float) for value in logps):
            raise TrainError(f"{where} returns no log-probabilities of the tokens (logprobs), which the loss needs")
        ids = _ids_in(choice, scores)
        if not ids or any(not isinstance(i, int) or not 0 <= i < self._tokenizer.vocab_size for i in ids):
            raise TrainError(
                f"{where} returns no ids of this model's vocabulary: it has to know return_token_ids or "
                "return_tokens_as_token_ids (vLLM, `erniekit server`), and to serve the model of model_name_or_path"
            )
        if len(ids) != len(logps):
            raise TrainError(
                f"{where} returns {len(logps)} log-probabilities for {len(ids)} tokens; the end token needs one, too"
            )
        if choice.get("prompt_token_ids", list(prompt)) not in (None, list(prompt)):
            raise TrainError(
                f"{where} has continued other tokens than those of the prompt. Does it add any of its own?"
            )
        if choice.get("finish_reason") == "length":
            return ServedTurn(ids, None, logps)
        if ids[-1] not in stops:
            raise TrainError(
                f"{where} has ended an answer with token {ids[-1]}, which is not an end token of this model "
                f"({', '.join(map(str, stops))}): finish_reason {choice.get('finish_reason')!r}"
            )
        return ServedTurn(ids[:-1], ids[-1], logps)

    def _retried(self) -> None:
        heartbeat.waiting(None)
        self.num_retries += 1


def _names(answer: Any) -> list[str]:
    return [model["id"] for model in answer["data"]]


def _ids_in(choice: Any, scores: Any) -> list[Any]:
    """The ids of an answer: `token_ids`, or those in its tokens "token_id:N"; None in the place of one that is not
    known.
    """
    if choice.get("token_ids") is not None:
        return list(choice["token_ids"])
    words = [str(text).partition(_ID_PREFIX) for text in scores.get("tokens") or []]
    return [int(number) if not before and prefix and number.isdigit() else None for before, prefix, number in words]


def _number(seed: int, draw: int) -> int:
    """A seed of 63 bits that depends on both."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{draw}".encode(), digest_size=8).digest(), "big") >> 1
