"""Run the benchmarks that a commit is remembered by, and write one JSON line about it.

    python tools/bench_all.py                         # everything, about 15 minutes on a quiet machine
    python tools/bench_all.py --parts start neighbour
    python tools/bench_all.py --draw                  # only the picture, from the lines that there are

Each part is a benchmark of this directory with fewer rounds than its own default. The line goes to the end of
docs/benchmarks.jsonl, and docs/images/benchmarks.png is drawn over the commits in it that were measured on this kind of
processor; of a commit with several lines the last number counts. A line has the commit (and whether files differed from
it), the processor, the versions, the load at the start and the numbers: ratios to torch, transformers and TRL in the
same run, shares of the rate of a matrix product, peak memory, seconds. Without torch, transformers or TRL their ratios
are missing, and `missing` names the packages.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import comparison

from erniekit.utils import runtime

ROOT = Path(__file__).resolve().parents[1]
LINES, PICTURE = ROOT / "docs/benchmarks.jsonl", ROOT / "docs/images/benchmarks.png"
PEERS = ("torch", "transformers", "trl")

Numbers = Iterator[tuple[str, float]]


def of_steps(results: list[dict[str, Any]], packed: str = "") -> Numbers:
    """The numbers of bench_step.py."""
    for result in results:
        name = f"step {result['preset']}{packed}"
        yield f"{name}: tokens/s", result["tokens_per_second"]["ours"]
        yield f"{name}: share of the matrix-product rate", result["share"]["ours"]
        yield f"{name}: peak MB", result["about"]["ours"]["peak_mb"]
        if "ratio" in result:
            yield f"{name}: ours / torch", result["ratio"]
            yield f"{name}: ours / torch by processor time", result["processor_ratio"]
            yield f"{name}: torch's peak MB", result["about"]["torch"]["peak_mb"]


def of_packed_steps(results: list[dict[str, Any]]) -> Numbers:
    """Those of rows with 16 documents."""
    return of_steps(results, " packed")


def of_bf16(results: list[dict[str, Any]]) -> Numbers:
    """Those of steps whose products round their factors to bf16."""
    for result in results:
        name = f"step {result['preset']} bf16"
        yield f"{name}: tokens/s", result["tokens_per_second"]["ours-bf16"]
        yield f"{name}: peak MB", result["about"]["ours-bf16"]["peak_mb"]
        for pair, (ratio, *_) in result["of"].items():
            if pair.startswith("ours-bf16 / "):
                yield f"{name}: {pair}", ratio


def of_sft(results: list[dict[str, Any]]) -> Numbers:
    """The numbers of bench_sft.py."""
    for result in results:
        name = f"sft, batches of {result['batch']}"
        yield f"{name}: tokens/s", result["useful_tokens_per_second"]["ours"]
        yield f"{name}: peak MB", result["peak_mb"]["ours"]
        for side, ratio in result["ratios"].items():
            yield f"{name}: ours / {side}", ratio


def of_generation(results: list[dict[str, Any]]) -> Numbers:
    """The numbers of bench_generate.py."""
    for result in results:
        name = f"generate {result['model']} {result['choice']}, batch {result['batch']}"
        yield f"{name}: tokens/s", result["ours"]
        if "ratio" in result:
            yield f"{name}: ours / torch", result["ratio"]


def of_neighbour(result: dict[str, Any]) -> Numbers:
    """The numbers of bench_neighbour.py."""
    found = result["variants"]["product"]
    yield f"neighbour {result['preset']}: tokens/s alone", found["tokens_per_second"]
    for name, value in found.items():
        if name.startswith("slower_beside_"):
            yield f"neighbour {result['preset']}: times slower beside {name.rpartition('_')[2]}", value


def of_start(result: dict[str, Any]) -> Numbers:
    """The numbers of bench_start.py."""
    yield "start: s until the first step", result["step 1/"]
    yield "start: processor s until the first step", result["CPU s"]


def of_resume(result: dict[str, Any]) -> Numbers:
    """The numbers of bench_resume.py."""
    for cache, found in result.items():
        yield f"resume {cache}: GB/s", found["resuming"]
        yield f"resume {cache}: share of the disk's rate", found["share"]


# name of a part -> (script and arguments, the same at the smallest size, what it found)
PARTS: dict[str, tuple[str, str, Callable[[Any], Numbers]]] = {
    "start": ("bench_start.py --rounds 3", "bench_start.py --rounds 1", of_start),
    "step": (
        "bench_step.py small tiny tinymoe --rounds 5",
        "bench_step.py tiny --rounds 1 --warmup 1 --batch 1 --seq 16 --only ours",
        of_steps,
    ),
    "packed": (
        "bench_step.py tiny --documents 16 --rounds 5",
        "bench_step.py tiny --documents 2 --rounds 1 --warmup 1 --batch 1 --seq 16 --only ours",
        of_packed_steps,
    ),
    "bf16": (
        "bench_step.py small tiny tinymoe --rounds 3 --bf16",
        "bench_step.py tiny --rounds 1 --warmup 1 --batch 1 --seq 16 --only ours-bf16",
        of_bf16,
    ),
    "sft": (
        "bench_sft.py --batches 8 --rounds 5",
        "bench_sft.py --num-samples 60 --batches 4 --rounds 1 --against",
        of_sft,
    ),
    "generate": (
        "bench_generate.py tiny --batches 1 8 64 --rounds 3 --turn 0.5",
        "bench_generate.py tiny --batches 1 --rounds 1 --turn 0 --tokens 3 --only ours",
        of_generation,
    ),
    "neighbour": (
        "bench_neighbour.py tinymoe --rounds 3 --seconds 2",
        "bench_neighbour.py tiny --batch 1 --seq 16 --rounds 1 --seconds 0 --spinning 1",
        of_neighbour,
    ),
    "resume": ("bench_resume.py --rounds 3", "bench_resume.py --rounds 1 --layers 1", of_resume),
}
# Of PARTS, those whose scripts stop without the package.
NEEDS = {"sft": "trl"}


def is_installed(package: str) -> bool:
    """Whether a package can be imported here."""
    return importlib.util.find_spec(package) is not None


def run_part(name: str, smallest: bool) -> dict[str, float]:
    """Run one part and give its numbers."""
    full, small, read = PARTS[name]
    words = (small if smallest else full).split()
    if name in NEEDS and not is_installed(NEEDS[name]) and "--against" not in words:
        words.append("--against")
    print(f"\n== {name}: {' '.join(words)}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "found.json"
        command = [sys.executable, str(ROOT / "tools" / words[0]), *words[1:], "--json", str(target)]
        subprocess.run(command, cwd=ROOT, check=True)
        return dict(read(json.loads(target.read_text())))


def machine() -> dict[str, Any]:
    """The processor, and how busy it is."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    kind = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return {
        "processor": f"{fields.get('model name', 'unknown')} ({kind})",
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
    }


