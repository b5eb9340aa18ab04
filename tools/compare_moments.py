"""What the storage of AdamW's moments (moment_dtype) does to the loss of one run: a table and a picture.

    python tools/compare_moments.py examples/configs/tiny/sft/run_sft_dense.yaml batch_size=1 max_seq_len=64
    adam_beta2=0.999 --steps 500 --out demo_output/moments

Trains the same model on the same rows once for each storage, from one seed; keys are given to every run. Prints for
each the largest distance of a step's loss from that with fp32 moments, the mean loss of the last tenth of the steps and
its distance in per cent, and the bytes of the optimizer's state for each parameter. Draws losses.png.
"""

from pathlib import Path

import comparison
import numpy as np

# Host memory for the state (offload_optim) changes no bit: tests/unit/training/test_state_storage.py.
VARIANTS = {"fp32": "fp32", "bf16": "bf16", "8 bits": "8bit"}


def bytes_a_parameter(config: str, moment_dtype: str) -> float:
    """Of the optimizer's state, by formula."""
    from erniekit import config as configuration
    from erniekit.models.config import ModelConfig
    from erniekit.models.decoder import CausalLM
    from erniekit.parallel.memory import state_bytes
    from erniekit.parallel.zero import ShardedParameters

    cfg = configuration.load(config, {"output_dir": "unused"}, "train")
    model = CausalLM(ModelConfig.from_dir(comparison.ROOT / str(cfg.model_name_or_path)))
    entries = ShardedParameters.single(model.named_parameters()).entries.values()
    return state_bytes(entries, moment_dtype=moment_dtype) / sum(entry.size for entry in entries)


def draw(curves: dict[str, np.ndarray], path: Path) -> None:
    """Losses above, their distances from the first variant below, both averaged over a twentieth of the steps."""
    figure, first = comparison.figure_of(8, 6), next(iter(curves.values()))
    above, below = comparison.loss_and_distance(figure, next(iter(curves)))
    width = max(1, len(first) // 20)
    for name, curve in curves.items():
        above.plot(*comparison.averaged(curve, width), label=name, linewidth=1)
        below.plot(*comparison.averaged(curve - first, width), linewidth=1)
    above.set_ylabel("loss")
    above.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """See the module."""
    given = comparison.arguments(__doc__, 500, "demo_output/moments")
    curves = {}
    for name, moment_dtype in VARIANTS.items():
        keys = {"moment_dtype": moment_dtype, "lr_scheduler_type": "cosine"}
        curves[name] = comparison.losses(comparison.train(given, moment_dtype, keys))
    first = next(iter(curves.values()))
    last = max(1, given.steps // 10)
    print(
        "| moments | largest distance of a step | mean loss of the last tenth | relative | bytes of state a parameter |"
    )
    print("|---|---|---|---|---|")
    for name, curve in curves.items():
        end, base = curve[-last:].mean(), first[-last:].mean()
        distance = np.abs(curve - first).max()
        state = bytes_a_parameter(given.config, VARIANTS[name])
        print(f"| {name} | {distance:.4f} | {end:.4f} | {end / base - 1:+.2%} | {state:.2f} |")
    draw(curves, given.out / "losses.png")
    print(f"drawn: {given.out / 'losses.png'}")


if __name__ == "__main__":
    main()
