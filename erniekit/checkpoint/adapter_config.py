"""PEFT's adapter_config.json: every option is supported, known to be harmless here, or rejected by name."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from erniekit.checkpoint.model_dir import ADAPTER_CONFIG_FILE, ADAPTER_FILE, is_adapter
from erniekit.hub import local_path, resolve_model
from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import JsonObject, kind, read_json_object

_OFF: tuple[Any, ...] = (False, {}, [])
# PEFT's options that change the meaning of the factors, with the values (in addition to null) that leave it unchanged.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": _OFF,
    "fan_in_fan_out": _OFF,
    "layer_replication": _OFF,
    "trainable_token_indices": _OFF,
    "use_qalora": _OFF,
    "use_bdlora": _OFF,
    "alora_invocation_tokens": _OFF,
    "arrow_config": _OFF,
    "velora_config": _OFF,
    "kasa_config": _OFF,
    "monteclora_config": _OFF,
    "megatron_config": _OFF,
}
_HONOURED = frozenset(
    (
        "peft_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "ensure_weight_tying",
        "init_lora_weights",
    )
)
# Options without influence on the result: notes, and the initialisation of factors that have been trained since.
_HARMLESS = frozenset(
    (
        "auto_mapping",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    )
)
# initialisations that also change the base's weights
_BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa")
_MAX_RANK = 1 << 16
_MAX_PATTERN = 1000  # characters of one regular expression
_MAX_REPEATS = 3  # of its unbounded repetitions


@dataclass(frozen=True)
class AdapterConfig:
    """The options in an adapter_config.json. `ranks` and `alphas` are PEFT's patterns with the rank or the alpha of
    each. `targets` is a pattern or a tuple of module names; None if the file does not list the adapted modules
    explicitly.
    """

    base: str | None
    rank: int
    ranks: tuple[tuple[re.Pattern[str], int], ...]
    alpha: float
    dropout: float
    rslora: bool
    dora: bool
    ties_weights: bool
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    targets: re.Pattern[str] | tuple[str, ...] | None
    target_parameters: tuple[str, ...]
    saved: tuple[str, ...]

    def scaling(self, name: str, rank: int) -> float:
        """The factor s in W + s A B for a projection by PEFT's name."""
        return _first(self.alphas, name, self.alpha) / (rank**0.5 if self.rslora else rank)

    def rank_of(self, name: str) -> int:
        """The rank of a projection by PEFT's name."""
        return _first(self.ranks, name, self.rank)


Number = TypeVar("Number", int, float)


