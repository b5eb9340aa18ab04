"""The routed experts: SwiGLU blocks whose weights are stacked over experts, with one product for each expert on
its span of sorted rows.
"""

from collections.abc import Callable

import paddle
from paddle import nn

from erniekit.nn.grouped import grouped_matmul
from erniekit.nn.linear import Projection
from erniekit.nn.mlp import gated
from erniekit.nn.roles import ComponentLayer, Role
from erniekit.nn.shard import ShardSpec


class StackedLinear(Projection):
    """E projections of one shape: weight [E, in, out], where E counts the experts of this process. `product` and
    `adapter` are called with the rows and the counts.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        init_std: float,
        parts: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.parts = parts or {}
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.weight = self.create_parameter(
            [num_experts, in_features, out_features], default_initializer=nn.initializer.Normal(0.0, init_std)
        )
        self.product = None
        self.adapter = None

    def shard_specs(self) -> dict[str, ShardSpec]:
        """The stack is sharded by whole experts."""
        return {"weight": ShardSpec(0, over="experts")}

    def roles(self) -> dict[str, Role]:
        """See DeclaresRoles."""
        return {"weight": Role.PROJECTION}

    def plain_product(self, x: paddle.Tensor, counts: list[int] | None) -> paddle.Tensor:
        """See Projection."""
        assert counts is not None and self.weight is not None
        return grouped_matmul(x, self.weight, counts)

    def forward(self, rows: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
        """[R, in] sorted by expert -> [R, out]."""
        if self.quantises_adapted:
            return self.multiply_adapted(rows, counts)
        y = self.multiply(rows, counts)
        return y if self.adapter is None else self.adapter(rows, counts, y)


# Computes all of `Experts.forward` instead of its projections' products: rows [R, D], the weights of up_gate_proj and
# down_proj, counts, and what each row is multiplied by -> [R, D].
ExpertBlock = Callable[
    [paddle.Tensor, paddle.Tensor, paddle.Tensor, list[int], paddle.Tensor | None],
    paddle.Tensor,
]


class Experts(ComponentLayer):
    """E SwiGLU experts of width F.

    `takes_weights`: each row is multiplied by its routing weight in front of down_proj, as in ERNIE, and not its output
    when the outputs are added up. The two are equal, but the outputs need not be kept for the backward pass. `block`:
    see ExpertBlock; adapters need the products of the projections, so that it is not used with them.
    """

    takes_weights = False
    block: ExpertBlock | None = None

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, init_std: float = 0.02) -> None:
        super().__init__()
        gate_up = {"gate": intermediate_size, "up": intermediate_size}
        self.up_gate_proj = StackedLinear(num_experts, hidden_size, 2 * intermediate_size, init_std, gate_up)
        self.down_proj = StackedLinear(num_experts, intermediate_size, hidden_size, init_std)

    def forward(self, rows: paddle.Tensor, counts: list[int], weights_R1: paddle.Tensor | None = None) -> paddle.Tensor:
        """[R, D] sorted by expert -> [R, D]. `weights_R1` [R, 1] fp32, with `takes_weights`."""
        up_gate, down = self.up_gate_proj, self.down_proj
        if self.block is not None and up_gate.adapter is None and down.adapter is None:
            assert up_gate.weight is not None and down.weight is not None
            return self.block(rows, up_gate.weight, down.weight, counts, weights_R1)
        hidden = gated(up_gate, rows, counts)
        if weights_R1 is not None:
            hidden = (hidden.astype("float32") * weights_R1).astype(hidden.dtype)
        return down(hidden, counts)
