"""The one projection layer. Tensor parallelism, LoRA, FP8 and weight-only quantisation attach here and nowhere else."""

from collections.abc import Callable
from typing import Literal

import paddle
from paddle import nn

from erniekit.nn.roles import Role
from erniekit.nn.shard import Shardable, ShardSpec

Split = Literal["column", "row"]


class Projection(Shardable):
    """A weight to which an adapter can be attached. `in_features` and `out_features` are those of this process;
    `adapter`, None on a plain model, is a layer that takes the input and the product and gives the adapted product.
    `low_bit`, None on a plain model, is a layer that holds the weight in 8 or 4 bits and multiplies by it; there is no
    `weight` then.
    """

    in_features: int
    out_features: int
    adapter: nn.Layer | None
    low_bit: nn.Layer | None


class Linear(Projection):
    """y = x W + b with W [in_features, out_features], x [..., in_features], y [..., out_features].

    `parts` names the outputs that one fused weight holds, in column order (q, k, v or gate, up): sharding and
    adapters treat each of them separately. `split` says how tensor parallelism cuts it: "column" by outputs,
    "row" by inputs, None not at all. All sizes are those of this process.

    What is applied from outside is attached to four attributes, None on a plain model: `adapter` and `low_bit` as in
    Projection, `enter` and `leave` communicate before the product and after it (the bias is added behind).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        parts: dict[str, int] | None = None,
        split: Split | None = None,
        init_std: float = 0.02,
        role: Role = Role.PROJECTION,
    ) -> None:
        super().__init__()
        self.role = role  # of the weight
        self.in_features = in_features
        self.out_features = out_features
        self.parts = parts or {}
        self.split = split
        assert not self.parts or sum(self.parts.values()) == out_features
        self.weight = self.create_parameter(
            [in_features, out_features], default_initializer=nn.initializer.Normal(0.0, init_std)
        )
        self.bias = self.create_parameter([out_features], is_bias=True) if bias else None
        self.enter: Callable[[paddle.Tensor], paddle.Tensor] | None = None
        self.leave: Callable[[paddle.Tensor], paddle.Tensor] | None = None
        self.adapter = None
        self.low_bit = None

    def shard_specs(self) -> dict[str, ShardSpec]:
        """See Divisible. The bias of a row-split layer is whole: it is added behind the sum."""
        widths = tuple(self.parts.values())
        if self.split == "column":
            return {"weight": ShardSpec(1, widths), "bias": ShardSpec(0, widths)}
        return {"weight": ShardSpec(0)} if self.split == "row" else {}

    def roles(self) -> dict[str, Role]:
        """See DeclaresRoles."""
        return {"weight": self.role, "bias": Role.BIAS}

    def product(self, x: paddle.Tensor) -> paddle.Tensor:
        """x W: [..., in_features] -> [..., out_features]."""
        return paddle.matmul(x, self.weight) if self.low_bit is None else self.low_bit(x)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of x."""
        if self.enter is not None:
            x = self.enter(x)
        y = self.product(x)
        if self.adapter is not None:
            y = self.adapter(x, y)
        if self.leave is not None:
            y = self.leave(y)
        return y if self.bias is None else y + self.bias
