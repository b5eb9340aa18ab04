"""Whole runs of stage RL against TRL's GRPOTrainer, which gets the completions and the rewards of this project's run
instead of making its own: advantages, losses, gradient norms, metrics, and the weights after every step. Skipped where
TRL is absent.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.rl_runs import rl_workspace

from erniekit import config
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.training.reporting.completions import CompletionLog
from erniekit.training.reporting.plot import LossPlot
from erniekit.training.rl.completions import Completion
from erniekit.training.rl.loader import Rollout, RolloutLoader
from erniekit.training.run import train

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytestmark = [pytest.mark.parity, pytest.mark.slow]
torch.set_num_threads(1)

Answers = list[tuple[list[int], Completion]]  # the tokens of a prompt, and a completion of it
VOCABULARY = 1200
END_IDS = [2, *range(30, 330)]  # so many that completions of random weights end early
# Of both runs. The epsilon is large, since a step of Adam is otherwise the sign of a gradient, also of one that is
# rounding alone.
SHARED = {"max_steps": 6, "learning_rate": 0.02, "adam_epsilon": 1e-3, "lr_scheduler_type": "constant"}
OURS = SHARED | {"warmup_steps": 0, "num_iterations": 2, "max_completion_length": 9, "save_total_limit": 6}

# TRL divides some losses by the tokens of a rollout, and not by those of each of its steps.
ONE_STEP = {"steps_per_generation": 1, "num_iterations": 3}

# Eighths, of which fp32 has the mean exactly. Otherwise TRL's advantage is a little below 0 where it is 0, and its
# share of clipped tokens counts that.
REWARD = "def checksum(completion_ids):\n    return [sum(ids) % 8 / 8 for ids in completion_ids]\n"

# name -> (keys of this project, options of GRPOConfig)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"rl_algorithm": "grpo", "temperature": 0.7, "delta": 1.5}, {"loss_type": "grpo", "delta": 1.5}),
    "bnpo": ({"rl_algorithm": "bnpo", "off_policy_mask_threshold": 0.1}, {"loss_type": "bnpo"}),
    "dr_grpo": ({"rl_algorithm": "dr_grpo"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": (
        {"rl_algorithm": "dapo", "scale_rewards": "batch"} | ONE_STEP,
        {"loss_type": "dapo", "epsilon_high": 0.28},
    ),
    "cispo": ({"rl_algorithm": "cispo", "entropy_coef": 0.1} | ONE_STEP, {"loss_type": "cispo", "epsilon_high": 5.0}),
    "gspo": (
        {"rl_algorithm": "gspo", "epsilon": 0.05, "epsilon_high": 0.1, "kl_coef": 0.1},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.1},
    ),
    "masked": (
        {"rl_algorithm": "grpo", "mask_truncated_completions": True, "max_completion_length": 2, "kl_coef": 0.1},
        {"loss_type": "grpo"},
    ),
    "moving_reference": (
        {"rl_algorithm": "grpo", "kl_coef": 0.3, "sync_ref_model": True, "ref_model_sync_steps": 2},
        {"loss_type": "grpo", "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6},
    ),
    "high_entropy": ({"rl_algorithm": "grpo", "top_entropy_quantile": 0.3}, {"loss_type": "grpo"}),
    "icepop": (
        # With bf16 generating and training differ.
        {"rollout_dtype": "bf16", "rollout_correction": "icepop", "icepop_alpha": 0.98, "icepop_beta": 1.02},
        {"loss_type": "grpo", "vllm_importance_sampling_mode": "token_mask"},
    ),
}
# Keys of both, under TRL's names where they differ.
SAME = {
    "temperature": "temperature",
    "kl_coef": "beta",
    "scale_rewards": "scale_rewards",
    "entropy_coef": "entropy_coef",
}
SAME |= {name: name for name in ("mask_truncated_completions", "off_policy_mask_threshold", "top_entropy_quantile")}
SAME |= {"icepop_alpha": "vllm_importance_sampling_clip_min", "icepop_beta": "vllm_importance_sampling_clip_max"}


@pytest.mark.parametrize("name", CASES)
def test_a_run_equals_that_of_trl(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given, options = CASES[name]
    keys = rl_workspace(tmp_path) | OURS | given
    (tmp_path / "reward.py").write_text(REWARD)
    ends = {"eos_token_id": END_IDS, "bos_token_id": 1, "pad_token_id": 0}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(ends))
    steps, rollouts = our_run(keys, monkeypatch)
    logs, weights, advantages = their_run(keys, options, rollouts, monkeypatch)
    assert len(steps) == len(logs) == len(weights) == keys["max_steps"]
    for rollout, expected in zip(rollouts, advantages, strict=True):
        np.testing.assert_allclose([answer.advantage for _, answer in rollout], expected, atol=1e-6)
    compared = set[str]()
    for number, (step, log, expected) in enumerate(zip(steps, logs, weights, strict=True), start=1):
        # fp32 in another order, through several updates with ratios up to 50
        assert step["loss"] == pytest.approx(log["loss"], abs=1e-4), number
        assert step["grad_norm"] == pytest.approx(log["grad_norm"], rel=1e-3, abs=1e-6), number
        assert step["entropy"] == pytest.approx(log["entropy"], rel=1e-4), number
        names = {"kl": "kl", "clip_ratio/low": "clip_ratio/low_mean", "clip_ratio/high": "clip_ratio/high_mean"}
        for ours, theirs in names.items():
            if theirs in log:
                assert step[ours] == pytest.approx(log[theirs], rel=1e-3, abs=1e-6), ours
                compared.add(ours)
        reader = Reader(tmp_path / "out" / f"checkpoint-{number}")
        for tensor in reader.keys():  # noqa: SIM118
            np.testing.assert_allclose(reader.read(tensor), expected[tensor], atol=2e-4, err_msg=f"{number} {tensor}")
    assert {"clip_ratio/low", "clip_ratio/high"} <= compared or name == "cispo"
    assert "kl" in compared or not given.get("kl_coef")


def our_run(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, Any]], list[Answers]]:
    """The steps of a run with their metrics, and the completions of its rollouts."""
    rollouts: list[Answers] = []
    make = RolloutLoader._make

    def recorded(loader: RolloutLoader) -> Rollout:
        made = make(loader)
        rollouts.append([(list(loader.prompts[each.prompt].ids), each) for each in made.completions])
        return made

    monkeypatch.setattr(RolloutLoader, "_make", recorded)
    monkeypatch.setattr(LossPlot, "_draw", lambda self: None)  # pictures take longer than these runs
    monkeypatch.setattr(CompletionLog, "_draw", lambda self: None)
    return train(config.load(None, keys, "train")).history, rollouts


def their_run(
    keys: dict[str, Any], options: dict[str, Any], rollouts: list[Answers], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[dict[str, Any]], list[dict[str, np.ndarray]], list[np.ndarray]]:
    """(the logs of GRPOTrainer's steps, the weights after each, the advantages of each rollout)."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import grpo_trainer

    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", lambda batch: batch)  # steps of the same completions
    weights: list[dict[str, np.ndarray]] = []
    advantages: list[np.ndarray] = []
    replay = Replay(rollouts, "vllm_importance_sampling_mode" in options)

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **others):
            weights.append({name: value.detach().numpy().copy() for name, value in model.state_dict().items()})

    size = keys["rollout_batch_size"] * keys["num_generations"]
    options = options | {theirs: keys[ours] for ours, theirs in SAME.items() if ours in keys}
    for name in ("steps_per_generation", "num_iterations", "num_generations", "max_completion_length", *SHARED):
        options[name] = keys[name]
    args = GRPOConfig(
        output_dir=keys["output_dir"] + "-trl",
        per_device_train_batch_size=size // keys["steps_per_generation"],
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **options,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(keys["model_name_or_path"], dtype=torch.float32),
        reward_funcs=replay.rewards,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": str(n)} for n in range(keys["rollout_batch_size"])]),
        processing_class=tokenizer(),
        rollout_func=replay,
        callbacks=[Note()],
    )
    if replay.has_log_probs:  # the branches of a run whose completions an engine of its own has made
        trainer.use_vllm, trainer._last_loaded_step = True, -1
        trainer.vllm_generation = replay
    scored = trainer._generate_and_score_completions
    monkeypatch.setattr(
        trainer,
        "_generate_and_score_completions",
        lambda batch: (result := scored(batch), advantages.append(result["advantages"].numpy()))[0],
    )
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log], weights, advantages


class Replay:
    """Gives TRL the completions and the rewards of recorded rollouts."""

    def __init__(self, rollouts: list[Answers], has_log_probs: bool) -> None:
        self.has_log_probs = has_log_probs
        self._rollouts = iter(rollouts)
        self._now: Answers = []

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        self._now = next(self._rollouts)
        assert len(prompts) == len(self._now)
        return {
            "prompt_ids": [prompt for prompt, _ in self._now],
            "completion_ids": [answer.ids.tolist() for _, answer in self._now],
            "logprobs": [answer.rollout_logps.tolist() for _, answer in self._now] if self.has_log_probs else None,
        }

    def rewards(self, completions: list[str], **others: Any) -> list[float]:
        return [answer.reward for _, answer in self._now]

    def sync_weights(self) -> None:
        """TRL sends the weights to the engine before it generates."""


def tokenizer() -> Any:
    """A tokenizer with the special tokens of the tiny models; TRL shows it the completions, and nothing reads that."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(VOCABULARY)}, unk_token="t3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2")
