"""How long a checkpoint stops the training: written at once, and written beside it (use_async_save).

    python tools/bench_save.py --directory /somewhere/on/the/disk --rounds 5

A dense model of about 100 M parameters with its optimizer's state (1.2 GB) on one process; the two ways take turns,
each after a training step of 2048 tokens, which leaves the memory as it is when a run saves. "Blocked" is the time
until `CheckpointManager.save` returns. Trust the ratio: disk and other users of the machine decide the seconds.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from erniekit.utils import runtime

runtime.prepare()

import numpy as np  # noqa: E402
import paddle  # noqa: E402

from erniekit.checkpoint.manager import CheckpointManager  # noqa: E402
from erniekit.checkpoint.model_io import model_rank_files  # noqa: E402
from erniekit.checkpoint.reshard import Shares  # noqa: E402
from erniekit.models.config import ModelConfig  # noqa: E402
from erniekit.models.decoder import CausalLM  # noqa: E402
from erniekit.parallel.grad_sync import GradientSync  # noqa: E402
from erniekit.parallel.zero import ShardedParameters  # noqa: E402
from erniekit.training.adamw import AdamW, ParamRule  # noqa: E402
from erniekit.training.state import optimizer_rank_files  # noqa: E402

CONFIG: dict[str, Any] = {
    "model_type": "ernie4_5",
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def build(layers: int = CONFIG["num_hidden_layers"]) -> tuple[CausalLM, AdamW, GradientSync]:
    """The model with what trains it."""
    runtime.ensure_threads()
    paddle.seed(0)
    model = CausalLM(ModelConfig.from_dict(CONFIG | {"num_hidden_layers": layers}))
    rules = {name: ParamRule(1.0, 0.0) for name, _ in model.named_parameters()}
    parameters = ShardedParameters.single(model.named_parameters())
    return model, AdamW(parameters, rules, 0.9, 0.95, 1e-8), GradientSync(parameters)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", help="where to write (default: the system's temporary directory)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model, optimizer, sync = build()
    count = sum(p.size for p in model.parameters())
    print(f"{count / 1e6:.0f} M parameters, {3 * 4 * count / 1e9:.2f} GB a checkpoint")
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        manager = CheckpointManager(Path(directory), None)

        def save(step: int, background: bool) -> tuple[float, float]:
            """Seconds blocked, and until all was on disk."""
            tokens = np.random.default_rng(step).integers(0, 32000, (4, 512))
            model(tokens).sum().backward()
            optimizer.step(sync.finish(), 1e-6)
            sync.clear()
            began = time.perf_counter()
            portions = [model_rank_files(model, Shares.alone(), "pt"), optimizer_rank_files(optimizer, Shares.alone())]
            path = manager.save(step, lambda _: None, portions, background=background)
            blocked = time.perf_counter() - began
            manager.wait()
            total = time.perf_counter() - began
            shutil.rmtree(path)
            return blocked, total

        ratios = []
        for step in range(1, args.rounds + 1):
            at_once, (blocked, total) = save(2 * step, False)[0], save(2 * step + 1, True)
            ratios.append(blocked / at_once)
            print(f"at once {at_once:.2f} s; beside blocked {blocked:.2f} s of {total:.2f} s: {ratios[-1]:.1%}")
    print(f"blocked: {statistics.median(ratios):.1%} of a save at once (median)")


if __name__ == "__main__":
    main()
