"""`erniekit eval` on several ranks: the numbers and the answers of one process, written once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.benchmark_oracle import BENCHMARKS
from support.tiny_directories import model_directory, write_lines
from support.worlds import World

from erniekit import config, lora
from erniekit.build import load_model, our_shapes
from erniekit.checkpoint.peft_attach import save_adapter
from erniekit.evaluate.run import PREDICTIONS_FILE, RESULTS_FILE, evaluate
from erniekit.utils.errors import UserError

TOLERANCE = 1e-5
TEXT = {"eval_dataset_type": "erniekit", "predict_with_generate": True, "max_new_tokens": 6}
DRAWN = {"temperature": 1.2, "top_p": 0.9, "seed": 5}
PAIRS = {"stage": "DPO", "eval_dataset_path": "pairs.jsonl", "eval_dataset_type": "erniekit"}
TENSOR2, PIPE2 = {"tensor_parallel_degree": 2}, {"pipeline_parallel_degree": 2}
DATA2, EXPERT2 = {"data_parallel_degree": 2}, {"expert_parallel_degree": 2}
SEQUENCE = {"sequence_parallel": True}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `dense` and `moe` of two layers, an adapter for the second; 15 questions and 9 pairs."""
    path = tmp_path_factory.mktemp("evaluation")
    model_directory(path / "dense")
    model_directory(path / "moe", kind="moe")
    model = load_model(path / "moe")
    lora.attach(model, lora.LoraOptions(rank=4, alpha=8.0, seed=5), our_shapes(model.config), True)
    for name, parameter in model.named_parameters():
        if ".adapter.B" in name:  # an adapter that does nothing would prove nothing
            parameter.set_value(parameter + 0.2)
    save_adapter(model, path / "adapter")
    write_lines(
        path / "eval.jsonl",
        [{"src": [f"{a}+{b}" + "=?" * (1 + a * b)], "tgt": [str(a + b)]} for a in range(5) for b in range(3)],
    )
    write_lines(
        path / "pairs.jsonl",
        [
            {"src": [f"{a}+{b}" + "?" * (1 + a)], "response": [[str(a + b)], [f"it is {a}"]], "sort": [1, 0]}
            for a in range(3)
            for b in range(3)
        ],
    )
    return path


def results(directory: str, output: str, keys: dict[str, Any], model: str = "dense") -> dict[str, Any]:
    """What `evaluate` returns on this rank. Paths are below `directory`."""
    paths = {"model_name_or_path": model, "eval_dataset_path": "eval.jsonl"} | keys
    paths = {key: f"{directory}/{value}" if key.endswith("_path") else value for key, value in paths.items()}
    settings = {"compute_type": "fp32", "batch_size": 2, "max_seq_len": 128, "disable_tqdm": True}
    cfg = config.load(None, settings | {"eval_output": f"{directory}/{output}"} | paths, "eval")
    try:
        return evaluate(cfg)
    except UserError as error:
        return {"error": str(error)}


