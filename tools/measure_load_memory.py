"""Measure the peak memory of loading a model whose frozen base is held in few bits, each in a process of its own.

    python tools/measure_load_memory.py [--model moe|dense] [--directory DIR]

Writes a synthetic bfloat16 checkpoint of about 100 million weights, loads it in every precision, and prints the bytes
that the loaded model holds beside the resident memory that loading added to what the process had after its imports.
The bound: the model as held, plus two copies of its largest tensor in float32 (as read, and as put together). glibc
hands out memory in steps of 64 MB here (erniekit/utils/runtime.py).
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

from measure_convert_memory import MB, make_checkpoint, peak

from erniekit.build import load_model
from erniekit.models.config import ModelConfig
from erniekit.models.products import held_weights
from erniekit.models.weights import logical_tensors
from erniekit.precision.quantized_weight import QuantizedWeights
from erniekit.precision.weight_only import SCHEMES

SHARED = {
    "vocab_size": 8000,
    "head_dim": 64,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
MODELS = {
    "dense": ModelConfig(
        model_type="ernie4_5",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=16,
        **SHARED,
    ),
    "moe": ModelConfig(
        model_type="ernie4_5_moe",
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        moe_num_experts=16,
        moe_k=2,
        moe_intermediate_size=512,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=4096,
        **SHARED,
    ),
}


def run_one(directory: Path, compute_type: str) -> None:
    """In a process of its own: load, and print megabytes held, megabytes that loading added at most, seconds."""
    before, start = peak(), time.perf_counter()
    product = QuantizedWeights(SCHEMES[compute_type]) if compute_type in SCHEMES else None
    model = load_model(directory, product=product)
    seconds, added = time.perf_counter() - start, peak() - before
    held = sum(parameter.element_size() * parameter.size for parameter in model.parameters())
    held += sum(product.num_bytes(projection.weight) for projection, product in held_weights(model).values())
    print(f"{held / MB:.0f} {added:.0f} {seconds:.1f}")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="moe")
    parser.add_argument("--directory", type=Path, default=None, help="where to write (default: a temporary directory)")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        run_one(Path(args.step[0]), args.step[1])
        return
    config = MODELS[args.model]
    sizes = [logical.shape for logical in logical_tensors(config)]
    count = sum(prod(shape) for shape in sizes)
    largest = max(prod(shape) for shape in sizes) * 4 / MB
    root = Path(tempfile.mkdtemp(dir=args.directory))
    try:
        make_checkpoint(root / "model", config)
        print(f"{args.model}: {count / 1e6:.0f} M weights, largest tensor {largest:.0f} MB in float32")
        print("compute_type    held   peak   bound   seconds   (MB)")
        for compute_type in ("fp32", *SCHEMES):
            step = [sys.executable, __file__, "--step", str(root / "model"), compute_type]
            done = subprocess.run(step, check=True, stdout=subprocess.PIPE, text=True)
            held, added, seconds = done.stdout.splitlines()[-1].split()
            print(f"{compute_type:12}{held:>8}{added:>7}{float(held) + 2 * largest:>8.0f}{seconds:>10}")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
