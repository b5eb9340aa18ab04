"""Paddle's own inference of shapes and types for GPU operators, on its CPU wheel.

Paddle refuses an operator for which it has no kernel before it looks at shapes. `start()` registers kernels that do
nothing (no_op_kernels.cc) for the element types that Paddle 3.3's GPU kernels are registered for, and for no others.
`infer(call)` then puts a call of `CALLS` into a static program, which runs Paddle's inference for it, and for its
gradient.

What this shows: names, number, order and kinds of arguments, shapes and element types of what comes out, and that a
kernel exists for the element types of what goes in. It does not show values, nor what only the kernel checks: the
layout of scales, alignment, the capability of the device.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paddle

from support import paddle_cpp

# The numbers of phi::DataType.
_NUMBERS = {
    "uint8": 2,
    "int8": 3,
    "int32": 7,
    "int64": 9,
    "float32": 10,
    "float64": 11,
    "float16": 15,
    "bfloat16": 16,
    "float8_e4m3fn": 17,
}
_HALVES = ("float16", "bfloat16")
_FLOATS = ("float32", "float64", *_HALVES)
_FP8_FUSED = ("float32", "float64", "int32", "int64", "bfloat16", "float8_e4m3fn")

# The element types of the GPU kernels, as Paddle 3.3 registers them.
KERNELS: dict[str, tuple[str, ...]] = {
    "fused_rms_norm_ext": ("float32", "float64", "bfloat16"),
    "fused_rms_norm_ext_grad": ("float32", "float64", "bfloat16"),
    "fused_rotary_position_embedding": _FLOATS,
    "fused_rotary_position_embedding_grad": _FLOATS,
    "swiglu": _FLOATS,
    "swiglu_grad": _FLOATS,
    "flashmask_attention": _HALVES,
    "flashmask_attention_grad": _HALVES,
    "flashmask_attention_v2": _HALVES,
    "flashmask_attention_v2_grad": _HALVES,
    "flash_attn_v3": _HALVES,
    "flash_attn_v3_grad": _HALVES,
    "batched_gemm": ("float32", "float64", "bfloat16"),
    "moe_permute": ("float8_e4m3fn", "bfloat16"),
    "moe_unpermute": ("bfloat16",),
    "fused_linear_param_grad_add": _FLOATS,
    "embedding_grad_add_to": _FLOATS,
    "cross_entropy_with_softmax": _FLOATS,
    "weight_only_linear": _HALVES,
    "weight_only_linear_grad": _HALVES,
    "fp8_quant_blockwise": ("float32", "float64", "bfloat16"),
    "fp8_gemm_blockwise": ("float32", "float64", "bfloat16", "float8_e4m3fn", "uint8"),
    "fused_stack_transpose_quant": ("bfloat16",),
    "fused_stack_quant": ("bfloat16",),
    "fused_act_dequant": ("float32", "float64", "int32", "int64", "float8_e4m3fn"),
    "fused_transpose_split_quant": _FP8_FUSED,
    "fused_weighted_swiglu_act_quant": _FP8_FUSED,
    "fused_swiglu_weighted_bwd": _FP8_FUSED,
    # The ones that a GPU has beside them in 16 bits, and a CPU has not.
    "matmul": _HALVES,
    "matmul_grad": _HALVES,
    "squared_l2_norm": _HALVES,
}

REFERENCE_KERNELS = Path(__file__).with_name("reference_kernels.cc")  # of tests/support/gpu_stand_in.py

Shape = tuple[int, ...]
Spec = tuple[str, Shape]  # element type and shape


@dataclass(frozen=True)
class Call:
    """A call of an operator: what goes in, by name, and what must come out. `inputs_with_gradient`: whose gradients are
    inferred, too; they have the element type and shape of what they belong to.
    """

    inputs: dict[str, Spec]
    run: Callable[..., Any]
    expected: tuple[Spec, ...]
    inputs_with_gradient: tuple[str, ...] = ()


_library: ctypes.CDLL | None = None


def start() -> None:
    """Register the kernels. Nothing else can undo it: call this in a process of its own (tests/support/worlds.py)."""
    global _library
    if _library is None:
        _library = ctypes.CDLL(str(paddle_cpp.library(Path(__file__).with_name("no_op_kernels.cc"))))
        pretend_capability()
        for name, dtypes in KERNELS.items():
            for dtype in dtypes:
                _library.register_no_op(name.encode(), _NUMBERS[dtype])


def pretend_capability() -> None:
    """Answers that Paddle's Python wrappers ask a GPU for."""
    flags = {"FLAGS_cudnn_deterministic": True, "FLAGS_flash_attn_version": 2}
    real = paddle.get_flags

    def get_flags(names: Any) -> dict[str, Any]:
        asked = [names] if isinstance(names, str) else list(names)
        return {name: flags[name] for name in asked} if set(asked) <= flags.keys() else real(names)

    paddle.get_flags = paddle.base.framework.get_flags = get_flags
    paddle.device.cuda.get_device_properties = lambda *_: type("Properties", (), {"major": 9, "minor": 0})()


def infer(call: Call) -> tuple[list[Spec], dict[str, Spec]]:
    """What comes out of a call, and the gradients of `inputs_with_gradient`, as Paddle infers them."""
    start()
    paddle.enable_static()
    try:
        with paddle.static.program_guard(paddle.static.Program()):
            data = {name: paddle.static.data(name, shape, dtype) for name, (dtype, shape) in call.inputs.items()}
            for name in call.inputs_with_gradient:
                data[name].stop_gradient = False
            made = call.run(**data)
            outputs = [x for x in (made if isinstance(made, list | tuple) else [made]) if x is not None]
            gradients: dict[str, Spec] = {}
            if call.inputs_with_gradient:
                wanted = [data[name] for name in call.inputs_with_gradient]
                found = paddle.static.gradients([outputs[0]], wanted)
                gradients = {
                    name: _spec(gradient) for name, gradient in zip(call.inputs_with_gradient, found, strict=True)
                }
            return [_spec(output) for output in outputs], gradients
    finally:
        paddle.disable_static()


def _spec(x: Any) -> Spec:
    return str(x.dtype).rpartition(".")[2].lower(), tuple(x.shape)
