"""The main job end to end on a CPU, as `make demo` runs it, for a dense and a sparse model: evaluate, train, evaluate,
export, chat.

Every step is a command a user can type; each is printed before it runs.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "三千零二十一写成数字"


def run(*args: str, stdin: str | None = None) -> str:
    """Run `erniekit ...` in the checkout, its messages on the terminal; returns what it wrote to stdout."""
    print(f"\n$ erniekit {' '.join(args)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "erniekit", *args], cwd=ROOT, input=stdin, stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"demo: `erniekit {args[0]}` failed with exit code {done.returncode}")
    return done.stdout


def demonstrate(name: str, extra: list[str]) -> dict[str, str]:
    """One model from a random start to an answer; returns its row of the table."""
    config = f"examples/configs/tiny/sft/run_sft_{name}.yaml"
    output = ROOT / "demo_output" / name
    print(f"\n===== {name} =====", flush=True)
    before_dir, after_dir = output / "eval_before", output / "eval_after"
    # An earlier demo's model in output_dir would be evaluated instead of the one that training starts from.
    untrained = f"output_dir={(output / 'no_model_yet').relative_to(ROOT)}"
    before = f"eval_output={before_dir.relative_to(ROOT)}"
    run("eval", config, "predict_with_generate=true", before, *extra, untrained)
    started = time.monotonic()
    run("train", config, "overwrite_output_dir=true", *extra)
    seconds = time.monotonic() - started
    run("eval", config, "predict_with_generate=true", f"eval_output={after_dir.relative_to(ROOT)}", *extra)
    run("export", config, "format=pt", *extra)
    exported = f"demo_output/{name}/export"
    run("convert", exported, f"{exported}_paddle", "format=paddle")
    answer = run("chat", config, *extra, stdin=f"{QUESTION}\n").strip().splitlines()[-1]
    before, after = (json.loads((d / "eval_results.json").read_text()) for d in (before_dir, after_dir))
    summary = json.loads((output / "summary.json").read_text())
    return {
        "model": name,
        "parameters": f"{summary['num_parameters'] / 1e6:.2f} M",
        "steps": str(summary["steps"]),
        "seconds": f"{seconds:.0f}",
        "tokens/s": f"{summary['median_step_tokens_per_second']:.0f}",
        "exact match before": f"{100 * before['exact_match']:.1f} %",
        "exact match after": f"{100 * after['exact_match']:.1f} %",
        "loss before": f"{before['loss']:.3f}",
        "loss after": f"{after['loss']:.4f}",
        QUESTION: answer.removeprefix("Assistant: "),
    }


def print_table(rows: list[dict[str, str]]) -> None:
    """Rows as columns, so that the table stays narrow."""
    print()
    for key in rows[0]:
        print(f"{key:<24}" + "".join(f"{row[key]:>16}" for row in rows))


def main() -> None:
    """Parse the arguments, run, print the table, fail if the task was not learnt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["dense", "moe"], choices=["dense", "moe"])
    parser.add_argument("--require", type=float, default=90.0, help="exact match in %% below which the demo fails")
    parser.add_argument("overrides", nargs="*", help="key=value for every command, e.g. max_steps=20")
    args = parser.parse_args()
    started = time.monotonic()
    rows = [demonstrate(name, args.overrides) for name in args.models]
    print_table(rows)
    seconds = time.monotonic() - started
    print(f"\nThe whole demo took {seconds:.0f} s. Its output is in demo_output/: loss.png, metrics.jsonl, the models.")
    print("The command that did this is .venv/bin/erniekit: try `.venv/bin/erniekit help`.")
    missed = [row["model"] for row in rows if float(row["exact match after"].split()[0]) < args.require]
    if missed:
        sys.exit(f"demo: {', '.join(missed)} stayed below {args.require:.0f} % exact match")


if __name__ == "__main__":
    main()
