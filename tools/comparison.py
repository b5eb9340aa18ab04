"""What compare_balancing.py, compare_fp8.py and compare_moments.py share: they train one configuration several times,
each time with other keys, and compare what the runs left.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def arguments(description: str, steps: int, out: str) -> argparse.Namespace:
    """The command line: `config`, `keys` for every run, `steps`, and `out`, made absolute. `steps` and `out` are the
    defaults; a relative `out` is below the checkout.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("keys", nargs="*", help="key=value for every run, such as batch_size=1")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--out", type=Path, default=Path(out))
    found = parser.parse_intermixed_args()
    found.out = ROOT / found.out
    found.out.mkdir(parents=True, exist_ok=True)
    return found


def train(given: argparse.Namespace, name: str, keys: Mapping[str, object]) -> Path:
    """Train with these keys into a directory of its own, named after `name`. The keys of the command line come before
    those of the comparison.
    """
    target = given.out / name.replace(" ", "_").replace("+", "and")
    fixed = {
        "max_steps": given.steps,
        "evaluation_strategy": "no",
        "do_eval": False,
        "save_strategy": "no",
        "overwrite_output_dir": True,
        "disable_tqdm": True,
        "logging_steps": 50,
        "output_dir": target,
    }
    words = [f"{key}={value}" for key, value in (fixed | dict(keys)).items()]
    subprocess.run([sys.executable, "-m", "erniekit", "train", given.config, *given.keys, *words], cwd=ROOT, check=True)
    return target


def records(directory: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines that a run wrote."""
    return [json.loads(line) for line in (directory / file).read_text().splitlines()]


def losses(directory: Path, part: str = "loss") -> np.ndarray:
    """The loss of each step, or its part of this name where the run has it."""
    return np.array([record.get(part, record["loss"]) for record in records(directory) if "loss" in record])


def averaged(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(steps, means over the `width` steps that end there)."""
    width = min(width, len(values))
    return np.arange(width, len(values) + 1), np.convolve(values, np.ones(width) / width, "valid")


def figure_of(width: float, height: float) -> Any:
    """An empty figure of matplotlib, in inches, which `savefig` writes without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def loss_and_distance(figure: Any, base: str) -> tuple[Any, Any]:
    """Two axes above one another with common steps: losses, and their distance from those of the variant `base`."""
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    lower.set_ylabel(f"from {base}")
    lower.set_xlabel("optimizer step")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    return upper, lower
