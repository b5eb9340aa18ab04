"""What a parameter is for (its role), and which part of a model it belongs to (its component). Layers declare both;
precision, optimizer, freezing and the random start ask for them, so that nothing is guessed from names.
"""

from enum import Enum, auto

from paddle import nn


class Role(Enum):
    """The role of a parameter or buffer; every one has exactly one."""

    PROJECTION = auto()  # the matrix of a linear layer, or the stack of matrices of a layer's experts
    EMBEDDING = auto()
    HEAD = auto()  # the output head's matrix where it is not the embedding
    NORM = auto()  # the gain of a normalisation
    BIAS = auto()
    ROUTER = auto()  # the matrix that gives the experts' scores
    ROUTER_BIAS = auto()  # a router's correction bias: state that no gradient trains
    ADAPTER_A = auto()  # LoRA's first factor
    ADAPTER_B = auto()  # LoRA's second factor, which starts at zero
    SCALE = auto()  # a learnt length or scale, such as DoRA's magnitude
    QUANTIZER = auto()  # scales and ranges of a projection's product (nn/product.py)


# In fp32 whatever the model's dtype: rounded to 16 bits, routers would send tokens to other experts, and a quantiser
# would scale by something else than it was calibrated for.
FP32_ROLES = frozenset({Role.ROUTER, Role.ROUTER_BIAS, Role.QUANTIZER})


class Component(Enum):
    """The part of a model that a parameter belongs to: the unit in which models with a vision tower are frozen and
    given learning rates. It says nothing about the role: a norm of the vision transformer is a norm.
    """

    LANGUAGE = auto()  # the decoder with embedding, head, text experts and shared experts
    VISION_EXPERTS = auto()  # the experts and routers in the decoder that only visual tokens reach
    VISION_TRANSFORMER = auto()
    RESAMPLER = auto()  # between the vision transformer and the decoder


class ComponentLayer(nn.Layer):
    """A layer that may belong, with all that is below it, to another component than the layer around it."""

    component: Component | None = None  # None: that of the layer around it


class DeclaresRoles(ComponentLayer):
    """A layer with parameters or buffers of its own."""

    def roles(self) -> dict[str, Role]:
        """The role of each own parameter and buffer by its own name; it may name some that this instance lacks."""
        raise NotImplementedError(type(self).__name__)

    def components(self) -> dict[str, Component]:
        """Own parameters that belong to another component than this layer, by own name."""
        return {}


def named_roles(model: nn.Layer) -> dict[str, Role]:
    """The role of every parameter and buffer of `model` by its name in the model. A parameter without a declared role
    is an error of the layer's author, and an assertion.
    """
    roles = {}
    for prefix, layer in model.named_sublayers(include_self=True):
        own = [name for name, _ in layer.named_parameters(include_sublayers=False)]
        own += [name for name, _ in layer.named_buffers(include_sublayers=False)]
        declared = layer.roles() if isinstance(layer, DeclaresRoles) else {}
        for name in own:
            assert name in declared, f"{type(layer).__name__} declares no role for its parameter {name} ({prefix})"
            roles[f"{prefix}.{name}" if prefix else name] = declared[name]
    return roles


def matrix_names(model: nn.Layer) -> list[str]:
    """The trained matrices of layers: what Muon updates. Embeddings, head, norms, biases, routers and adapters are not
    among them.
    """
    roles = named_roles(model)
    return [name for name, p in model.named_parameters() if roles[name] is Role.PROJECTION and not p.stop_gradient]


def named_components(model: nn.Layer) -> dict[str, Component]:
    """The component of every parameter of `model` by its name in the model."""
    components: dict[str, Component] = {}

    def visit(layer: nn.Layer, prefix: str, around: Component) -> None:
        here = (layer.component if isinstance(layer, ComponentLayer) else None) or around
        own = layer.components() if isinstance(layer, DeclaresRoles) else {}
        for name, _ in layer.named_parameters(include_sublayers=False):
            components[prefix + name] = own.get(name, here)
        for name, child in layer.named_children():
            visit(child, f"{prefix}{name}.", here)

    visit(model, "", Component.LANGUAGE)
    return components
