"""A random start that does not depend on how a model is divided: each value follows from the seed and the parameter's
name.
"""

from collections.abc import Callable, Sequence

import numpy as np
import paddle

from erniekit.models.decoder import CausalLM
from erniekit.models.products import held_weights
from erniekit.models.weights import Shape, our_shapes
from erniekit.nn.roles import Role, named_roles
from erniekit.nn.shard import named_shard_specs, shard
from erniekit.utils.arrays import seeded_generator


def init_weights(
    model: CausalLM,
    seed: int,
    wanted: Callable[[str], bool] = lambda name: True,
    on_set: Callable[[str, paddle.Tensor], None] = lambda name, parameter: None,
) -> None:
    """Set the parameters that this process holds and whose names are `wanted`: matrices normal with the configuration's
    initializer_range, norms 1, biases 0. Experts are drawn one by one, so that a process draws only its own. Values are
    drawn in fp32 and rounded to the parameter's dtype, one parameter at a time. A weight that a product holds is drawn
    as if it were a parameter; a product's own parameters are initialised by the product. `on_set` is called with
    each parameter that has its values.
    """
    shard_specs, roles, shapes = named_shard_specs(model), named_roles(model), our_shapes(model.config)
    std = model.config.initializer_range

    def draw(name: str, local_shape: Sequence[int]) -> np.ndarray:
        shape, spec = shapes[name], shard_specs.get(name)
        if len(shape) == 1:
            return np.full(local_shape, 0.0 if roles[name] is Role.BIAS else 1.0, np.float32)
        if spec is not None and spec.over == "experts":
            first = model.shard.share(spec)[0] * local_shape[0]
            experts = range(first, first + local_shape[0])
            return np.stack([normal(seed, f"{name}.{expert}", shape[1:], std) for expert in experts])
        value = normal(seed, name, shape, std)
        return value if spec is None else shard(value, spec, *model.shard.share(spec))

    for name, parameter in model.named_parameters():
        if name in shapes and wanted(name):
            value = draw(name, parameter.shape)
            is_wide = parameter.dtype == paddle.float32
            parameter.set_value(value if is_wide else paddle.to_tensor(value).astype(parameter.dtype))
            on_set(name, parameter)
    for name, (projection, product) in held_weights(model).items():
        if wanted(name):
            value = draw(name, projection.weight_shape)
            for index, matrix in enumerate(value if value.ndim == 3 else [value]):
                product.fill(index, matrix)


def normal(seed: int, name: str, shape: Shape, std: float) -> np.ndarray:
    """Normal float32 numbers of standard deviation `std` that follow from (seed, name)."""
    return seeded_generator(seed, name).standard_normal(shape, dtype=np.float32) * np.float32(std)
