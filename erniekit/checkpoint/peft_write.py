"""Writes adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT with transformers 5 computes the same from them: dense projections are `target_modules`; in a mixture of experts,
where PEFT takes the names gate_proj, up_proj and down_proj for the stacked experts, feed-forward weights are
`target_parameters`. Names are the paths in transformers' model. The header's metadata contains a fingerprint of the
base, which PEFT ignores. Reading: peft_read.py.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.checkpoint.model_dir import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from erniekit.checkpoint.safetensors_header import SINGLE_FILE
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.lora import LoraOptions, LoraState, Slot
from erniekit.lora.layers import parameter_name
from erniekit.lora.targets import adaptable, hf_name, is_stacked, parts_of, vision_language_path
from erniekit.models.config import ModelConfig
from erniekit.models.weights import Logical, Shape, logical_tensors, our_shapes
from erniekit.utils import atomic

PREFIX = "base_model.model."
_IN_LAYER = re.compile(r"^model\.(language_model\.layers|vision_tower\.blocks|layers)\.\d+\.")


@dataclass(frozen=True)
class AdapterEntry:
    """One tensor of the file: our parameter, its name and shape there."""

    param: str
    name: str
    shape: Shape
    saved: Logical | None = None

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """Convert our array to PEFT's layout: A [r, in], B [out, r]; of E experts A [E*r, in], expert by expert, and B
        [out, r*E], where the index of the expert varies fastest.
        """
        if self.saved is not None:
            return self.saved.to_file(array, "pt")[0]
        if array.ndim == 3:
            array = array.transpose(0, 2, 1) if ".lora_A." in self.name else array.transpose(2, 1, 0)
        elif array.ndim == 2:
            array = array.T
        return np.ascontiguousarray(array.reshape(self.shape))


def adapter_parameters(state: LoraState) -> list[str]:
    """The names of the whole model's parameters that a file contains, in its order."""
    names = []
    for module, slots in state.slots.items():
        for part in slots:
            kinds = ("A", "B", "magnitude") if state.options.dora else ("A", "B")
            names += [f"{module}.adapter.{parameter_name(kind, part)}" for kind in kinds]
    return [*names, *state.saved]


def write_adapter(
    directory: Path,
    state: LoraState,
    config: ModelConfig,
    tensors: Iterable[np.ndarray],
) -> None:
    """Write an adapter for the model of `config`. `tensors`: fp32, whole, in the order of `adapter_parameters`, taken
    one at a time.
    """
    entries = adapter_entries(state, config)
    metadata = {"format": "pt"} | ({"base_fingerprint": state.base_fingerprint} if state.base_fingerprint else {})
    plan = [(entry.name, "F32", entry.shape) for entry in entries]
    staging = directory / ".adapter"  # the writer always uses the same file name
    with Writer(staging, plan, max_shard_size="1000TB", metadata=metadata) as writer:
        for (_, group), array in zip(groupby(entries, key=lambda entry: entry.param), tensors, strict=True):
            for entry in group:
                writer.write(entry.name, entry.to_file(array))
    atomic.write_json(directory / ADAPTER_CONFIG_FILE, _config_json(state, config))
    (staging / SINGLE_FILE).replace(directory / ADAPTER_FILE)
    staging.rmdir()


def adapter_entries(state: LoraState, config: ModelConfig) -> list[AdapterEntry]:
    """The tensors of an adapter's file, in its order."""
    logicals = {logical.param: logical for logical in logical_tensors(config)}
    entries = []
    for param in adapter_parameters(state):
        if param in state.saved:
            logical = logicals[param]
            piece = logical.pt[0]
            entries.append(AdapterEntry(param, PREFIX + peft_path(piece.name, config), piece.shape, logical))
            if _ties_head(param, config):  # PEFT reads both names
                entries.append(AdapterEntry(param, PREFIX + "lm_head.weight", piece.shape, logical))
            continue
        module, _, factor = param.partition(".adapter.")
        kind, _, part = factor.partition("_")
        rank = state.slots[module][part].rank
        experts, num_in, num_out = part_sizes(config)[module, part]
        shape: Shape = {"A": (experts * rank, num_in), "B": (num_out, rank * experts), "magnitude": (num_out,)}[kind]
        name = "lora_magnitude_vector" if kind == "magnitude" else f"lora_{kind}.weight"
        entries.append(AdapterEntry(param, f"{PREFIX}{_peft_module(module, part, state, config)}.{name}", shape))
    return entries


