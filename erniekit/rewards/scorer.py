"""Scores completions by the configured functions, in processes with time limits."""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.config.methods import option_names
from erniekit.config.schema import Config
from erniekit.config.schema_rewards import RIGHT_OR_WRONG, RewardArgs, reward_names, reward_problems
from erniekit.rewards.code import limits_of
from erniekit.rewards.domains import DomainStatistics
from erniekit.rewards.judge import Judge
from erniekit.rewards.sample import Sample, ScoreTable
from erniekit.rewards.sandbox import problem_of
from erniekit.rewards.table import BUILTINS
from erniekit.rewards.workers import Chunk, Result, Step, Workers, checked
from erniekit.utils import log
from erniekit.utils.errors import ConfigError, DataError, TrainError
from erniekit.utils.wording import count_of

_SHOWN_FAILURES = 3  # of each function; the others are only counted
GIVEN = ("reward_model",)  # functions that the caller gives, since they need the engine
GivenFunction = Callable[[Sequence[Sample]], np.ndarray]


class Scorer:
    """The reward functions of a run. It keeps processes: call `close`, or use it as a context.

    names: of the functions, as in tables and logs. weights: float64, one each.
    """

    def __init__(
        self,
        cfg: RewardArgs,
        base_dir: Path | None = None,
        given: Mapping[str, GivenFunction] | None = None,
    ) -> None:
        """`base_dir`: what paths of the user's functions are relative to; None: the working directory. `given`: the
        functions of GIVEN that the configuration names; they return float64 [N], NaN for no reward.

        Raises ConfigError for unknown names, files that cannot be imported, packages that are not installed, and a
        wrong number of weights.
        """
        problems = list(reward_problems(cfg))
        if problems:
            raise ConfigError("; ".join(problems), problems)
        self._cfg = cfg
        self.names = reward_names(cfg.reward_funcs)
        self.weights = np.array(cfg.reward_weights or [1.0] * len(self.names))
        self._right = next((name for name in self.names if name in RIGHT_OR_WRONG), None)
        self._given = {name: (given or {})[name] for name in self.names if name in GIVEN}
        self._domains = DomainStatistics()
        self._shown: Counter[str] = Counter()
        self.begin_rollout()
        self._in_workers = [name for name in self.names if name not in (*GIVEN, "judge")]
        _check_packages(self.names)
        if "code" in self.names:
            _check_sandbox(cfg)
        self._judge = Judge(cfg) if "judge" in self.names else None
        self._workers = Workers(_reward_args(cfg), base_dir or Path.cwd()) if self._in_workers else None

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def check(self, fields: Mapping[str, Any], place: str) -> None:
        """Check that a record has what the functions need, in a form that they can read; call it for every record
        before training.

        Raises DataError with `place` ("file:line") and what is missing or wrong.
        """
        wanted = self._wanted(fields, place)
        for name in wanted:
            builtin = BUILTINS.get(name)
            needed = builtin.fields if builtin else self._workers.fields.get(name, ()) if self._workers else ()
            if builtin and builtin.reads_answer:
                needed = (self._cfg.answer_key, *needed)
            empty: tuple[object, ...] = (None, "") if builtin and builtin.may_be_empty else (None, "", [])
            missing = [field for field in needed if fields.get(field) in empty]
            if missing:
                raise _lacking(place, name, missing, self._cfg.answer_key)
            try:
                if builtin is not None:
                    builtin.check(Sample([], "", (), fields, place), self._cfg)
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError(
                    f"{place}: the reward {name} cannot read the record: {str(error)[:300]}. Correct it, or leave the "
                    "function out of reward_funcs (a field 'reward_funcs' of a record names those that score it)"
                ) from None

    def begin_rollout(self) -> None:
        """Begin the completions over which failures are counted and logged numbers averaged: those of a rollout are
        scored in several calls where dynamic_sample draws further prompts.
        """
        self._num_scored = 0
        self._num_failed: Counter[str] = Counter()
        self._logged: dict[str, list[float]] = {}

    def score(self, samples: Sequence[Sample], step: int = 0) -> ScoreTable:
        """The rewards of N completions; those of one prompt must be neighbours.

        step: the optimizer step, for the user's functions. Raises TrainError for a failure with reward_on_failure:
        stop, or too many failures of a function since begin_rollout.
        """
        values = {name: np.full(len(samples), np.nan) for name in self.names}
        failures: Counter[str] = Counter()
        extras: dict[str, list[Any]] = {}
        for result in self._results(samples, step):
            for number, value in zip(result.numbers, result.values, strict=True):
                if isinstance(value, str):
                    failures[result.name] += 1
                    value = self._failed(result.name, samples[number].place, value)
                values[result.name][number] = np.nan if value is None else value
            _collect(result, len(samples), self._logged, extras)
        self._num_scored += len(samples)
        self._num_failed.update(failures)
        self._limit_failures()
        return ScoreTable(
            values,
            self._totals(values, samples),
            values[self._right] if self._right else None,
            dict(failures),
            {name: float(np.mean(sorted(numbers))) for name, numbers in sorted(self._logged.items())} | self._usage(),
            extras,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the statistics of domains, as plain JSON values."""
        return {"domains": self._domains.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a saved scorer."""
        self._domains.load_state_dict(state["domains"])

    def close(self) -> None:
        """End all processes."""
        if self._workers:
            self._workers.close()
        if self._judge:
            self._judge.close()

    def _results(self, samples: Sequence[Sample], step: int) -> Iterator[Result]:
        """The results of all functions; the judge works while the processes do."""
        asked = {}
        if self._judge:
            judged = [i for i, sample in enumerate(samples) if "judge" in self._wanted(sample.fields, sample.place)]
            asked = dict(zip(judged, self._judge.ask([samples[i] for i in judged]), strict=True))
        if self._workers:
            yield from self._workers.run(self._chunks(samples), step)
        for name, function in self._given.items():
            chosen = [i for i, sample in enumerate(samples) if name in self._wanted(sample.fields, sample.place)]
            found = function([samples[i] for i in chosen])
            assert found.shape == (len(chosen),), (name, found.shape)
            values = [checked(None if math.isnan(value) else value) for value in found.tolist()]
            yield Result(name, tuple(chosen), values)
        for number, future in asked.items():
            yield Result("judge", (number,), [future.result()])

    def _usage(self) -> dict[str, float]:
        """What the judge has been asked since the start of the process."""
        return (
            {f"judge/{name}": float(count) for name, count in sorted(self._judge.usage.items())} if self._judge else {}
        )

    def _wanted(self, fields: Mapping[str, Any], place: str) -> list[str]:
        """The functions that score a record: all, or those that its field `reward_funcs` names."""
        chosen = fields.get("reward_funcs")
        if chosen is None:
            return list(self.names)
        chosen = [chosen] if isinstance(chosen, str) else chosen
        unknown = [name for name in chosen if name not in self.names] if isinstance(chosen, list) else [chosen]
        if unknown:
            raise DataError(
                f"{place}: 'reward_funcs' has {unknown[0]!r}, which is none of the run's reward_funcs: "
                f"{', '.join(self.names)}"
            )
        return list(chosen)

    def _chunks(self, samples: Sequence[Sample]) -> list[Chunk]:
        """Neighbours of one prompt, with the calls for them."""
        chunks: list[Chunk] = []
        for number, sample in enumerate(samples):
            before = samples[number - 1] if number else None
            if before is None or before.place != sample.place or before.prompt != sample.prompt:
                chunks.append(Chunk([], [], deque()))
            chunks[-1].samples.append(sample)
            chunks[-1].numbers.append(number)
        for chunk in chunks:
            wanted = self._wanted(chunk.samples[0].fields, chunk.samples[0].place)
            places = range(len(chunk.samples))
            for name in (name for name in self._in_workers if name in wanted):
                alone = name in BUILTINS
                chunk.steps.extend([Step(name, (i,)) for i in places] if alone else [Step(name, tuple(places))])
        return chunks

    def _failed(self, name: str, place: str, why: str) -> float | None:
        text = f"reward {name}: {place}: {why}"
        if self._cfg.reward_on_failure == "stop":
            raise TrainError(f"{text} (reward_on_failure: stop). Correct the function or the record")
        self._shown[name] += 1
        if self._shown[name] <= _SHOWN_FAILURES:
            given = "its reward is 0" if self._cfg.reward_on_failure == "zero" else "it has no reward from it"
            more = " (further ones are only counted)" if self._shown[name] == _SHOWN_FAILURES else ""
            log.warning(f"{text}; {given}{more}")
        return 0.0 if self._cfg.reward_on_failure == "zero" else None

    def _limit_failures(self) -> None:
        for name, count in self._num_failed.items():
            if count > self._cfg.reward_max_failures * self._num_scored:
                raise TrainError(
                    f"reward {name}: failed for {count} of {count_of(self._num_scored, 'completion')}, more than "
                    f"reward_max_failures: {self._cfg.reward_max_failures:g}. Correct the function or the records (see "
                    "the warnings above), or raise reward_max_failures"
                )

    def _totals(self, values: dict[str, np.ndarray], samples: Sequence[Sample]) -> np.ndarray:
        table_NK = np.stack([values[name] for name in self.names], axis=1)
        is_given = ~np.isnan(table_NK)
        total = np.where(is_given.any(axis=1), np.where(is_given, table_NK, 0.0) @ self.weights, np.nan)
        if self._cfg.domain_normalize:
            total = self._domains.scaled([str(sample.fields.get("domain") or "") for sample in samples], total)
        return total


def _collect(result: Result, num_samples: int, logged: dict[str, list[float]], extras: dict[str, list[Any]]) -> None:
    """Add what the user's functions logged."""
    for name, numbers in result.logged.metrics.items():
        logged.setdefault(name, []).extend(numbers)
    for name, column in result.logged.extras.items():
        rows = extras.setdefault(name, [None] * num_samples)
        for number, value in zip(result.numbers, column, strict=False):
            rows[number] = value


def _lacking(place: str, name: str, fields: Sequence[str], answer_key: str) -> DataError:
    """The error of a record without fields that a function needs."""
    keys = ", ".join(repr(field) for field in fields)
    is_answer = name in BUILTINS and answer_key in fields  # functions of the user's name their fields themselves
    other = "name the field of the right answer (answer_key), " if is_answer else ""
    return DataError(
        f"{place}: the record has no {keys}, which the reward {name} needs. Add it, {other}or leave the function out "
        "of reward_funcs"
    )


def _check_packages(names: Sequence[str]) -> None:
    for name in names:
        missing = [package for package in BUILTINS[name].packages if not find_spec(package)] if name in BUILTINS else []
        if missing:
            raise ConfigError(
                f"reward_funcs: {name} needs {' and '.join(missing)}, not installed here: pip install 'erniekit[rl]'"
            )


def _check_sandbox(cfg: RewardArgs) -> None:
    problem = problem_of(limits_of(cfg))
    if problem:
        more = "" if cfg.code_network else ". If it may have the network, set code_network: true"
        raise ConfigError(f"code_sandbox: programs cannot be run here: {problem}{more}")
    log.warning(
        "code_sandbox: subprocess: programs that the model writes are run on this machine, with limits "
        f"({cfg.code_time_limit:g} s, {cfg.code_memory_mb} MB) that are no protection against attacks (docs/rewards.md)"
        + (", and with its network" if cfg.code_network else "")
    )


def _reward_args(cfg: RewardArgs) -> RewardArgs:
    """The keys about rewards alone, for the worker processes."""
    if not isinstance(cfg, Config):
        return cfg
    return RewardArgs(**{name: vars(cfg)[name] for name in option_names(RewardArgs)})
