"""Round to nearest: how fast weights become codes, beside one pass over memory, and a whole export beside the disk.

    OMP_NUM_THREADS=1 python tools/bench_quantise.py --rounds 5
    OMP_NUM_THREADS=1 python tools/bench_quantise.py --rounds 3 --export 1000 --wide --directory /a/large/disk

Weights are normal, [out, in] fp32. The first table has MB of fp32 weights a second of processor time, the best of the
rounds: of choosing scales, of encoding, of decoding, and of a copy of the same array, which is one pass over memory.
With --export, a synthetic bfloat16 model of that many MB is exported in some schemes: seconds of the clock and of the
processor, in each round beside what it is compared with. `memory`: one pass over the source, read from the page cache
into a buffer, and its weights copied once as fp32. `disk`: as many bytes as the export has written, in one sequential
write with fsync. `ratio` is the export's time over the longer of both, the best and the worst of the rounds. The
matrices are small, 512 x 256; with --wide they are those of ERNIE-4.5-0.3B. OMP_NUM_THREADS is the number of threads.
"""

import argparse
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measure_convert_memory import make_checkpoint, synthetic_config

from erniekit.export.quantise import Quantisation, write_quantised
from erniekit.models.config import ModelConfig
from erniekit.precision.codes import FP8_BLOCK, FP8_TENSOR, CodeSpec, choose_scales, decode, encode, full_range
from erniekit.precision.packing import pack_for_kernels, pack_words
from erniekit.quantize.quantiser import RoundToNearest
from erniekit.quantize.schemes import Options
from erniekit.utils.runtime import keep_freed_memory, wanted_threads

SPECS: dict[str, tuple[CodeSpec, bool]] = {
    "int8 channel": (full_range(8), False),
    "int4 group 128": (full_range(4, 128), False),
    "int4 group 128, search": (full_range(4, 128), True),
    "fp8 block": (FP8_BLOCK, False),
    "fp8 tensor": (FP8_TENSOR, False),
}


def rate(action: Callable[[], object], size: int, rounds: int) -> float:
    """MB/s of `size` bytes in the fastest round, in processor time."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        action()
        best = min(best, time.process_time() - begin)
    return size / max(best, 1e-9) / 1e6


def bench_codes(num_out: int, num_in: int, rounds: int) -> None:
    weight = np.random.default_rng(0).normal(size=(num_out, num_in)).astype(np.float32)
    print(f"{'[' + str(num_out) + ', ' + str(num_in) + '], MB/s':24} {'scales':>8} {'encode':>8} {'decode':>8}")
    for name, (spec, search) in SPECS.items():
        scales = choose_scales(weight, spec, search)
        codes = encode(weight, scales, spec)
        rates = (
            rate(lambda: choose_scales(weight, spec, search), weight.nbytes, rounds),  # noqa: B023 - called here
            rate(lambda: encode(weight, scales, spec), weight.nbytes, rounds),  # noqa: B023
            rate(lambda: decode(codes, scales, spec), weight.nbytes, rounds),  # noqa: B023
        )
        print(f"{name:24} {rates[0]:8.0f} {rates[1]:8.0f} {rates[2]:8.0f}")
    codes = np.random.default_rng(1).integers(-8, 8, weight.shape).astype(np.int8)
    print(f"{'packing, 4 bits':24} words {rate(lambda: pack_words(codes, 4), weight.nbytes, rounds):.0f}", end="")
    print(f", order of kernels {rate(lambda: pack_for_kernels(codes, 4), weight.nbytes, rounds):.0f}")
    print(f"{'a copy':24} {rate(weight.copy, weight.nbytes, rounds):8.0f}")


def write_seconds(path: Path, size: int) -> float:
    """Seconds of the clock that the disk takes for a sequential write of `size` bytes and its fsync."""
    block = np.random.default_rng(0).bytes(1 << 24)
    begin = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    path.unlink()
    return seconds


def pass_seconds(source: Path) -> float:
    """Seconds of the clock for one pass over memory in one thread: 16 MB at a time of the source's files are read from
    the page cache, and as many weights in fp32 are copied.
    """
    bits, weights, copied = np.empty(1 << 23, np.uint16), np.ones(1 << 23, np.float32), np.ones(1 << 23, np.float32)
    begin = time.perf_counter()
    for path in source.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(bits.data):
                np.copyto(copied[: count // 2], weights[: count // 2])
    return time.perf_counter() - begin


def wide_config(megabytes: int) -> ModelConfig:
    """A dense model with the matrices of ERNIE-4.5-0.3B, 1024 x 3072, a quarter of the bytes in embeddings and head."""
    config = synthetic_config(megabytes)
    layer = 2 * (3 * 1024 * 3072 + 2 * 1024 * (2048 + 256))  # bytes
    return dataclasses.replace(
        config,
        model_type="ernie4_5",
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        head_dim=128,
        vocab_size=megabytes * 10**6 // (16 * 1024),
        num_hidden_layers=max(1, round(megabytes * 10**6 * 3 / 4 / layer)),
        moe_num_experts=0,
        num_nextn_predict_layers=0,
    )


def bench_export(config: ModelConfig, directory: Path, rounds: int) -> None:
    source = directory / "source"
    make_checkpoint(source, config)
    size = sum(file.stat().st_size for file in source.iterdir()) / 1e6
    print(f"{size:.0f} MB of bfloat16; MB of them a second, {wanted_threads()} threads")
    print(f"{'':14} {'written':>8} {'clock':>6} {'processor':>9} {'memory':>7} {'disk':>6}   ratio")
    for name, search in (("wint8", False), ("wint4", False), ("wint4", True), ("fp8", False)):
        quantisation = Quantisation(name, Options(), lambda source, scheme: RoundToNearest(search))  # noqa: B023
        times = []
        for _ in range(rounds):
            os.sync()
            begin, busy = time.perf_counter(), time.process_time()
            report = write_quantised(source, directory / "target", "pt", quantisation, "5GB")
            seconds, busy = time.perf_counter() - begin, time.process_time() - busy
            shutil.rmtree(directory / "target")
            os.sync()
            disk = write_seconds(directory / "written", report.num_bytes)
            times.append((seconds, busy, pass_seconds(source), disk))
        clock, busy, memory, disk = (min(column) for column in zip(*times, strict=True))
        ratios = [seconds / max(memory, disk) for seconds, _, memory, disk in times]
        print(
            f"{name + (', search' if search else ''):14} {report.num_bytes / 1e6:5.0f} MB {size / clock:6.0f} "
            f"{size / busy:9.0f} {size / memory:7.0f} {size / disk:6.0f}   {min(ratios):.2f} to {max(ratios):.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=int, default=4096)
    parser.add_argument("--in", type=int, default=2560, dest="num_in")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--export", type=int, metavar="MB")
    parser.add_argument("--wide", action="store_true", help="with the matrices of ERNIE-4.5-0.3B")
    parser.add_argument("--directory", type=Path, help="where --export writes; else the system's temporary directory")
    args = parser.parse_args()
    keep_freed_memory()  # as exports do
    bench_codes(args.out, args.num_in, args.rounds)
    if args.export:
        with tempfile.TemporaryDirectory(dir=args.directory) as directory:
            bench_export((wide_config if args.wide else synthetic_config)(args.export), Path(directory), args.rounds)


if __name__ == "__main__":
    main()
