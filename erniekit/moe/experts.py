"""The routed experts: SwiGLU blocks whose weights are stacked over experts, with one product for each expert on
its span of sorted rows.
"""

import paddle
from paddle import nn
from paddle.autograd import PyLayer

from erniekit.nn.linear import Projection
from erniekit.nn.mlp import swiglu
from erniekit.nn.roles import Role
from erniekit.nn.shard import ShardSpec
from erniekit.utils.spans import spans


class _GroupedMatmul(PyLayer):
    """The rows of expert e times W[e]. One node for all experts: the gradient of the stack is built once instead of
    being scattered expert by expert.
    """

    @staticmethod
    def forward(ctx, rows: paddle.Tensor, weight: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        outputs = [
            paddle.matmul(rows[begin:end], weight[e]) for e, (begin, end) in enumerate(spans(counts)) if end > begin
        ]
        return paddle.concat(outputs, axis=0) if outputs else paddle.zeros([0, weight.shape[2]], dtype=rows.dtype)

    @staticmethod
    def backward(ctx, dy: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        rows, weight = ctx.saved_tensor()
        expert_spans = spans(ctx.counts)
        drows = None
        if not rows.stop_gradient:
            outputs = [
                paddle.matmul(dy[begin:end], weight[e], transpose_y=True)
                for e, (begin, end) in enumerate(expert_spans)
                if end > begin
            ]
            drows = paddle.concat(outputs, axis=0) if outputs else paddle.zeros_like(rows)
        if weight.stop_gradient:
            return drows, None
        empty = paddle.zeros(weight.shape[1:], dtype=weight.dtype)
        dweight = paddle.stack(
            [paddle.matmul(rows[b:e], dy[b:e], transpose_x=True) if e > b else empty for b, e in expert_spans]
        )
        return drows, dweight


def grouped_matmul(rows: paddle.Tensor, weight: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
    """rows [R, in] sorted by expert, weight [E, in, out], counts [E] summing to R -> [R, out]. An expert without rows
    gets a zero gradient.
    """
    return _GroupedMatmul.apply(rows, weight, counts)


class StackedLinear(Projection):
    """E projections of one shape: weight [E, in, out], where E counts the experts of this process. `adapter` and
    `low_bit`: as in nn.Linear, called with the rows and the counts.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int, init_std: float) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.weight = self.create_parameter(
            [num_experts, in_features, out_features], default_initializer=nn.initializer.Normal(0.0, init_std)
        )
        self.adapter = None
        self.low_bit = None

    def shard_specs(self) -> dict[str, ShardSpec]:
        """The stack is sharded by whole experts."""
        return {"weight": ShardSpec(0, over="experts")}

    def roles(self) -> dict[str, Role]:
        """See DeclaresRoles."""
        return {"weight": Role.PROJECTION}

    def product(self, rows: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
        """Each row times its expert's matrix: [R, in] -> [R, out]."""
        if self.low_bit is not None:
            return self.low_bit(rows, counts)
        return grouped_matmul(rows, self.weight, counts)

    def forward(self, rows: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
        """[R, in] sorted by expert -> [R, out]."""
        y = self.product(rows, counts)
        return y if self.adapter is None else self.adapter(rows, counts, y)


class Experts(nn.Layer):
    """E SwiGLU experts of width F."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, init_std: float = 0.02) -> None:
        super().__init__()
        self.up_gate_proj = StackedLinear(num_experts, hidden_size, 2 * intermediate_size, init_std)
        self.down_proj = StackedLinear(num_experts, intermediate_size, hidden_size, init_std)

    def forward(self, rows: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
        """[R, D] sorted by expert -> [R, D]."""
        return self.down_proj(swiglu(self.up_gate_proj(rows, counts)), counts)
