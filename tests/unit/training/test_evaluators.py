"""Evaluations during training and `erniekit eval` are one implementation: the same numbers, the same refusals."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.tiny_directories import model_directory, write_lines
from support.tiny_models import tiny_model
from support.vision_directories import picture_records, vision_workspace

import erniekit
from erniekit.build import PreparedModel, load_model
from erniekit.checkpoint.model_io import save_model
from erniekit.config import Config, load
from erniekit.evaluate import evaluate
from erniekit.parallel.mesh import Mesh
from erniekit.training.build import build_run
from erniekit.training.evaluation import evaluate as evaluate_in_training
from erniekit.training.evaluators import EvaluatedModel, Evaluator, label_scores, pair_scores
from erniekit.utils import log
from erniekit.utils.errors import DataError, EvaluationError


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluators")
    model_directory(path / "model", num_nextn_predict_layers=1)
    questions = [{"src": [f"{a}加{b}等于几？"], "tgt": [str(a + b) * (1 + a % 3)]} for a in range(4) for b in range(6)]
    pairs = [
        {"src": row["src"], "tgt": [], "response": [["答案是" + row["tgt"][0]], [row["tgt"][0] * 2]], "sort": [2, 1]}
        for row in questions
    ]
    texts = [{"text": row["src"][0] * (2 + number % 3)} for number, row in enumerate(questions)]
    for name, rows in (("questions", questions), ("pairs", pairs), ("texts", texts)):
        write_lines(path / f"{name}.jsonl", rows[:16])
        write_lines(path / f"{name}_eval.jsonl", rows[9:])
    return path


def keys_of(workspace: Path, tmp_path: Path, data: str, **keys: Any) -> dict[str, Any]:
    values = {
        "model_name_or_path": workspace / "model",
        "train_dataset_path": workspace / f"{data}.jsonl",
        "train_dataset_type": "erniekit",
        "eval_dataset_path": workspace / f"{data}_eval.jsonl",
        "eval_dataset_type": "erniekit",
        "output_dir": tmp_path / "out",
        "max_seq_len": 96,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 3e-3,
        "save_strategy": "no",
        "compute_type": "fp32",
        "disable_tqdm": True,
    }
    return {name: str(value) for name, value in (values | keys).items()}


DPO = {"stage": "DPO", "data": "pairs"}
CASES: dict[str, dict[str, Any]] = {
    "sft": {"data": "questions", "packing": True},
    "sft with prediction ahead": {"data": "questions", "num_nextn_predict_layers": 1},
    "lora": {"data": "questions", "fine_tuning": "LoRA", "lora_rank": 4},
    "pretraining": {"data": "texts", "stage": "PT", "packing": True},
    "first batches": {"data": "questions", "max_evaluate_steps": 3},
    "dpo": DPO | {"packing": True, "batch_size": 1},
    "dpo with an sft loss": DPO | {"sft_loss_ratio": 0.5, "pref_loss_ratio": 0.7},
    "dpo with lora": DPO | {"fine_tuning": "LoRA", "lora_rank": 4, "max_evaluate_steps": 4},
    "means over all pairs": DPO | {"loss_type": "kto_pair"},
    "no reference": DPO | {"loss_type": "orpo"},
    "first pairs": DPO | {"loss_type": "ipo", "max_evaluate_steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_the_command_reports_of_the_final_model_what_training_reported(workspace: Path, tmp_path: Path, case: str):
    keys = keys_of(workspace, tmp_path, **CASES[case])
    trained = erniekit.train(None, **keys, do_eval=True, evaluation_strategy="steps", eval_steps=3)
    in_training = {name: value for name, value in read_metrics(trained.output_dir) if name.startswith("eval_")}
    by_command = evaluate(load(None, keys, "eval"))
    assert in_training.keys() >= {"eval_loss"}
    for name, value in in_training.items():
        # The same float32 sums; only the weights went through a file between.
        assert by_command[name.removeprefix("eval_")] == pytest.approx(value, rel=1e-6, abs=1e-7), name
    if "stage" in keys and "loss_type" not in keys and keys["stage"] == "DPO":
        assert in_training["eval_kl"] != 0.0, "otherwise the reference would be the trained model"


def test_pictures_have_losses_by_modality_which_are_those_of_the_records_alone(tmp_path: Path):
    yaml = vision_workspace(tmp_path, weights=True)
    records = picture_records(tmp_path)
    kinds: dict[str, list[dict[str, Any]]] = {"text": [], "image": [], "video": []}
    for record in records:
        kinds["video" if "videos" in record else "image" if record["images"] else "text"].append(record)
    for name, of_kind in (kinds | {"all": records}).items():
        write_lines(tmp_path / f"{name}.jsonl", of_kind)
    keys = {"eval_dataset_type": "messages", "max_seq_len": 192}

    def by_command(name: str, **more: Any) -> dict[str, Any]:
        keys_of_set = keys | {
            "eval_dataset_path": str(tmp_path / f"{name}.jsonl"),
            "output_dir": str(tmp_path / "new"),
            "continue_training": "true",
        }
        return evaluate(load(str(yaml), keys_of_set | more, "eval"))

    together = by_command("all")
    alone = {name: by_command(name) for name in kinds}
    for name, results in alone.items():
        assert together[f"loss_{name}"] == pytest.approx(results["loss"], rel=1e-5), name
        assert {key for key in results if key.startswith("loss_")} == {f"loss_{name}"}
    total = sum(results["loss"] * results["num_tokens"] for results in alone.values())
    assert together["loss"] == pytest.approx(total / together["num_tokens"], rel=1e-5)

    path = str(tmp_path / "all.jsonl")
    result = erniekit.train(
        str(yaml), **keys, eval_dataset_path=path, do_eval=True, max_steps=2, metric_for_best_model="loss_video"
    )
    in_training = dict(read_metrics(result.output_dir))
    again = by_command("all", output_dir=str(tmp_path / "out"))
    for name in ("loss", *(f"loss_{kind}" for kind in kinds)):
        assert in_training[f"eval_{name}"] == pytest.approx(again[name], rel=1e-6), name


def test_training_counts_what_its_evaluations_leave_out(workspace: Path, tmp_path: Path):
    two_turns = {"src": ["第一" * 20, "二"], "tgt": ["一", "二"]}
    long = {"src": ["长" * 99], "tgt": ["一"]}
    path = write_lines(tmp_path / "eval.jsonl", [two_turns, long, {"src": ["一"], "tgt": ["一"]}])
    keys = keys_of(workspace, tmp_path, "questions", eval_dataset_path=path, max_seq_len=41, max_steps=2)
    with log.captured() as lines:
        erniekit.train(None, **keys, do_eval=True, evaluation_strategy="steps", eval_steps=1)
    told = "eval data: 1 sample cut at max_seq_len: 41"
    assert [text.startswith(told) for _, text in lines].count(True) == 1, "not at every evaluation"
    counts = json.loads((tmp_path / "out" / "summary.json").read_text())["eval_data"]
    assert (counts["samples"], counts["cut"], counts["dropped"]) == (2, 1, 1)


def read_metrics(output_dir: Path) -> list[tuple[str, float]]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [item for line in lines if "eval_loss" in line for item in line.items()]


@pytest.mark.parametrize("data", ["questions", "pairs"])
def test_weights_that_are_not_finite_are_named_in_both(workspace: Path, tmp_path: Path, data: str):
    broken = model_directory(tmp_path / "broken")
    model = load_model(broken)
    model.model.norm.weight.set_value(np.full(model.model.norm.weight.shape, np.nan, np.float32))
    save_model(model, broken)
    stage = {"questions": "SFT", "pairs": "DPO"}[data]
    keys = keys_of(workspace, tmp_path, data, stage=stage, model_name_or_path=str(broken))
    with pytest.raises(EvaluationError, match=r"broken: the loss .*is nan.*Evaluate an earlier checkpoint"):
        evaluate(load(None, keys, "eval"))
    run = build_run(load(None, keys | {"do_eval": "true"}, "train"), Mesh.single())
    try:
        with pytest.raises(EvaluationError, match=r"after step 7: the loss .*is nan.*Lower learning_rate"):
            evaluate_in_training(run, 7)
    finally:
        run.close()


@pytest.mark.parametrize(
    ("evaluator", "message"), [(label_scores, "no token .*carries loss"), (pair_scores, "no pair of answers")]
)
def test_data_without_anything_to_score_are_named_in_the_words_of_the_method(evaluator: Evaluator, message: str):
    model = tiny_model()
    with pytest.raises(DataError, match=message):
        evaluator(EvaluatedModel("m", Config(), model), SimpleNamespace(batches=lambda most: (batch for batch in ())))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"content": "95 " * 200}, r"bad_eval.jsonl: none of 2 samples can be used \(2 dropped"),
        ({"content": "95", "reasoning_content": "37+58"}, "bad_eval.jsonl:1: chat template text refuses"),
    ],
)
def test_evaluation_data_of_which_nothing_is_left_ends_a_run_before_its_weights_are_read(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: dict[str, str], reason: str
):
    def read(*given: object) -> None:
        pytest.fail("the model was built")

    turns = [{"role": "user", "content": "37加58等于几？"}, {"role": "assistant"} | answer]
    write_lines(tmp_path / "bad_eval.jsonl", [{"messages": turns}] * 2)
    monkeypatch.setattr(PreparedModel, "build", read)
    bad = {"eval_dataset_path": tmp_path / "bad_eval.jsonl", "eval_dataset_type": "messages"}
    with pytest.raises(DataError, match=reason):
        erniekit.train(None, **keys_of(workspace, tmp_path, "questions", **bad, do_eval=True))


@pytest.mark.parametrize("keys", [{"max_seq_len": 4}, {"max_seq_len": 4, "max_steps": -1, "num_train_epochs": 1}])
def test_training_data_of_which_nothing_is_left_ends_a_run_before_its_weights_are_read(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, int]
):
    monkeypatch.setattr(PreparedModel, "build", lambda *given: pytest.fail("the model was built"))
    with pytest.raises(DataError, match=r"questions.jsonl: none of 16 samples can be used \(16 dropped"):
        erniekit.train(None, **keys_of(workspace, tmp_path, "questions", **keys))
