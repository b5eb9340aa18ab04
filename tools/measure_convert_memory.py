"""Measure the peak memory of a conversion, each in a process of its own.

    python tools/measure_convert_memory.py [--megabytes 400] [--directory DIR]

Writes a synthetic bfloat16 checkpoint (untied, with experts and multi-token prediction), converts it -PT -> -Paddle ->
-PT with small shards and with one large file, and prints the resident memory that each conversion added to what the
process had after its imports, beside the bound: the largest shard plus the largest tensor.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from erniekit.checkpoint.dtypes import num_bytes
from erniekit.checkpoint.model_dir import write_configs
from erniekit.checkpoint.safetensors_header import Plan
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.export.convert import convert
from erniekit.models.config import ModelConfig
from erniekit.models.weights import logical_tensors

MB = 10**6


def synthetic_config(megabytes: int) -> ModelConfig:
    """A quarter of the bytes in each of embeddings and head, the rest in layers."""
    size = 512
    layer = 2 * size * (3 * 64 * 256 + 4 * size)  # bytes of a sparse layer, roughly
    return ModelConfig(
        model_type="ernie4_5_moe",
        vocab_size=megabytes * MB // (8 * size),
        hidden_size=size,
        intermediate_size=2048,
        num_hidden_layers=max(2, round(megabytes * MB / 2 / layer)),
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=False,
        moe_num_experts=64,
        moe_k=6,
        moe_intermediate_size=256,
        moe_layer_start_index=1,
        moe_layer_end_index=4096,
        num_nextn_predict_layers=1,
        dtype="bfloat16",
    )


def make_checkpoint(directory: Path, config: ModelConfig) -> None:
    """Random bits of ordinary size under the names of a -PT checkpoint."""
    rng = np.random.default_rng(0)
    plan: Plan = []
    for logical in logical_tensors(config):
        plan += [(piece.name, "F32" if logical.keep_fp32 else "BF16", piece.shape) for piece in logical.pt]
    with Writer(directory, plan, "100MB") as writer:
        for name, dtype, shape in plan:
            bits = rng.integers(0x3C00, 0x3F00, shape, np.uint16)
            writer.write(name, bits.astype(np.float32) if dtype == "F32" else bits)
    write_configs(directory, config, "pt")


def peak() -> float:
    """Peak resident megabytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB


def run_one(source: Path, target: Path, layout: str, shard: str) -> None:
    """In a process of its own: convert, and print megabytes before, megabytes added, seconds."""
    before, start = peak(), time.perf_counter()
    convert(source, target, "paddle" if layout == "paddle" else "pt", shard)
    print(f"{before:.0f} {peak() - before:.0f} {time.perf_counter() - start:.1f}")


def bound(directory: Path) -> float:
    """The largest weight file plus the largest tensor of a directory, in megabytes."""
    reader = Reader(directory)
    shard = max(file.stat().st_size for file in directory.glob("*.safetensors"))
    return (shard + max(num_bytes(*reader.info(name)) for name in reader.keys())) / MB  # noqa: SIM118


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--directory", type=Path, default=None, help="where to write (default: a temporary directory)")
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_checkpoint(args.make, synthetic_config(args.megabytes))
        return
    if args.step:
        source, target, layout, shard = args.step
        run_one(Path(source), Path(target), layout, shard)
        return
    root = Path(tempfile.mkdtemp(dir=args.directory))
    again = [sys.executable, __file__, "--megabytes", str(args.megabytes)]
    try:
        subprocess.run([*again, "--make", str(root / "pt")], check=True)
        print("conversion            shards   before   added   bound   seconds   (MB)")
        for shard in ("100MB", "5GB"):
            for layout, source in (("paddle", "pt"), ("pt2", "paddle")):
                target = root / layout
                shutil.rmtree(target, ignore_errors=True)
                step = [str(root / source), str(target), layout, shard]
                done = subprocess.run([*again, "--step", *step], check=True, stdout=subprocess.PIPE, text=True)
                before, added, seconds = done.stdout.split()
                name = "-PT -> -Paddle" if layout == "paddle" else "-Paddle -> -PT"
                print(f"{name:20}{shard:>8}{before:>9}{added:>8}{bound(target):>8.0f}{seconds:>10}")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
