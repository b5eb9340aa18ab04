"""What the benchmarks share: each side in a long-lived process of its own that is told, over a pipe, when to run.

So no side sees another's threads, allocator or environment, and only one runs at a time.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PAUSE = 0.3  # seconds between turns: the idle side's worker threads stop spinning after 0.2


def serve() -> tuple[Iterator[Any], Callable[[dict[str, Any]], None]]:
    """In the worker: the commands as they come, and a function that answers one. What libraries print goes to stderr.

    The commands end when the parent closes the pipe. Every answer carries the process's peak memory.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(value | {"peak_mb": peak}), file=answers, flush=True)

    return (json.loads(line) for line in sys.stdin), answer


class Worker:
    """A side, as its parent sees it: `script --serve side`, started with a job."""

    def __init__(self, script: str, side: str, job: dict[str, Any]) -> None:
        self.side = side
        # The environment is the machine's own; each side sets itself up, as it does for its users.
        command = [sys.executable, script, "--serve", side]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.peak_mb = 0.0
        self.about = self.ask(job)

    def ask(self, command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.side}: the worker ended with code {self.process.wait()}; its error is above")
        answer = json.loads(line)
        self.peak_mb = answer["peak_mb"]
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def best_rate(product: Callable[[], Any], size: int, seconds: float = 0.2) -> float:
    """FLOP/s of the fastest product of two fp32 matrices [size, size] within so many seconds."""
    end, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        began = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


class OurStep:
    """A training step of erniekit, timed by part, of the model in the job. A subclass gives the `loss` of a batch.
    `environment` of the job: variables that are set before anything is imported.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        os.environ.update(job.get("environment", {}))
        sys.path.insert(0, str(ROOT))
        from erniekit.utils import runtime

        runtime.prepare()  # before the first import of paddle
        import paddle

        from erniekit.config.schema import Config
        from erniekit.models.config import ModelConfig
        from erniekit.models.decoder import CausalLM
        from erniekit.parallel.grad_sync import GradientSync
        from erniekit.parallel.zero import ShardedParameters
        from erniekit.training.adamw import AdamW, parameter_rules
        from erniekit.utils.thread_waits import ThreadWaits

        self.threads = runtime.set_threads(job["threads"])
        paddle.seed(0)
        self.paddle = paddle
        self.model = CausalLM(ModelConfig.from_dict(job["config"]))
        self.model.train()
        named = [(name, p) for name, p in self.model.named_parameters() if not p.stop_gradient]
        parameters = ShardedParameters.single(named)
        self.sync = GradientSync(parameters)
        self.optimizer = AdamW(parameters, parameter_rules(self.model, Config(weight_decay=0.01)), 0.9, 0.999, 1e-8)
        self.num_parameters = sum(int(np.prod(p.shape)) for _, p in named)
        self.waits = ThreadWaits()

    def loss(self, *batch: Any) -> Any:
        """The mean loss of a batch, every position of which has a label."""
        raise NotImplementedError(type(self).__name__)

    def head_loss(self, inputs: Any, labels_T: np.ndarray) -> Any:
        """The mean loss of what models.inputs made of a batch."""
        from erniekit.losses.lm import linear_cross_entropy

        hidden = self.model.model(inputs)
        weights = self.paddle.full([labels_T.size], 1.0 / labels_T.size)
        labels = self.paddle.to_tensor(labels_T)
        return linear_cross_entropy(hidden.normed, self.model.output_head(), labels, weights)[0]

    def step(self, *batch: Any) -> tuple[float, list[float]]:
        """The loss, and the times before and after each part."""
        from erniekit.parallel.grad_clip import clip_, global_norm
        from erniekit.parallel.process_group import ALONE

        times = [time.perf_counter()]
        loss = self.loss(*batch)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        gradients = self.sync.finish()
        clip_(gradients, global_norm(gradients, self.sync.parameters.entries, ALONE), 1.0)
        self.optimizer.step(gradients, 1e-4)
        self.sync.clear()
        self.waits.after_step()
        times.append(time.perf_counter())
        return loss.item(), times

    def rate(self, size: int) -> float:
        """See best_rate."""
        x, y = (self.paddle.randn([size, size]) for _ in range(2))
        return best_rate(lambda: self.paddle.matmul(x, y), size)

    def profile(self, run: Callable[[], Any]) -> None:
        """Time by operator over `run`, on stderr. The times are on the host and include a node's children."""
        from paddle import profiler

        with profiler.Profiler(targets=[profiler.ProfilerTarget.CPU]) as recorder:
            run()
        recorder.summary(sorted_by=profiler.SortedKeys.CPUTotal, op_detail=False, thread_sep=False, time_unit="ms")


class TorchStep:
    """The same step in torch + transformers. A subclass makes the `model` and gives the `loss` of a batch."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(job["threads"])
        torch.manual_seed(0)
        self.torch, self.threads = torch, job["threads"]
        self.model = self.build(job["config"]).train()
        # The fused kernel is what transformers' Trainer takes by default.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
        self.num_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def build(self, config: dict[str, Any]) -> Any:
        """The model of a config.json."""
        raise NotImplementedError(type(self).__name__)

    def loss(self, *batch: Any) -> Any:
        """See OurStep."""
        raise NotImplementedError(type(self).__name__)

    def step(self, *batch: Any) -> tuple[float, list[float]]:
        """See OurStep."""
        times = [time.perf_counter()]
        loss = self.loss(*batch)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        return loss.item(), times

    def rate(self, size: int) -> float:
        """See best_rate."""
        x, y = (self.torch.randn(size, size) for _ in range(2))
        return best_rate(lambda: self.torch.matmul(x, y), size)

    def profile(self, run: Callable[[], Any]) -> None:
        """Time by operator over `run`, on stderr."""
        with self.torch.profiler.profile() as recorder:
            run()
        print(recorder.key_averages().table(sort_by="self_cpu_time_total", row_limit=30), file=sys.stderr)


def serve_steps(
    commands: Iterator[Any],
    answer: Callable[[dict[str, Any]], None],
    side: OurStep | TorchStep,
    next_batch: Callable[[], tuple[Any, ...]],
    warmup: int,
    about: dict[str, Any],
) -> None:
    """In the worker: warm up and answer `about`; then each command is a number of steps to run, "rate" for that of a
    matrix product, or "profile".
    """

    def run(steps: int) -> list[list[float]]:
        rows = []
        for _ in range(steps):
            batch = next_batch()
            cpu = time.process_time()
            loss, times = side.step(*batch)
            rows.append([loss, *np.diff(times).tolist(), time.process_time() - cpu])
        return rows

    warm = run(warmup)
    answer({"parameters": side.num_parameters, "threads": side.threads, "first_loss": warm[0][0]} | about)
    for command in commands:
        if command == "profile":
            side.profile(lambda: run(3))
            answer({})
        elif command == "rate":
            answer({"rate": side.rate(1024)})
        else:
            answer({"rows": run(command)})