def _first(patterns: Iterable[tuple[re.Pattern[str], Number]], name: str, default: Number) -> Number:
    """The number of the first pattern that fits the name of a projection, or of its weight."""
    forms = (name, f"{name}.weight")
    return next((number for pattern, number in patterns if any(pattern.match(form) for form in forms)), default)


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read adapter_config.json in the directory `path`. A CheckpointError names the file and the option."""
    if not is_adapter(path):
        raise CheckpointError(f"{path} holds no adapter: {ADAPTER_CONFIG_FILE} and {ADAPTER_FILE} are needed.")
    file = path / ADAPTER_CONFIG_FILE
    content = JsonObject(read_json_object(file, CheckpointError), str(file), CheckpointError)
    _check_options(content)
    alphas = content.get_object("alpha_pattern")
    ranks = content.get_object("rank_pattern")
    return AdapterConfig(
        base=content.get_text("base_model_name_or_path", None),
        rank=content.get_int("r", 8, 1, _MAX_RANK),
        ranks=tuple(
            (_pattern(name, f"{file}: rank_pattern", ending=True), ranks.get_int(name, 8, 1, _MAX_RANK))
            for name in ranks.values
        ),
        alpha=_alpha(content, "lora_alpha", 8.0),
        dropout=float(content.get_number("lora_dropout", 0.0, 0, 0.999)),
        rslora=content.get_bool("use_rslora", False),
        dora=content.get_bool("use_dora", False),
        ties_weights=content.get_bool("ensure_weight_tying", False),
        alphas=tuple(
            (_pattern(name, f"{file}: alpha_pattern", ending=True), _alpha(alphas, name, 8.0)) for name in alphas.values
        ),
        targets=_targets(content),
        target_parameters=() if _is_limited(content) else _names(content, "target_parameters"),
        saved=_names(content, "modules_to_save"),
    )


def _check_options(content: JsonObject) -> None:
    peft_type = content.get_text("peft_type", None)
    if peft_type != "LORA":
        raise CheckpointError(f"{content.where}: peft_type {peft_type!r:.60}: only LORA adapters can be applied.")
    for name, value in content.values.items():
        if value is None or name in _HONOURED or name in _HARMLESS:
            continue
        if name in _ONLY and value not in _ONLY[name]:
            raise CheckpointError(
                f"{content.where}: {name}: {value!r:.60}: this kind of adapter is not known here. Merge it into its "
                "base with PEFT, and use the result as a model."
            )
        if name not in _ONLY and value not in _OFF:
            raise CheckpointError(
                f"{content.where}: {name}: {value!r:.60}: an option that is not known here, so it is not clear what "
                "the adapter computes. Remove it from the file if it makes no difference, or merge the adapter into "
                "its base with PEFT."
            )
    start = str(content.values.get("init_lora_weights"))
    if start.lower().startswith(_BASE_CHANGED):
        raise CheckpointError(
            f"{content.where}: init_lora_weights: {start:.60}: such adapters belong to a base with changed weights. "
            "Convert it to a plain one with PEFT first (path_initial_model_for_weight_conversion)."
        )


def _alpha(content: JsonObject, name: str, default: float) -> float:
    return float(content.get_number(name, default, 1e-6, 1e6))


def _names(content: JsonObject, key: str) -> tuple[str, ...]:
    names = content.get_list(key, [])
    if not all(isinstance(name, str) and name for name in names):
        raise CheckpointError(f"{content.where}: {key}: must be a list of names.")
    return tuple(names)


def _is_limited(content: JsonObject) -> bool:
    """Whether other options exclude some of the modules that the targets name."""
    return content.values.get("layers_to_transform") is not None or bool(content.values.get("exclude_modules"))


def _targets(content: JsonObject) -> re.Pattern[str] | tuple[str, ...] | None:
    value = content.values.get("target_modules")
    if value is None or value == "all-linear" or _is_limited(content):
        return None
    if isinstance(value, str):
        return _pattern(value, f"{content.where}: target_modules")
    if not isinstance(value, list):
        raise CheckpointError(f"{content.where}: target_modules: must be text or a list of names, found {kind(value)}.")
    return _names(content, "target_modules")


def _pattern(text: str, where: str, ending: bool = False) -> re.Pattern[str]:
    """Compile a regular expression from a file of unknown origin; with `ending`, for the end of a name, as PEFT matches
    its patterns. Matching has no time limit, so patterns that could take very long are rejected: repeated groups, and
    many repetitions.
    """
    plain = re.sub(r"\\.|\[\^?\]?[^]]*\]", "x", text)  # remove escapes and character classes
    repeats = len(re.findall(r"[*+{]", plain))
    if len(text) > _MAX_PATTERN or repeats > _MAX_REPEATS or re.search(r"\)[*+{]", plain):
        raise CheckpointError(
            f"{where}: {text!r:.60}: too complicated a pattern (at most {_MAX_REPEATS} of * and +, none of them behind "
            "a bracket). List the names instead."
        )
    try:
        return re.compile(rf"(.*\.)?({text})$" if ending else text)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{where}: {text!r:.60} is not a regular expression: {error}.") from None


def ends(name: str, targets: Iterable[str]) -> bool:
    """Whether PEFT matches `name` by one of the short names `targets`."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def base_of(directory: str | Path, named: str | None, hub: str | None = None) -> Path:
    """The directory of the model that an adapter belongs to: `named` (model_name_or_path), or the local directory that
    the adapter itself names.

    Raises CheckpointError if neither exists: a file does not decide what is downloaded from a Hub.
    """
    if named:
        return resolve_model(named, hub)
    base = read_adapter_config(Path(directory)).base
    if not base:
        raise CheckpointError(
            f"model_name_or_path: {directory} is an adapter that does not name its base model. Name it here."
        )
    path = local_path(base)
    if path is None:
        raise CheckpointError(
            f"model_name_or_path: {directory} is an adapter for {base!r:.200}, which is not a directory here. Set "
            "model_name_or_path to a copy of that model, or to its name on a Hub to have it downloaded."
        )
    return path
