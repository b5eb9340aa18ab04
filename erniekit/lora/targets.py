"""Selects the projections to adapt: translates names and patterns, ours or Hugging Face's, to parts of projections. It
uses no tensors.

In memory q|k|v and gate|up are fused; Hugging Face has q_proj, k_proj, v_proj, gate_proj and up_proj. A fused
projection has an adapter for each part that is targeted, so that PEFT's files map one to one. Routed experts are one
stacked projection for gate and up on either side, hence one adapter (as PEFT has it for `experts.gate_up_proj`).
"""

import difflib
import re
from collections.abc import Iterable, Sequence

from erniekit.utils.errors import ConfigError

FUSED = {"qkv_proj": ("q", "k", "v"), "up_gate_proj": ("gate", "up")}
# ERNIEKit's: not the router, not the head; of a vision-language model the resampler, too, not the vision transformer.
_DEFAULT_TARGETS = ("qkv_proj", "o_proj", "up_gate_proj", "down_proj")
_RESAMPLER_TARGETS = ("spatial_linear.0", "spatial_linear.2", "temporal_linear.0", "temporal_linear.2")
_LEAVES = (*FUSED, "o_proj", "down_proj")
_KNOWN = (*_LEAVES, "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "gate_up_proj")
# Modules that modules_to_save can name: whole parameters outside the projections and the routers.
SAVEABLE = ("embed_tokens", "lm_head", "score", "norm", "input_layernorm", "post_attention_layernorm")
_PLAIN = re.compile(r"[\w.]+")
# The projections of the vision transformer and of the resampler.
_VISUAL = re.compile(
    r"model\.vision_model\.(patch_embed\.proj|blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12]))"
    r"|model\.resampler_model\.((spatial|temporal)_linear\.[02]|mlp)"
)
# Names in files of vision-language models, and the paths of the same modules in transformers' model.
_VISION_LANGUAGE_PATHS = (
    (re.compile(r"^model\.(?=(layers|embed_tokens|norm)\b)"), "model.language_model."),
    (re.compile(r"\.mlp\.experts(?=\.|$)"), ".mlp.text_moe.experts"),
    (re.compile(r"\.mlp\.vision_experts(?=\.|$)"), ".mlp.vision_moe.experts"),
    (re.compile(r"^model\.vision_model\."), "model.vision_tower."),
    (re.compile(r"(?<=_linear\.)0(?=\.|$)"), "fc1"),
    (re.compile(r"(?<=_linear\.)2(?=\.|$)"), "fc2"),
)

# Module name of a projection -> its adapted parts; ("",) if it has no parts.
Chosen = dict[str, tuple[str, ...]]


def is_stacked(module: str) -> bool:
    """Whether a projection's name is that of all routed experts of a layer."""
    return module.rpartition(".")[0].endswith((".mlp.experts", ".mlp.vision_experts"))


def adaptable(names: Iterable[str]) -> list[str]:
    """The projections among module or weight names: attention and feed-forward, those of the vision transformer and
    the resampler, not multi-token prediction.
    """
    modules = dict.fromkeys(name.removesuffix(".weight") for name in names)
    return [
        name
        for name in modules
        if (name.rpartition(".")[2] in _LEAVES and ".mtp_" not in name) or _VISUAL.fullmatch(name)
    ]


def has_vision(names: Iterable[str]) -> bool:
    """Whether modules or weights of these names are those of a vision-language model."""
    return any(name.startswith("model.resampler_model.") for name in names)


def default_targets(names: Iterable[str]) -> tuple[str, ...]:
    """What is adapted of a model with weights of these names where nothing is given."""
    return _DEFAULT_TARGETS + (_RESAMPLER_TARGETS if has_vision(names) else ())


def short_name(module: str) -> str:
    """The end of a projection's name that says what it is: "qkv_proj", "spatial_linear.0"."""
    prefix, _, leaf = module.rpartition(".")
    return leaf if leaf in _LEAVES else f"{prefix.rpartition('.')[2]}.{leaf}"


def parts_of(module: str) -> tuple[str, ...]:
    """The parts of a projection, each of which may have an adapter."""
    return ("",) if is_stacked(module) else FUSED.get(module.rpartition(".")[2], ("",))


def hf_name(module: str, part: str) -> str:
    """Hugging Face's name of a part: "...self_attn.qkv_proj", "q" -> "...self_attn.q_proj"; the experts' stacked
    parameters are "...experts.gate_up_proj" and "...experts.down_proj".
    """
    prefix, _, leaf = module.rpartition(".")
    if part:
        return f"{prefix}.{part}_proj"
    return f"{prefix}.gate_up_proj" if leaf == "up_gate_proj" else module


def vision_language_path(name: str) -> str:
    """The path in transformers' vision-language model of a module or parameter that has `name` in files or here. PEFT
    uses these paths, not the names in files.
    """
    for pattern, path in _VISION_LANGUAGE_PATHS:
        name = pattern.sub(path, name)
    return name


def choose(names: Iterable[str], targets: Sequence[str]) -> Chosen:
    """The parts that `targets` select among the projections `names` (of the whole model).

    An entry of letters, digits, _ and . is the end of a name ("q_proj", "mlp.down_proj"); anything else is a regular
    expression for a whole name. Both are compared with our names and with Hugging Face's ("experts.0.gate_proj" stands
    for all experts), of a vision-language model also with the paths in transformers' model. Raises ConfigError for an
    entry that matches nothing (with the nearest name), an invalid expression, and gate without up in routed experts.
    """
    modules = adaptable(names)
    vision = has_vision(modules)
    chosen: set[tuple[str, str]] = set()
    halves: set[tuple[str, str]] = set()  # ("...experts.up_gate_proj", "gate")
    for target in targets:
        hits = {
            (module, part) for module in modules for part in parts_of(module) if _means(target, module, part, vision)
        }
        half_hits = _halves(target, modules)
        if not hits and not half_hits:
            raise ConfigError(_unknown(target, modules))
        chosen |= hits
        halves |= half_hits
    for module, half in sorted(halves):
        if (module, {"gate": "up", "up": "gate"}[half]) in halves:
            chosen.add((module, ""))
        elif (module, "") not in chosen:
            raise ConfigError(
                f"lora_target_modules: {half}_proj of the routed experts ({module}) without the other half: they are "
                "one projection with one adapter. Name both gate_proj and up_proj, or leave experts out."
            )
    by_module = {module: tuple(part for part in parts_of(module) if (module, part) in chosen) for module in modules}
    return {module: parts for module, parts in by_module.items() if parts}


def _halves(target: str, modules: Iterable[str]) -> set[tuple[str, str]]:
    """The halves of stacked gate and up projections that a name of one expert's module means (older PEFT files have a
    module for each expert).
    """
    stacks = [module for module in modules if is_stacked(module) and module.endswith(".up_gate_proj")]
    return {
        (module, half)
        for module in stacks
        for half in ("gate", "up")
        if _matches(target, (f"{module.rpartition('.')[0]}.0.{half}_proj",))
    }


def _means(target: str, module: str, part: str, vision: bool) -> bool:
    names = [module, hf_name(module, part)]
    if vision:
        names.append(vision_language_path(names[1]))
    if is_stacked(module) and module.endswith("down_proj"):
        names.append(f"{module.rpartition('.')[0]}.0.down_proj")
    return _matches(target, names)


def _matches(target: str, names: Iterable[str]) -> bool:
    if _PLAIN.fullmatch(target):
        return any(name == target or name.endswith(f".{target}") for name in names)
    return any(re.fullmatch(target, name) for name in names)  # config/checks.py has checked that it compiles


def _unknown(target: str, modules: Sequence[str]) -> str:
    leaf = target.rpartition(".")[2]
    if leaf in ("gate", "lm_head", "embed_tokens"):
        whole = "" if leaf == "gate" else f" To train it whole, put it into modules_to_save: {leaf}."
        kind = "the router is" if leaf == "gate" else f"{leaf} is"
        return f"lora_target_modules: {target}: {kind} not adapted.{whole}"
    if target in ("all", "all-linear"):
        return f"lora_target_modules: {target}: leave the key out: attention, feed-forward and experts are the default."
    if not _PLAIN.fullmatch(target):
        example = f" (names look like {modules[0]})" if modules else ""
        return f"lora_target_modules: the pattern {target!r} matches no projection of this model{example}."
    near = difflib.get_close_matches(leaf, _KNOWN, n=1, cutoff=0.3)
    return (
        f"lora_target_modules: {target}: no projection of this model has that name; did you mean "
        f"{near[0] if near else 'q_proj'}? There are {', '.join(_KNOWN)}."
    )


def choose_saved(names: Iterable[str], entries: Sequence[str], tied: bool) -> tuple[str, ...]:
    """The parameters (of `names`, the whole model's weights) that modules_to_save means, trained whole and saved with
    the adapter. ConfigError for a module that cannot be, or that is not there.
    """
    names = list(names)
    saved: dict[str, None] = {}
    for entry in entries:
        leaf = entry.rpartition(".")[2]
        if entry == "lm_head" and tied:
            raise ConfigError(
                "modules_to_save: lm_head: the head of this model is its embeddings. Name embed_tokens: both are "
                "trained."
            )
        hits = [
            name
            for name in names
            if ".mtp_" not in name
            for module in (name.rpartition(".")[0],)
            if leaf in SAVEABLE and (module == entry or module.endswith(f".{entry}"))
        ]
        if not hits:
            near = difflib.get_close_matches(leaf, SAVEABLE, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near and near[0] != entry else "."
            raise ConfigError(
                f"modules_to_save: {entry}: not a module of this model that can be trained whole{hint} There are "
                f"{', '.join(SAVEABLE)}; projections are adapted (lora_target_modules)."
            )
        saved |= dict.fromkeys(hits)
    return tuple(saved)
