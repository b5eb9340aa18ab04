"""The parameters of the part of a model that a process holds, and their places in the whole model."""

from paddle import nn

from erniekit.nn.cut import Cut, Divisible


def named_cuts(model: nn.Layer) -> dict[str, Cut]:
    """Parameter name -> how it is divided, for every parameter of `model` that can be."""
    return {
        f"{prefix}.{name}" if prefix else name: cut
        for prefix, layer in model.named_sublayers(include_self=True)
        if isinstance(layer, Divisible)
        for name, cut in layer.cuts().items()
    }
