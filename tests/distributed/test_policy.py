"""Stage RL on several ranks: the same samples, and losses within 1e-5, as on one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.rl_runs import rl_workspace

KEYS = {
    "rl_algorithm": "gspo",
    "epsilon": 0.05,
    "epsilon_high": 0.05,
    "rollout_correction": "misc",
    "kl_coef": 0.05,
    "dynamic_sample": True,
    "save_strategy": "no",
}


def train_rl(keys: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a run of the real trainer on this rank."""
    from erniekit import config
    from erniekit.training.reporting.completions import CompletionLog
    from erniekit.training.reporting.plot import LossPlot
    from erniekit.training.run import train

    LossPlot._draw = CompletionLog._draw = lambda self: None  # pictures take longer than the run
    return train(config.load(None, keys, "train")).history


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """The keys of a run, its steps in one process, and its completions."""
    directory = tmp_path_factory.mktemp("rl")
    keys = rl_workspace(directory, "moe") | KEYS
    return keys, train_rl(keys | {"output_dir": f"{directory}/one"}), completions(directory / "one")


def completions(directory: Path) -> list[str]:
    lines = (directory / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["completion"] for line in lines]


@pytest.mark.parametrize(
    "layout",
    [
        "data_parallel_degree=2",
        "tensor_parallel_degree=2",
        pytest.param("pipeline_parallel_degree=2", marks=pytest.mark.slow),
        pytest.param("expert_parallel_degree=2", marks=pytest.mark.slow),
        pytest.param("sharding=stage3 sharding_parallel_degree=2", marks=pytest.mark.slow),
        pytest.param("tensor_parallel_degree=2 sequence_parallel=True", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_make_the_samples_and_losses_of_one(world2, one_rank, layout):
    keys, wanted, texts = one_rank
    changes = dict(part.split("=") for part in layout.split())
    there = Path(keys["output_dir"]).parent / re.sub(r"\W", "_", layout)
    histories = world2.run(train_rl, keys=keys | changes | {"output_dir": str(there)})
    assert completions(there) == texts
    for steps in histories:
        for found, expected in zip(steps, wanted, strict=True):
            for name in ("loss", "loss_policy", "loss_kl_penalty", "grad_norm", "entropy", "ratio/max"):
                # fp32 sums in another order, through up to three updates
                assert found[name] == pytest.approx(expected[name], abs=1e-5, rel=1e-4), name
            for name in ("reward", "reward_std", "completions/mean_length", "sampling/generated_prompts"):
                assert found.get(name) == pytest.approx(expected.get(name)), name
