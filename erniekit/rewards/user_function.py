"""The user's own reward functions, `path.py:name`, called as TRL's GRPOTrainer calls them."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from erniekit.rewards.sample import Sample
from erniekit.utils.wording import count_of

# What a function may take beside the fields of the records.
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


@dataclass
class Logged:
    """What a function logged in one call: numbers by name, and lists with a value for each completion."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)


class UserFunction:
    """A function of the user's file, with TRL's signature.

    It is called with keyword arguments for all completions of one prompt: `prompts` and `completions`, lists of lists
    of messages; `completion_ids`, lists of token ids; a list for each field of the records; `trainer_state` with
    global_step; `log_extra(name, values)` and `log_metric(name, value)`. Only what it declares is passed, unless it
    takes **kwargs. It returns a number or None for each completion, and may be a coroutine.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self._function = _load(path, name)
        parameters = inspect.signature(self._function).parameters.values()
        self._takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._takes = {parameter.name for parameter in named}
        # The fields without which a call is impossible.
        self.fields = tuple(p.name for p in named if p.default is p.empty and p.name not in _GIVEN)

    def __call__(self, samples: Sequence[Sample], step: int) -> tuple[list[Any], Logged]:
        """The values that it returns for completions of one prompt, one each, and what it logged. Raises ValueError if
        it does not return a list of this length.
        """
        logged = Logged()
        result = self._function(**self._arguments(samples, step, logged))
        if inspect.isawaitable(result):
            import asyncio  # a tenth of a second of every worker's start

            result = asyncio.run(_awaited(result))
        return _as_list(result, len(samples)), logged

    def _arguments(self, samples: Sequence[Sample], step: int, logged: Logged) -> dict[str, Any]:
        names = dict.fromkeys(name for sample in samples for name in sample.fields)
        arguments: dict[str, Any] = {name: [sample.fields.get(name) for sample in samples] for name in names}
        arguments |= {
            "prompts": [sample.prompt for sample in samples],
            "completions": [sample.messages for sample in samples],
            "completion_ids": [list(sample.completion_ids) for sample in samples],
            "trainer_state": SimpleNamespace(global_step=step),
            "log_extra": lambda name, values: logged.extras.update({str(name): _column(name, values, len(samples))}),
            "log_metric": lambda name, value: logged.metrics.setdefault(str(name), []).append(float(value)),
        }
        return {name: value for name, value in arguments.items() if self._takes_all or name in self._takes}


def _as_list(result: Any, count: int) -> list[Any]:
    is_list = isinstance(result, Sequence) and not isinstance(result, str | bytes)
    if not is_list and not _is_array(result):
        raise ValueError(f"it returned {type(result).__name__}, not a list with a number for each completion")
    if len(result) != count:
        raise ValueError(f"it returned {count_of(len(result), 'value')} for {count_of(count, 'completion')}")
    return list(result)


def _column(name: Any, values: Any, count: int) -> list[Any]:
    column = [_plain(value) for value in values]
    if len(column) != count:
        raise ValueError(
            f"log_extra({str(name)!r}) got {count_of(len(column), 'value')} for {count_of(count, 'completion')}"
        )
    return column


def _plain(value: Any) -> Any:
    """The value in one of Python's own types, since the trainer's process does not know the classes of the user's file:
    an enumeration's content, a number of any library, otherwise a text.
    """
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    kind = next((kind for kind in (int, float) if isinstance(value, kind)), None)
    return kind(value) if kind else str.__str__(value) if isinstance(value, str) else str(value)


async def _awaited(result: Any) -> Any:
    return await result


def _is_array(value: Any) -> bool:
    """Whether it is an array of one dimension, of numpy or of any library that names its shape so."""
    try:
        return len(value.shape) == 1
    except (AttributeError, TypeError):
        return False


def _load(path: Path, name: str) -> Callable[..., Any]:
    """The function of a file. The file's directory is searched last for what it imports. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    function = vars(module).get(name)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise ValueError(f"there is no function {name} in {path}; it has {', '.join(known) or 'none'}")
    return function
