"""How fast a run resumes: reading a checkpoint's weights and optimizer state, beside the rate of the disk.

    python tools/bench_resume.py --directory /somewhere/on/the/disk --rounds 5

The dense model of bench_save.py, 1.2 GB with the optimizer's state. Each round reads the files as they are, in pieces
of 8 MB and nothing else ("the disk"), and loads them into the model and the optimizer as a resumed run does; in turns,
and each with the files out of the kernel's cache ("cold"), then in it ("warm"). One process.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from bench_save import CONFIG, build

from erniekit.checkpoint.manager import CheckpointManager
from erniekit.checkpoint.model_io import load_weights, model_rank_files, write_model_configs
from erniekit.checkpoint.reshard import Shares
from erniekit.training.state import load_optimizer, optimizer_rank_files


def files_of(directory: Path) -> list[Path]:
    """The files of a checkpoint."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def forget(directory: Path) -> None:
    """Put the files of a checkpoint out of the kernel's cache."""
    for path in files_of(directory):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(directory: Path) -> None:
    """Read all files in pieces."""
    piece = bytearray(8 << 20)
    for path in files_of(directory):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(piece):
                pass


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="where to write (default: the system's temporary directory)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    model, optimizer, _ = build(args.layers)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        portions = [model_rank_files(model, Shares.alone(), "pt"), optimizer_rank_files(optimizer, Shares.alone())]
        manager = CheckpointManager(Path(directory), None)
        checkpoint = manager.save(1, lambda path: write_model_configs(model, path, "pt"), portions)
        size = sum(path.stat().st_size for path in files_of(checkpoint))

        def load(path: Path) -> None:
            load_weights(model, path)
            load_optimizer(path, optimizer, Shares.alone())

        ways = {"the disk": read_plainly, "resuming": load}
        rates: dict[tuple[str, str], list[float]] = {}
        for number in range(args.rounds):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                forget(checkpoint)
                for cache in ("cold", "warm"):
                    began = time.perf_counter()
                    ways[name](checkpoint)
                    rates.setdefault((cache, name), []).append(size / (time.perf_counter() - began) / 1e9)
    print(f"{size / 1e9:.2f} GB, {args.rounds} rounds, load {os.getloadavg()[0]:.2f}")
    result = {}
    for cache in ("cold", "warm"):
        disk, resuming = rates[cache, "the disk"], rates[cache, "resuming"]
        share = statistics.median(mine / other for mine, other in zip(resuming, disk, strict=True))
        result[cache] = {"resuming": statistics.median(resuming), "share": share}
        print(
            f"{cache}: the disk {statistics.median(disk):.2f} GB/s ({min(disk):.2f}-{max(disk):.2f}), resuming "
            f"{statistics.median(resuming):.2f} GB/s ({min(resuming):.2f}-{max(resuming):.2f}): {share:.0%} of it"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
