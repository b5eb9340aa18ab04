"""The changes that a configuration makes to the config.json of the model that it names. Paddle is not imported."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from erniekit.config.schema import Config
from erniekit.models.config import ModelConfig
from erniekit.models.config_rope import scaled_positions
from erniekit.nn.frequencies import RopeScaling
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Overrides:
    """The changes that a configuration makes to a model's config.json. The defaults change nothing.

    `min_positions`: max_position_embeddings is raised to this value, and with `rope_scaling` positions are scaled to
    it. `mtp_depths`: the minimum number of blocks of multi-token prediction; blocks that the weights lack are
    initialised at random. `score_head`: whether the model is a reward model, whose head starts at random where the
    weights have none; None: as it is.
    """

    rope_theta: float | None = None
    rope_scaling: str = ""
    min_positions: int = 0
    group_experts: bool = False
    capacity_factor: float | None = None
    mtp_depths: int = 0
    score_head: bool | None = None

    def apply(self, model_config: ModelConfig) -> ModelConfig:
        """The model's configuration with these changes, each of which is logged. ConfigError where it cannot have
        them.
        """
        changes: dict[str, Any] = {}
        if self.rope_theta is not None and self.rope_theta != model_config.rope_theta:
            before = f"{model_config.rope_theta:g}"
            log.info(f"rope_theta: {before} in the model's config.json, {self.rope_theta:g} from here on")
            changes["rope_theta"] = self.rope_theta
        changes |= self._scaling(model_config)
        changes |= self._more_positions(model_config, changes.get("rope_scaling", model_config.rope_scaling))
        if self.mtp_depths > model_config.num_nextn_predict_layers:
            changes["num_nextn_predict_layers"] = self.mtp_depths
        if model_config.moe_num_experts:
            changes["moe_capacity_factor"] = self.capacity_factor
            if self.group_experts and not model_config.moe_group_experts:
                log.warning(
                    "moe_group_experts: other tools know only plain top-k; this model has to be used with erniekit"
                )
                changes["moe_group_experts"] = True
        if self.score_head is not None and self.score_head != model_config.has_score_head:
            changes |= _with_score_head(model_config)
        changed = dataclasses.replace(model_config, **changes)
        try:
            changed.check("the keys and the model's config.json do not go together", "Leave the key out")
        except CheckpointError as error:
            raise ConfigError(str(error)) from None
        return changed

    def _more_positions(self, model_config: ModelConfig, scaling: RopeScaling | None) -> dict[str, Any]:
        """The change that `min_positions` makes."""
        before = model_config.max_position_embeddings
        if self.min_positions <= before:
            return {}
        in_file = ""
        if scaling is not None and scaling.kind == "dynamic":
            in_file = f" ({scaling.length} in config.json, beyond which dynamic positions are scaled)"
        log.info(f"max_position_embeddings: {before} before, {self.min_positions} from here on{in_file}")
        return {"max_position_embeddings": self.min_positions}

    def _scaling(self, model_config: ModelConfig) -> dict[str, Any]:
        """The change that `rope_scaling` makes; none where the model's positions are scaled so already."""
        now, length = model_config.rope_scaling, model_config.max_position_embeddings
        if not self.rope_scaling or (now is not None and now.kind == self.rope_scaling):
            return {}
        if now is not None:
            raise ConfigError(
                f"rope_scaling: {self.rope_scaling}: the positions of this model are scaled already (rope_type "
                f"{now.kind} in its config.json). Leave the key out, or set {now.kind}"
            )
        if self.min_positions <= length:
            log.info(f"rope_scaling: {self.rope_scaling}: no effect: the model has {length} positions (max_seq_len)")
            return {}
        scaling = scaled_positions(self.rope_scaling, length, self.min_positions)
        log.info(f"rope_scaling: {scaling.kind} by {scaling.factor:g}, from {length} to {self.min_positions} positions")
        return {"rope_scaling": scaling}


def _with_score_head(model_config: ModelConfig) -> dict[str, Any]:
    """The changes that make a reward model of a language model. ConfigError the other way round."""
    if model_config.has_score_head:
        raise ConfigError(
            "model_name_or_path: this is a reward model (stage: RM), which gives a text one number and generates none. "
            "Name a language model, or set stage: RM"
        )
    if model_config.vision is not None:
        raise ConfigError(
            "stage: RM: reward models of vision-language models are not built. Name a model of text alone"
        )
    log.info("the model becomes a reward model: its output head is replaced by a score head, which starts at random")
    return {"has_score_head": True}


def overrides_of(cfg: Config) -> Overrides:
    """The changes that the configuration makes to its model, in every command that uses the model."""
    return Overrides(
        rope_theta=cfg.rope_theta,
        rope_scaling=cfg.rope_scaling,
        # The default of max_seq_len is just the length of a training row, so it must not change the model's context.
        min_positions=cfg.max_seq_len if "max_seq_len" in cfg.given else 0,
        group_experts=cfg.moe_group_experts,
        score_head=cfg.method.scores,
    )


def training_overrides(cfg: Config) -> Overrides:
    """The changes that `erniekit train` makes: those of every command, and what only training reads."""
    return dataclasses.replace(
        overrides_of(cfg),
        min_positions=cfg.max_seq_len,
        capacity_factor=cfg.moe_capacity_factor,
        mtp_depths=cfg.mtp_depths,
    )
