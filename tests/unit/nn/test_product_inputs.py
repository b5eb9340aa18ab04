"""What products keep for the backward pass."""

from collections.abc import Callable

import paddle
import pytest
from support.memory_truth import allocated

from erniekit.nn import factors, mlp, narrow, onednn
from erniekit.nn.grouped import grouped_matmul
from erniekit.nn.linear import Linear

ROWS, INNER = 1024, 512  # more numbers than one thread takes
PRODUCTS: dict[str, tuple[list[int], Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor]]] = {
    "projection": ([INNER, 64], narrow.matmul),
    "experts": ([2, INNER, 64], lambda x, weight: grouped_matmul(x, weight, [1000, 24])),
    "gate and up": ([INNER, 64], lambda x, weight: mlp.gated(_linear(weight), x)),
}

pytestmark = pytest.mark.skipif(not onednn.is_available(paddle.float32), reason="the library is not in this wheel")


def _linear(weight: paddle.Tensor) -> Linear:
    layer = Linear(INNER, 64, parts={"gate": 32, "up": 32})
    layer.weight = weight
    return layer


def kept(product: Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor], weight: paddle.Tensor) -> int:
    """Bytes of tensors that there are because of a product of an input which nothing else keeps."""
    leaf = paddle.ones([ROWS, INNER])
    leaf.stop_gradient = False
    before = allocated()
    out = product(leaf.scale(2.0), weight)
    after = allocated()
    out.sum().backward()
    assert leaf.grad is not None
    return after - before


@pytest.mark.parametrize("kind", PRODUCTS)
def test_an_input_waits_only_for_the_gradient_of_its_weight(kind: str):
    shape, product = PRODUCTS[kind]
    weight = paddle.create_parameter(shape, "float32")
    trained = kept(product, weight)
    weight.clear_gradient()
    weight.stop_gradient = True
    assert trained - kept(product, weight) == 4 * ROWS * INNER


@pytest.mark.skipif(not onednn.multiplies_bf16(), reason="this processor has no bf16 products")
@pytest.mark.parametrize("kind", ["projection", "gate and up"])
def test_an_input_waits_in_bf16_where_factors_are_rounded(kind: str):
    shape, product = PRODUCTS[kind]
    weight = paddle.create_parameter(shape, "float32")
    wide = kept(product, weight)
    with factors.rounded():
        assert wide - kept(product, weight) == 2 * ROWS * INNER
