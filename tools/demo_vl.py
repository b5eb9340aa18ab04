"""Vision-language training end to end on a CPU, as `make demo-vl` runs it: pretraining on text, on pictures with the
text part frozen, on both together, then fine-tuning on questions about pictures and clips.

Every step is a command a user can type; each is printed before it runs. The held-out questions are answered before and
after fine-tuning, the text task after the first and after the third stage. Some pictures with the model's answers are
drawn to demo_output/vl/samples.png. It fails if a task was not learnt well enough.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("demo_output/vl")
DATA = OUT / "data"
CONFIGS = "examples/configs/tiny/vl"
TASKS = {  # what is asked, and the percentage of right answers without which the demo fails
    "digit": ("which digit", 90.0),
    "count": ("how many", 90.0),
    "colour": ("what colour", 90.0),
    "chart": ("which bar is the tallest", 90.0),
    "word": ("read this word", 30.0),  # 32 words: 3 by guessing
    "box": ("where (IoU 0.5)", 80.0),
    "clip": ("what happens, and when", 20.0),  # 4 directions, 3 seconds: 8 by guessing
}
MAX_TEXT_LOSS = 2.0  # points of the text task from the first stage to the third
TEXT_OPTIONS = (  # the text task: to write a number in digits
    "stage=SFT",
    "chat_template=text",
    "eval_dataset_type=erniekit",
    f"eval_dataset_path={(DATA / 'text-test.jsonl').as_posix()}",
)
STAGES = ("stage1_text", "stage2_vision", "stage3_joint")


def run(*command: str) -> None:
    """Run a command of this interpreter in the checkout, printed first."""
    shown = ["erniekit", *command[2:]] if command[:2] == ("-m", "erniekit") else ["python", *command]
    print(f"\n$ {' '.join(shown)}", flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"demo-vl: this command failed with exit code {done.returncode}")


def train(name: str, overrides: Sequence[str]) -> None:
    """Run one stage."""
    run("-m", "erniekit", "train", f"{CONFIGS}/{name}.yaml", "overwrite_output_dir=true", *overrides)


def answers(config: str, name: str, *options: str) -> list[dict[str, Any]]:
    """Let a model answer the questions of its evaluation data; the lines of its predictions."""
    results = OUT / name
    command = ("-m", "erniekit", "eval", f"{CONFIGS}/{config}.yaml", "predict_with_generate=true")
    run(*command, f"eval_output={results.as_posix()}", *options)
    text = (ROOT / results / "eval_predictions.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def percent(rows: Sequence[dict[str, Any]]) -> float:
    """The share of right answers; a box is right if it overlaps with the reference by half (IoU)."""
    right = [row["score"] >= 0.5 if row.get("reference_kind") == "boxes" else row["exact_match"] for row in rows]
    return 100 * sum(right) / max(len(right), 1)


def by_task(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Predictions by the task whose file they are from."""
    return {task: [row for row in rows if Path(row["source"]).name.startswith(f"{task}-")] for task in TASKS}


def question_of(row: dict[str, Any]) -> str:
    """The question of a prediction, as its data file has it."""
    path, line = row["source"].rsplit(":", 1)
    record = json.loads((ROOT / path).read_text("utf-8").splitlines()[int(line) - 1])
    return next(part["text"] for part in record["messages"][0]["content"] if part["type"] == "text")


def draw_samples(tasks: dict[str, list[dict[str, Any]]], path: Path, per_task: int = 4) -> None:
    """Some held-out pictures, each with its question, the model's answer, and the box of the answer where it is one.
    Red: the answer is wrong.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import font_manager
    from matplotlib.patches import Rectangle
    from PIL import Image

    from erniekit.rewards.picture_answers import read_boxes

    font = font_manager.FontProperties(fname=str(ROOT / "tools/fonts/NotoSansSC-Subset.ttf"), size=7)
    figure, axes = plt.subplots(len(tasks), per_task, figsize=(2.6 * per_task, 1.9 * len(tasks)))
    for row_axes, rows in zip(axes, tasks.values(), strict=True):
        for axis, row in zip(row_axes, rows[:per_task], strict=False):
            source = ROOT / DATA / (row.get("images") or row.get("videos"))[0]
            frames = sorted(source.glob("*.png")) if source.is_dir() else [source]
            pictures = [Image.open(frame).convert("RGB") for frame in frames]
            strip = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
            left = 0
            for picture in pictures:
                strip.paste(picture, (left, 0))
                left += picture.width
            axis.imshow(strip)
            for x1, y1, x2, y2 in read_boxes(row["prediction"]).boxes:
                width, height = strip.width / 1000, strip.height / 1000
                corner, sides = (x1 * width, y1 * height), ((x2 - x1) * width, (y2 - y1) * height)
                axis.add_patch(Rectangle(corner, *sides, fill=False, edgecolor="magenta", linewidth=1.5, clip_on=False))
            colour = "black" if percent([row]) == 100 else "red"
            axis.set_title(f"{question_of(row)}\n{row['prediction'][:48]}", fontproperties=font, color=colour)
        for axis in row_axes:
            axis.axis("off")
    figure.suptitle("Question and answer; wrong answers are red, boxes of answers magenta", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse the arguments, run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=1400, help="rows of each task to train on")
    parser.add_argument("--test", type=int, default=100, help="rows of each task that are held out")
    parser.add_argument("--no-require", action="store_true", help="end well also if a task was not learnt well enough")
    parser.add_argument("overrides", nargs="*", help="key=value for every training, e.g. max_steps=20")
    args = parser.parse_args()
    started = time.monotonic()
    run("tools/make_vl_demo_data.py", DATA.as_posix(), f"--train={args.train}", f"--test={args.test}")
    text: list[float] = []
    for stage in STAGES:
        train(stage, args.overrides)
        if stage != "stage2_vision":  # in which the text part is frozen
            text.append(percent(answers(stage, f"eval_text_{stage}", *TEXT_OPTIONS)))
    model = f"model_name_or_path={(OUT / STAGES[-1]).as_posix()}"
    untrained = f"output_dir={(OUT / 'no_model_yet').as_posix()}"
    before = by_task(answers("run_sft", "eval_before", model, untrained))
    train("run_sft", args.overrides)
    after = by_task(answers("run_sft", "eval_after"))
    draw_samples(after, ROOT / OUT / "samples.png")
    print(f"\n{'right answers, held out':<28}{'before VL-SFT':>16}{'after':>10}")
    for task, (title, _) in TASKS.items():
        print(f"{title:<28}{percent(before[task]):>14.1f} %{percent(after[task]):>8.1f} %")
    print(f"{'text task':<28}{text[0]:>14.1f} % after stage 1, {text[1]:.1f} % after stage 3")
    print(f"\nThe whole demo took {time.monotonic() - started:.0f} s. Pictures with answers: {OUT}/samples.png.")
    missed = [title for task, (title, least) in TASKS.items() if percent(after[task]) < least]
    missed += ["the text task after stage 3"] if text[1] < text[0] - MAX_TEXT_LOSS else []
    if missed and not args.no_require:
        sys.exit(f"demo-vl: not learnt well enough: {', '.join(missed)}")


if __name__ == "__main__":
    main()
