"""lm-evaluation-harness as the oracle of `erniekit eval` with eval_benchmark: its scores of a small model on the
question sets of tests/fixtures/benchmarks, with its own task files.

Run as a program it prints what tests/fixtures/benchmarks/lm_eval.json holds. It needs lm-eval, transformers and torch:

    PYTHONPATH=tests:. python -m support.benchmark_oracle > tests/fixtures/benchmarks/lm_eval.json
"""

import csv
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.checkpoint.model_io import save_model
from support.tiny_directories import VOCAB_SIZE, model_directory
from support.tiny_models import tiny_model

BENCHMARKS = Path(__file__).parents[1] / "fixtures" / "benchmarks"
RECORDED = BENCHMARKS / "lm_eval.json"
# benchmark -> (lm-eval's template, its description, split, subjects)
_TASKS = {
    "mmlu": ("mmlu/default/_default_template_yaml", "mmlu/default/mmlu_{}.yaml", "test"),
    "ceval": ("ceval/_default_ceval_yaml", "ceval/ceval-valid_{}.yaml", "val"),
    "cmmlu": ("cmmlu/_default_template_yaml", "cmmlu/cmmlu_{}.yaml", "test"),
}
_GENERATIVE = ("mmlu/generative/_default_template_yaml", "mmlu/generative/mmlu_{}.yaml", "test")
SUBJECTS = {
    "mmlu": ("elementary_mathematics", "formal_logic"),
    "ceval": ("logic", "middle_school_mathematics"),
    "cmmlu": ("elementary_mathematics", "logical"),
}
MAX_NEW_TOKENS = 8


def benchmark_model(path: Path) -> Path:
    """A model directory whose weights do not depend on the version of Paddle."""
    model_directory(path, weights=False)
    model, generator = tiny_model(vocab_size=VOCAB_SIZE), np.random.default_rng(11)
    for name, parameter in sorted(model.named_parameters()):
        mean = 1.0 if "norm" in name else 0.0
        parameter.set_value(generator.normal(mean, 0.3, parameter.shape).astype(np.float32))
    save_model(model, path)
    return path


def lm_eval_scores(
    model_dir: Path, scratch: Path, benchmark: str, mode: str, num_fewshot: int, server: str | None = None
) -> dict[str, Any]:
    """What lm-eval reports of a model directory, or of what a `server` ("http://127.0.0.1:8188/v1") makes of it:
    `accuracy`, `stderr`, `macro`, and of each subject the accuracy and a list of the four log-probabilities of each
    question, or of the answers.
    """
    import lm_eval
    import yaml
    from lm_eval.tasks import TaskManager

    template, of_subject, split = _GENERATIVE if mode == "generate" else _TASKS[benchmark]
    tasks = Path(lm_eval.__file__).parent / "tasks"
    scratch.mkdir(parents=True, exist_ok=True)
    names = []
    for subject in SUBJECTS[benchmark]:
        options = yaml.safe_load((tasks / template).read_text(encoding="utf-8"))
        theirs = yaml.safe_load((tasks / of_subject.format(subject)).read_text(encoding="utf-8"))
        files = {name: str(_json_file(benchmark, subject, name, scratch)) for name in (split, "dev")}
        name = f"ours_{benchmark}_{mode}_{subject}"
        options |= {"task": name, "description": theirs["description"]}
        options |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        if mode == "generate":
            options["generation_kwargs"]["max_gen_toks"] = MAX_NEW_TOKENS
        (scratch / f"{name}.yaml").write_text(yaml.safe_dump(options, allow_unicode=True), encoding="utf-8")
        names.append(name)
    metric = "exact_match" if mode == "generate" else "acc"
    group = {
        "group": f"ours_{benchmark}_{mode}",
        "task": names,
        "aggregate_metric_list": [{"metric": metric, "weight_by_size": True}],
    }
    if mode == "generate":
        group["aggregate_metric_list"][0]["filter_list"] = ["get_response"]
    (scratch / "group.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    found = lm_eval.simple_evaluate(
        model="hf" if server is None else "local-completions",
        model_args=_model_args(model_dir, server),
        tasks=[group["group"]],
        num_fewshot=num_fewshot,
        batch_size=4 if server is None else 1,
        task_manager=TaskManager(include_path=str(scratch), include_defaults=False),
        bootstrap_iters=100,
        log_samples=True,
    )
    suffix = "get_response" if mode == "generate" else "none"
    summary = found["groups"][group["group"]] if "groups" in found else found["results"][group["group"]]
    accuracies = {name: found["results"][name][f"{metric},{suffix}"] for name in names}
    return {
        "accuracy": summary[f"{metric},{suffix}"],
        "stderr": summary[f"{metric}_stderr,{suffix}"],
        "macro": float(np.mean(list(accuracies.values()))),
        "subjects": {
            subject: {
                "accuracy": accuracies[name],
                "answers": [_answer(sample, mode) for sample in _in_order(found["samples"][name])],
            }
            for subject, name in zip(SUBJECTS[benchmark], names, strict=True)
        },
    }


def _model_args(model_dir: Path, server: str | None) -> dict[str, Any]:
    if server is None:
        return {"pretrained": str(model_dir), "dtype": "float32", "device": "cpu"}
    options = {"num_concurrent": 2, "max_retries": 1, "tokenizer": str(model_dir)}
    return {"model": model_dir.name, "base_url": f"{server}/completions", **options}


def _in_order(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda sample: sample["doc_id"])


def _answer(sample: dict[str, Any], mode: str) -> Any:
    if mode == "generate":
        return sample["filtered_resps"][0]
    return [round(float(response[0]), 6) for response in sample["filtered_resps"]]


def _json_file(benchmark: str, subject: str, split: str, scratch: Path) -> Path:
    """The questions of a subject as lm-eval's task reads them."""
    (path,) = BENCHMARKS.glob(f"{benchmark}/{split}/{subject}*.csv")
    with open(path, newline="", encoding="utf-8") as file:
        if benchmark == "mmlu":
            rows: list[dict[str, Any]] = [
                {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])} for row in csv.reader(file)
            ]
        else:
            rows = list(csv.DictReader(file))
    target = scratch / f"{benchmark}_{subject}_{split}.jsonl"
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return target


CASES = [("mmlu", "loglikelihood", 3), ("mmlu", "loglikelihood", 0), ("ceval", "loglikelihood", 2)]
CASES += [("cmmlu", "loglikelihood", 1), ("mmlu", "generate", 2)]


def main() -> None:
    """Print the scores of all cases."""
    with tempfile.TemporaryDirectory() as directory:
        model_dir = benchmark_model(Path(directory) / "model")
        scores = {
            f"{benchmark} {mode} {shots}": lm_eval_scores(
                model_dir, Path(directory) / f"{benchmark}-{mode}-{shots}", benchmark, mode, shots
            )
            for benchmark, mode, shots in CASES
        }
    text = json.dumps(scores, indent=1, ensure_ascii=False)
    in_one_line = re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    sys.stdout.write(in_one_line + "\n")


if __name__ == "__main__":
    main()
