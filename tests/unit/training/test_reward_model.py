"""Reward models from end to end: they learn, are saved and loaded, give rewards, and are not taken for others."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.tiny_directories import model_directory, write_lines

from erniekit.build import load_model
from erniekit.checkpoint.quantised_read import open_weights
from erniekit.config import load
from erniekit.evaluate import evaluate
from erniekit.generation.load import find_model
from erniekit.models.inputs import packed_inputs
from erniekit.rewards import Sample, Scorer
from erniekit.training.rl.reward_model import RewardModel, reward_models, score_rows
from erniekit.training.run import train
from erniekit.utils.errors import ConfigError


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward_model")
    model_directory(path / "model", tie_word_embeddings=False)
    pairs = [
        {"src": [f"{a}加{b}等于几？"], "tgt": [], "response": [[f"等于{a + b}"], [f"不知道{a}"]], "sort": [2, 1]}
        for a in range(4)
        for b in range(6)
    ]
    write_lines(path / "train.jsonl", pairs[:16])
    write_lines(path / "eval.jsonl", pairs[16:])
    train(load(None, train_keys(path, path / "full")))
    lora = {"fine_tuning": "LoRA", "lora_rank": 4, "learning_rate": 3e-2}
    train(load(None, train_keys(path, path / "lora", **lora)))
    return path


def train_keys(path: Path, output: Path, **keys: Any) -> dict[str, Any]:
    values = {
        "stage": "RM",
        "model_name_or_path": path / "model",
        "train_dataset_path": path / "train.jsonl",
        "train_dataset_type": "erniekit",
        "output_dir": output,
        "max_seq_len": 64,
        "batch_size": 4,
        "max_steps": 12,
        "learning_rate": 3e-3,
        "save_strategy": "no",
        "compute_type": "fp32",
        "disable_tqdm": True,
    }
    return {name: str(value) for name, value in (values | keys).items()}


def losses(output: Path) -> list[dict[str, float]]:
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [step for step in map(json.loads, lines) if "loss" in step]


def sample(answer: str) -> Sample:
    return Sample([{"role": "user", "content": "2加3等于几？"}], answer, (1,), {}, "d:1")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_it_learns_which_answers_are_chosen(workspace: Path, kind: str, tmp_path: Path):
    steps = losses(workspace / kind)
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=0.3)  # of equal scores
    assert steps[-1]["loss"] < 0.1 and steps[-1]["reward_accuracy"] == 1.0
    keys = train_keys(workspace, tmp_path, eval_dataset_path=workspace / "eval.jsonl", eval_dataset_type="erniekit")
    keys |= {"checkpoint": str(workspace / kind), "eval_output": str(tmp_path)}
    if kind == "full":
        del keys["model_name_or_path"]
    metrics = evaluate(load(None, keys, "eval"))
    assert metrics["reward_accuracy"] == 1.0 and metrics["reward_margin"] > 1.0


def test_its_files_are_those_of_a_model_for_sequences(workspace: Path):
    config = json.loads((workspace / "full" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Ernie4_5ForSequenceClassification"] and config["num_labels"] == 1
    reader = open_weights(workspace / "full")
    assert reader.info("score.weight").shape == (1, config["hidden_size"])
    assert "lm_head.weight" not in reader
    adapter = json.loads((workspace / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["task_type"] == "SEQ_CLS" and adapter["modules_to_save"] == ["score"]


def test_the_score_is_that_of_the_last_token(workspace: Path):
    model = load_model(workspace / "full")
    assert model.score is not None
    rows = [np.random.default_rng(length).integers(3, 60, length).tolist() for length in (7, 3, 12)]
    for row, score in zip(rows, score_rows(model, rows), strict=True):
        ids = np.array([row])
        with paddle.no_grad():
            hidden = model.model(packed_inputs(model, ids, np.ones_like(ids), None)).normed
        expected = hidden.numpy()[-1] @ model.score.weight.numpy()
        assert score == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_it_gives_rewards(workspace: Path, kind: str):
    cfg = load(None, {"reward_funcs": ["reward_model"], "reward_model_path": str(workspace / kind)}, "version")
    with Scorer(cfg, given=reward_models(cfg)) as scorer:
        total = scorer.score([sample("等于5"), sample("不知道2")]).total
    assert total[0] > total[1] + 1.0


def test_a_model_of_another_kind_gives_no_rewards(workspace: Path):
    with pytest.raises(ConfigError, match="it has no score head"):
        RewardModel(load(None, {"reward_model_path": str(workspace / "model")}, "version"))


def test_it_is_not_taken_for_a_language_model(workspace: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"this is a reward model \(stage: RM\)"):
        find_model(load(None, {"checkpoint": str(workspace / "full")}, "chat"))
    with pytest.raises(ConfigError, match=r"this is a reward model \(stage: RM\)"):
        train(load(None, train_keys(workspace, tmp_path, model_name_or_path=workspace / "full", stage="DPO")))


def test_the_margin_and_the_center_term_are_read(workspace: Path, tmp_path: Path):
    keys = {"max_steps": 1, "reward_margin": 2.0, "center_rewards_coefficient": 0.5}
    train(load(None, train_keys(workspace, tmp_path / "out", **keys)))
    plain, step = losses(workspace / "full")[0], losses(tmp_path / "out")[0]
    assert step["loss"] == pytest.approx(step["loss_pairwise"] + 0.5 * step["loss_center"], rel=1e-5)
    assert step["loss_pairwise"] > plain["loss"] + 0.5


def test_the_margins_of_records_are_those_of_their_scores(workspace: Path, tmp_path: Path):
    """TRL's column `margin`, with reward_margin: 1 for its loss, against the scores of type erniekit."""
    questions = [f"{a}加{b}等于几？" for a in range(2) for b in range(3)]
    margins = [0.0, 0.25, 0.5, 1.0, 2.0, 4.0]
    answers = {"chosen": "等于5", "rejected": "不知道2"}
    columns = [{"prompt": q, "margin": m, **answers} for q, m in zip(questions, margins, strict=True)]
    scores = [
        {"src": [q], "tgt": [], "response": list(answers.values()), "sort": [1 + max(m, 1e-6), 1]}
        for q, m in zip(questions, margins, strict=True)
    ]
    found = {}
    for kind, records in (("messages", columns), ("erniekit", scores)):
        write_lines(tmp_path / f"{kind}.jsonl", records)
        data = {"train_dataset_path": tmp_path / f"{kind}.jsonl", "train_dataset_type": kind}
        keys = {"max_steps": 1, "batch_size": 6, "reward_margin": 1.0, **data}
        train(load(None, train_keys(workspace, tmp_path / f"out-{kind}", **keys)))
        found[kind] = losses(tmp_path / f"out-{kind}")[0]
    assert found["messages"]["loss"] == pytest.approx(found["erniekit"]["loss"], rel=1e-5)
    without = losses(workspace / "full")[0]["loss"]
    assert found["messages"]["loss"] > without + 0.3
