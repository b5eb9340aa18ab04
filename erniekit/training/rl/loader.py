"""The data of policy optimisation: completions that the model generates between its own steps.

A rollout draws `rollout_batch_size` prompts, generates `num_generations` completions of each, scores them, and turns
the rewards into advantages. Its completions are divided into `steps_per_generation` optimizer steps of whole groups,
and all of that is repeated `num_iterations` times; then the next rollout is made with the weights that resulted.
"""

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from erniekit.config.pointless_rl import wants_old_log_probs
from erniekit.data.loader import StepReport
from erniekit.data.packed_batch import PackedBatch
from erniekit.data.prompts import Prompt, PromptSet
from erniekit.data.record_feed import specs_of
from erniekit.losses.advantages import Scaling, advantages_of
from erniekit.models.decoder import CausalLM
from erniekit.rewards import Scorer
from erniekit.training.data import DataContext
from erniekit.training.rl.batches import BatchOptions, microbatches, min_entropy_of
from erniekit.training.rl.completions import Completion, Group, from_bytes, sample_records, to_bytes
from erniekit.training.rl.difficulty import Filled, Outcome, PromptSampler, fill_rollout
from erniekit.training.rl.expert_record import record_bytes
from erniekit.training.rl.generate import Generator, draw_number
from erniekit.training.rl.offline_pairs import OfflinePairs
from erniekit.training.rl.prompts import check_records, known_pass_rates, prompt_options, tool_loop
from erniekit.training.rl.reference import PolicyReference
from erniekit.training.rl.remote import RemoteGenerator, WeightExport, require_same_weights
from erniekit.training.rl.reward_model import reward_models
from erniekit.training.rl.rollout_metrics import length_metrics, mean, note_if_all_masked, sampled_kl, std
from erniekit.training.rl.rollout_server import RolloutServer
from erniekit.training.rl.scoring import reward_table, score_groups
from erniekit.training.rl.token_scores import TokenScorer, score_completions
from erniekit.training.rl.tools import ToolLoop
from erniekit.utils import heartbeat, log
from erniekit.utils.errors import CheckpointError, DataError
from erniekit.utils.user_files import read_bytes, read_json_object
from erniekit.utils.wording import count_of

_VERSION = 1
STATE_FILE, COMPLETIONS_FILE, PAIRS_FILE = "rollout_state.json", "rollout.npz", "rollout_pairs.npz"
OFFLINE = BatchOptions(pair_margin=0.0, is_offline=True)


@dataclass
class Rollout:
    """The completions of a rollout in the order of training, and what is reported of it. pairs: pairs of answers that
    were made in advance, as completions. logged: numbers that the user's functions named.
    """

    completions: list[Completion]
    pairs: list[Completion] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    logged: dict[str, float] = field(default_factory=dict)


