"""Keys of training in FP8."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key, list_of


@dataclass(frozen=True, kw_only=True)
class Fp8Args:
    """Matrix products in FP8, forward and backward, on 16-bit weights; see docs/fp8.md. Read only with fp8."""

    group: ClassVar[str] = "FP8"

    fp8: str = key(
        "none",
        "Matrix products in FP8: blockwise (1 x 128 of activations and 128 x 128 of weights share a scale: ERNIE's "
        "recipe), rowwise or tensorwise; none: in compute_type.",
        choices=("none", "blockwise", "rowwise", "tensorwise"),
    )
    fp8_modules: tuple[str, ...] = list_of(
        str,
        "What multiplies in FP8: experts, shared_experts, mlp (dense feed-forward), attention (its projections).",
        ("experts",),
        choices=("experts", "shared_experts", "mlp", "attention"),
    )
    fp8_scale: str = key(
        "pow2",
        "Scales in FP8: powers of two (pow2), which quantise a second time almost without loss, or any number (real).",
        choices=("pow2", "real"),
    )
    fp8_gradients: str = key(
        "e4m3",
        "Format of gradients of activations in FP8: e4m3, or e5m2 with more range and less precision.",
        choices=("e4m3", "e5m2"),
    )
    fp8_store: bool = key(True, "Keep the inputs of products in FP8 for the backward pass, instead of in compute_type.")
    fp8_recompute_up_gate_layers: tuple[int, ...] = list_of(
        int, "Numbers of layers whose experts compute gate and up again in the backward pass; empty: none.", ge=0
    )
    fp8_routing_weight: str = key(
        "before",
        "Where experts in FP8 multiply by the routing weight: before down_proj, as ERNIE does, or after it.",
        choices=("before", "after"),
    )
    fp8_statistics_steps: int = key(
        0,
        "Every N steps metrics.jsonl has the shares of FP8 values that saturate and that become zero; 0: never.",
        ge=0,
    )
