"""Shows what a policy writes and how its rewards develop: samples.jsonl, sample answers in the log, reward.png and
rollout.png.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from erniekit.checkpoint.model_dir import resuming_command, where_it_resumes
from erniekit.training.reporting.base import RunInfo, StepMetrics
from erniekit.training.reporting.metrics_file import FILE_NAME as METRICS_FILE
from erniekit.training.reporting.metrics_file import drop_later_records, read_metrics
from erniekit.training.reporting.picture import Picture
from erniekit.training.reporting.plot import column, smooth
from erniekit.utils import atomic, log, plot_text
from erniekit.utils.errors import TrainError
from erniekit.utils.wording import count_of

FILE_NAME = "samples.jsonl"
_WIDTH = 60  # characters of a text in the log
_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#2563c9", "#d9480f", "#0f766e", "#9333ea", "#6b7280"


class CompletionLog(Picture):
    """Writes output_dir/samples.jsonl, a line for each completion that was generated, and logs a few of them. Draws
    reward.png and rollout.png. It does nothing for methods that generate nothing.

    A run that resumes after step s first drops the lines of later steps.
    """

    name = "reward.png, rollout.png"
    numbers = METRICS_FILE

    def __init__(self, writes: bool, num_shown: int, every: int) -> None:
        """`writes`: whether samples.jsonl is written. num_shown, every: completions that are logged, and the optimizer
        steps between two times that they are.
        """
        super().__init__()
        self._writes, self._num_shown, self._every = writes, num_shown, every
        self._file: TextIO | None = None
        self._command: Callable[[], str] = str  # what resumes the run, as text
        self._shown_at: int | None = None

    def on_start(self, run: RunInfo) -> None:
        """Remember the run's directory, and shorten a file that a killed run left."""
        super().on_start(run)
        self._command = partial(resuming_command, run.config)
        drop_later_records(run.output_dir / FILE_NAME, run.start_step)

    def on_step(self, metrics: StepMetrics) -> None:
        """Append the completions that were generated for the step, and log some of them."""
        if not metrics.samples or self._directory is None:
            return
        if self._writes:
            self._write(self._directory / FILE_NAME, metrics.samples)
        is_due = self._shown_at is None or metrics.step >= self._shown_at + self._every
        if self._num_shown and is_due:
            self._shown_at = metrics.step
            for line in sample_lines(metrics.samples, self._num_shown):
                log.info(line)

    def on_end(self, summary: dict[str, Any]) -> None:
        """Draw the whole run, and close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        super().on_end(summary)

    def _write(self, path: Path, samples: Sequence[dict[str, Any]]) -> None:
        try:
            if self._file is None:
                self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 open for the run
            self._file.write("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
            self._file.flush()
        except OSError as error:
            raise TrainError(
                f"{path}: cannot be written ({error.strerror}). Make room, or set log_completions: false, then run "
                f"{self._command()} again: {where_it_resumes(path.parent)}."
            ) from error

    def draw_run(self, directory: Path) -> None:
        """Draw metrics.jsonl, once it has a reward."""
        records = list(read_metrics(directory / METRICS_FILE))
        if not any(record.get("reward") is not None for record in records):
            return
        for name, draw in (("reward.png", draw_rewards), ("rollout.png", draw_rollouts)):
            with atomic.new_file(directory / name) as temporary:
                draw(records, temporary, directory.name)


def sample_lines(samples: Sequence[dict[str, Any]], count: int) -> list[str]:
    """`count` completions as lines for the log: of each prompt in turn one, the best and the worst by turns."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        by_prompt.setdefault(sample["source"], []).append(sample)
    lines = []
    for number, group in enumerate(list(by_prompt.values())[:count]):
        ranked = sorted(group, key=lambda sample: -1e30 if sample["reward"] is None else sample["reward"])
        sample = ranked[-1 if number % 2 == 0 else 0]
        reward = "none" if sample["reward"] is None else f"{sample['reward']:.3g}"
        prompt = sample["prompt"][-1]["content"]
        lines.append(
            f"sample of step {sample['step']}: {_short(prompt)!r} -> {_short(sample['completion'])!r}  reward {reward}"
            f"  advantage {sample['advantage']:.2f}  "
            f"{count_of(sample['length'], 'token')}{', cut' * sample['truncated']}"
        )
    return lines