class RolloutLoader:
    """Gives the microbatches of each step, and makes a rollout whenever the last one is used up (data.loader.
    StepSource). All ranks hold the same completions.

    Its position is the number of optimizer steps. Files of a checkpoint have the rest: the sampler of prompts, the
    statistics of rewards, and the completions of a rollout that is not used up.
    """

    def __init__(
        self,
        context: DataContext,
        prompts: PromptSet,
        scorer: Scorer | None,
        tools: ToolLoop | None = None,
        server: RolloutServer | None = None,
        pairs: OfflinePairs | None = None,
    ) -> None:
        """`scorer`, and the `server` of rollout_base_url: on the first rank alone. `tools`: what the model may call
        while it answers. `pairs`: answers that were made in advance.
        """
        assert context.template is not None, "prompts need a chat template"
        cfg = self._cfg = context.cfg
        self.prompts, self._scorer, self._tools, self._server = prompts, scorer, tools, server
        self._pairs = pairs
        self._mesh, self._template, self._tokenizer = context.mesh, context.template, context.tokenizer
        self._sampler = PromptSampler(prompts.sizes, cfg, cfg.seed, known_pass_rates(prompts))
        self.identity: dict[str, Any] = {
            ("content of train_dataset_path" if name == "content of the prompts" else name): value
            for name, value in prompts.identity.items()
        } | {"seed": cfg.seed, "number of prompts": len(prompts)}
        self.identity |= {} if pairs is None else pairs.identity
        self._step = 0  # optimizer steps that next_step has given
        self._rollout: Rollout | None = None
        self._report = StepReport({}, [])
        self._generator: Generator | RemoteGenerator | None = None

    def connect(
        self, model: CausalLM, reference: PolicyReference | None, sources: tuple[Path, Path] | None = None
    ) -> None:
        """Take over the model that generates, before the first step. `sources`: the directories of the model and of the
        tokenizer, which a server gets beside the weights.
        """
        self._model, self._reference = model, reference
        self._announce_experts()
        cfg, template = self._cfg, self._template
        if cfg.rollout_base_url is None:
            self._generator = Generator(cfg, model, template, self._tools)
        else:
            assert sources is not None, "a server needs whole directories"
            export = WeightExport(cfg, model, template, sources)
            self._generator = RemoteGenerator(cfg, model, template, self._server, export, self._tools)
        self._token_scorer = TokenScorer(self._cfg.temperature, self._cfg.loss_subbatch_seqlen)

    @property
    def _replays_experts(self) -> bool:
        return self._cfg.router_replay == "r3"

    @property
    def steps_per_rollout(self) -> int:
        """The optimizer steps that a rollout is used for."""
        return self._cfg.steps_per_generation * self._cfg.num_iterations

    def next_step(self) -> list[PackedBatch]:
        """This rank's microbatches of the next step. Raises DataError where the prompts teach nothing, TrainError for
        rewards that fail.
        """
        cfg, update = self._cfg, self._step % self.steps_per_rollout
        is_new = self._rollout is None
        if self._rollout is None:
            assert update == 0, "a rollout that is not used up is in the checkpoint"
            self._rollout = self._make()
        rollout = self._rollout
        part, num_parts = update % cfg.steps_per_generation, cfg.steps_per_generation
        size = len(rollout.completions) // num_parts
        completions = rollout.completions[part * size : (part + 1) * size]
        self._step += 1
        if update == self.steps_per_rollout - 1:
            self._rollout = None
        staleness = {"staleness": float(update)} if self.steps_per_rollout > 1 else {}
        self._report = StepReport(
            (rollout.metrics if is_new else {}) | staleness, *((rollout.samples, rollout.logged) if is_new else ([],))
        )
        mesh = self._mesh
        options = BatchOptions(
            cfg.mask_truncated_completions,
            cfg.upo_margin if cfg.upo_weight else None,
            replays_experts=self._replays_experts,
        )
        if cfg.top_entropy_quantile < 1:
            entropies = self._scored(completions, partial(self._token_scorer.entropies, self._model))
            least = min_entropy_of(completions, entropies, cfg.top_entropy_quantile, options)
            options = replace(options, min_entropy=least)
        where = (cfg.batch_size, mesh.data, mesh.degrees.data)
        batches = microbatches(completions, self.prompts.__getitem__, *where, options)
        if self._pairs is not None:
            pairs = rollout.pairs[2 * part * cfg.upo_offline_pairs :][: 2 * cfg.upo_offline_pairs]
            batches += microbatches(pairs, self._pairs.prompt, *where, OFFLINE)
        return batches

    def report_step(self) -> StepReport:
        """What the rollout of the last step says, if it was made for it."""
        return self._report

    # --- a rollout

    def _make(self) -> Rollout:
        cfg, started = self._cfg, time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._drawn: Counter[int] = Counter()
        self._all_rewards: list[np.ndarray] = []
        self._num_tokens = 0
        self._texts: dict[int, str] = {}
        self._failures: Counter[str] = Counter()
        with heartbeat.phase("a rollout"):
            assert self._generator is not None, "connect comes first"
            self._generator.begin_rollout(self._step)
            if cfg.rollout_base_url is not None:
                self._seconds["weights"] += time.perf_counter() - started
            self._sampler.begin_rollout(self._step)
            if self._scorer is not None:
                self._scorer.begin_rollout()
            filled = fill_rollout(self._sampler, cfg, cfg.rollout_batch_size, self._groups)
            groups = [outcome.group for outcome in filled.outcomes]
            completions = [completion for group in groups for completion in group.completions]
            for index, group in enumerate(groups):
                for completion in group.completions:
                    completion.group = index
            self._add_log_probs(completions)
            self._add_advantages(groups, filled.num_padded)
            pairs = self._drawn_pairs()
        note_if_all_masked(cfg, completions)
        metrics = self._metrics(groups, completions, filled)
        metrics["time/rollout"] = time.perf_counter() - started
        metrics |= {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        metrics["rollout/tokens_per_second"] = metrics["rollout/generated_tokens"] / max(
            self._seconds["generation"], 1e-9
        )
        samples = self._records(groups) if self._mesh.rank == 0 else []
        return Rollout(completions, pairs, metrics, samples, self._logged)

    def _groups(self, indices: Sequence[int]) -> list[Outcome[Group]]:
        """Generate and score the groups of these prompts."""
        assert self._generator is not None, "connect comes first"
        cfg = self._cfg
        prompts = [self.prompts[index] for index in indices]
        draws = []
        for index in indices:
            times = self._drawn[index]
            self._drawn[index] += 1
            draws.append([draw_number(self._step, index, times, k) for k in range(cfg.num_generations)])
        began = time.perf_counter()
        groups = self._generator(prompts, draws, range(len(indices)))
        for index, group in zip(indices, groups, strict=True):
            group.prompt = index
            for completion in group.completions:
                completion.prompt = index
        generated = time.perf_counter()
        scored = score_groups(cfg, self._mesh, self._scorer, self._tokenizer, groups, prompts, self._step)
        flat = [completion for group in groups for completion in group.completions]
        self._texts |= {id(completion): text for completion, text in zip(flat, scored.texts, strict=False)}
        self._failures.update(scored.failures)
        self._logged = scored.metrics
        self._seconds["generation"] += generated - began
        self._seconds["scoring"] += time.perf_counter() - generated
        outcomes = []
        for group in groups:
            rewards = np.array([completion.reward for completion in group.completions])
            self._all_rewards.append(rewards)
            self._num_tokens += sum(completion.num_sampled for completion in group.completions)
            given = rewards[~np.isnan(rewards)]
            has_variance = len(given) > 1 and bool((given != given[0]).any())
            outcomes.append(Outcome(group.prompt, self._pass_rate(group), has_variance, group))
        return outcomes

    def _pass_rate(self, group: Group) -> float | None:
        """The share of right completions of a group, if a function says what is right."""
        values = group.rewards.get(self._cfg.difficulty_metric)
        if values is None or np.isnan(values).all():
            return None
        return float(np.clip(np.nanmean(values), 0.0, 1.0))

    def _add_log_probs(self, completions: list[Completion]) -> None:
        """Log-probabilities of the policy before its first update, and of the reference, where they are needed."""
        cfg, began = self._cfg, time.perf_counter()
        wants_old = wants_old_log_probs(cfg)
        if wants_old:
            self._fill(completions, "old_logps", partial(self._token_scorer.log_probs, self._model))
        if cfg.rollout_base_url is not None:
            require_same_weights(cfg, completions)
        if self._reference is not None:
            self._fill(completions, "reference_logps", self._reference.log_probs)
        if wants_old or self._reference is not None:
            self._seconds["log_probs"] += time.perf_counter() - began

    def _drawn_pairs(self) -> list[Completion]:
        """The pairs of this rollout that were made in advance, with the log-probabilities that they are compared with:
        which they are follows from the step alone.
        """
        if self._pairs is None:
            return []
        count = self._cfg.upo_offline_pairs * self._cfg.steps_per_generation
        pairs = self._pairs.draw(self._step // self.steps_per_rollout * count, count)
        if self._cfg.upo_reference == "old":
            self._fill(pairs, "old_logps", partial(self._token_scorer.log_probs, self._model), self._pairs.prompt)
        else:
            assert self._reference is not None, "config/pointless_rl.py: has_reference"
            self._fill(pairs, "reference_logps", self._reference.log_probs, self._pairs.prompt)
        return pairs

    def _fill(
        self,
        completions: list[Completion],
        name: str,
        score: Callable[[Sequence[PackedBatch]], list[paddle.Tensor]],
        prompt_of: Callable[[int], Prompt] | None = None,
    ) -> None:
        """Set one column of each completion's tokens by a pass over them."""
        for completion, values in zip(completions, self._scored(completions, score, prompt_of), strict=True):
            setattr(completion, name, values)

    def _scored(
        self,
        completions: list[Completion],
        score: Callable[[Sequence[PackedBatch]], list[paddle.Tensor]],
        prompt_of: Callable[[int], Prompt] | None = None,
    ) -> list[np.ndarray]:
        """What a pass over completions says of their tokens (score_completions)."""
        options = BatchOptions(replays_experts=self._replays_experts)
        prompt_of = prompt_of or self.prompts.__getitem__
        return score_completions(self._cfg, self._mesh, completions, prompt_of, score, options)

    def _add_advantages(self, groups: list[Group], num_padded: int) -> None:
        """Advantages of all completions; those of the last `num_padded` groups are 0."""
        cfg = self._cfg
        flat = [completion for group in groups for completion in group.completions]
        if cfg.kl_in_reward:
            for completion in flat:
                completion.reward -= cfg.kl_coef * sampled_kl(completion)
        table, weights = reward_table(cfg, groups)
        scaling: Scaling = cfg.scale_rewards  # type: ignore[assignment]  # its choices are these words
        result = advantages_of(table, weights, cfg.num_generations, scaling)
        for completion, advantage in zip(flat, result.tolist(), strict=True):
            completion.advantage = advantage
        for group in groups[len(groups) - num_padded :]:
            for completion in group.completions:
                completion.advantage = 0.0

    # --- reports

    def _metrics(self, groups: list[Group], completions: list[Completion], filled: Filled[Group]) -> dict[str, float]:
        """Numbers about the rollout under TRL's names; rewards are those of the groups that are trained on."""
        rewards = np.array([completion.reward for completion in completions])
        stds = [std(np.array([c.reward for c in group.completions])) for group in groups]
        result = {
            "reward": mean(rewards),
            "reward_std": std(rewards),
            "frac_reward_zero_std": float(np.mean([each == 0 for each in stds])),
            "reward_generated": mean(np.concatenate(self._all_rewards)),
            "rollout/generated_tokens": float(self._num_tokens),
        }
        result |= length_metrics(completions)
        for name in groups[0].rewards:
            values = np.concatenate([group.rewards[name] for group in groups])
            result |= {f"rewards/{name}/mean": mean(values), f"rewards/{name}/std": std(values)}
        rates = [rate for group in groups if (rate := self._pass_rate(group)) is not None]
        if rates:
            result |= {"accuracy": float(np.mean(rates)), "pass_at_g": float(np.mean([rate > 0 for rate in rates]))}
        result |= {f"reward_failures/{name}": float(count) for name, count in self._failures.items()}
        if self._server is not None:
            result["rollout/retries"] = float(self._server.num_retries)
        return result | filled.metrics() | self._sampler.metrics()

    def _records(self, groups: list[Group]) -> list[dict[str, Any]]:
        """The lines of samples.jsonl."""
        prompts = {group.prompt: self.prompts[group.prompt] for group in groups}
        return sample_records(groups, prompts, self._texts, self._step + 1, self._cfg.answer_key)

    # --- the interface of StepSource

    def steps_left(self) -> int:
        """See StepSource: num_train_epochs times the number of prompts, in whole rollouts."""
        rollouts = math.ceil(self._cfg.num_train_epochs * len(self.prompts) / self._cfg.rollout_batch_size)
        return max(0, rollouts * self.steps_per_rollout - self._step)

    def rows_left(self) -> float:
        """The completions from here to the end of num_train_epochs."""
        per_step = self._cfg.rollout_batch_size * self._cfg.num_generations // self._cfg.steps_per_generation
        return float(self.steps_left() * per_step)

    @property
    def exact(self) -> bool:
        """The number of steps is not an estimate."""
        return True

    @property
    def epochs_done(self) -> int:
        """How often as many prompts were used as there are."""
        return self._num_prompts_used() // len(self.prompts)

    def _num_prompts_used(self) -> int:
        return self._step // self.steps_per_rollout * self._cfg.rollout_batch_size

    def announce(self) -> None:
        """Log what a step consists of."""
        cfg = self._cfg
        per_rollout = cfg.rollout_batch_size * cfg.num_generations
        steps = f"{self.steps_per_rollout} optimizer steps" if self.steps_per_rollout > 1 else "an optimizer step"
        share = cfg.batch_size * self._mesh.degrees.data
        log.info(
            f"rollouts of {count_of(cfg.rollout_batch_size, 'prompt')} x {cfg.num_generations} completions = "
            f"{per_rollout} for {steps}, in microbatches of {count_of(share, 'completion')} over all ranks"
        )

    def _announce_experts(self) -> None:
        """Log the memory of recorded experts."""
        cfg = self._cfg
        if cfg.router_replay == "none":
            return
        longest = max(len(self.prompts[index].ids) for index in range(len(self.prompts)))
        tokens = cfg.rollout_batch_size * (longest + cfg.num_generations * cfg.max_completion_length)
        log.info(
            f"router_replay: {cfg.router_replay}: {record_bytes(self._model, 1)} bytes a token, at most "
            f"{record_bytes(self._model, tokens) / 2**20:,.1f} MB of each rank's memory for a rollout"
        )

    def report(self) -> dict[str, Any]:
        """Counts since the start of the training."""
        return self.prompts.report() | {"epoch": self._num_prompts_used() / len(self.prompts)}

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"version": _VERSION, "position": {"step": self._step}, "data": self.identity}

    def changes(self, state: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """See Loader.changes."""
        then = state.get("data")
        if state.get("version") != _VERSION or not isinstance(then, dict):
            return {"version of the data position": (state.get("version"), _VERSION)}
        return {key: (then[key], self.identity.get(key)) for key in then if then[key] != self.identity.get(key)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position. Raises DataError if the prompts have changed."""
        changed = [f"{key} was {then!r} and is now {now!r}" for key, (then, now) in self.changes(state).items()]
        if changed:
            raise DataError(
                f"the position was saved for other prompts: {'; '.join(changed)}. Hint: restore these to continue "
                "where the run stopped, or set ignore_data_skip: true to draw prompts from the beginning."
            )
        try:
            self._step = int(state["position"]["step"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the position cannot be read: {error!r}. Hint: set ignore_data_skip: true.") from None
        self._rollout = None

    def files(self) -> dict[str, bytes]:
        """See StepSource."""
        state = {
            "sampler": self._sampler.state_dict(),
            "scorer": None if self._scorer is None else self._scorer.state_dict(),
            "shape": self._shape(),
        }
        files = {STATE_FILE: json.dumps(state).encode()}
        if self._rollout is None:
            return files
        pairs = {PAIRS_FILE: to_bytes(self._rollout.pairs)} if self._rollout.pairs else {}
        return files | pairs | {COMPLETIONS_FILE: to_bytes(self._rollout.completions)}

    def load_files(self, directory: Path) -> None:
        """See StepSource."""
        file = directory / STATE_FILE
        try:
            state = read_json_object(file, CheckpointError)
            self._sampler.load_state_dict(state["sampler"])
            if self._scorer is not None and state["scorer"] is not None:
                self._scorer.load_state_dict(state["scorer"])
            shape = state["shape"]
        except FileNotFoundError:
            raise CheckpointError(
                f"{directory} has no {STATE_FILE}, so it is not a checkpoint of a run that generates. Resume from "
                "another one, or set ignore_data_skip: true."
            ) from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error!r:.100}. Resume from an older checkpoint.") from None
        path = directory / COMPLETIONS_FILE
        if path.exists():
            if shape != self._shape():
                changed = ", ".join(f"{key}: {shape.get(key)} -> {now}" for key, now in self._shape().items())
                raise CheckpointError(
                    f"{directory} was saved between the steps of a rollout, which cannot be divided otherwise "
                    f"({changed}). Restore these, or resume from a checkpoint after a whole rollout."
                )
            self._rollout = Rollout(_read(path), _read(directory / PAIRS_FILE) if self._pairs is not None else [])
        elif self._step % self.steps_per_rollout:
            raise CheckpointError(
                f"{directory}: {COMPLETIONS_FILE} is missing, the completions that step {self._step + 1} trains on. "
                f"Resume from a checkpoint after a multiple of {self.steps_per_rollout} steps."
            )

    def _shape(self) -> dict[str, int]:
        """What a rollout that is not used up depends on."""
        keys = ["rollout_batch_size", "num_generations", "steps_per_generation", "num_iterations"]
        return {key: vars(self._cfg)[key] for key in (keys if self._pairs is None else [*keys, "upo_offline_pairs"])}

    def close(self) -> None:
        """End the processes that compute rewards."""
        if self._scorer is not None:
            self._scorer.close()
        if self._tools is not None:
            self._tools.close()


def open_prompts(context: DataContext) -> RolloutLoader:
    """The prompts and the rewards of a run; see training.data.open_rows."""
    cfg = context.cfg
    tools = tool_loop(context)
    prompts = PromptSet.open(specs_of(cfg, "train"), "train", prompt_options(context, tools), cfg.download_hub)
    scorer = Scorer(cfg, given=reward_models(cfg)) if context.mesh.rank == 0 else None
    check_records(scorer, prompts)
    server = None
    if cfg.rollout_base_url is not None and context.mesh.rank == 0:
        server = RolloutServer(cfg, context.tokenizer)
        if cfg.rollout_update_command is None:  # a command may start the server, and is followed by the same check
            server.check()
    pairs = OfflinePairs.open(context) if cfg.upo_offline_weight else None
    return RolloutLoader(context, prompts, scorer, tools, server, pairs)


def _read(path: Path) -> list[Completion]:
    try:
        return from_bytes(read_bytes(path, CheckpointError), str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Resume from another checkpoint.") from None
