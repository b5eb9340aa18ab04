"""A product from outside the package: it multiplies its result by a learnt scale and counts its calls."""

import numpy as np
import paddle

from erniekit.nn.grouped import grouped_matmul
from erniekit.nn.linear import Projection
from erniekit.nn.product import Product
from erniekit.nn.roles import Role
from erniekit.nn.shard import ShardSpec


class ScaledProduct(Product):
    """scale * (x W): the projection keeps W; the scale is one number a matrix."""

    name = "scaled"

    def __init__(self, num_experts: int | None, scale: float) -> None:
        super().__init__()
        self.num_experts = num_experts
        initial = paddle.nn.initializer.Constant(scale)
        self.scale = self.create_parameter([num_experts or 1], dtype="float32", default_initializer=initial)
        self.register_buffer("calls", paddle.zeros([1]))

    def forward(self, x: paddle.Tensor, weight: paddle.Tensor | None, counts: list[int] | None = None) -> paddle.Tensor:
        self.calls.add_(paddle.ones([1]))
        if counts is None:
            return paddle.matmul(x, weight) * self.scale
        expert_of_row = paddle.to_tensor(np.repeat(np.arange(len(counts)), counts))
        scales = paddle.gather(self.scale, expert_of_row).unsqueeze(-1)
        return grouped_matmul(x, weight, counts) * scales

    def dense(self, weight: paddle.Tensor | None) -> np.ndarray:
        scale = self.scale if self.num_experts is None else self.scale.reshape([-1, 1, 1])
        return (weight * scale).numpy()

    def roles(self) -> dict[str, Role]:
        return {"scale": Role.QUANTIZER, "calls": Role.QUANTIZER}

    def shard_specs(self) -> dict[str, ShardSpec]:
        return {} if self.num_experts is None else {"scale": ShardSpec(0, over="experts")}


def scaled(projection: Projection, scale: float = 0.5) -> ScaledProduct:
    """The factory."""
    return ScaledProduct(projection.num_experts, scale)
