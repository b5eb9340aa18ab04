"""Stage RL on several ranks: the same samples, and losses within 1e-5, as on one."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.loopback_server import KEY, serving
from support.rl_runs import rl_workspace
from support.tiny_directories import write_lines
from support.vision_directories import picture_records, vision_model_directory

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
    check(world2, *one_rank, dict(part.split("=") for part in layout.split()))


def check(world, keys: dict[str, Any], wanted: list[dict[str, Any]], texts: list[str], layout: dict[str, Any]) -> None:
    """A run in this layout makes the same completions, and losses, norms and rewards within rounding."""
    there = Path(keys["output_dir"]).parent / re.sub(r"\W", "_", str(layout))
    histories = world.run(train_rl, keys=keys | layout | {"output_dir": str(there)})
    assert completions(there) == texts
    for steps in histories:
        for found, expected in zip(steps, wanted, strict=True):
            for name in ("loss", "loss_policy", "loss_kl_penalty", "grad_norm", "entropy", "ratio/max"):
                # fp32 sums in another order, through up to three updates
                assert found[name] == pytest.approx(expected[name], abs=1e-5, rel=1e-4), name
            for name in ("reward", "reward_std", "completions/mean_length", "sampling/generated_prompts"):
                assert found.get(name) == pytest.approx(expected.get(name)), name


@pytest.mark.slow
def test_a_rank_without_completions_changes_nothing(world2, tmp_path):
    """One group in one microbatch: the other data rank has none in any step."""
    keys = rl_workspace(tmp_path) | KEYS | {"rollout_batch_size": 1, "steps_per_generation": 1, "num_iterations": 2}
    keys |= {"batch_size": 4, "top_entropy_quantile": 0.5, "entropy_coef": 0.05, "dynamic_sample": False}
    wanted = train_rl(keys | {"output_dir": f"{tmp_path}/one"})
    check(world2, keys, wanted, completions(tmp_path / "one"), {"data_parallel_degree": 2})


@pytest.fixture(scope="module")
def replayed(tmp_path_factory) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """As one_rank, with routing replay and pairs that were made in advance."""
    directory = tmp_path_factory.mktemp("replay")
    write_lines(
        directory / "pairs.jsonl",
        [{"src": [f"{n}+1="], "response": [str(n + 1), str(n)], "sort": [1, 0]} for n in range(5)],
    )
    keys = rl_workspace(directory, "moe") | {
        "router_replay": "r3",
        "num_iterations": 2,
        "batch_size": 4,
        "upo_offline_weight": 0.5,
        "upo_offline_path": str(directory / "pairs.jsonl"),
        "upo_offline_pairs": 3,
        "save_strategy": "no",
    }
    return keys, train_rl(keys | {"output_dir": f"{directory}/one"}), completions(directory / "one")


def test_four_ranks_make_the_samples_and_losses_of_one(world4, one_rank):
    layout = {"data_parallel_degree": 2, "tensor_parallel_degree": 2}
    check(world4, *one_rank, layout)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """As one_rank, of a model that sees pictures, on prompts with one picture, two and none."""
    directory = tmp_path_factory.mktemp("pictures")
    keys = rl_workspace(directory) | KEYS
    vision_model_directory(directory / "vl", weights=True)
    records = [record | {"prompt": record.pop("messages")[:1], "answer": "1"} for record in picture_records(directory)]
    write_lines(directory / "vl.jsonl", [record for record in records if "videos" not in record])
    keys |= {
        "stage": "VL-RL",
        "model_name_or_path": f"{directory}/vl",
        "train_dataset_path": f"{directory}/vl.jsonl",
        "train_dataset_type": "messages",
        "max_seq_len": 200,
        "num_generations": 2,
    }
    return keys, train_rl(keys | {"output_dir": f"{directory}/one"}), completions(directory / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        "data_parallel_degree=2",
        "tensor_parallel_degree=2",
        "pipeline_parallel_degree=2",
        "expert_parallel_degree=2",
        "tensor_parallel_degree=2 sequence_parallel=True",
    ],
)
def test_two_ranks_replay_the_experts_that_both_recorded(world2, replayed, layout):
    """Later updates of a rollout have moved the routers, so a record in the wrong place would change the loss."""
    keys, wanted, texts = replayed
    changes = dict(part.split("=") for part in layout.split())
    there = Path(keys["output_dir"]).parent / re.sub(r"\W", "_", layout)
    histories = world2.run(train_rl, keys=keys | changes | {"output_dir": str(there)})
    assert completions(there) == texts
    for steps in histories:
        assert all(step["router/changed_fraction"] == 0 for step in steps)
        for found, expected in zip(steps, wanted, strict=True):
            for name in ("loss", "loss_policy", "loss_upo_offline", "grad_norm", "entropy"):
                # fp32 sums in another order, through up to three updates
                assert found[name] == pytest.approx(expected[name], abs=1e-5, rel=1e-4), name
            for name in ("router/disagreeing_fraction", "upo_offline/accuracy"):
                assert found[name] == pytest.approx(expected[name], abs=1e-6), name


def train_with_key(keys: dict[str, Any]) -> list[dict[str, Any]]:
    """As train_rl, where the environment has the key of the server."""
    os.environ["ERNIEKIT_ROLLOUT_API_KEY"] = KEY
    return train_rl(keys)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data_parallel_degree", "pipeline_parallel_degree"])
def test_two_ranks_share_what_a_server_generates(world2, tmp_path, layout):
    """One rank asks; both get the completions and write the adapter that the server loads."""
    keys = rl_workspace(tmp_path) | {"fine_tuning": "LoRA", "lora_rank": 4, "save_strategy": "no", layout: 2}
    with serving(tmp_path / "model", lora_directory=keys["output_dir"]) as url:
        first, second = world2.run(train_with_key, keys=keys | {"rollout_base_url": url})
    assert [step["loss"] for step in first] == [step["loss"] for step in second]
    for step in first[::2]:
        assert step["rollout/logp_difference/max"] < 1e-4


@pytest.mark.parametrize("degree", ["data", "tensor", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_two_ranks_that_see_pictures_equal_one(world2, pictures, degree):
    check(world2, *pictures, {f"{degree}_parallel_degree": 2})


# Counts the calls of all ranks in a file.
COUNTING = """
from pathlib import Path

