"""Names that ERNIEKit and its relatives use and that have no field here: what each one means for us.

Five kinds of rule. An Alias is another name of a key. NoEffect is accepted and named at start-up with the reason.
Detail belongs to a feature that is not built yet and is harmless by itself (apply_hadamard without FP8). Later asks for
such a feature, unless its value asks for nothing. Fixed has one value here, and any other is a mistake.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from erniekit.config.values import Scalar, plain, to_bool, to_float

RUN = ("train", "eval", "chat")
EVERY = ("train", "eval", "chat", "export", "split")
DATA = ("train", "eval")
WRITE = ("export", "split")


@dataclass(frozen=True)
class Alias:
    """Another name of the key `to`.

    `convert` gives (value, rank), or None when the value says nothing. Rank 0 is as good as the key itself and may not
    contradict it; a higher rank gives way to a lower one, the key itself to a negative one. `without_effect`: what of
    the value does nothing here and why, as text. `remark`: what a user should know about the two names.
    """

    to: str
    convert: Callable[[Any], tuple[Any, int] | None] = lambda value: (value, 0)
    without_effect: Callable[[Any], str] = lambda value: ""
    remark: str = ""


@dataclass(frozen=True)
class NoEffect:
    """Accepted; `why` says in plain words why it does nothing here."""

    why: str


@dataclass(frozen=True)
class Detail:
    """Read only once `of` is asked for, which this version cannot do yet."""

    of: str


@dataclass(frozen=True)
class Later:
    """Asks for `feature`, which this version does not have, unless the value is null, off, or one of `safe`.

    commands: the commands that the feature matters to. otherwise: why a value that does not ask for it, but is given,
    has no effect; empty where that goes without saying.
    """

    feature: str
    safe: tuple[Any, ...] = ()
    commands: tuple[str, ...] = RUN
    otherwise: str = ""

    def asks(self, value: Any) -> bool:
        """Whether `value` wants the feature."""
        return _plain(value) not in (None, "", 0, False, [], {}, *self.safe)


@dataclass(frozen=True)
class Fixed:
    """A setting that has one value here: `only`, or null, or nothing (empty); `why` says what to do about another."""

    only: tuple[Any, ...]
    why: str

    def asks(self, value: Any) -> bool:
        """Whether a value asks for something else."""
        value = plain(value)
        if isinstance(value, str):
            value = value.lower()
        return value not in (None, "", [], {}, *self.only)


Rule = Alias | NoEffect | Detail | Later | Fixed


def negated(value: Any) -> tuple[Any, int]:
    """from_scratch: 1 means continue_training: False."""
    return not to_bool(value), 0


def lora_flag(value: Any) -> tuple[Any, int] | None:
    """lora: True means fine_tuning: LoRA; False says nothing (fine_tuning does)."""
    return ("LoRA", 0) if to_bool(value) else None


def weak(value: Any) -> tuple[Any, int]:
    """A value that gives way to the key itself."""
    return value, 1


def weaker(value: Any) -> tuple[Any, int]:
    """A value that gives way to the key itself and to a weak one."""
    return value, 2


def bf16_flag(value: Any) -> tuple[Any, int]:
    """bf16: True is compute_type: bf16 and False is fp32, if nothing else says better: upstream it only switches mixed
    precision on, and compute_type says in how many bits the weights are held.
    """
    return ("bf16" if to_bool(value) else "fp32"), 1


def fp16_flag(value: Any) -> tuple[Any, int] | None:
    """fp16: True is compute_type: fp16; fp16: False says nothing."""
    return ("fp16", 0) if to_bool(value) else None


_QUANTISATIONS = {
    "weight_only_int8": "wint8",
    "weight_only_int4": "wint4",
    "weight_only_mix": "wint4/8",
    "fp8linear": "fp8",
} | {name: name for name in ("wint8", "wint4", "wint4/8", "nf4")}


def quantisation(value: Any) -> tuple[Any, int] | None:
    """How a base is quantised says more than the bf16 of its products: it decides over the key itself."""
    if not isinstance(value, str) or value not in _QUANTISATIONS:
        raise ValueError(f"expected one of {', '.join(_QUANTISATIONS)}, got {plain(value)!r}")
    return _QUANTISATIONS[value], -1


def unless_zero(value: Any) -> tuple[Any, int] | None:
    """A coefficient whose 0 means off."""
    return None if to_float(value) == 0.0 else (value, 0)


def async_save(value: Any) -> tuple[Any, int] | None:
    """The one word of unified_checkpoint_config that asks for something here."""
    return (True, 1) if "async_save" in _words(value) else None


def other_words(value: Any) -> str:
    """What the other words of unified_checkpoint_config do."""
    rest = [word for word in _words(value) if word != "async_save"]
    return f"{', '.join(rest)}: checkpoints are always whole tensors in safetensors" if rest else ""


def _words(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [str(word) for word, wanted in value.items() if wanted]
    return [str(v) for v in value] if isinstance(value, list) else str(value or "").replace(",", " ").split()


def is_given(value: Any) -> tuple[Any, int]:
    """A choice of what is recomputed, where there is only recomputed or not."""
    return bool(_plain(value)), 0


def every_module(value: Any) -> tuple[Any, int] | None:
    """PEFT's all-linear and LLaMA-Factory's all are what is adapted when no names are given."""
    return None if str(value).strip().lower() in ("all", "all-linear") else (value, 0)


def truncation(value: Any) -> tuple[Any, int]:
    """PaddleFormers' truncation_strategy: delete is our drop."""
    return ("drop" if str(value).lower() == "delete" else value), 0


def _plain(value: Any) -> Any:
    """Text that stands for nothing, a switch or a number, as that; all else as it is."""
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
