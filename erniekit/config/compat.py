"""Rules for keys that ERNIEKit and related toolkits have and that are no fields of our schema.

There are five kinds of rule. An Alias is another name of a key. A NoEffect key is accepted and reported at start-up
with the reason. A Detail key is an option of a feature that is not built yet, and harmless without that feature
(apply_hadamard without FP8). A Later key requests such a feature, unless its value switches it off. A Fixed key has one
supported value, and any other is an error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from erniekit.config.schema_qat import QAT_COMPUTE_TYPES
from erniekit.config.values import Scalar, plain, to_bool, to_float

RUN = ("train", "eval", "chat", "server")
EVERY = ("train", "eval", "chat", "server", "export", "split")
DATA = ("train", "eval")
WRITE = ("export", "split")


@dataclass(frozen=True)
class Alias:
    """Another name of the key `to`.

    `convert` returns (value, rank), or None when the value sets nothing. The key itself has rank 0, and the lowest rank
    wins; two values of the same rank must not contradict each other. `without_effect` returns a text that names the
    parts of the value that have no effect here, with the reason. `remark` is a note about the two names for the user.
    """

    to: str
    convert: Callable[[Any], tuple[Any, int] | None] = lambda value: (value, 0)
    without_effect: Callable[[Any], str] = lambda value: ""
    remark: str = ""


@dataclass(frozen=True)
class NoEffect:
    """A key that is accepted without an effect; `why` is the reason that the user reads."""

    why: str


@dataclass(frozen=True)
class Detail:
    """An option of the feature `of`, which this version does not have; without that feature it has no effect."""

    of: str


@dataclass(frozen=True)
class Later:
    """A key that requests `feature`, which this version does not have, unless its value is null, off or one of `safe`.

    commands: the commands for which the feature matters. otherwise: why a value that does not request the feature has
    no effect; empty where that is obvious.
    """

    feature: str
    safe: tuple[Any, ...] = ()
    commands: tuple[str, ...] = RUN
    otherwise: str = ""

    def is_unsupported(self, value: Any) -> bool:
        """Whether `value` requests the feature."""
        return _plain(value) not in (None, "", 0, False, [], {}, *self.safe)


@dataclass(frozen=True)
class Fixed:
    """A key that supports the values `only`, null and empty; `why` tells the user what to do about any other value."""

    only: tuple[Any, ...]
    why: str

    def is_unsupported(self, value: Any) -> bool:
        """Whether `value` is one that is not supported."""
        value = plain(value)
        if isinstance(value, str):
            value = value.lower()
        return value not in (None, "", [], {}, *self.only)


Rule = Alias | NoEffect | Detail | Later | Fixed


def negated(value: Any) -> tuple[Any, int]:
    """from_scratch: 1 means continue_training: False."""
    return not to_bool(value), 0


def lora_flag(value: Any) -> tuple[Any, int] | None:
    """lora: True means fine_tuning: LoRA; False sets nothing (fine_tuning decides)."""
    return ("LoRA", 0) if to_bool(value) else None


def weak(value: Any) -> tuple[Any, int]:
    """Returns the value with a rank that the key itself overrides."""
    return value, 1


def weaker(value: Any) -> tuple[Any, int]:
    """Returns the value with a rank that the key itself and a weak alias override."""
    return value, 2


def bf16_flag(value: Any) -> tuple[Any, int]:
    """bf16: True means compute_type: bf16 and False means fp32, unless compute_type is given: in ERNIEKit, bf16 only
    switches mixed precision on, and compute_type sets the precision of the stored weights.
    """
    return ("bf16" if to_bool(value) else "fp32"), 1


def fp16_flag(value: Any) -> tuple[Any, int] | None:
    """fp16: True means compute_type: fp16; fp16: False sets nothing."""
    return ("fp16", 0) if to_bool(value) else None


def lowprecision_moment(value: Any) -> tuple[Any, int] | None:
    """use_lowprecision_moment: True means moment_dtype: bf16, unless that is given; False sets nothing."""
    return ("bf16", 1) if to_bool(value) else None


_QUANTISATIONS = {
    "weight_only_int8": "wint8",
    "weight_only_int4": "wint4",
    "weight_only_mix": "wint4/8",
    "fp8linear": "fp8",
    "a8w8linear": "w8a8",
    "a8w4linear": "w4a8",
} | {name: name for name in ("wint8", "wint4", "wint4/8", "nf4")}
# What can be said of the base in a run: the values of compute_type that quantise it.
QUANTISED_TYPES = frozenset(_QUANTISATIONS.values()) - QAT_COMPUTE_TYPES.keys()


def quantisation(value: Any) -> tuple[Any, int] | None:
    """The quantisation of the base as a compute_type. It overrides compute_type, which names the products' type."""
    if not isinstance(value, str) or value not in _QUANTISATIONS:
        raise ValueError(f"expected one of {', '.join(_QUANTISATIONS)}, got {plain(value)!r}")
    return _QUANTISATIONS[value], -1


