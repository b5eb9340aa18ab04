"""Preference optimisation on N ranks does what it does on one: losses, rewards, norms and weights."""

import json
from pathlib import Path

import pytest
from support.equality import compare, evaluate_some, keys_for, prepare, train_some
from support.worlds import World

TOLERANCE = 1e-5  # as in test_equality
LORA = {"continue_training": True, "fine_tuning": "LoRA", "lora_rank": 4, "learning_rate": 1e-2}
PIPE2, TENSOR2 = {"pipeline_parallel_degree": 2}, {"tensor_parallel_degree": 2}
CONTEXT2 = {"context_parallel_degree": 2}
MOVING = {"ref_model_update_steps": 2, "sft_loss_ratio": 0.3}
REWARD_MODEL = {"stage": "RM", "reward_margin": 0.5, "center_rewards_coefficient": 0.01}
JUDGED = {"stage": "KTO", "train_dataset_path": "judged.jsonl", "beta": 0.3, "desirable_weight": 1.5}
KTO = {"loss_type": "kto_pair", "normalize_logps": True}

TWO = {
    "dense-dp2-moving": ("dense", {"data_parallel_degree": 2}, MOVING),
    "dense-stage3-moving": ("dense", {"sharding_parallel_degree": 2, "sharding": "stage3"}, MOVING),
    "dense-dp2-kto": ("dense", {"data_parallel_degree": 2}, KTO),
    "moe-ep2": ("moe", {"expert_parallel_degree": 2}, {}),
    "untied-tp2-sp": ("untied", TENSOR2 | {"sequence_parallel": True}, {}),
    "moe-pp2-kto": ("moe", PIPE2, KTO),
    "dense-pp2-cached": ("dense", PIPE2, {"ref_logps_cache": "cache.npz", "continue_training": True}),
    "moe-ep2-cached": ("moe", {"expert_parallel_degree": 2}, {"ref_logps_cache": "cache.npz"}),
    "moe-lora-pp2": ("moe", PIPE2, LORA),
    "dense-cp2-judged": ("dense", CONTEXT2, JUDGED),
    "moe-cp2-moving": ("moe", CONTEXT2, MOVING),
    "dense-cp2-heads-kto": ("dense", CONTEXT2 | {"cp_comm_type": "a2a"}, KTO),
    "dense-cp2-cached": ("dense", CONTEXT2, {"ref_logps_cache": "cache.npz", "continue_training": True}),
    "untied-cp2-rm": ("untied", CONTEXT2, REWARD_MODEL),
    "untied-tp2-sp-rm": ("untied", TENSOR2 | {"sequence_parallel": True}, REWARD_MODEL),
    "moe-lora-pp2-rm": ("moe", PIPE2, REWARD_MODEL | LORA),
}
PATH_OF_TEACHER = "teacher_model_name_or_path"
DISTILLED = {"stage": "GKD", "train_dataset_path": "answers.jsonl", PATH_OF_TEACHER: "dense"}
DISTILLED |= {"lmbda": 0.5, "max_new_tokens": 5, "temperature": 1.0}
DATA2 = {"data_parallel_degree": 2}
TWO |= {
    "dense-dp2-judged": ("dense", DATA2, JUDGED),
    "dense-dp2-gkd": ("dense", DATA2, DISTILLED),
    "untied-tp2-sp-judged": ("untied", TENSOR2 | {"sequence_parallel": True}, JUDGED),
    "moe-pp2-judged": ("moe", PIPE2, JUDGED),
    "dense-tp2-gkd": ("dense", TENSOR2, DISTILLED),
    "dense-pp2-gkd": ("dense", PIPE2, DISTILLED),
}
SLOW = {"untied-tp2-sp-judged", "moe-pp2-judged", "dense-tp2-gkd", "dense-pp2-gkd"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("preference")
    prepare(path)
    lines = [
        {
            "src": [f"{a}加{b}" + "等于？" * (1 + a * b % 3)],
            "response": [[str(a + b)], [f"是{a + b}"]],
            "sort": [a, a + 1],
        }
        for a in range(9)
        for b in range(9)
    ]
    answers = [{"src": line["src"], "tgt": line["response"][0]} for line in lines]
    judged = [answer | {"label": number % 3 > 0} for number, answer in enumerate(answers)]
    for name, records in (("train", lines), ("answers", answers), ("judged", judged)):
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (path / f"{name}.jsonl").write_text(text)
    return path


alone: dict[str, dict] = {}


@pytest.mark.parametrize("layout", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in TWO])
def test_two_ranks_equal_one(world2: World, directory: Path, layout: str):
    model, degrees, method = TWO[layout]
    paths = {key: f"{directory}/{method[key]}" for key in ("train_dataset_path", PATH_OF_TEACHER) if key in method}
    keys = {"stage": "DPO"} | method | paths
    if "ref_logps_cache" in keys:
        keys["ref_logps_cache"] = str(directory / layout / "cache.npz")
    name = f"{model} {method}"
    if name not in alone:
        alone[name] = train_some(keys_for(str(directory), model, rows=2, **keys))
    if "ref_logps_cache" in keys:
        Path(keys["ref_logps_cache"]).unlink()  # so that the two ranks compute it themselves
    data_ranks = 1 if degrees.keys() & (PIPE2 | TENSOR2 | CONTEXT2).keys() else 2
    ranks = world2.run(train_some, keys=keys_for(str(directory), model, data_ranks, **keys, **degrees))
    numbers, weights = compare(*without_ties(ranks, alone[name]))
    assert numbers < TOLERANCE and weights < TOLERANCE


@pytest.mark.parametrize(
    "degrees",
    [{"data_parallel_degree": 2}, PIPE2 | {"virtual_pp_degree": 1}, CONTEXT2],
    ids=["data", "pipe", "context"],
)
def test_two_ranks_evaluate_as_one(world2: World, directory: Path, degrees: dict[str, int]):
    """A loss with means over all pairs, of the first batches; the reference has the trained model's start."""
    keys = {"stage": "DPO", "max_evaluate_steps": 4} | KTO
    alone = evaluate_some(keys_for(str(directory), "dense", rows=2, **keys))
    data_ranks = degrees.get("data_parallel_degree", 1)
    for metrics in world2.run(evaluate_some, keys=keys_for(str(directory), "dense", data_ranks, 2, **keys, **degrees)):
        del metrics["eval_reward_accuracy"]  # margins are 0 but for the order of sums
        assert metrics == pytest.approx({name: alone[name] for name in metrics}, rel=1e-5, abs=1e-6)
    assert alone["eval_logp_chosen"] < -1


def without_ties(ranks, one):
    """Without the reward accuracy of steps in which a margin is a rounding error: it counts margins above 0, and the
    first step's are 0 but for the order of sums.
    """

    def kept(run):
        steps = [
            {
                name: value
                for name, value in step.items()
                if name != "reward_accuracy" or abs(step["reward_margin"]) > 1e-4
            }
            for step in run["steps"]
        ]
        return run | {"steps": steps}

    return [kept(rank) for rank in ranks], kept(one)