def _short(text: Any) -> str:
    shown = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= _WIDTH else f"{shown[: _WIDTH - 25]} ... {shown[-20:]}"


Panel = tuple[str, tuple[tuple[str, str, str], ...]]  # axis label, (column, label, color) of each curve


def draw_rewards(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw rewards and accuracies, the length of completions, and how many groups teach nothing, as a PNG."""
    panels: list[Panel] = [
        (
            "reward",
            (
                ("reward", "used prompts", _BLUE),
                ("reward_generated", "all generated", _GREY),
                ("eval_reward", "evaluation, greedy", _ORANGE),
            ),
        ),
        (
            "accuracy",
            (
                ("accuracy", "used prompts", _BLUE),
                ("pass_at_g", "some completion right", _GREEN),
                ("eval_accuracy", "evaluation, greedy", _ORANGE),
            ),
        ),
        (
            "share",
            (
                ("frac_reward_zero_std", "groups without variance", _PURPLE),
                ("sampling/accept_rate", "generated prompts used", _GREEN),
                ("completions/clipped_ratio", "truncated", _ORANGE),
            ),
        ),
        ("tokens of a completion", (("completions/mean_length", "mean", _BLUE),)),
    ]
    _draw(records, path, title, panels)


def draw_rollouts(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw how far generating and training are apart, clipping, entropy, and where the time goes, as a PNG."""
    panels: list[Panel] = [
        (
            "|log p(train) - log p(generate)|",
            (
                ("rollout/logp_difference", "mean", _BLUE),
                ("rollout/logp_difference/max", "largest", _GREY),
            ),
        ),
        (
            "share",
            (
                ("rollout/masked_fraction", "tokens masked", _PURPLE),
                ("clip_ratio/low", "clipped, low", _BLUE),
                ("clip_ratio/high", "clipped, high", _ORANGE),
            ),
        ),
        ("entropy (nats)", (("entropy", "mean over tokens", _GREEN),)),
        (
            "seconds",
            (
                ("time/generation", "generating", _BLUE),
                ("time/scoring", "scoring", _ORANGE),
                ("time/log_probs", "log-probabilities", _PURPLE),
                ("seconds", "training step", _GREEN),
            ),
        ),
    ]
    _draw(records, path, title, panels)


@plot_text.in_any_script()
def _draw(records: list[dict[str, Any]], path: Path, title: str, panels: Sequence[Panel]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Rewards that do not say what is right leave accuracies without a curve.
    panels = [panel for panel in panels if any(len(column(records, name)[0]) for name, *_ in panel[1])] or panels
    figure = Figure(figsize=(9, 2.4 * len(panels)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, curves) in zip(
        figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels, strict=True
    ):
        for name, what, color in curves:
            _curve(axes, *column(records, name), what, color)
        axes.set_ylabel(label)
        if label in ("accuracy", "share"):
            axes.set_ylim(-0.03, 1.03)
        if axes.get_lines():
            axes.legend(frameon=False, fontsize=8)
        axes.grid(True, color=_GREY, alpha=0.25, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.axes[0].set_title(title, loc="left", fontsize=11, parse_math=False)
    figure.axes[-1].set_xlabel("optimizer step")
    figure.align_ylabels()
    figure.savefig(path, format="png")


def _curve(axes: Any, steps: np.ndarray, values: np.ndarray, what: str, color: str) -> None:
    if not len(steps):
        return
    if "evaluation" in what:
        axes.plot(steps, values, color=color, linewidth=1.2, marker="o", markersize=5, label=what)
        return
    is_long = len(steps) >= 60
    marker = "o" if len(steps) == 1 else None
    shown = "_" if is_long else what  # matplotlib leaves labels that begin with _ out of the legend
    axes.plot(steps, values, color=color, alpha=0.3 if is_long else 1, linewidth=1.2, marker=marker, label=shown)
    if is_long:
        axes.plot(steps, smooth(values), color=color, linewidth=2, label=what)
