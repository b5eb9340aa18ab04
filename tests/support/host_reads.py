"""Counts what makes a host wait for its device in a training step: where, and how often.

`of_a_step(keys)` is a job for every rank of a world (tests/support/worlds.py), and a plain function for one process.
A read is a call of a tensor's `numpy`, `item`, `tolist` or of a conversion to a Python number, bool or numpy array: on
a GPU the host then waits until everything before it is computed. An upload is `paddle.to_tensor` of host data, which
copies from pageable memory.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paddle

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
    """Reads and uploads of the second step of the trainer with these keys, on this rank."""
    from erniekit import config
    from erniekit.parallel import comm
    from erniekit.parallel.mesh import ParallelDims, build_mesh
    from erniekit.training.build import build_run
    from erniekit.training.trainer import Trainer

    cfg = config.load(None, keys, "train")
    run = build_run(cfg, build_mesh(ParallelDims.from_config(cfg, comm.world().size)))
    trainer = Trainer(run, [])
    trainer.train_step(run.loader.next_step())
    with counted() as transfers:
        trainer.train_step(run.loader.next_step())
    run.close()
    return {"reads": dict(transfers.reads), "uploads": dict(transfers.uploads)}
