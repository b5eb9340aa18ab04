"""Preference optimisation end to end on a CPU, as `make demo-align` runs it: SFT on answers in two styles, then LoRA
DPO towards whole sentences, each judged by what the model then writes to held-out questions.

Every step is a command a user can type; each is printed before it runs.
"""

import argparse
import json
import sys
import time

from demo import ROOT, print_table, run
from make_demo_data import Item, whole_sentence

SFT, DPO = "examples/configs/tiny/sft/run_sft_styles.yaml", "examples/configs/tiny/dpo/run_dpo_lora.yaml"
OUTPUT = "demo_output/align"
QUESTION = "三千零二十一写成数字"


def judge(name: str, model: list[str]) -> dict[str, str]:
    """Let a model answer the held-out questions: how many answers are whole sentences, and how many are right."""
    folder = f"{OUTPUT}/{name}"
    run("eval", SFT, "predict_with_generate=true", f"eval_output={folder}", *model)
    lines = (ROOT / folder / "eval_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    wanted = right = 0
    for line in map(json.loads, lines):
        prompt = line["prompt"].rsplit("User: ", 1)[1].split("\n")[0]
        sentence = whole_sentence(Item(fact=(), question=prompt, answer=line["reference"]))
        frame = sentence.split(line["reference"])
        wanted += line["prediction"].startswith(frame[0]) and line["prediction"].endswith(frame[1])
        right += line["prediction"] in (sentence, line["reference"])
    return {
        "wanted style": f"{100 * wanted / len(lines):.1f} %",
        "right answers": f"{100 * right / len(lines):.1f} %",
    }


def rewards(model: list[str]) -> dict[str, str]:
    """What `erniekit eval` says of the preference pairs held out; without a reference, so that the model before
    training can be judged, too: how often the chosen answer is the likelier one.
    """
    run("eval", DPO, "reference_free=true", f"eval_output={OUTPUT}/rewards", *model)
    found = json.loads((ROOT / OUTPUT / "rewards" / "eval_results.json").read_text())
    return {
        "reward accuracy": f"{100 * found['reward_accuracy']:.1f} %",
        "reward margin": f"{found['reward_margin']:.2f}",
    }


def main() -> None:
    """Run, print the table, fail if the style was not learnt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--require", type=float, default=90.0, help="wanted answers in %% below which the demo fails")
    parser.add_argument("--keep-sft", action="store_true", help="go on from demo_output/styles instead of training it")
    args = parser.parse_args()
    started = time.monotonic()
    if not args.keep_sft:
        run("train", SFT, "overwrite_output_dir=true", "evaluation_strategy=no", "do_eval=false", "save_strategy=no")
    full, lora = (
        ["fine_tuning=Full", "output_dir=./demo_output/styles"],
        ["fine_tuning=LoRA", "output_dir=./demo_output/dpo_lora"],
    )
    before = {"model": "after SFT"} | judge("before", []) | rewards(full)
    run("train", DPO, "overwrite_output_dir=true")
    after = (
        {"model": "after LoRA DPO"} | judge("after", [*lora, "model_name_or_path=./demo_output/styles"]) | rewards([])
    )
    run("export", DPO, "format=pt")
    run("chat", DPO, stdin=f"{QUESTION}\n")
    print_table([before, after])
    print(f"\nThe whole demo took {time.monotonic() - started:.0f} s. Its output is in demo_output/.")
    if float(after["wanted style"].split()[0]) < args.require:
        sys.exit(f"demo-align: fewer than {args.require:.0f} % of the answers have the wanted style")


if __name__ == "__main__":
    main()
