"""Time and memory of a training step on one long document, from 2,048 to 131,072 tokens, on one rank and on several
that share the document (context_parallel_degree).

    python tools/bench_length.py --out docs/images/length.png
    python tools/bench_length.py --tokens 2048 4096 --degrees 1 2 4 --exchange a2a

One tiny model, one row of one document, one microbatch a step; each rank has one thread. Numbers are those of the
second step: processor seconds of attention between the projections, and of everything else, of the slowest rank; the
most bytes that tensors took on a rank, beside what `erniekit plan` says; the most memory of its process. Losses and
gradient norms of all degrees must agree to 1e-5, or the tool stops.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TOLERANCE = 1e-5
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
HEADINGS = ("tokens", "ranks", "attention, s", "rest, s", "tensors, MiB", "planned", "process, MiB", "loss")


def main() -> None:
    """Parse the command line, measure, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << bit for bit in range(11, 18)])
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--exchange", choices=("p2p", "a2a"), default="p2p")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--out", type=Path, help="a picture; the numbers are written beside it as .jsonl")
    args = parser.parse_args()
    rows = list(_measured(args))
    if args.out is not None:
        args.out.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        draw(rows, args.out)
        print(f"\n{args.out}")


def _measured(args: argparse.Namespace) -> Any:
    from support.length import measure
    from support.tiny_directories import write_lines
    from support.worlds import World

    print("| " + " | ".join(HEADINGS) + " |")
    print("|" + "---|" * len(HEADINGS), flush=True)
    first: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "train.jsonl"
        write_lines(data, [{"text": "a line of text"}])  # opened, not read
        for degree in args.degrees:
            world = World(degree)
            for tokens in args.tokens:
                keys = _keys(data, tokens, degree, args)
                ranks = world.run(measure, keys=keys, timeout=24 * 3600)
                row = _worst(ranks) | {"tokens": tokens, "ranks": degree}
                _require_equal(row, first.setdefault(tokens, row))
                print(_line(row), flush=True)
                yield row
            world.stop()


def _keys(data: Path, tokens: int, degree: int, args: argparse.Namespace) -> dict[str, Any]:
    return SHAPE | {
        "model_name_or_path": str(ROOT / "examples" / "models" / "tiny-dense"),
        "continue_training": False,
        "stage": "PT",
        "train_dataset_type": "erniekit",
        "train_dataset_path": str(data),
        "output_dir": str(data.parent / "out"),
        "num_hidden_layers": args.layers,
        "max_seq_len": tokens,
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "compute_type": "fp32",
        "dataloader_num_workers": 0,
        "context_parallel_degree": degree,
        "cp_comm_type": args.exchange,
    }


def _worst(ranks: list[dict[str, float]]) -> dict[str, float]:
    """The slowest rank's seconds, and the largest memory; measured and planned are of the rank with most tensors."""
    slowest = max(ranks, key=lambda rank: rank["attention"] + rank["rest"])
    largest = max(ranks, key=lambda rank: rank["peak"])
    return slowest | {name: largest[name] for name in ("peak", "planned", "resident")}


def _require_equal(row: dict[str, float], first: dict[str, float]) -> None:
    for name in ("loss", "norm"):
        if abs(row[name] - first[name]) > TOLERANCE:
            raise SystemExit(
                f"{row['tokens']} tokens: {name} {row[name]:.7f} on {row['ranks']} ranks, {first[name]:.7f} on "
                f"{first['ranks']}"
            )


def _line(row: dict[str, float]) -> str:
    mib = 2**20
    cells = [f"{row['tokens']:,}", f"{row['ranks']}", f"{row['attention']:.3g}", f"{row['rest']:.3g}"]
    cells += [f"{row['peak'] / mib:.1f}", f"{row['planned'] / row['peak'] - 1:+.1%}", f"{row['resident'] / mib:.0f}"]
    return "| " + " | ".join([*cells, f"{row['loss']:.6f}"]) + " |"


def draw(rows: list[dict[str, float]], out: Path) -> None:
    """Two panels over the number of tokens, both axes logarithmic: processor seconds, and bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    degrees = sorted({row["ranks"] for row in rows})
    for number, degree in enumerate(degrees):
        _curves(time_axes, memory_axes, [row for row in rows if row["ranks"] == degree], f"C{number}")
    _guides(time_axes, rows)
    time_axes.set(ylabel="processor seconds of a step on the slowest rank")
    memory_axes.set(ylabel="MiB of tensors on a rank, at most")
    ticks = sorted({row["tokens"] for row in rows})
    for axes in (time_axes, memory_axes):
        axes.set(xscale="log", yscale="log", xlabel="tokens of the one document")
        axes.set_xticks(ticks, [f"{tick // 1024}K" if tick >= 1024 else str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _curves(time_axes: Any, memory_axes: Any, rows: list[dict[str, float]], colour: str) -> None:
    """The curves of one degree."""
    chosen = sorted(rows, key=lambda row: row["tokens"])
    tokens, degree = [row["tokens"] for row in chosen], int(chosen[0]["ranks"])
    ranks = f"{degree} rank{'s' if degree > 1 else ''}"
    for name, style in (("attention", "o-"), ("rest", "s--")):
        time_axes.plot(tokens, [row[name] for row in chosen], style, color=colour, label=f"{name}, {ranks}")
    for name, style, word in (("peak", "o-", "measured"), ("planned", "x:", "planned")):
        mebibytes = [row[name] / 2**20 for row in chosen]
        memory_axes.plot(tokens, mebibytes, style, color=colour, label=f"{word}, {ranks}")


def _guides(axes: Any, rows: list[dict[str, float]]) -> None:
    """Thin lines of slope 2 and 1 through the last points of one rank."""
    fewest = min(row["ranks"] for row in rows)
    chosen = [row for row in rows if row["ranks"] == fewest]
    last = max(chosen, key=lambda row: row["tokens"])
    tokens = sorted(row["tokens"] for row in chosen)
    for name, power in (("attention", 2), ("rest", 1)):
        through = [last[name] * (count / last["tokens"]) ** power for count in tokens]
        axes.plot(tokens, through, color="0.6", linewidth=0.8, zorder=0)


if __name__ == "__main__":
    main()
