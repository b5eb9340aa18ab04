"""Which weights of a model a frozen base holds in 8 or 4 bits, and how many bytes that takes."""

from dataclasses import dataclass

from erniekit.models.decoder import CausalLM
from erniekit.moe.experts import StackedLinear
from erniekit.nn.linear import Projection
from erniekit.precision.low_bit import LowBitWeight
from erniekit.precision.weight_only import INT4, INT8, NF4, Scheme


@dataclass(frozen=True)
class Schemes:
    """How the projections of attention, dense blocks and shared experts are held, and how the routed experts are."""

    projections: Scheme
    experts: Scheme


# By compute_type.
SCHEMES = {
    "wint8": Schemes(INT8, INT8),
    "wint4": Schemes(INT4, INT4),
    "wint4/8": Schemes(INT8, INT4),
    "nf4": Schemes(NF4, NF4),
}


def hold_in_low_bits(model: CausalLM, schemes: Schemes) -> None:
    """Replace the weight of every projection in the decoder's layers by a place for its codes, to be filled from a
    checkpoint. Router, norms, biases, embedding, head and multi-token prediction stay as they are.

    Built without allocating (paddle.LazyGuard), the model never holds the weights that are replaced.
    """
    for layer in model.model.layers.sublayers():
        if isinstance(layer, Projection):
            scheme = schemes.experts if isinstance(layer, StackedLinear) else schemes.projections
            layer.low_bit = LowBitWeight(layer.weight.shape, scheme)
            del layer.weight


def low_bit_weights(model: CausalLM) -> dict[str, LowBitWeight]:
    """By the name that the parameter would have."""
    return {
        f"{name}.weight": layer.low_bit
        for name, layer in model.named_sublayers()
        if isinstance(layer, Projection) and isinstance(layer.low_bit, LowBitWeight)
    }
