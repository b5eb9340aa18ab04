"""The dtypes of parameters and matrix products, and a log line where a device cannot compute in the requested dtype."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import paddle
from paddle import nn

from erniekit.nn import factors, fused, onednn
from erniekit.nn.linear import ProductFactory
from erniekit.nn.roles import FP32_ROLES, Role, named_roles
from erniekit.precision.fp8 import Fp8Options
from erniekit.precision.qat import QatOptions
from erniekit.precision.quantized_weight import QuantizedWeights
from erniekit.precision.weight_only import SCHEMES
from erniekit.utils import log
from erniekit.utils.errors import ConfigError


@dataclass(frozen=True)
class Policy:
    """How a model stores and multiplies. `param_dtype` is the dtype of weights and matrix products ("float32",
    "bfloat16" or "float16"); 16-bit weights have fp32 masters in the optimizer. `product`: how the projections of the
    layers multiply and keep their weights; None: plainly. `rounded_to`: the dtype that weights are rounded to when they
    are read, where `param_dtype` is wider. `fp8`, `qat`: products in FP8, or with fake quantisation, which keep their
    weights as they are.
    """

    param_dtype: str
    product: ProductFactory | None = None
    rounded_to: str | None = None
    fp8: Fp8Options | None = None
    qat: QatOptions | None = None


DTYPES = {"float32": paddle.float32, "bfloat16": paddle.bfloat16, "float16": paddle.float16}
_PARAM_DTYPES = {"fp32": "float32", "fp16": "float16"}  # others: bfloat16
_BF16 = (8, 0)  # the first compute capability with products in bf16


def choose(compute_type: str, device: str, emulate: bool | None = None) -> Policy:
    """The policy for a compute_type (bf16, fp16, fp32, or a key of weight_only.SCHEMES) on a device ("cpu", "gpu:0"). A
    log line says where the policy differs from the compute_type.

    On a CPU everything is fp32, unless the run is to `emulate` a GPU's 16-bit types (nn/narrow.py); None: it cannot, so
    the log line does not propose it. ConfigError where a GPU would be emulated on a GPU.
    """
    product = QuantizedWeights(SCHEMES[compute_type]) if compute_type in SCHEMES else None
    param_dtype = _PARAM_DTYPES.get(compute_type, "bfloat16")
    if emulate and device != "cpu":
        raise ConfigError(
            f"emulate_precision: this run is on {device}, which has {compute_type} itself. Remove the key, or hide the "
            "GPU (CUDA_VISIBLE_DEVICES=) to run on the CPU"
        )
    if emulate:
        how = "oneDNN" if onednn.is_available(DTYPES[param_dtype]) else "float32, rounded"
        log.info(f"emulate_precision: {param_dtype} weights and activations on the CPU; matrix products by {how}")
    elif param_dtype != "float32" and device == "cpu":
        proposes = emulate is not None and compute_type in ("bf16", "fp16")
        instead = f". emulate_precision: true computes in {compute_type}, as a GPU does" if proposes else ""
        log.info(f"compute_type: {compute_type} computes in float32 on a CPU{instead}")
        param_dtype = "float32"
    return Policy(param_dtype, product)


@contextmanager
def products(matmul_precision: str, device: str) -> Iterator[None]:
    """Matrix products of a `with` block, on this device, are as matmul_precision says. A log line says where they round
    their factors to bf16 (nn/factors.py); ConfigError where the device cannot, or need not.
    """
    if matmul_precision == "fp32":
        yield
        return
    reason = products_missing(device)
    if reason:
        raise ConfigError(f"matmul_precision: {matmul_precision}: {reason}")
    log.info(
        f"matmul_precision: {matmul_precision}: products of projections, experts, adapters and the head round their "
        "factors to bf16"
    )
    with factors.rounded():
        yield


def products_missing(device: str) -> str:
    """Why a device does not round the factors of its products (`matmul_precision: bf16`), and what to do; empty if it
    does.
    """
    if device != "cpu":
        return (
            f"it is for products of float32 tensors on a CPU, and this run is on {device}. Remove it; compute_type: "
            "bf16 multiplies in bf16 there"
        )
    if not onednn.multiplies_bf16():
        return (
            "this processor has no bf16 products (avx512_bf16, which AMD has since Zen 4 and Intel since Cooper Lake), "
            "or Paddle's oneDNN has none. Remove it to multiply in fp32"
        )
    return ""


def of_weights(dtype: str, device: str, product: ProductFactory | None = None) -> Policy:
    """The policy for weights of a dtype on any device. On a CPU, which cannot multiply the 16-bit types, the weights
    are rounded to `dtype` and multiplied in float32, and a log line says so.
    """
    if dtype == "float32" or device != "cpu":
        return Policy(dtype, product)
    log.info(f"{dtype} on CPU: the weights are rounded to it and computed with in float32")
    return Policy("float32", product, rounded_to=dtype)


def computable(policy: Policy, compute_type: str) -> Policy:
    """The policy. Raises ConfigError where it computes in bf16 and this process's GPU does not."""
    capability = fused.compute_capability() if paddle.get_device().startswith("gpu") else None
    if policy.param_dtype == "bfloat16" and capability is not None and capability < _BF16:
        raise ConfigError(
            f"compute_type: {compute_type} computes in bf16, which needs a GPU of compute capability 8.0 (Ampere) or "
            f"later; this one has {capability[0]}.{capability[1]}. Set compute_type: fp16, or fp32"
        )
    return policy


@contextmanager
def default_dtype(policy: Policy) -> Iterator[None]:
    """Build the layers of a `with` block with weights in the policy's dtype from the start, so that no fp32 copy of a
    model ever exists. Layers that state a dtype themselves (routers) keep it.
    """
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(policy.param_dtype)
    try:
        yield
    finally:
        paddle.set_default_dtype(before)


@paddle.no_grad()
def apply(model: nn.Layer, policy: Policy) -> None:
    """Make sure that every weight has the policy's dtype, and that those of FP32_ROLES have fp32. Weights that were
    built in another dtype are cast where they are; those that were built under `default_dtype` cost nothing.
    """
    target = DTYPES[policy.param_dtype]
    roles = named_roles(model)
    for name, parameter in model.named_parameters():
        if roles[name] not in FP32_ROLES and parameter.dtype != target:
            cast = parameter.astype(target)
            # Layer.to does the same; Tensor._to returns a copy and leaves the parameter as it was.
            parameter.value().get_tensor()._share_data_with(cast.value().get_tensor())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.dtype == (paddle.float32 if roles[name] in FP32_ROLES else target), f"{name} is {tensor.dtype}"


def describe(model: nn.Layer, has_masters: bool) -> str:
    """The dtypes that a model in training has, as text for the log."""
    roles = named_roles(model)
    parameters = list(model.named_parameters())
    weights = sorted({_name(tensor) for name, tensor in parameters if roles[name] not in FP32_ROLES})
    routers = sorted({_name(tensor) for name, tensor in parameters if roles[name] is Role.ROUTER})
    text = f"weights {' and '.join(weights)}"
    if routers and routers != weights:
        text += f", routers {' and '.join(routers)}"
    return text + (", masters float32" if has_masters else "")


def _name(tensor: paddle.Tensor) -> str:
    return str(tensor.dtype).removeprefix("paddle.")