CASES = {
    "dense-tp2-sp": ("dense", TENSOR2 | SEQUENCE, TEXT | DRAWN),
    "dense-dp2": ("dense", DATA2, TEXT),
    "dense-dp2-some": ("dense", DATA2, {"max_evaluate_steps": 3}),
    "moe-ep2": ("moe", EXPERT2, TEXT | DRAWN),
    "moe-ep2-some": ("moe", EXPERT2, TEXT | {"max_evaluate_steps": 1}),
    "moe-pp2": ("moe", PIPE2, TEXT),
    "moe-lora-tp2": ("moe", TENSOR2, TEXT | {"lora_path": "adapter"}),
    "moe-lora-pairs-ep2": ("moe", EXPERT2, PAIRS | {"lora_path": "adapter"}),
    "moe-lora-pairs-pp2": ("moe", PIPE2, PAIRS | {"lora_path": "adapter"}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_report_what_one_process_does(world2: World, directory: Path, case: str):
    model, degrees, keys = CASES[case]
    alone = results(str(directory), f"{case}-1", keys, model)
    assert alone["num_samples"] > 1, alone
    ranks = world2.run(results, directory=str(directory), output=f"{case}-2", keys=keys | degrees, model=model)
    for reported in ranks:
        del reported["seconds"]
        texts = {name for name, value in reported.items() if isinstance(value, str)}
        assert all(reported.pop(name) == alone[name] for name in texts)
        assert reported == pytest.approx({name: alone[name] for name in reported}, rel=TOLERANCE, abs=TOLERANCE)
    one, two = (directory / f"{case}-{count}" for count in (1, 2))
    written = json.loads((two / RESULTS_FILE).read_text())
    assert {name: written[name] for name in ranks[0]} == ranks[0]
    if "predict_with_generate" in keys:
        assert (two / PREDICTIONS_FILE).read_bytes() == (one / PREDICTIONS_FILE).read_bytes()


def test_four_ranks_report_what_one_process_does(world4: World, directory: Path):
    alone = results(str(directory), "four-1", TEXT | DRAWN, "moe")
    keys = TEXT | DRAWN | EXPERT2 | TENSOR2
    for reported in world4.run(results, directory=str(directory), output="four-4", keys=keys, model="moe"):
        assert reported["loss"] == pytest.approx(alone["loss"], rel=TOLERANCE)
    files = [(directory / name / PREDICTIONS_FILE).read_bytes() for name in ("four-1", "four-4")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"eval_dataset_path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"eval_output": "/proc/nowhere"}, "eval_output: "),  # a mistake that only the first rank finds
    ],
    ids=["data", "output"],
)
def test_a_mistake_ends_every_rank(world2: World, directory: Path, keys: dict[str, Any], words: str):
    ranks = world2.run(results, directory=str(directory), output="bad", keys=DATA2 | keys)
    assert all(words in rank["error"] for rank in ranks)


def differing(directory: str) -> dict[str, Any]:
    """Ranks that were started with different bounds of an answer would wait for one another for ever."""
    from erniekit.parallel import backend

    length = {"max_new_tokens": 4 + backend.world().rank}
    return results(directory, "differing", TEXT | TENSOR2 | length)


def test_ranks_that_would_answer_otherwise_are_refused(world2: World, directory: Path):
    for rank in world2.run(differing, directory=str(directory)):
        assert "max_new_tokens: 4 on rank 0, 5 on rank 1" in rank["error"]


@pytest.mark.parametrize(
    ("model", "degrees", "keys"),
    [
        ("dense", DATA2, {"num_fewshot": 0}),
        ("moe", EXPERT2, {"num_fewshot": 0}),
        ("moe", PIPE2, {"num_fewshot": 0}),
        ("dense", TENSOR2 | SEQUENCE, {"num_fewshot": 0}),
        ("dense", DATA2, {"num_fewshot": 0, "eval_benchmark_mode": "generate", "max_new_tokens": 4}),
    ],
)
def test_a_benchmark_on_two_ranks(
    world2: World, directory: Path, model: str, degrees: dict[str, Any], keys: dict[str, Any]
):
    shutil.copytree(BENCHMARKS / "mmlu", directory / "mmlu", dirs_exist_ok=True)
    keys = keys | {"eval_benchmark": "mmlu", "eval_benchmark_path": "mmlu"}
    alone = results(str(directory), "benchmark-1", keys, model)
    ranks = world2.run(results, directory=str(directory), output="benchmark-2", keys=keys | degrees, model=model)
    for reported in ranks:
        assert reported | {"seconds": alone["seconds"]} == alone
    lines = [(directory / f"benchmark-{count}" / PREDICTIONS_FILE).read_text().splitlines() for count in (1, 2)]
    for one, two in zip(*(map(json.loads, text) for text in lines), strict=True):
        scores = [line.pop("logprobs", {}) for line in (one, two)]
        assert one == two and scores[1] == pytest.approx(scores[0], abs=1e-4)
