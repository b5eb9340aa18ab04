"""Training for a scheme against quantising afterwards: losses, tokens and answers of one model in 4 and 8 bits.

    python tools/compare_qat.py examples/configs/tiny/sft/run_sft_moe.yaml --steps 400 --more 200 --seeds 1 2 3 \
        --questions 1000

For each seed: trains the model of the file for --steps; then, from there, for --more steps each: plainly, and with
`qat` (and, with --distil, with `qat` and distillation). The plain model is exported in the scheme by round to nearest
and by GPTQ with calibration, each without and with the clip search; the other by round to nearest, so that its codes
are those of its last step. What was exported is evaluated as any command reads it: loss and token accuracy of the given
answers (the share of their tokens that are the model's first choice), and exact match of the model's own. What engines
do to activations is not in the numbers.

With --questions the demo's tasks are drawn anew, with so many held-out questions, none of whose facts is in the
training set; otherwise the data are those of the file. Differences are by seed: the mean over the seeds and its
standard error.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("loss", "token_accuracy", "exact_match")
HEADS = " | ".join(NAMES).replace("_", " ")
QAT, DISTILLED = "qat, round to nearest", "qat and distillation"
# What an export of the plain model is told besides the scheme.
CALIBRATION = {"quantization_calibration_samples": 32, "quantization_calibration_length": 256}
AFTERWARDS: dict[str, dict[str, object]] = {
    "afterwards, round to nearest": {"quantization_clip_search": False},
    "afterwards, clip search": {"quantization_clip_search": True},
    "afterwards, GPTQ": CALIBRATION | {"quantization_clip_search": False, "quantization_algorithm": "gptq"},
    "afterwards, GPTQ with clip search": CALIBRATION
    | {"quantization_clip_search": True, "quantization_algorithm": "gptq"},
}
Keys = dict[str, object]
# The scores of one model, in the order of NAMES.
Scores = tuple[float, ...]


def run(command: str, given: argparse.Namespace, keys: Keys) -> None:
    """One erniekit command. `given.data`: keys of the data sets."""
    words = [f"{key}={value}" for key, value in (given.data | keys).items()]
    subprocess.run([sys.executable, "-m", "erniekit", command, given.config, *given.keys, *words], cwd=ROOT, check=True)


def train(given: argparse.Namespace, target: Path, steps: int, seed: int, **keys: object) -> Path:
    """Train into `target`, without evaluations and checkpoints on the way."""
    fixed: Keys = {
        "max_steps": steps,
        "output_dir": target,
        "seed": seed,
        "save_strategy": "no",
        "evaluation_strategy": "no",
        "do_eval": False,
        "overwrite_output_dir": True,
        "disable_tqdm": True,
        "logging_steps": 50,
    }
    run("train", given, fixed | keys)
    return target


def export(given: argparse.Namespace, model: Path, target: Path, scheme: str, keys: Keys) -> Path:
    """Export a model in a scheme; the directory of the files."""
    shutil.rmtree(target, ignore_errors=True)
    if "quantization_algorithm" in keys:
        training = given.data.get("train_dataset_path", "./data/demo/train.jsonl")
        keys = {"quantization_calibration_path": training} | keys
    run("export", given, {"checkpoint": model, "output_dir": target, "quantization": scheme, "format": "pt"} | keys)
    return target / "export"


def evaluate(given: argparse.Namespace, model: Path) -> Scores:
    """The scores of a model, quantised or not."""
    target = model.parent / f"{model.name}-evaluation"
    run("eval", given, {"checkpoint": model, "eval_output": target, "predict_with_generate": True})
    found = json.loads((target / "eval_results.json").read_text())
    return tuple(float(found[name]) for name in NAMES)


def of_scheme(
    given: argparse.Namespace, seed: int, scheme: str, plain: Path, further: Keys
) -> dict[tuple[str, str], Scores]:
    """As one_seed, of a scheme: the model that was trained plainly is quantised afterwards, others train for it."""
    out, scores = ROOT / given.out / f"seed-{seed}", dict[tuple[str, str], Scores]()
    name, takes_search = scheme.replace("/", "_"), scheme in ("wint4", "wint4/8")
    for how, keys in AFTERWARDS.items():
        keys = keys if takes_search else {k: v for k, v in keys.items() if k != "quantization_clip_search"}
        if takes_search or not how.endswith("clip search"):
            target = out / f"{name}-{how.split(', ')[1].replace(' ', '_')}"
            scores[scheme, how] = evaluate(given, export(given, plain, target, scheme, keys))
    for how, weight in ((QAT, 0.0), (DISTILLED, 0.5))[: 2 if given.distil else 1]:
        keys = {"qat": scheme} | ({"qat_distill_weight": weight} if weight else {})
        trained = train(given, out / f"{name}-qat-{weight:g}", given.more, seed, **further, **keys)
        keys = {"qat": scheme} | ({"quantization_clip_search": False} if takes_search else {})
        exported = export(given, trained, out / f"{name}-qat-{weight:g}-export", scheme, keys)
        scores[scheme, how] = evaluate(given, exported)
    return scores


def one_seed(given: argparse.Namespace, seed: int) -> dict[tuple[str, str], Scores]:
    """By (scheme, how): the scores of the models of a seed, which are kept in a file for another start."""
    out = ROOT / given.out / f"seed-{seed}"
    kept = out / "scores.json"
    if given.reuse and kept.is_file():
        return {(scheme, how): tuple(values) for scheme, how, values in json.loads(kept.read_text())}
    start = given.start.resolve() if given.start else train(given, out / "start", given.steps, seed)
    further: Keys = {
        "model_name_or_path": start,
        "continue_training": True,
        "learning_rate": given.rate,
        "min_lr": given.rate / 100,
    }
    plain = train(given, out / "plain", given.more, seed, **further)
    scores = {("none", "at the start"): evaluate(given, start), ("none", "plain"): evaluate(given, plain)}
    for scheme in given.schemes:
        scores |= of_scheme(given, seed, scheme, plain, further)
    kept.write_text(json.dumps([[*names, values] for names, values in scores.items()], indent=1))
    return scores


def shown(value: float, name: str) -> str:
    """A score: losses as they are, shares in per cent."""
    return f"{value:.4f}" if name == "loss" else f"{100 * value:.2f} %"


def print_tables(seeds: list[int], found: list[dict[tuple[str, str], Scores]]) -> None:
    """The means over the seeds with the values of each, then what training for the scheme changes."""
    print(f"\n| exported in | model | {HEADS} |\n|---|---|---|---|---|")
    for scheme, how in found[0]:
        cells = []
        for column, name in enumerate(NAMES):
            values = [scores[scheme, how][column] for scores in found]
            each = ", ".join(shown(value, name).removesuffix(" %") for value in values)
            cells.append(shown(float(np.mean(values)), name) + (f" ({each})" if len(values) > 1 else ""))
        print(f"| {scheme} | {how} | " + " | ".join(cells) + " |")
    print(f"\nSeeds {', '.join(map(str, seeds))}. qat less each of the others, mean over the seeds and standard error:")
    print(f"\n| scheme | less | {HEADS} |\n|---|---|---|---|---|")
    for scheme, how in found[0]:
        if scheme == "none" or how == QAT:
            continue
        cells = []
        for column, name in enumerate(NAMES):
            values = [scores[scheme, QAT][column] - scores[scheme, how][column] for scores in found]
            error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            cells.append(f"{shown(float(np.mean(values)), name)} ± {shown(float(error), name)}")
        print(f"| {scheme} | {how} | " + " | ".join(cells) + " |")


def main() -> None:
    """Parse the arguments, train, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("keys", nargs="*", help="key=value for every command")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--more", type=int, default=200)
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of the further steps")
    parser.add_argument("--schemes", nargs="+", default=["wint4"], help="of wint4, wint8, wint4/8, w8a8, fp8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--questions", type=int, default=0, help="held-out questions, drawn anew; 0: the file's data")
    parser.add_argument("--distil", action="store_true", help="also train with distillation")
    parser.add_argument("--start", type=Path, help="a trained model to begin with, instead of --steps")
    parser.add_argument("--reuse", action="store_true", help="take the scores of finished seeds from --out")
    parser.add_argument("--out", type=Path, default=Path("demo_output/qat"))
    given = parser.parse_intermixed_args()
    given.data = {}
    if given.questions:
        data = ROOT / given.out / "data"
        words = ["--seed", "7", "--test", str(given.questions), "--demo-dir", str(data), "--examples-dir", ""]
        subprocess.run([sys.executable, str(ROOT / "tools" / "make_demo_data.py"), *words], check=True)
        given.data = {"train_dataset_path": data / "train.jsonl", "eval_dataset_path": data / "test.jsonl"}
    print_tables(given.seeds, [one_seed(given, seed) for seed in given.seeds])


if __name__ == "__main__":
    main()
