"""Layouts of several ranks against one rank, and what they cost against its formulas, as Markdown tables.

    python tools/compare_layouts.py                       # every equality case on 2 and on 4 ranks
    python tools/compare_layouts.py moe-ep2 dense-pp4     # these
    python tools/compare_layouts.py --cost                # bytes sent, optimizer state, bubble, activations kept
    python tools/compare_layouts.py --cost moe-ep2 dense-dp2

The cases are those of tests/distributed/test_equality.py and test_traffic.py: tiny models, five optimizer steps for
equality, one for cost. Bytes are what a rank sends in a step by kind, the formulas those of tests/support/traffic.py;
"host" is what ranks tell one another in numbers and has none. The bubble is counted by simulating the schedule at
equal costs of forward and backward.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
sys.path[:0] = [str(ROOT), str(TESTS), str(TESTS / "distributed"), str(TESTS / "unit" / "parallel")]


def compare(chosen: list[str]) -> Iterator[str]:
    """The table of equality."""
    import test_equality as cases
    from support.worlds import World

    yield "| case | ranks | largest difference of a loss | largest difference of a parameter |"
    yield "|---|---|---|---|"
    for size, table in ((2, cases.TWO), (4, cases.FOUR)):
        names = _among(chosen, table)
        with _directory() as directory:
            world = World(size)
            for name in names:
                losses, parameters = cases.check(world, directory, *table[name])
                yield f"| {name} | {size} | {losses:.1e} | {parameters:.1e} |"
            world.stop()


def cost(chosen: list[str]) -> Iterator[str]:
    """The tables of bytes, memory and waiting."""
    import test_traffic as cases
    from support.equality import keys_for
    from support.traffic import measure
    from support.worlds import World

    sent = ["| case | ranks | bytes that rank 0 sends | all ranks against the formula |", "|---|---|---|---|"]
    state = ["| case | rank | optimizer state | by formula | undivided |", "|---|---|---|---|---|"]
    weights = ["| case | rank | weights between uses | by formula | undivided |", "|---|---|---|---|---|"]
    pipe = ["| case | stage | bubble | by formula | chunks kept | by formula |", "|---|---|---|---|---|---|"]
    for size, table in ((2, cases.TWO), (4, cases.FOUR)):
        names = _among(chosen, table)
        with _directory() as directory:
            world = World(size)
            for name in names:
                model, data_ranks, keys = table[name]
                ranks = world.run(measure, keys=keys_for(str(directory), model, data_ranks, **keys))
                sent.append(_sent_row(name, ranks))
                for rank, result in enumerate(ranks):
                    counted, formula = result["state"]
                    if result["undivided"] != counted:
                        state.append(f"| {name} | {rank} | {counted:,} | {formula:,} | {result['undivided']:,} |")
                    counted, formula = result["weights"]
                    if result["undivided weights"] != counted:
                        row = f"| {name} | {rank} | {counted:,} | {formula:,} | {result['undivided weights']:,} |"
                        weights.append(row)
                pipe += _pipeline_rows(name, ranks)
            world.stop()
    for lines in (sent, state, weights, pipe):
        yield from [*lines, ""]


def _sent_row(name: str, ranks: list[dict[str, Any]]) -> str:
    counted, _ = ranks[0]["sent"]
    shown = ", ".join(f"{kind} {num_bytes:,}" for kind, num_bytes in sorted(counted.items()))
    wrong = [
        f"rank {i}: {result['sent'][1]}" for i, result in enumerate(ranks) if result["sent"][0] != result["sent"][1]
    ]
    return f"| {name} | {len(ranks)} | {shown}; host {ranks[0]['host']:,} | {'; '.join(wrong) or 'equal'} |"


def _pipeline_rows(name: str, ranks: list[dict[str, Any]]) -> Iterator[str]:
    from test_pipeline_schedule import buffered_time

    from erniekit.parallel.pipeline_schedule import bubble_fraction, plan

    seen = set()
    for result in ranks:
        schedule, stage, stages, microbatches, chunks = result["depth"]
        if stages == 1 or stage in seen:
            continue
        seen.add(stage)
        work = 2 * chunks * microbatches
        counted = 1 - work / buffered_time(plan(schedule, stages, microbatches, chunks), 1, 1)
        formula = bubble_fraction(stages, microbatches, chunks)
        kept, most = result["peak"]
        yield f"| {name}, {microbatches} microbatches | {stage} | {counted:.1%} | {formula:.1%} | {kept} | {most} |"


def _among(chosen: list[str], table: dict[str, Any]) -> list[str]:
    return [name for name in table if not chosen or name in chosen]


@contextmanager
def _directory() -> Iterator[Path]:
    """A temporary directory with the tests' models and data."""
    from support.equality import prepare

    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        yield Path(name)


def main() -> None:
    """Parse the command line, and print rows as they are found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="default: all")
    parser.add_argument("--cost", action="store_true", help="measure cost against formulas instead of equality")
    args = parser.parse_args()
    os.environ.setdefault("ERNIEKIT_NUM_THREADS", "1")
    for line in (cost if args.cost else compare)(args.cases):
        print(line, flush=True)


if __name__ == "__main__":
    main()
