"""Where the weights are that can be quantised: the projections of the decoder's layers."""

import re
from dataclasses import dataclass
from typing import Literal, cast

from erniekit.models.weights import Logical

Role = Literal["attention", "mlp", "shared_experts", "experts", "vision_experts"]
# The routed experts of both modalities.
EXPERTS: tuple[Role, ...] = ("experts", "vision_experts")

_PROJECTION = re.compile(
    r"model\.layers\.(\d+)\.(self_attn|mlp)\.(?:(shared_experts|experts|vision_experts)\.)?"
    r"(?:qkv_proj|o_proj|up_gate_proj|down_proj)\.weight"
)


@dataclass(frozen=True)
class Place:
    """The number of a weight's layer, and its part there."""

    layer: int
    role: Role


def place_of(logical: Logical) -> Place | None:
    """Where a weight is; None for one that no scheme quantises."""
    match = _PROJECTION.fullmatch(logical.param)
    if match is None:
        return None
    role = "attention" if match[2] == "self_attn" else match[3] or "mlp"
    return Place(int(match[1]), cast(Role, role))
