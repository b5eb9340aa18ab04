"""A model that answers: its limits, and what turns its tokens into text. Shared by the server and `erniekit.LLM`."""

from dataclasses import dataclass
from pathlib import Path

from erniekit.config import Config
from erniekit.generation.engine import Engine
from erniekit.generation.guided import Grammars
from erniekit.generation.load import ChatModel
from erniekit.generation.request import Limits
from erniekit.lora.several import adapter_set_of
from erniekit.models.config import ModelConfig
from erniekit.serve.server_errors import ApiError
from erniekit.serve.server_text import hidden_ids
from erniekit.utils.errors import ConfigError
from erniekit.utils.wording import count_of

NUM_KEPT = 4  # conversations whose keys and values are kept for the next question


@dataclass
class ServedModel:
    """A model that answers. `context`: tokens of a prompt and its answer at most. `limits`: as the YAML has them.
    `name`: of the model in requests; each of its adapters has a name of its own.
    """

    cfg: Config
    chat_model: ChatModel
    context: int
    limits: Limits
    name: str

    def __post_init__(self) -> None:
        model = self.chat_model
        self.hidden = hidden_ids(model.tokenizer)
        self.grammars = Grammars(model.tokenizer, model.model.config.vocab_size, self.limits.stop_ids)
        find = self.chat_model.tokenizer.find_id
        self._bytes = {number: byte for byte in range(256) if (number := find(f"<0x{byte:02X}>")) is not None}

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that requests may name."""
        adapters = adapter_set_of(self.chat_model.model)
        return () if adapters is None else adapters.names

    def adapter_of(self, name: str | None) -> str | None:
        """The adapter that a request for the model `name` uses. Raises ApiError for a model that is not served."""
        if name is None or name == self.name:
            return None
        if name not in self.adapters:
            known = ", ".join(map(repr, (self.name, *self.adapters)))
            verb = "are" if self.adapters else "is"
            raise ApiError(404, f"model: {name[:80]!r} is not served here; {known} {verb}.", "model", "model_not_found")
        return name

    def check_length(self, num_tokens: int, name: str, is_answered: bool = True) -> None:
        """Raises ApiError for a prompt without tokens, or one that leaves no room for an answer; one that is scored
        alone (not `is_answered`) needs none.
        """
        if not num_tokens:
            raise ApiError(400, f"{name}: the prompt has no tokens.", name, "invalid_value")
        if num_tokens + is_answered > self.context:
            what = " and leaves no room for an answer" if is_answered else ""
            raise ApiError(
                400,
                f"{name}: the prompt has {count_of(num_tokens, 'token')}{what}: the context is {self.context} "
                "tokens. Shorten it.",
                name,
                "context_length_exceeded",
            )

    def token(self, number: int) -> tuple[str, list[int] | None]:
        """The text of a token and its bytes; None where they are not known (a part of a character)."""
        if number in self._bytes:
            byte = self._bytes[number]
            return (chr(byte) if byte < 128 else "\ufffd"), [byte]
        text = self.chat_model.tokenizer.decode([number])
        return text, None if "\ufffd" in text else list(text.encode())


def name_of(cfg: Config, path: Path) -> str:
    """The name of the model in requests; `path`: its directory."""
    return cfg.served_model_name or path.resolve().name


def context_of(cfg: Config, model: ModelConfig) -> int:
    """Tokens of a prompt and its answer at most. Raises ConfigError for a max_model_len that the model has not."""
    context = model.max_position_embeddings
    if cfg.max_model_len is None:
        return context
    if cfg.max_model_len > context:
        raise ConfigError(f"max_model_len: {cfg.max_model_len} is more than the model's context, {context}.")
    return cfg.max_model_len


def engine_of(cfg: Config, chat_model: ChatModel) -> Engine:
    """An engine with the bounds of a configuration."""
    kept = min(NUM_KEPT, cfg.max_num_seqs)
    drafts = cfg.num_speculative_tokens > 0
    return Engine(chat_model.model, cfg.max_num_seqs, cfg.max_num_batched_tokens, kept, drafts)
