"""Which weights of a model a frozen base holds in 8 or 4 bits, and how many bytes that takes."""

from math import prod

from erniekit.models.decoder import CausalLM
from erniekit.moe.experts import StackedLinear
from erniekit.nn.linear import Projection
from erniekit.precision.quantized_weight import QuantizedWeight
from erniekit.precision.weight_only import Schemes


def quantize_weights(model: CausalLM, schemes: Schemes) -> None:
    """Replace the weight of every projection in the decoder's layers by a place for its codes, to be filled from a
    checkpoint. Router, norms, biases, embedding, head and multi-token prediction stay as they are.

    Built without allocating (paddle.LazyGuard), the model never holds the weights that are replaced.
    """
    for layer in model.model.layers.sublayers():
        if isinstance(layer, Projection):
            scheme = schemes.experts if isinstance(layer, StackedLinear) else schemes.projections
            layer.low_bit = QuantizedWeight(layer.weight.shape, scheme)
            del layer.weight


def describe(model: CausalLM) -> str:
    """For the log: the number, formats and size of the quantised weights, and their size in the model's own type."""
    held = quantized_weights(model).values()
    names = sorted({weight.scheme.name for weight in held})
    few = sum(weight.num_bytes() for weight in held)
    size = next(model.model.layers.children()).input_layernorm.weight.element_size()
    many = size * sum(prod(weight.shape) for weight in held)
    return f"{len(held)} frozen weights in {' and '.join(names)}: {_size(few)} instead of {_size(many)}"


def _size(num_bytes: float) -> str:
    for unit in ("kB", "MB"):
        num_bytes /= 1000
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} GB"


def num_held(model: CausalLM) -> int:
    """The number of elements of this process's parameters, quantised or not."""
    return sum(prod(each.shape) for each in (*model.parameters(), *quantized_weights(model).values()))


def quantized_weights(model: CausalLM) -> dict[str, QuantizedWeight]:
    """By the name that the parameter would have."""
    return {
        f"{name}.weight": layer.low_bit
        for name, layer in model.named_sublayers()
        if isinstance(layer, Projection) and isinstance(layer.low_bit, QuantizedWeight)
    }
