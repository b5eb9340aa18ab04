"""Prints what `plan` says beside what Paddle's allocator counts, for the layouts of tests/support/memory_truth.py, as
the table of docs/plan-accuracy.md: python tools/plan_truth.py [WORD ...]  (only layouts whose names contain a word)
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.memory_truth import LAYOUTS, measure, prepare, run_keys
from support.worlds import World

EXACT = ("parameters", "gradients", "state", "reference")


def main(words: list[str]) -> None:
    """Measure, and print a row for each rank."""
    worlds = {2: World(2), 4: World(4)}
    print("| layout | rank | parameters, gradients, state | activations, measured | planned | |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(directory)
        for layout in LAYOUTS:
            if words and not any(word in layout.name for word in words):
                continue
            keys = run_keys(layout, directory)
            if layout.ranks == 1:
                found = [measure(keys)]
            else:
                found = worlds[layout.ranks].run(measure, keys=keys, timeout=600)
            for rank, values in enumerate(found):
                measured, planned = values["measured"], values["planned"]
                wrong = [kind for kind in EXACT if measured[kind] != planned[kind]]
                cells = [f"differ: {', '.join(wrong)}" if wrong else "equal"]
                error = planned["activations"] / measured["activations"] - 1
                cells += [f"{measured['activations']:,}", f"{planned['activations']:,}", f"{error:+.1%}"]
                print(f"| {layout.name} | {rank} | " + " | ".join(cells) + " |", flush=True)
    for world in worlds.values():
        world.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
