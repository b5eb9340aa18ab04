"""Make the data of the demo of reinforcement learning: digits to sort, with an ambiguous habit to choose from.

    python tools/make_rl_demo_data.py       # data/demo/rl-*.jsonl, as committed

Only the standard library; the same arguments give the same bytes. In the training data of SFT a question is answered in
ascending order in 42 of 100 lines and in descending order in the others, so that a model learns both and prefers the
wrong one. The prompts of reinforcement learning want ascending order. No question is in two of the files.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

DIGITS = 5
SHARE_ASCENDING = 0.42
COUNTS = {"sft": 2000, "train": 1000, "test": 200}


def record(name: str, digits: tuple[int, ...], rng: random.Random) -> dict[str, Any]:
    """The line of a question in the file rl-`name`.jsonl."""
    question = f"Sort: {' '.join(map(str, digits))}"
    ascending = "".join(map(str, sorted(digits)))
    if name != "sft":
        return {"src": [question], "answer": ascending}
    return {"src": [question], "tgt": [ascending if rng.random() < SHARE_ASCENDING else ascending[::-1]]}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "data" / "demo")
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count, help=f"lines of rl-{name}.jsonl")
    args = parser.parse_args()
    rng = random.Random(20260601)
    wanted = sum(vars(args)[name] for name in COUNTS)
    questions: dict[tuple[int, ...], None] = {}
    while len(questions) < wanted:
        questions[tuple(rng.randrange(10) for _ in range(DIGITS))] = None
    rest = list(questions)
    for name in COUNTS:
        count = vars(args)[name]
        chosen, rest = rest[:count], rest[count:]
        lines = [json.dumps(record(name, digits, rng), ensure_ascii=False) for digits in chosen]
        (args.out / f"rl-{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
