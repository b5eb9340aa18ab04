"""Let erniekit take its GPU path in this process, on Paddle's CPU wheel.

`start()` gives Paddle the bfloat16 kernels that its CPU wheel lacks (gpu_stand_in.cc), the GPU operators that it lacks
(gpu_shapes/reference_kernels.cc), and an AdamW for 16-bit parameters, and makes tensors look like a GPU's to the
modules that choose by place. It cannot be undone: tests run it in a process of its own (tests/support/worlds.py).

What this shows: the types of weights, gradients, masters and files, which branches run, that the arguments of every
fused operator pass Paddle's own checks, and that losses stay near those in fp32. It does not show speed, a GPU's
rounding inside a product, what only a GPU's kernel checks, or anything of NCCL.
"""

import ctypes
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paddle

from support import gpu_shapes, paddle_cpp

SOURCE = Path(__file__).resolve().parent / "gpu_stand_in.cc"
# These ask a tensor's place to choose between a CPU's and a GPU's way.
PRETENDING = ("erniekit.nn.", "erniekit.losses.", "erniekit.moe.")

calls: Counter[str] = Counter()  # of fused operators by name, and of AdamW by types


def compiled() -> tuple[Path, Path]:
    """The libraries of the bfloat16 kernels and of the GPU operators, which take a minute to compile the first time."""
    return paddle_cpp.library(SOURCE), paddle_cpp.library(gpu_shapes.REFERENCE_KERNELS)


def start() -> None:
    """See the module. Calling it again does nothing."""
    if getattr(start, "done", False):
        return
    narrow_kernels, operators = compiled()
    assert ctypes.CDLL(str(narrow_kernels)).provide_bf16_kernels() == 0
    ctypes.CDLL(str(operators))
    gpu_shapes.pretend_capability()
    place = paddle.base.core.Place
    place.is_cpu_place = _pretending(place.is_cpu_place, False)
    place.is_gpu_place = _pretending(place.is_gpu_place, True)
    _count_calls()
    paddle._C_ops.adamw_ = _adamw(paddle._C_ops.adamw_)
    from erniekit.precision import policy

    choose = policy.choose
    policy.choose = lambda compute_type, device, *rest: choose(compute_type, "gpu:0", *rest)
    start.done = True  # type: ignore[attr-defined]


def _pretending(real: Callable[[Any], bool], answer: bool) -> Callable[[Any], bool]:
    def asked(place: Any) -> bool:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return answer if caller.startswith(PRETENDING) else real(place)

    return asked


def _count_calls() -> None:
    """Count the calls of fused operators, which are those of Paddle's own bindings."""
    from erniekit.nn.fused import OPERATORS

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(*args, **kwargs)

        return call

    for operator in OPERATORS:
        setattr(paddle._C_ops, operator.name, counting(operator.name, getattr(paddle._C_ops, operator.name)))


def _adamw(real: Callable[..., Any]) -> Callable[..., Any]:
    """The update of a 16-bit parameter: that of its master copy, rounded. The GPU's kernel takes its gradient in either
    type.
    """

    def step(parameter: paddle.Tensor, gradient: paddle.Tensor, *rest: Any) -> Any:
        master, multi_precision = rest[6], rest[-3]
        kind = "fp32" if parameter.dtype == paddle.float32 else "bf16"
        calls[f"adamw of {kind} by {str(gradient.dtype).removeprefix('paddle.')}"] += 1
        if kind == "fp32":
            assert master is None and not multi_precision and gradient.dtype == paddle.float32
            return real(parameter, gradient, *rest)
        assert multi_precision and master.dtype == rest[1].dtype == rest[2].dtype == paddle.float32
        arguments = [*rest[:6], None, *rest[7:-3], False, *rest[-2:]]
        result = real(master, gradient.astype("float32"), *arguments)
        paddle.assign(master.astype(parameter.dtype), parameter)
        return result

    return step