def peft_path(name: str, config: ModelConfig) -> str:
    """The path, in transformers' model, of a module or parameter that has `name` in files."""
    return name if config.vision is None else vision_language_path(name)


def _peft_module(module: str, part: str, state: LoraState, config: ModelConfig) -> str:
    """The module in which PEFT stores the adapter: that of gate and up of the experts is inside that of down, if both
    exist.
    """
    if not is_stacked(module):
        return peft_path(hf_name(module, part), config)
    prefix, _, leaf = module.rpartition(".")
    both = leaf == "up_gate_proj" and f"{prefix}.down_proj" in state.slots
    return peft_path(prefix, config) + (".base_layer" if both else "")


def part_sizes(config: ModelConfig) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(projection, part) -> (experts, in, out) of the whole model; 1 expert for dense projections."""
    sizes = {}
    shapes = our_shapes(config)
    widths = {
        piece.name: piece.shape[0]
        for logical in logical_tensors(config)
        for piece in logical.pt
        if len(piece.shape) == 2
    }
    for module in adaptable(shapes):
        *lead, num_in, num_out = shapes[f"{module}.weight"]
        for part in parts_of(module):
            width = widths[f"{hf_name(module, part)}.weight"] if part else num_out
            sizes[module, part] = (lead[0] if lead else 1, num_in, width)
    return sizes


def _others(values: dict[str, float], usual: float) -> dict[str, float]:
    return {name: value for name, value in values.items() if value != usual}


def _config_json(state: LoraState, config: ModelConfig) -> dict[str, Any]:
    options, named = state.options, _named_targets(state, config)
    alphas = {name: _alpha(slot, options) for name, (slot, _) in named.items()}
    ranks: dict[str, float] = {name: slot.rank for name, (slot, _) in named.items()}
    rank, alpha = Counter(zip(ranks.values(), alphas.values(), strict=True)).most_common(1)[0][0]
    parameters, modules = ([name for name, target in named.items() if target[1] is kind] for kind in (True, False))
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.has_score_head else "CAUSAL_LM",
        "base_model_name_or_path": state.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else options.dropout,  # PEFT rejects it for parameters
        "use_rslora": options.rslora,
        "use_dora": options.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": modules,
        "target_parameters": parameters or None,
        "rank_pattern": _others(ranks, rank),
        "alpha_pattern": _others(alphas, alpha),
        "modules_to_save": sorted({peft_path(name.rpartition(".")[0], config) for name in state.saved}) or None,
        "ensure_weight_tying": any(_ties_head(param, config) for param in state.saved),
    }


def _named_targets(state: LoraState, config: ModelConfig) -> dict[str, tuple[Slot, bool]]:
    """PEFT's name of each target -> (its slot, whether it is a parameter and not a module). A short name stands for all
    layers where they are alike.
    """
    targets = {(module, part): slot for module, slots in state.slots.items() for part, slot in slots.items()}
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in part_sizes(config):
        groups.setdefault(_IN_LAYER.sub("", _target(*key, config)), []).append(key)
    named = {}
    for short, keys in groups.items():
        present = [key for key in keys if key in targets]
        alike = len(present) == len(keys) and len({targets[key] for key in keys}) == 1
        for name, key in [(short, keys[0])] if alike else [(_target(*key, config), key) for key in present]:
            named[name] = targets[key], is_parameter(key[0], config)
    return named


def _ties_head(param: str, config: ModelConfig) -> bool:
    return config.tie_word_embeddings and param == "model.embed_tokens.weight"


def _alpha(slot: Slot, options: LoraOptions) -> float:
    alpha = round(slot.scaling * (slot.rank**0.5 if options.rslora else slot.rank), 6)
    return int(alpha) if alpha == int(alpha) else alpha


def is_parameter(module: str, config: ModelConfig) -> bool:
    """Whether PEFT adapts the parameter and not the module. Of a vision-language model these are the stacked experts
    alone, since PEFT takes no other names for them.
    """
    return is_stacked(module) if config.vision is not None else config.moe_num_experts > 0 and ".mlp." in module


def _target(module: str, part: str, config: ModelConfig) -> str:
    """PEFT's name of a part in its configuration: a module, or a parameter."""
    name = peft_path(hf_name(module, part), config)
    return f"{name}.weight" if is_parameter(module, config) and not is_stacked(module) else name
