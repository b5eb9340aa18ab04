"""The configuration object: all keys in one flat, frozen class."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import yaml

from erniekit.config import references
from erniekit.config.methods import METHODS, MethodFacts
from erniekit.config.schema_curriculum import CurriculumArgs
from erniekit.config.schema_data import DataArgs
from erniekit.config.schema_fp8 import Fp8Args
from erniekit.config.schema_gkd import GkdArgs
from erniekit.config.schema_kto import KtoArgs
from erniekit.config.schema_lora import LoraArgs
from erniekit.config.schema_mixture import MixtureArgs
from erniekit.config.schema_model import ModelArgs, MoEArgs
from erniekit.config.schema_parallel import ParallelArgs
from erniekit.config.schema_parts import PartsArgs
from erniekit.config.schema_preference import PreferenceArgs
from erniekit.config.schema_qat import QatArgs
from erniekit.config.schema_quantization import QuantizationArgs
from erniekit.config.schema_reward_model import RewardModelArgs
from erniekit.config.schema_rewards import RewardArgs
from erniekit.config.schema_rl import RLArgs
from erniekit.config.schema_rollout_server import RolloutServerArgs
from erniekit.config.schema_rollout_tools import RolloutToolArgs
from erniekit.config.schema_shape import ShapeArgs
from erniekit.config.schema_train import OptimArgs, TrainArgs
from erniekit.config.schema_use import ChatArgs, EvalArgs, ExportArgs, GenerateArgs, ServerArgs
from erniekit.config.schema_vision import VisionArgs


@dataclass(frozen=True, kw_only=True)
class Config(
    DataArgs,
    VisionArgs,
    MixtureArgs,
    ModelArgs,
    Fp8Args,
    QatArgs,
    LoraArgs,
    PreferenceArgs,
    RewardModelArgs,
    RLArgs,
    RewardArgs,
    CurriculumArgs,
    RolloutToolArgs,
    RolloutServerArgs,
    KtoArgs,
    GkdArgs,
    TrainArgs,
    OptimArgs,
    PartsArgs,
    ParallelArgs,
    MoEArgs,
    ShapeArgs,
    GenerateArgs,
    ChatArgs,
    ServerArgs,
    EvalArgs,
    ExportArgs,
    QuantizationArgs,
):
    """All keys as attributes, checked and frozen; `erniekit.config.load` makes it. The base classes are the groups of
    keys in the order of config.yaml.

    extras: given keys that have no field (no effect here, or not built yet), as (name, value).
    given: the keys that the user gave, under their own or another name, as opposed to those left at their defaults.
    notes: one line for each accepted key that has no effect.
    source: the file that was loaded, for messages.
    """

    extras: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), hash=False)  # a value may be a list
    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    source: str = dataclasses.field(default="", compare=False)

    @property
    def method(self) -> MethodFacts:
        """The facts about the method that `stage` names."""
        return METHODS[self.stage]

    @property
    def mtp_depths(self) -> int:
        """The depth of multi-token prediction that a run trains; 0 if the method has no loss for it."""
        return self.num_nextn_predict_layers if self.method.reads("num_nextn_predict_layers") else 0

    def num_microbatches(self, data_ranks: int) -> int:
        """The microbatches of an optimizer step on each data rank: gradient_accumulation_steps, or as many as the
        completions of a step need.
        """
        if self.method.reads("gradient_accumulation_steps"):
            return self.gradient_accumulation_steps
        completions = self.rollout_batch_size * self.num_generations // self.steps_per_generation
        pairs = 2 * self.upo_offline_pairs if self.upo_offline_weight else 0
        return sum(-(-count // (self.batch_size * data_ranks)) for count in (completions, pairs))

    @property
    def recomputed_modules(self) -> frozenset[str]:
        """What is recomputed, in the words of recompute_modules; "layer" for whole layers. Empty without recompute."""
        if not self.recompute:
            return frozenset()
        named = {"full": ("layer", "vision"), "full_attn": ("attention",), "selective": self.recompute_modules}
        modules = named.get(self.recompute_granularity, (self.recompute_granularity,))
        sparse = ("moe",) if self.use_recompute_moe and self.recompute_granularity != "full" else ()
        return frozenset((*modules, *sparse)) - {"loss_fn"}

    def to_yaml(self) -> str:
        """The configuration as YAML with every key and its documentation; loading it gives an equal Config."""
        lines: list[str] = []
        for name, group in GROUPS.items():
            lines.append(f"### {name}")
            for field in dataclasses.fields(group):
                lines.append(f"# {field.metadata['doc']}")
                lines.append(_yaml_line(field.name, vars(self)[field.name]))
            lines.append("")
        if self.extras:
            lines.append("### given, and without effect here")
            lines.extend(_yaml_line(name, value) for name, value in self.extras)
        return "\n".join(lines).rstrip("\n") + "\n"


GROUPS: dict[str, type] = {vars(base)["group"]: base for base in Config.__bases__}


@functools.cache
def fields() -> Mapping[str, "dataclasses.Field[Any]"]:
    """Every key that has a field, by name, in the order of the groups."""
    return MappingProxyType({field.name: field for group in GROUPS.values() for field in dataclasses.fields(group)})


def _yaml_line(name: str, value: Any) -> str:
    if value is None or isinstance(value, bool | int):  # most keys; PyYAML takes 0.2 ms for each
        return f"{name}: {'null' if value is None else str(value).lower()}"
    written = {name: _escaped(value)}
    # PyYAML does not escape these three line breaks, and would read them back as a space.
    readable = not any(character in str(value) for character in "\x85\u2028\u2029")
    flow = None if isinstance(value, tuple) else False  # lists are written in one line
    text = yaml.safe_dump(written, allow_unicode=readable, sort_keys=False, width=10**6, default_flow_style=flow)
    return text.rstrip("\n")


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return references.escape(value)
    if isinstance(value, dict):
        return {name: _escaped(inner) for name, inner in value.items()}
    return [_escaped(inner) for inner in value] if isinstance(value, list | tuple) else value
