"""The planner's step time against runs that others have published (tests/fixtures/published).

    python tools/plan_accuracy.py             # prints the table of docs/plan-accuracy.md
    python tools/plan_accuracy.py --write     # writes it into that page
    python tools/plan_accuracy.py --check     # fails if the page's table differs
    python tools/plan_accuracy.py --only "405B 16384" --timeline x.png   # all ranks of the first such run, simulated

Efficiencies come from the sources in erniekit/plan/hardware.yaml; no number is fitted to one run.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from published_runs import Published, published

from erniekit.plan.outlook import JITTER
from erniekit.plan.simulate import Disturbance, simulate_step
from erniekit.plan.timeline import draw_timeline

PAGE = Path(__file__).resolve().parents[1] / "docs" / "plan-accuracy.md"
BEGIN, END = "<!-- table: tools/plan_accuracy.py -->", "<!-- end of table -->"


def table(runs: Sequence[Published]) -> str:
    """The table in Markdown, with the medians."""
    lines = ["| run | GPUs | published | planned | error |", "| --- | --- | --- | --- | --- |"]
    errors: dict[str, list[float]] = {"calibration": [], "held_out": []}
    for run in runs:
        error = run.planned / run.reached - 1
        errors[run.group].append(abs(error))
        star = " *" if run.group == "calibration" else ""
        lines.append(
            f"| {run.name}{star} | {run.gpus} | {run.shown(run.reached)} | {run.shown(run.planned)} | {error:+.0%} |"
        )
    lines += ["", "| runs | number | median of the absolute errors |", "| --- | --- | --- |"]
    groups = {
        "all": [*errors["calibration"], *errors["held_out"]],
        "without a star": errors["held_out"],
        "with a star": errors["calibration"],
    }
    lines += [f"| {name} | {len(each)} | {statistics.median(each):.1%} |" for name, each in groups.items() if each]
    return "\n".join(lines)


def draw(run: Published, file: Path) -> None:
    """Simulate all ranks of a run with jitter and draw the slowest data rank."""
    step = simulate_step(run.time, Disturbance(JITTER))
    after = [stage.after for stage in run.time.stages]
    finished = step.timeline.finished[:, step.slowest].tolist()
    title = (
        f"{run.name}: {run.gpus} ranks, {step.seconds:.2f} s a step with a jitter of {JITTER:.0%}, slowest data rank"
    )
    draw_timeline(file, step.timeline.events, after, finished, title)


def main() -> None:
    """Print, write or check the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--kinds", action="store_true", help="also print where the time of each run goes")
    parser.add_argument("--only", default="", help="only runs whose name contains this")
    parser.add_argument("--timeline", type=Path, help="draw the simulated step of the first run into this file")
    args = parser.parse_args()
    runs = published(args.only)
    if args.timeline:
        draw(runs[0], args.timeline)
        return
    shown = table(runs)
    if args.kinds:
        for run in runs:
            total = run.time.seconds
            kinds = ", ".join(f"{kind} {part / total:.0%}" for kind, part in run.time.seconds_by_kind.items())
            print(f"{run.name}: {total:.3g} s: {kinds}; MFU {run.time.mfu():.1%}")
    if not (args.write or args.check):
        print(shown)
        return
    text = PAGE.read_text("utf-8")
    new = re.sub(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n\n{shown}\n\n{END}", text, flags=re.DOTALL
    )
    if args.check and new != text:
        sys.exit(f"{PAGE.name} differs from what the planner computes: run tools/plan_accuracy.py --write")
    if args.write:
        PAGE.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
