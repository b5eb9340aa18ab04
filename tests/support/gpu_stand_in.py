"""Let erniekit take its GPU path in this process, on Paddle's CPU wheel.

`start()` gives Paddle the bfloat16 kernels that its CPU wheel lacks (gpu_stand_in.cc, compiled once), makes tensors
look like a GPU's to the modules that choose by place, and replaces the two GPU kernels that have no CPU counterpart,
with the checks of types that those make. It cannot be undone: tests run it in a process of its own
(tests/support/worlds.py).

What this shows: the types of weights, gradients, masters and files, which branches run, and that losses stay near
those in fp32. It does not show speed, a GPU's rounding inside a product, or anything of NCCL.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paddle

SOURCE = Path(__file__).resolve().parent / "gpu_stand_in.cc"
# These ask a tensor's place to choose between a CPU's and a GPU's way.
PRETENDING = ("erniekit.nn.", "erniekit.losses.", "erniekit.moe.")

calls: Counter[str] = Counter()  # of the replaced kernels, by name and types


def why_not() -> str | None:
    """What is missing to compile the kernels; None: nothing."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    root = Path(paddle.__file__).parent
    return None if (root / "include" / "paddle" / "phi").is_dir() else "this Paddle has no C++ headers"


def start() -> None:
    """See the module. Calling it again does nothing."""
    if getattr(start, "done", False):
        return
    assert ctypes.CDLL(str(_library())).provide_bf16_kernels() == 0
    place = paddle.base.core.Place
    place.is_cpu_place = _pretending(place.is_cpu_place, False)
    place.is_gpu_place = _pretending(place.is_gpu_place, True)
    paddle.nn.functional.flashmask_attention = _flashmask
    paddle._C_ops.adamw_ = _adamw(paddle._C_ops.adamw_)
    from erniekit.precision import policy

    choose = policy.choose
    policy.choose = lambda compute_type, device: choose(compute_type, "gpu:0")
    start.done = True  # type: ignore[attr-defined]


def _library() -> Path:
    """The compiled kernels, in the user's temporary directory."""
    root = Path(paddle.__file__).parent
    version = f"{paddle.__version__}-{os.getuid()}-{int(SOURCE.stat().st_mtime)}"
    library = Path(tempfile.gettempdir()) / f"erniekit-test-kernels-{version}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        include = [f"-I{root / 'include'}", f"-I{root / 'include' / 'third_party'}"]
        libraries = [f"-L{root / 'libs'}", "-l:libphi_core.so", "-l:libphi.so", "-l:libcommon.so"]
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w"]
        subprocess.run(["g++", *flags, *include, str(SOURCE), "-o", str(part), *libraries], check=True)
        part.replace(library)
    return library


def _pretending(real: Callable[[Any], bool], answer: bool) -> Callable[[Any], bool]:
    def asked(place: Any) -> bool:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return answer if caller.startswith(PRETENDING) else real(place)

    return asked


def _flashmask(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    startend_row_indices: paddle.Tensor,
    dropout: float,
    causal: bool,
) -> paddle.Tensor:
    """What the kernel computes from [1, T, heads, d]: query i sees key j where j <= i < startend_row_indices[j]."""
    assert dropout == 0.0, "the stand-in draws no masks"
    calls["flashmask"] += 1
    assert query.dtype == key.dtype == value.dtype and query.dtype in (paddle.bfloat16, paddle.float16), query.dtype
    assert startend_row_indices.dtype == paddle.int32 and startend_row_indices.shape == [1, 1, key.shape[1], 1]
    assert causal and query.shape[0] == 1 and query.shape[2] % key.shape[2] == 0
    length, repeat = query.shape[1], query.shape[2] // key.shape[2]
    q, k, v = (x.squeeze(0).astype("float32").transpose([1, 0, 2]) for x in (query, key, value))
    k, v = k.repeat_interleave(repeat, axis=0), v.repeat_interleave(repeat, axis=0)
    row, column = paddle.arange(length).unsqueeze(1), paddle.arange(length).unsqueeze(0)
    seen = (column <= row) & (row < startend_row_indices.reshape([1, length]).astype("int64"))
    scores = paddle.where(seen, paddle.matmul(q, k, transpose_y=True) / query.shape[3] ** 0.5, paddle.full([1], -1e30))
    out = paddle.matmul(paddle.nn.functional.softmax(scores, axis=-1), v)
    return out.transpose([1, 0, 2]).unsqueeze(0).astype(query.dtype)


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
