"""Which prompts a rollout draws: by their pass rates, which are kept over the whole run, and in stages.

The technical report of ERNIE 4.5 names dynamic difficulty sampling and progressive stages, and leaves their rules open.
Those here are ours. Groups without variance are replaced as in DAPO (Yu et al. 2025, arXiv 2503.14476, section 3.2).

Everything is a function of the seed and of what was observed: randomness is counter-based (data/sampler.py), so that a
resumed run draws the prompts that an uninterrupted one would have drawn.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from erniekit.config.schema_curriculum import CurriculumArgs
from erniekit.data.sampler import permutation, random_bits
from erniekit.utils import log
from erniekit.utils.errors import DataError
from erniekit.utils.wording import count_of

_UNKNOWN = 0.5  # the pass rate of a prompt that nobody has seen: the one with the largest variance
_MAX_DOUBLINGS = 10
# Groups of equal rewards, over all prompts, that end a run without dynamic_sample: few may be so by chance. With
# dynamic_sample each rollout has drawn other prompts already.
_ENOUGH_GROUPS = 32
_WEIGHTED = 1  # the number that tells weighted draws from the orders of epochs in the keys of random numbers


@dataclass
class PromptRecord:
    """What is known of a prompt. pass_rate: the exponential mean of its groups' shares of right completions; None: no
    group had one. num_groups: groups that were scored. back_at: the rollout from which on it is drawn again.
    num_pauses: pauses in a row. has_taught: whether a group of it ever had variance.
    """

    pass_rate: float | None = None
    num_groups: int = 0
    back_at: int = 0
    num_pauses: int = 0
    has_taught: bool = False


class PromptSampler:
    """Draws prompts, numbered from 0 over all data sets, and keeps what is known of each.

    sizes: the number of prompts of each data set. pass_rates: what the data say of prompts beforehand, by number.

    A prompt is drawn at most once in a rollout as long as there are others. Without difficulty_weighting every stage
    reads its prompts in shuffled epochs, without those that pause; with it each draw takes a prompt with its weight.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        args: CurriculumArgs,
        seed: int,
        pass_rates: Mapping[int, float] | None = None,
    ) -> None:
        assert not args.rl_stages or len(args.rl_stages) == len(sizes), (args.rl_stages, sizes)
        self._args, self._seed = args, seed
        stage_of_set = args.rl_stages or [1] * len(sizes)
        self._stage_of = np.repeat(np.array(stage_of_set, np.int64) - 1, sizes)
        self._records: dict[int, PromptRecord] = {
            index: PromptRecord(pass_rate=float(rate)) for index, rate in (pass_rates or {}).items()
        }
        self._rollout = 0
        self._stage = 0
        self._epoch, self._cursor, self._draws = 0, 0, 0
        self._drawn: set[int] = set()  # in this rollout
        self._has_warned = False
        self._order: tuple[tuple[int, int], np.ndarray] | None = None  # (stage, epoch) and its order

    @property
    def current_stage(self) -> int:
        """The number of the stage, from 1 on."""
        return self._stage + 1

    def begin_rollout(self, step: int) -> None:
        """Begin the rollout whose first optimizer step is `step` (from 0): another stage may begin with it."""
        self._rollout += 1
        self._drawn.clear()
        ends = np.cumsum(self._args.rl_stage_steps)
        stage = int(np.searchsorted(ends, step, side="right"))
        if stage != self._stage:
            self._stage, self._epoch, self._cursor = stage, 0, 0
            log.info(
                f"rl_stages: stage {stage + 1} begins at step {step} with {count_of(len(self._members()), 'prompt')}"
            )

    def next(self, count: int) -> list[int]:
        """The next `count` prompts. Fewer prompts than that in the stage are repeated."""
        drawn: list[int] = []
        while len(drawn) < count:
            available = self._available()
            wanted = count - len(drawn)
            chosen = (
                self._weighted(available, wanted)
                if self._args.difficulty_weighting == "variance"
                else self._in_order(available, wanted)
            )
            drawn += chosen
            self._drawn.update(chosen)
        return drawn

    def observe(self, index: int, pass_rate: float | None, has_variance: bool) -> None:
        """Add what a group of prompt `index` was: its share of right completions in [0, 1] (None: no function gives
        one), and whether its rewards differ.
        """
        record = self._records.setdefault(index, PromptRecord())
        record.num_groups += 1
        record.has_taught |= has_variance
        if pass_rate is not None:
            known, momentum = record.pass_rate, self._args.difficulty_momentum
            record.pass_rate = pass_rate if known is None else momentum * known + (1 - momentum) * pass_rate
        if not self._args.dynamic_sample:
            return
        if self.teaches(pass_rate, has_variance):
            record.num_pauses = 0
            return
        rollouts = self._args.difficulty_pause * 2 ** min(record.num_pauses, _MAX_DOUBLINGS)
        record.num_pauses += 1
        record.back_at = self._rollout + 1 + rollouts

    def teaches(self, pass_rate: float | None, has_variance: bool) -> bool:
        """Whether a group gives a gradient: its rewards differ, and its share of right completions is neither too low
        nor too high.
        """
        if pass_rate is None:
            return has_variance
        return has_variance and self._args.difficulty_low < pass_rate < self._args.difficulty_high

    def require_signal(self, min_groups: int = 1) -> None:
        """Raise DataError if every prompt of the stage was seen, in at least `min_groups` groups together, and none has
        ever had completions of different reward: then there is nothing to learn from these data.
        """
        members = self._members()
        records = [self._records.get(index, PromptRecord()) for index in members.tolist()]
        counts = [record.num_groups for record in records]
        if not all(counts) or sum(counts) < min_groups or any(record.has_taught for record in records):
            return
        rates = [record.pass_rate for record in records if record.pass_rate is not None]
        right, wrong = sum(rate >= 1 for rate in rates), sum(rate <= 0 for rate in rates)
        raise DataError(
            f"of {count_of(len(members), 'prompt')}{self._of_stage()}, all answered, {right} were always right and "
            f"{wrong} always wrong, and in no group did the rewards differ: there is nothing to learn. Hint: give "
            "prompts that the model answers correctly now and then, raise num_generations or temperature, or check "
            "reward_funcs and the answers."
        )

    def warns_of_padding(self) -> bool:
        """Whether this is the first rollout that is filled with groups that teach nothing."""
        first, self._has_warned = not self._has_warned, True
        return first

    def metrics(self) -> dict[str, float]:
        """Numbers about the stage: "difficulty/stage", "difficulty/epoch" (without weights), shares of its prompts that
        were seen, that pause, and whose pass rate is not above difficulty_low or not below difficulty_high, and the
        mean pass rate of those that have one.
        """
        members = self._members()
        records = [self._records.get(index, PromptRecord()) for index in members.tolist()]
        rates = np.array([record.pass_rate for record in records if record.pass_rate is not None], np.float64)
        args, count = self._args, len(members)
        result = {
            "difficulty/stage": float(self.current_stage),
            "difficulty/seen": sum(record.num_groups > 0 for record in records) / count,
            "difficulty/pausing": sum(record.back_at > self._rollout for record in records) / count,
        }
        if args.difficulty_weighting == "none":
            result["difficulty/epoch"] = self._epoch + self._cursor / count
        if len(rates):
            result["difficulty/pass_rate"] = float(rates.mean())
            result["difficulty/too_hard"] = float((rates <= args.difficulty_low).sum() / count)
            result["difficulty/too_easy"] = float((rates >= args.difficulty_high).sum() / count)
        return result

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {
            "rollout": self._rollout,
            "stage": self._stage,
            "epoch": self._epoch,
            "cursor": self._cursor,
            "draws": self._draws,
            "drawn": sorted(self._drawn),
            "prompts": {str(index): list(asdict(record).values()) for index, record in sorted(self._records.items())},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that state_dict() gave for the same prompts."""
        self._rollout, self._stage = state["rollout"], state["stage"]
        self._epoch, self._cursor, self._draws = state["epoch"], state["cursor"], state["draws"]
        self._drawn = set(state["drawn"])
        self._records = {int(index): PromptRecord(*values) for index, values in state["prompts"].items()}

    def _of_stage(self) -> str:
        return f" of stage {self.current_stage}" if self._args.rl_stages else ""

    def _members(self) -> np.ndarray:
        """The numbers of the prompts of the stage, ascending."""
        return np.flatnonzero(self._stage_of == self._stage)

    def _available(self) -> np.ndarray:
        """The prompts that may be drawn now, bool [number of prompts]: those of the stage that neither pause nor were
        drawn in this rollout. If there is none, those that pause, the ones that return first; and if there is none
        either, all again.
        """
        members = self._members()
        result = np.zeros(len(self._stage_of), bool)
        back_at = np.array([self._back_at(index) for index in members.tolist()])
        drawn = np.isin(members, np.fromiter(self._drawn, np.int64, len(self._drawn)))
        if drawn.all():
            self._drawn -= set(members.tolist())
            drawn[:] = False
        first_back = max(self._rollout, int(back_at[~drawn].min()))
        result[members[~drawn & (back_at <= first_back)]] = True
        return result

    def _back_at(self, index: int) -> int:
        record = self._records.get(index)
        return 0 if record is None else record.back_at

    def _in_order(self, available: np.ndarray, count: int) -> list[int]:
        """Up to `count` available prompts in the order of the epoch, which ends when its last prompt was reached."""
        chosen: list[int] = []
        order = self._epoch_order()
        while len(chosen) < count and self._cursor < len(order):
            index = int(order[self._cursor])
            self._cursor += 1
            if available[index]:
                chosen.append(index)
        if self._cursor == len(order):
            self._epoch, self._cursor = self._epoch + 1, 0
        return chosen

    def _epoch_order(self) -> np.ndarray:
        key = (self._stage, self._epoch)
        if self._order is None or self._order[0] != key:
            members = self._members()
            self._order = key, members[permutation(len(members), (self._seed, *key))]
        return self._order[1]

    def _weighted(self, available: np.ndarray, count: int) -> list[int]:
        """Up to `count` available prompts, drawn with their weights and without replacement: those with the largest
        u^(1/w), u uniform (Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir").
        """
        candidates = np.flatnonzero(available)
        self._draws += 1
        bits = random_bits((self._seed, _WEIGHTED, self._draws), 0, len(available))[candidates]
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        keys = np.log(uniform) / self.weights(candidates)
        return candidates[np.argsort(-keys, kind="stable")[:count]].tolist()

    def weights(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The weights p (1 - p) + difficulty_floor of prompts, float64."""
        records = [self._records.get(int(index)) for index in indices]
        rates = [_UNKNOWN if record is None or record.pass_rate is None else record.pass_rate for record in records]
        p = np.clip(np.array(rates, np.float64), 0.0, 1.0)
        return p * (1 - p) + self._args.difficulty_floor


Group = TypeVar("Group")


@dataclass(frozen=True)
class Outcome(Generic[Group]):
    """A scored group of completions of prompt `index`; pass_rate and has_variance as in PromptSampler.observe."""

    index: int
    pass_rate: float | None
    has_variance: bool
    group: Group


@dataclass(frozen=True)
class Filled(Generic[Group]):
    """The groups of a rollout in the order in which they are trained on. Without dynamic_sample, they are all that were
    generated; with it the first `len(outcomes) - num_padded` teach.

    num_generated: groups that were generated. num_padded: groups among `outcomes` that teach nothing, since no others
    were found. num_resamples: how often other prompts were drawn.
    """

    outcomes: list[Outcome[Group]]
    num_generated: int
    num_padded: int
    num_resamples: int

    def metrics(self) -> dict[str, float]:
        """The numbers of prompts that were generated, that are used, and that fill the rollout although they teach
        nothing, and the share of generated ones that teach.
        """
        used = len(self.outcomes) - self.num_padded
        return {
            "sampling/generated_prompts": float(self.num_generated),
            "sampling/used_prompts": float(used),
            "sampling/accept_rate": used / self.num_generated,
            "sampling/padded_prompts": float(self.num_padded),
            "sampling/resamples": float(self.num_resamples),
        }


def fill_rollout(
    sampler: PromptSampler,
    args: CurriculumArgs,
    count: int,
    generate: Callable[[Sequence[int]], Sequence[Outcome[Group]]],
) -> Filled[Group]:
    """The `count` groups of a rollout, after `sampler.begin_rollout`. `generate` makes and scores the groups of given
    prompts; on several ranks, all must get the same outcomes from it.

    With dynamic_sample, as many other prompts are drawn as groups teach nothing, up to max_resample_times times. What
    is lacking then is filled with groups that teach nothing, in the order in which they were generated.
    """
    teaching: list[Outcome[Group]] = []
    others: list[Outcome[Group]] = []
    num_generated = num_draws = 0
    while len(teaching) < count and num_draws <= (args.max_resample_times if args.dynamic_sample else 0):
        outcomes = generate(sampler.next(count - len(teaching)))
        num_draws += 1
        num_generated += len(outcomes)
        for outcome in outcomes:
            sampler.observe(outcome.index, outcome.pass_rate, outcome.has_variance)
            is_used = not args.dynamic_sample or sampler.teaches(outcome.pass_rate, outcome.has_variance)
            (teaching if is_used else others).append(outcome)
    padding = others[: count - len(teaching)]
    sampler.require_signal(1 if args.dynamic_sample else _ENOUGH_GROUPS)
    if padding and sampler.warns_of_padding():
        kinds = Counter(_kind(outcome, args) for outcome in padding)
        listing = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        log.warning(
            f"dynamic_sample: {len(padding)} of {count_of(count, 'group')} without anything to learn ({listing}) after "
            f"{count_of(num_draws - 1, 'further draw')} (max_resample_times), and so without an advantage. Later "
            "rollouts only count them: sampling/padded_prompts"
        )
    return Filled(teaching + padding, num_generated, len(padding), num_draws - 1)


def _kind(outcome: Outcome[Any], args: CurriculumArgs) -> str:
    if outcome.pass_rate is None:
        return "without variance"
    if outcome.pass_rate >= args.difficulty_high:
        return "too easy"
    return "too hard" if outcome.pass_rate <= args.difficulty_low else "without variance"