def fp8_flag(value: Any) -> tuple[Any, int] | None:
    """use_fp8_mlp: True means fp8: blockwise; False sets nothing."""
    return ("blockwise", 1) if to_bool(value) else None


def fp8_shared(value: Any) -> tuple[Any, int] | None:
    """shared_expert: True adds the shared experts to what multiplies in FP8."""
    return (["experts", "shared_experts"], 1) if to_bool(value) else None


def layers_or_none(value: Any) -> tuple[Any, int]:
    """recompute_fwd_gate_up: numbers of layers, or False for none of them."""
    switch = plain(value)
    if switch is True:
        raise ValueError("True is every layer there; list the numbers of the layers, such as [4, 5, 6]")
    return ([] if switch is False else value), 0


def unless_zero(value: Any) -> tuple[Any, int] | None:
    """Returns a coefficient, or None for 0, which switches it off."""
    return None if to_float(value) == 0.0 else (value, 0)


def async_save(value: Any) -> tuple[Any, int] | None:
    """use_async_save, if async_save is among the words of unified_checkpoint_config; no other word has an effect."""
    return (True, 1) if "async_save" in _words(value) else None


def other_words(value: Any) -> str:
    """A note on the other words of unified_checkpoint_config, which have no effect."""
    rest = [word for word in _words(value) if word != "async_save"]
    return f"{', '.join(rest)}: checkpoints are always whole tensors in safetensors" if rest else ""


def _words(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [str(word) for word, wanted in value.items() if wanted]
    return [str(v) for v in value] if isinstance(value, list) else str(value or "").replace(",", " ").split()


def is_given(value: Any) -> tuple[Any, int]:
    """A choice of what to recompute in a block that is recomputed as a whole: any choice switches recomputation on."""
    return bool(_plain(value)), 0


_CALLS = "FunctionCallSFTReader"


def reader_of_calls(value: Any) -> tuple[Any, int] | None:
    """dataset_name: ERNIEKit's reader of function calls, whose texts without pictures are of type messages."""
    return ("messages", 1) if value == _CALLS else None


def other_reader(value: Any) -> str:
    """A note on ERNIEKit's other readers."""
    return "" if value == _CALLS else f"{plain(value)}: a record's own fields say whether it has tools"


def every_module(value: Any) -> tuple[Any, int]:
    """PEFT's all-linear and LLaMA-Factory's all mean the same as giving no names."""
    return ([] if str(value).strip().lower() in ("all", "all-linear") else value), 0


def truncation(value: Any) -> tuple[Any, int]:
    """PaddleFormers' truncation_strategy: its delete is our drop."""
    return ("drop" if str(value).lower() == "delete" else value), 0


def _plain(value: Any) -> Any:
    """Converts a text that means null, a truth value or a number; returns any other value unchanged."""
    if isinstance(value, str | Scalar):
        text = str(value).strip().lower()
        if text in ("", "none", "null"):
            return None
        try:
            return to_bool(text)
        except ValueError:
            pass
        try:
            number = to_float(text)
        except ValueError:
            return text
        return int(number) if number == math.floor(number) else number
    return value
