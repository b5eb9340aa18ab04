"""Finds the directory of the model that a command uses. Only its configuration is read."""

from dataclasses import dataclass
from pathlib import Path

from erniekit.checkpoint.adapter_config import base_of
from erniekit.checkpoint.model_dir import find_checkpoint, is_adapter, require_adapter, require_model
from erniekit.checkpoint.model_shape import adds_vision, directories, given_shape, model_config, vision_start
from erniekit.checkpoint.vision_start import VisionStart
from erniekit.config.schema import Config
from erniekit.hub import resolve_model
from erniekit.models.config import ModelConfig
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class ModelFiles:
    """The directories of a model. `path`: the directory that a command uses. `base`: the same, or the model to which
    the adapter in `path` belongs. `is_start`: whether a training with this configuration starts from it;
    `random_start`: whether without its weights. `note`: a remark for the user about the choice, or "".
    """

    path: Path
    base: Path
    is_start: bool
    random_start: bool
    note: str = ""

    def config(self, cfg: Config) -> ModelConfig:
        """The configuration of the model."""
        if self.random_start:
            return model_config(cfg, self.base)
        start = self.vision_start(cfg)
        return ModelConfig.from_dir(self.base) if start is None else start.config

    def vision_start(self, cfg: Config) -> VisionStart | None:
        """How the training adds vision to the text model in `base`; None where it does not, or has done so."""
        is_text_model = self.is_start and not self.random_start and adds_vision(cfg, ModelConfig.from_dir(self.base))
        return vision_start(cfg, model_config(cfg, self.base)) if is_text_model else None


def model_files(cfg: Config) -> ModelFiles:
    """The model that `cfg` names: `checkpoint`; else the final or newest one in `output_dir`; else
    `model_name_or_path`, with the adapter `lora_path` if there is one. The base of an adapter is `model_name_or_path`,
    else the local directory that it names itself. Raises CheckpointError or ConfigError that names the key.
    """
    path, is_start, note = _directory(cfg)
    say_if_not_applied(cfg, path)
    base = base_of(path, cfg.model_name_or_path, cfg.download_hub) if is_adapter(path) else path
    return ModelFiles(path, base, is_start, is_start and not cfg.continue_training, note)


def say_if_not_applied(cfg: Config, path: Path) -> None:
    """Log a warning if lora_path has no effect, since the model that is used, `path`, is a whole one that another key
    names. An adapter is the run's own, which continued that of lora_path.
    """
    if cfg.lora_path is None or is_adapter(path):
        return
    source, instead = "checkpoint names", "in place of checkpoint"
    if cfg.checkpoint is None:
        source, instead = "output_dir holds", "with another output_dir"
    log.once(
        f"lora_path: {cfg.lora_path} is not applied, since {source} a whole model, {path}. To apply the adapter to it, "
        f"set model_name_or_path: {path} {instead}"
    )


def _directory(cfg: Config) -> tuple[Path, bool, str]:
    """`path`, `is_start` and `note` of ModelFiles."""
    if cfg.checkpoint is not None:
        path = Path(cfg.checkpoint)
        if not path.is_dir():
            raise CheckpointError(f"checkpoint: there is no directory {cfg.checkpoint!r} (looked in {Path.cwd()}).")
        return find_checkpoint(path), False, ""
    missing = ""
    shaped = not (cfg.model_name_or_path or cfg.continue_training) and bool(given_shape(cfg))
    if cfg.output_dir is not None:
        try:
            return find_checkpoint(cfg.output_dir), False, ""
        except CheckpointError as error:
            missing = str(error)
            if cfg.model_name_or_path is None and cfg.lora_path is None and not shaped:
                raise
    if cfg.lora_path is not None:
        return require_adapter(cfg.lora_path), False, ""
    if shaped:
        return directories(cfg)[0], True, ""
    if cfg.model_name_or_path is None:
        raise ConfigError("model_name_or_path: no model is given. Set checkpoint, output_dir or model_name_or_path.")
    path = resolve_model(cfg.model_name_or_path, cfg.download_hub, weights=cfg.continue_training)
    require_model(path)
    ModelConfig.from_dir(path)  # raises the proper error if the directory is not a model
    note = f"output_dir: {cfg.output_dir} holds no model yet; using model_name_or_path" if missing else ""
    return path, True, note
