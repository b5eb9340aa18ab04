"""Attach products (nn/product.py) to a model, and count what they hold."""

from collections.abc import Collection, Iterator
from math import prod

import paddle
from paddle import nn

from erniekit.models.decoder import CausalLM, DecoderLayer
from erniekit.moe.layer import MoELayer
from erniekit.nn.linear import EVERY_PART, SHARED_EXPERTS, Part, ProductFactory, Projection
from erniekit.nn.product import Product
from erniekit.utils.wording import count_of


def attach_products(model: CausalLM, factory: ProductFactory, parts: Collection[Part] = EVERY_PART) -> None:
    """Give every projection in these parts of the decoder's layers the product that `factory` makes for it. Router,
    norms, biases, embedding, head and multi-token prediction stay as they are.

    Called before the model has its weights: built without allocating (paddle.LazyGuard), a model never holds the
    parameters that a product replaces.
    """
    for layer in model.model.layers:
        for part, module in parts_of(layer):
            for projection in module.sublayers() if part in parts else ():
                if isinstance(projection, Projection):
                    product = factory(projection)
                    if product is not None:
                        projection.attach_product(product)


def parts_of(layer: DecoderLayer) -> Iterator[tuple[Part, nn.Layer]]:
    """The parts of a decoder layer that have projections; experts of images are a second part with experts."""
    block: nn.Layer = layer.mlp
    yield "attention", layer.self_attn
    if not isinstance(block, MoELayer):
        yield "mlp", block
        return
    for experts in block.all_experts():
        yield "experts", experts
    if block.shared_experts is not None:
        yield SHARED_EXPERTS, block.shared_experts


def products(model: paddle.nn.Layer) -> dict[str, tuple[Projection, Product]]:
    """(projection, its product) by the name that the projection's weight has in the model."""
    return {
        f"{name}.weight": (layer, layer.product)
        for name, layer in model.named_sublayers()
        if isinstance(layer, Projection) and layer.product is not None
    }


def held_weights(model: paddle.nn.Layer) -> dict[str, tuple[Projection, Product]]:
    """The entries of `products` that hold a weight, so that the model has no parameter of that name."""
    return {name: pair for name, pair in products(model).items() if pair[1].holds_weight}


def product_state(model: paddle.nn.Layer) -> dict[str, paddle.Tensor]:
    """The parameters and buffers of the products by their names in the model."""
    own = {id(t) for _, product in products(model).values() for t in (*product.parameters(), *product.buffers())}
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if id(tensor) in own}


def num_elements(model: paddle.nn.Layer) -> int:
    """The number of elements of this process's parameters, those that products hold included."""
    held = sum(prod(projection.weight_shape) for projection, _ in held_weights(model).values())
    return held + sum(prod(parameter.shape) for parameter in model.parameters())


def describe(model: CausalLM) -> str:
    """For the log: the number and kinds of products, and the size of held weights beside that in the model's dtype."""
    attached, held = products(model).values(), held_weights(model).values()
    names = " and ".join(sorted({product.name for _, product in attached}))
    if not held:
        return f"{count_of(len(attached), 'projection multiplies', 'projections multiply')} in {names}"
    stored = sum(product.num_bytes(projection.weight) for projection, product in held)
    element_size = next(model.model.layers.children()).input_layernorm.weight.element_size()
    plain = element_size * sum(prod(projection.weight_shape) for projection, _ in held)
    return f"{count_of(len(held), 'frozen weight')} in {names}: {_size(stored)} instead of {_size(plain)}"


def _size(num_bytes: float) -> str:
    for unit in ("kB", "MB"):
        num_bytes /= 1000
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} GB"
