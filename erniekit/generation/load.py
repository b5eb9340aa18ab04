"""Finds and loads the model that a command uses, with its tokenizer and chat template."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from erniekit.build import PreparedModel, inference_options, prepare_model
from erniekit.checkpoint.adapter_origin import say_if_base_differs
from erniekit.checkpoint.generation_config import GenerationConfig, not_used
from erniekit.checkpoint.model_dir import has_weights
from erniekit.checkpoint.model_files import model_files
from erniekit.checkpoint.model_shape import model_config, processor_directory
from erniekit.checkpoint.processor import settings_of
from erniekit.checkpoint.safetensors_header import unusable_weights
from erniekit.config import Config
from erniekit.data.chat.template import Template, load_template, say_if_trained_otherwise
from erniekit.data.chat.tokenizer import Tokenizer, check_fits, load_tokenizer
from erniekit.data.vision.encode import VisionSpec
from erniekit.data.vision.options import inference_spec
from erniekit.data.vision.template import load_vision_template
from erniekit.generation.request import Limits
from erniekit.generation.sampling import Sampling
from erniekit.hub import resolve_model, resolve_tokenizer
from erniekit.models.decoder import CausalLM
from erniekit.parallel.mesh import Mesh
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class ChatModel:
    """A model in eval mode with what turns text into its tokens. `path` is its directory; `enable_thinking` is
    passed to the template (None: it is not). `vision`: how pictures and videos are prepared; None: the model reads text
    alone.
    """

    model: CausalLM
    tokenizer: Tokenizer
    template: Template
    path: Path
    enable_thinking: bool | None
    generation: GenerationConfig
    vision: VisionSpec | None = None

    def limits(self, cfg: Config) -> Limits:
        """When an answer ends: at the template's and the model's end tokens, within the configuration's bounds."""
        stops = {*self.template.stop_ids, *self.model.end_ids}
        if (line := not_used(self.generation, _settings_of(cfg))) is not None:
            log.info(line)
        return Limits(cfg.max_new_tokens, cfg.min_tokens, tuple(sorted(stops)))


def sampling_of(cfg: Config) -> Sampling:
    """The sampling settings of the configuration."""
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
    """The sampling settings of the configuration, under transformers' names."""
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
class PreparedChatModel:
    """The model that a command uses, checked but not read yet. The fields are those of ChatModel."""

    prepared: PreparedModel
    tokenizer: Tokenizer
    template: Template
    path: Path
    enable_thinking: bool | None
    vision: VisionSpec | None = None

    def load(self, mesh: Mesh | None = None, chunks: Sequence[Sequence[int]] | None = None) -> ChatModel:
        """Read the weights: those that this process of `mesh` has, with the layers of `chunks`; given no mesh, all."""
        model = self.prepared.build(mesh, chunks)
        if not self.prepared.options.random_start:
            base, adapter = self.prepared.path, f" with the adapter {self.path}"
            log.info(f"model: {base}{'' if base == self.path else adapter}")
        generation = self.prepared.generation
        return ChatModel(model, self.tokenizer, self.template, self.path, self.enable_thinking, generation, self.vision)


def open_model(cfg: Config) -> ChatModel:
    """Find and load the model that `cfg` names (see `find_model`)."""
    return find_model(cfg).load()


def find_model(cfg: Config) -> PreparedChatModel:
    """The model that `cfg` names (see `model_files`). A checkpoint that is an adapter is attached to its base.

    With continue_training: false, model_name_or_path, or the shape that the YAML gives, is the random start that
    training has; with vision_config_path, a text model gets the vision part that the training gives it. The tokenizer
    is that of `tokenizer_name_or_path`, else the checkpoint's, else that of
    model_name_or_path. Everything is checked, no weight is read. Raises CheckpointError
    or ConfigError that names the key.
    """
    files = model_files(cfg)
    path, base = files.path, files.base
    if files.note:
        log.info(files.note)
    tokenizer = _tokenizer(cfg, base)
    if not files.random_start and not has_weights(base):
        start = " (or set continue_training: false for a random start)" if files.is_start else ""
        raise CheckpointError(
            unusable_weights(base)
            or f"{base} holds a config.json but no weights: train first, or name another model{start}."
        )
    shape = model_config(cfg, base) if files.random_start else None
    if base != path:
        say_if_base_differs(path, cfg)
    options = inference_options(cfg, None if base == path else path, files.random_start)
    added = files.vision_start(cfg)
    if added is not None:
        log.warning(
            f"vision_config_path: {base} is a model of text, and its vision part is not trained yet: vision "
            f"transformer, resampler and vision routers are random (seed {cfg.seed})"
        )
    prepared = prepare_model(base, replace(options, vision_start=added), shape)
    check_fits(tokenizer, prepared.config.vocab_size, str(base))
    vision = None
    if prepared.config.vision is not None:  # an adapter has files of its own where it was trained with other settings
        beside = (path, base) if added is None else (processor_directory(cfg, base),)
        vision = inference_spec(cfg, settings_of(*beside, model=prepared.config.vision.patching))
    template = (load_template if vision is None else load_vision_template)(tokenizer, cfg.chat_template, path)
    say_if_trained_otherwise(path, template)
    thinking = cfg.enable_thinking
    if thinking is not None and "enable_thinking" not in template.source:
        log.info(f"enable_thinking: {thinking}: no effect: chat template {template.name} knows only one mode")
        thinking = None
    return PreparedChatModel(prepared, tokenizer, template, path, thinking, vision)


def _tokenizer(cfg: Config, path: Path) -> Tokenizer:
    if cfg.tokenizer_name_or_path is not None:
        return load_tokenizer(resolve_tokenizer(cfg.tokenizer_name_or_path, cfg.download_hub))
    if any((path / name).is_file() for name in _TOKENIZERS) or cfg.model_name_or_path is None:
        return load_tokenizer(path)
    source = resolve_model(cfg.model_name_or_path, cfg.download_hub)
    if source != path:
        log.info(f"{path} has no tokenizer; taking the one of model_name_or_path, {source}")
    return load_tokenizer(source)
