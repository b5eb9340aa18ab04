"""The one projection layer. Tensor parallelism, LoRA, FP8 and quantisation attach here and nowhere else."""

from collections.abc import Callable
from functools import partial
from typing import Final, Literal, get_args

import paddle
from paddle import nn
from paddle.autograd import PyLayer

from erniekit.nn.cpu_ops import add_to_each
from erniekit.nn.narrow import matmul, rounded
from erniekit.nn.nodes import call
from erniekit.nn.product import Product
from erniekit.nn.roles import Role
from erniekit.nn.shard import Shardable, ShardSpec

Split = Literal["column", "row"]


class Projection(Shardable):
    """A matrix [in, out], or E of them for the experts of a layer, with two slots that are None on a plain model:
    `product` replaces the matrix product (see nn.product), `adapter` takes the input and the result of the product and
    returns the adapted result. All sizes are those of this process.
    """

    in_features: int
    out_features: int
    num_experts: int | None = None
    parts: dict[str, int]  # the outputs that one fused weight holds, in column order; empty if it holds one matrix
    head_dim: int | None = None  # of fused q|k|v: the columns of one attention head; without `parts`: three equal ones
    weight: paddle.Tensor | None  # None where the product holds it
    product: Product | None
    adapter: nn.Layer | None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """[in, out] or [E, in, out], also where a product holds the weight."""
        stack = () if self.num_experts is None else (self.num_experts,)
        return (*stack, self.in_features, self.out_features)

    @property
    def lone_weight(self) -> paddle.Tensor | None:
        """The weight of a projection that computes x W and nothing else; None for any other."""
        return self.weight if self.product is None and self.adapter is None else None

    def attach_product(self, product: Product) -> None:
        """Fill the slot. A product that holds the weight takes the parameter's place."""
        self.product = product
        if product.holds_weight:
            self.weight = None

    def multiply(self, x: paddle.Tensor, counts: list[int] | None = None) -> paddle.Tensor:
        """x W without adapter, bias or communication: [..., in] -> [..., out]. Of experts, `counts` are the rows of
        each: [R, in] sorted by expert -> [R, out].
        """
        if self.product is not None:
            return self.product(x, self.weight, counts)
        return self.plain_product(x, counts)

    @property
    def quantises_adapted(self) -> bool:
        """Whether the product gets the weight with the adapter in it."""
        return self.adapter is not None and self.product is not None and self.product.quantises_adapted

    def multiply_adapted(self, x: paddle.Tensor, counts: list[int] | None = None) -> paddle.Tensor:
        """Multiply as `multiply` does, by the weight with the adapter added to it; only where `quantises_adapted`."""
        assert self.adapter is not None and self.product is not None and self.weight is not None
        return self.product(x, self.adapter.added(self.weight), counts)

    def plain_product(self, x: paddle.Tensor, counts: list[int] | None) -> paddle.Tensor:
        """x W by the parameter as it is; see `multiply`."""
        raise NotImplementedError(type(self).__name__)


# What a projection of a decoder layer belongs to. "mlp": a dense layer's feed-forward block; "experts": routed ones.
Part = Literal["attention", "mlp", "shared_experts", "experts"]
EVERY_PART = frozenset(get_args(Part))
SHARED_EXPERTS: Final = "shared_experts"

# Which product a projection gets; None leaves it plain.
ProductFactory = Callable[[Projection], Product | None]


class Linear(Projection):
    """y = x W + b with W [in_features, out_features], x [..., in_features], y [..., out_features].

    `parts` names the outputs that one fused weight holds, in column order (q, k, v or gate, up): sharding and
    adapters treat each of them separately. `split` says how tensor parallelism cuts it: "column" by outputs,
    "row" by inputs, None not at all. All sizes are those of this process.

    What is applied from outside is attached to four attributes, None on a plain model: `product` and `adapter` as in
    Projection, `gather_input` and `reduce_output` communicate before and after the product (the bias is added last).
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
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
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
        self.gather_input: Callable[[paddle.Tensor], paddle.Tensor] | None = None
        self.reduce_output: Callable[[paddle.Tensor], paddle.Tensor] | None = None
        self.product = None
        self.adapter = None

    def shard_specs(self) -> dict[str, ShardSpec]:
        """See Shardable. The bias of a row-split layer is whole: it is added behind the sum."""
        widths = tuple(self.parts.values())
        if self.split == "column":
            return {"weight": ShardSpec(1, widths), "bias": ShardSpec(0, widths)}
        return {"weight": ShardSpec(0)} if self.split == "row" else {}

    def roles(self) -> dict[str, Role]:
        """See DeclaresRoles."""
        return {"weight": self.role, "bias": Role.BIAS}

    @property
    def lone_weight(self) -> paddle.Tensor | None:
        """See Projection."""
        alone = self.bias is None and self.gather_input is None and self.reduce_output is None
        return super().lone_weight if alone else None

    def plain_product(self, x: paddle.Tensor, counts: list[int] | None) -> paddle.Tensor:
        """See Projection."""
        return matmul(x, self.weight)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of x."""
        if self.gather_input is not None:
            x = self.gather_input(x)
        if self.quantises_adapted:
            y = self.multiply_adapted(x)
        else:
            y = self.multiply(x)
            y = y if self.adapter is None else self.adapter(x, y)
        if self.reduce_output is not None:
            y = self.reduce_output(y)
        return y if self.bias is None else add_bias(y, self.bias)


class _AddBias(PyLayer):
    """y + b for the CPU: the gradient of b is a product, since Paddle's sum over rows takes 30 times as long there."""

    @staticmethod
    def forward(ctx, y_TN: paddle.Tensor, bias_N: paddle.Tensor) -> paddle.Tensor:
        ctx.needs_gradient = not y_TN.stop_gradient, not bias_N.stop_gradient
        return add_to_each(y_TN, bias_N)

    @staticmethod
    def backward(ctx, dout_TN: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        y_needs_gradient, bias_needs_gradient = ctx.needs_gradient
        dbias = None
        if bias_needs_gradient:
            dbias = paddle.matmul(paddle.ones([1, dout_TN.shape[0]]), dout_TN).reshape([-1])
        return dout_TN if y_needs_gradient else None, dbias


def add_bias(y: paddle.Tensor, bias_N: paddle.Tensor) -> paddle.Tensor:
    """y + b: [..., N], [N] -> [..., N]."""
    if not y.place.is_cpu_place():
        return y + bias_N
    return rounded(partial(call, _AddBias), y.reshape([-1, y.shape[-1]]), bias_N).reshape(y.shape)
