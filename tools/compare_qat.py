"""Training for a scheme against quantising afterwards: losses and answers of one model in 4 and 8 bits.

    python tools/compare_qat.py examples/configs/tiny/sft/run_sft_moe.yaml --steps 900 --more 300

Trains the model of the file for --steps; then, from there, for --more steps each: plainly, with `qat`, and with `qat`
and distillation. Everything is evaluated in the scheme (fake-quantised by round to nearest, as an export rounds), so
that the plain rows are quantisation after training.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(command: str, config: str, keys: dict[str, object], words: list[str]) -> None:
    """One erniekit command."""
    given = [f"{key}={value}" for key, value in keys.items()]
    subprocess.run([sys.executable, "-m", "erniekit", command, config, *words, *given], cwd=ROOT, check=True)


def train(config: str, words: list[str], target: Path, steps: int, **keys: object) -> Path:
    """Train into `target`, without evaluations and checkpoints on the way."""
    fixed = {
        "max_steps": steps,
        "output_dir": target,
        "save_strategy": "no",
        "evaluation_strategy": "no",
        "do_eval": False,
        "overwrite_output_dir": True,
        "disable_tqdm": True,
        "logging_steps": 50,
    }
    run("train", config, fixed | keys, words)
    return target


def evaluate(config: str, words: list[str], model: Path, scheme: str, answers: int) -> tuple[float, float]:
    """(evaluation loss, share of answers that match exactly; NaN without answers) of a model in a scheme."""
    target = model / f"eval_{scheme.replace('/', '_')}"
    keys: dict[str, object] = {"checkpoint": model, "eval_output": target, "output_dir": model, "qat": scheme}
    keys |= {"predict_with_generate": True, "max_evaluate_steps": answers} if answers else {}
    run("eval", config, keys, words)
    found = json.loads((target / "eval_results.json").read_text())
    return found["loss"], found.get("exact_match", float("nan"))


def main() -> None:
    """Parse the arguments, train, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("keys", nargs="*", help="key=value for every command")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--more", type=int, default=300)
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of the further steps")
    parser.add_argument("--schemes", nargs="+", default=["wint4", "w4a8", "w8a8"])
    parser.add_argument("--answers", type=int, default=0, help="evaluation batches, with generated answers; 0: losses")
    parser.add_argument("--start", type=Path, help="a trained model to begin with, instead of --steps")
    parser.add_argument("--out", type=Path, default=Path("demo_output/qat"))
    args = parser.parse_args()
    out = ROOT / args.out
    start = args.start.resolve() if args.start else train(args.config, args.keys, out / "start", args.steps)
    further = {
        "model_name_or_path": start,
        "continue_training": True,
        "learning_rate": args.rate,
        "min_lr": args.rate / 100,
    }
    plain = train(args.config, args.keys, out / "plain", args.more, **further)
    rows = []
    for scheme in ["none", *args.schemes]:
        models = {"at the start": start, f"{args.more} plain steps": plain}
        for name, distilled in () if scheme == "none" else (("qat", 0.0), ("qat, distilled", 0.5)):
            keys = further | {"qat": scheme} | ({"qat_distill_weight": distilled} if distilled else {})
            target = out / f"{scheme.replace('/', '_')}-{distilled:g}"
            models[f"{args.more} steps, {name}"] = train(args.config, args.keys, target, args.more, **keys)
        for name, model in models.items():
            rows.append((scheme, name, *evaluate(args.config, args.keys, model, scheme, args.answers)))
    print(f"\n{args.start or f'{args.steps} steps'}, then {args.more} more")
    print("| evaluated in | trained | loss | exact answers |\n|---|---|---|---|")
    for scheme, name, loss, exact in rows:
        print(f"| {scheme} | {name} | {loss:.4f} | {'-' if exact != exact else f'{exact:.1%}'} |")


if __name__ == "__main__":
    main()