def commit() -> dict[str, Any]:
    """The commit, and whether files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return {
        "commit": git("rev-parse", "--short=8", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--", "erniekit", "tools")),
        "committed": git("show", "-s", "--format=%cI", "HEAD"),
    }


def versions() -> dict[str, str]:
    """The versions of what is compared."""
    names = ("paddlepaddle", "numpy", *PEERS)
    installed = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
    return {"python": sys.version.split()[0]} | {name: installed[name] for name in names if name in installed}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that there are."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# Titles of the picture's parts, and the ends of the names of the numbers that they show.
_SHOWN = {
    "times as fast as": (
        "ours / torch",
        "ours-bf16 / torch-autocast",
        "ours-bf16 / torch-bf16",
        "ours / trl",
        "ours / trl-fp32",
    ),
    "share of the matrix-product rate": ("share of the matrix-product rate",),
    "peak MB": ("peak MB",),
    "times slower beside spinning programs": ("beside 1", "beside 4"),
    "seconds until the first step": ("until the first step",),
}


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """The numbers over the commits that were measured on the last line's kind of processor."""
    here = lines[-1]["processor"]
    numbers: dict[str, dict[str, float]] = {}
    for line in lines:
        if line["processor"] == here:
            numbers.setdefault(line["commit"], {}).update(line["numbers"])
    names = list(dict.fromkeys(name for found in numbers.values() for name in found))
    figure = comparison.figure_of(9, 3 * len(_SHOWN))
    from matplotlib import colormaps

    figure.suptitle(here, fontsize=9)
    for axes, (title, ends) in zip(figure.subplots(len(_SHOWN), 1, sharex=True), _SHOWN.items(), strict=True):
        axes.set_prop_cycle("color", colormaps["tab20"].colors)  # more lines than the usual ten colours
        for name in (name for name in names if name.endswith(ends)):
            points = [(place, found[name]) for place, found in enumerate(numbers.values()) if name in found]
            label = name.removesuffix(f": {title}")
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=label)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xticks(range(len(numbers)), list(numbers), rotation=45, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Parse the command line, run the parts, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--draw", action="store_true", help="run nothing")
    parser.add_argument("--smallest", action="store_true", help="at sizes that say nothing, to see that it runs")
    parser.add_argument("--lines", type=Path, default=LINES, help="where the line goes")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    if not args.draw:
        line: dict[str, Any] = commit() | {"measured": datetime.now(UTC).isoformat(timespec="seconds")} | machine()
        line |= {"versions": versions(), "missing": [name for name in PEERS if not is_installed(name)]}
        if line["missing"]:
            print(f"not installed: {', '.join(line['missing'])}: the ratios to these are left out")
        line |= {"seconds": {}, "numbers": {}}
        for name in args.parts:
            if name == "bf16" and "avx512_bf16" not in runtime.cpu_flags():
                print("bf16: left out, this processor has no such products")
                continue
            began = time.perf_counter()
            line["numbers"] |= {key: float(f"{value:.4g}") for key, value in run_part(name, args.smallest).items()}
            line["seconds"][name] = round(time.perf_counter() - began)
        with open(args.lines, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"\nwritten: {args.lines}, {sum(line['seconds'].values())} s in all")
    lines = read_lines(args.lines)
    if lines:
        draw(lines, args.picture)
        print(f"drawn: {args.picture}")


if __name__ == "__main__":
    main()
