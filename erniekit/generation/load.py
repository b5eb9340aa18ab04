"""Which model a command uses, and that model with its tokenizer and chat template."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erniekit.build import PreparedModel, inference_options, prepare_model
from erniekit.checkpoint.generation_config import GenerationConfig, not_used
from erniekit.checkpoint.model_dir import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    find_checkpoint,
    has_weights,
    is_adapter,
    require_model,
)
from erniekit.checkpoint.model_shape import directories, given_shape, model_config
from erniekit.checkpoint.peft_read import base_of
from erniekit.config import Config
from erniekit.data.chat.template import Template, load_template, say_if_trained_otherwise
from erniekit.data.chat.tokenizer import Tokenizer, check_fits, load_tokenizer
from erniekit.generation.decode import Limits
from erniekit.generation.sampling import Sampling
from erniekit.hub import resolve_model, resolve_tokenizer
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError, ConfigError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Opened:
    """A model in eval mode with what turns text into its tokens. `path` is its directory; `enable_thinking` is
    passed to the template (None: it is not).
    """

    model: CausalLM
    tokenizer: Tokenizer
    template: Template
    path: Path
    enable_thinking: bool | None
    generation: GenerationConfig

    def limits(self, cfg: Config) -> Limits:
        """When an answer ends: at the template's and the model's end tokens, within the configuration's bounds."""
        stops = {*self.template.stop_ids, *self.model.end_ids}
        if (line := not_used(self.generation, _settings_of(cfg))) is not None:
            log.info(line)
        return Limits(cfg.max_new_tokens, cfg.min_tokens, tuple(sorted(stops)))


def sampling_of(cfg: Config) -> Sampling:
    """How the configuration asks tokens to be chosen."""
    return Sampling(
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        repetition_penalty=cfg.repetition_penalty,
        frequency_penalty=cfg.frequency_penalty,
        presence_penalty=cfg.presence_penalty,
        seed=cfg.seed,
    )


def _settings_of(cfg: Config) -> dict[str, Any]:
    """What decides how tokens are chosen, by transformers' names."""
    return {
        "do_sample": cfg.temperature > 0,
        "temperature": cfg.temperature,
        "top_p": cfg.top_p,
        "top_k": cfg.top_k,
        "repetition_penalty": cfg.repetition_penalty,
        "frequency_penalty": cfg.frequency_penalty,
        "presence_penalty": cfg.presence_penalty,
        "max_new_tokens": cfg.max_new_tokens,
        "min_new_tokens": cfg.min_tokens,
    }


@dataclass(frozen=True)
class FoundModel:
    """The model that a command uses, checked but not read yet. The fields are those of Opened."""

    prepared: PreparedModel
    tokenizer: Tokenizer
    template: Template
    path: Path
    enable_thinking: bool | None

    def load(self) -> Opened:
        """Read the weights."""
        model = self.prepared.build()
        if not self.prepared.options.random_start:
            base, adapter = self.prepared.path, f" with the adapter {self.path}"
            log.info(f"model: {base}{'' if base == self.path else adapter}")
        generation = self.prepared.generation
        return Opened(model, self.tokenizer, self.template, self.path, self.enable_thinking, generation)


def open_model(cfg: Config) -> Opened:
    """Find and load the model that `cfg` names (see `find_model`)."""
    return find_model(cfg).load()


def find_model(cfg: Config) -> FoundModel:
    """The model that `cfg` names: `checkpoint`; else the final or newest one in `output_dir`; else
    `model_name_or_path`, with the adapter `lora_path` if there is one. A checkpoint that is an adapter is attached to
    its base: `model_name_or_path`, else the local directory that it names itself.

    With continue_training: false, model_name_or_path, or the shape that the YAML gives, is the random start that
    training has. The tokenizer is that of `tokenizer_name_or_path`, else the checkpoint's, else that of
    model_name_or_path. Everything is checked, no weight is read. Raises CheckpointError
    or ConfigError that names the key.
    """
    path, is_start = _directory(cfg)
    base = base_of(path, cfg.model_name_or_path, cfg.download_hub) if is_adapter(path) else path
    tokenizer = _tokenizer(cfg, base)
    template = load_template(tokenizer, cfg.chat_template, path)
    say_if_trained_otherwise(path, template)
    random_start = is_start and not cfg.continue_training
    if not random_start and not has_weights(base):
        start = " (or set continue_training: false for a random start)" if is_start else ""
        raise CheckpointError(f"{base} holds a config.json but no weights: train first, or name another model{start}.")
    shape = model_config(cfg, base) if random_start else None
    prepared = prepare_model(base, inference_options(cfg, None if base == path else path, random_start), shape)
    check_fits(tokenizer, prepared.config.vocab_size, str(base))
    thinking = cfg.enable_thinking
    if thinking is not None and "enable_thinking" not in template.source:
        log.info(f"enable_thinking: {thinking}: no effect: chat template {template.name} knows only one mode")
        thinking = None
    return FoundModel(prepared, tokenizer, template, path, thinking)


def _directory(cfg: Config) -> tuple[Path, bool]:
    """The directory of the model, and whether it is the one that a run with this configuration starts from."""
    if cfg.checkpoint is not None:
        path = Path(cfg.checkpoint).expanduser()
        if not path.is_dir():
            raise CheckpointError(f"checkpoint: there is no directory {cfg.checkpoint!r} (looked in {Path.cwd()}).")
        return find_checkpoint(path), False
    missing = ""
    shaped = not (cfg.model_name_or_path or cfg.continue_training) and bool(given_shape(cfg))
    if cfg.output_dir is not None:
        try:
            return find_checkpoint(cfg.output_dir), False
        except CheckpointError as error:
            missing = str(error)
            if cfg.model_name_or_path is None and cfg.lora_path is None and not shaped:
                raise
    if cfg.lora_path is not None:
        if not is_adapter(cfg.lora_path):
            raise CheckpointError(
                f"lora_path: {cfg.lora_path} holds no adapter ({ADAPTER_CONFIG_FILE}, {ADAPTER_FILE})."
            )
        return Path(cfg.lora_path), False
    if shaped:
        return directories(cfg)[0], True
    if cfg.model_name_or_path is None:
        raise ConfigError("model_name_or_path: no model is named. Give checkpoint, output_dir or model_name_or_path.")
    if missing:
        log.info(f"output_dir: {cfg.output_dir} holds no model yet; using model_name_or_path")
    path = resolve_model(cfg.model_name_or_path, cfg.download_hub)
    require_model(path)
    ModelConfig.from_dir(path)  # a directory of something else is named as such
    return path, True


def _tokenizer(cfg: Config, path: Path) -> Tokenizer:
    if cfg.tokenizer_name_or_path is not None:
        return load_tokenizer(resolve_tokenizer(cfg.tokenizer_name_or_path, cfg.download_hub))
    if any((path / name).is_file() for name in _TOKENIZERS) or cfg.model_name_or_path is None:
        return load_tokenizer(path)
    source = resolve_model(cfg.model_name_or_path, cfg.download_hub)
    if source != path:
        log.info(f"{path} has no tokenizer; taking the one of model_name_or_path, {source}")
    return load_tokenizer(source)
