"""Start a world of ranks on this machine again and again; say how many starts failed.

    python tools/start_ranks.py --starts 20 --ranks 4

Each start is a fresh set of processes that meet, make the group of all ranks and those of every two (four ranks: seven
groups), and use each: sums, an uneven all-to-all, sends that cross. Exit code 1 if a start failed.
"""

import argparse
import os
import random
import socket
import subprocess
import sys
import time
from contextlib import suppress
from itertools import combinations
from pathlib import Path

ROUNDS = 10
TIMEOUT = 120  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=4)
    args = parser.parse_args()
    failed = 0
    for number in range(1, args.starts + 1):
        started = time.monotonic()
        outputs = start(args.ranks)
        ok = all(code == 0 for code, _ in outputs)
        failed += not ok
        print(f"start {number}: {'ok' if ok else 'FAILED'} after {time.monotonic() - started:.1f} s", flush=True)
        for rank, (code, text) in enumerate(outputs):
            if code:
                print(f"rank {rank} ended with {code}:\n{text}")
    print(f"{args.starts - failed} of {args.starts} starts of {args.ranks} ranks went well, {failed} failed")
    return min(failed, 1)


def start(size: int) -> list[tuple[int, str]]:
    """One world: exit code and output of each rank."""
    endpoints = ",".join(f"127.0.0.1:{port}" for port in _free_ports(size))
    common = {"PADDLE_TRAINERS_NUM": str(size), "PADDLE_TRAINER_ENDPOINTS": endpoints, "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", "import start_ranks; start_ranks.work()"],
            cwd=Path(__file__).parent,
            env={**os.environ, **common, "PADDLE_TRAINER_ID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    return [_finish(process) for process in ranks]


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that systems give to outgoing connections: still free in a moment."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20000, 32000)
        with suppress(OSError), socket.create_server(("", port)):
            ports += [port] if port not in ports else []
    return ports


def _finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        text, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        return -1, f"{text}\nnot done after {TIMEOUT} s"
    return process.returncode, text


def work() -> None:
    """What one rank does."""
    from erniekit.utils import runtime

    runtime.prepare()
    import numpy as np
    import paddle

    from erniekit.parallel import backend, comm

    world = backend.init(TIMEOUT / 2)
    everyone = tuple(range(world.size))
    groups = backend.groups([everyone, *combinations(everyone, 2)])
    for number in range(ROUNDS):
        for ranks, group in groups.items():
            total = comm.all_reduce_(paddle.full([10000], world.rank + number, "float32"), group)
            assert total.unique().tolist() == [sum(ranks) + number * len(ranks)]
            sent = [(world.rank + other) % 3 for other in ranks]
            rows = comm.all_to_all(paddle.full([sum(sent), 4], world.rank, "int64"), sent, sent, group)
            assert rows[:, 0].tolist() == np.repeat(ranks, sent).tolist()
        comm.send(paddle.to_tensor([world.rank, number]), (world.rank + 1) % world.size)
        before = (world.rank - 1) % world.size
        assert comm.recv([2], "int64", before).tolist() == [before, number]


if __name__ == "__main__":
    sys.exit(main())
