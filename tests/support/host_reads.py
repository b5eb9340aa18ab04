"""Counts what makes a host wait for its device in a training step: where, and how often.

`of_a_step(keys)` is a job for every rank of a world (tests/support/worlds.py), and a plain function for one process.
A read is a call of a tensor's `numpy`, `item`, `tolist` or of a conversion to a Python number, bool or numpy array: on
a GPU the host then waits until everything before it is computed. An upload is `paddle.to_tensor` of host data, which
copies from pageable memory.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paddle

# Paddle's CPU kernel of the cross-entropy needs a look at its result, and nn/cpu_ops.py reads the CPU's own memory; on
# a GPU nobody looks.
ON_A_CPU_ALONE = ("losses/lm.py:_softmax_nll", "nn/cpu_ops.py:take_at", "nn/cpu_ops.py:add_at_")
# Uploads of what a microbatch is: tokens, positions, and where attention finds what. Some are kept from step to step.
INPUTS = ("models/inputs.py", "nn/attention.py", "nn/mlp.py", "nn/rotary.py")

READS = ("numpy", "item", "tolist", "__array__", "__bool__", "__float__", "__int__", "__index__")


@dataclass
class Transfers:
    """Reads and uploads by place: "file in the package:function"."""

    reads: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)


@contextmanager
def counted() -> Iterator[Transfers]:
    """Count the reads and uploads of the package's code until the context ends."""
    transfers, is_inside = Transfers(), [False]

    def counting(real: Callable[..., Any], places: Counter[str], counts: Callable[[Any], bool]) -> Callable[..., Any]:
        def call(value: Any, *args: Any, **kwargs: Any) -> Any:
            if is_inside[0] or not counts(value):  # `tolist` calls `numpy`: one read
                return real(value, *args, **kwargs)
            is_inside[0] = True
            try:
                places[_place()] += 1
                return real(value, *args, **kwargs)
            finally:
                is_inside[0] = False

        return call

    tensor_reads = {name: getattr(paddle.Tensor, name) for name in READS}
    to_tensor = paddle.to_tensor
    for name, real in tensor_reads.items():
        setattr(paddle.Tensor, name, counting(real, transfers.reads, lambda _: True))
    paddle.to_tensor = counting(to_tensor, transfers.uploads, lambda value: not isinstance(value, paddle.Tensor))
    try:
        yield transfers
    finally:
        paddle.to_tensor = to_tensor
        for name, real in tensor_reads.items():
            setattr(paddle.Tensor, name, real)


def _place() -> str:
    """The package's innermost function that is running."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "erniekit" in path.parts and "tests" not in path.parts:
            name = path.as_posix().rpartition("/erniekit/")[2]
            return f"{name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def of_a_step(keys: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The second step of the trainer with these keys, on this rank: "reads" by place, without those that only a CPU
    needs, and "uploads" by file, without those of the inputs.
    """
    from erniekit import config
    from erniekit.parallel import backend
    from erniekit.parallel.mesh import ParallelDims, build_mesh
    from erniekit.training.build import build_run
    from erniekit.training.trainer import Trainer

    cfg = config.load(None, keys, "train")
    run = build_run(cfg, build_mesh(ParallelDims.from_config(cfg, backend.world().size)))
    trainer = Trainer(run, [])
    trainer.train_step(run.loader.next_step())
    with counted() as transfers:
        trainer.train_step(run.loader.next_step())
    run.close()
    reads = {place: count for place, count in transfers.reads.items() if place not in ON_A_CPU_ALONE}
    uploads: Counter[str] = Counter()
    for place, count in transfers.uploads.items():
        if place not in ON_A_CPU_ALONE:
            uploads[place.partition(":")[0]] += count
    return {"reads": reads, "uploads": {file: count for file, count in uploads.items() if file not in INPUTS}}


def write_pairs(path: Path) -> None:
    """Preference data, enough for a few steps."""
    lines = [
        {"src": [f"{a}加{b}" + "等于？" * (1 + a * b % 3)], "response": [[str(a + b)], [f"是{a + b}"]], "sort": [1, 0]}
        for a in range(9)
        for b in range(9)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