calls = Path(__file__).with_name("calls")

def double(number: int) -> str:
    'Doubles a number.'
    with calls.open("a") as file:
        file.write("x")
    return f"{2 * number}, call {calls.stat().st_size}"
"""


def train_with_tools(keys: dict[str, Any]) -> list[dict[str, Any]]:
    """As train_rl, of a model every turn of which ends soon and is taken for a call."""
    from erniekit.generation.tool_calls import Answer
    from erniekit.training.rl import generate, tools

    read_calls, tools.read_calls = (
        tools.read_calls,
        lambda text: Answer(text, [{"name": "double", "arguments": {"number": 21}}], 0),
    )
    begin = generate.Generator.__init__

    def with_many_ends(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self._limits = replace(self._limits, stop_ids=(2, *range(20, 1200)))

    generate.Generator.__init__ = with_many_ends
    try:
        return train_rl(keys)
    finally:
        generate.Generator.__init__, tools.read_calls = begin, read_calls


@pytest.mark.parametrize("degree", ["tensor_parallel_degree", "pipeline_parallel_degree"])
def test_of_ranks_that_share_a_model_one_executes_the_calls(world2, tmp_path, degree):
    keys = rl_workspace(tmp_path) | {"save_strategy": "no", "max_steps": 2, "num_generations": 2}
    (tmp_path / "tool.py").write_text(COUNTING, encoding="utf-8")
    keys |= {"tools": f"{tmp_path / 'tool.py'}:double", "max_turns": 3, "max_completion_length": 90, "max_seq_len": 400}
    histories = world2.run(train_with_tools, keys=keys | {degree: 2})
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    results = [turn["content"] for line in lines for turn in line["turns"] if turn["role"] == "tool"]
    assert sorted(int(result.split()[-1]) for result in results) == list(range(1, len(results) + 1)) and results
    for steps in histories:
        assert all(step["rollout/logp_difference/max"] < 2e-4 for step in steps)
        assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in histories[0]], abs=1e-6)
