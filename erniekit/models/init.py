"""A random start that does not depend on how a model is divided: each value follows from the seed and the parameter's
name.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import paddle

from erniekit.models.decoder import CausalLM
from erniekit.models.weights import Shape, our_shapes
from erniekit.nn.roles import Role, named_roles
from erniekit.nn.shard import named_shard_specs, shard


def init_weights(model: CausalLM, seed: int, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Set the parameters that this process holds and whose names are `wanted`: matrices normal with the configuration's
    initializer_range, norms 1, biases 0. Experts are drawn one by one, so that a process draws only its own. Values are
    drawn in fp32 and rounded to the parameter's dtype, one parameter at a time.
    """
    shard_specs, roles, shapes = named_shard_specs(model), named_roles(model), our_shapes(model.config)
    std = model.config.initializer_range
    for name, parameter in model.named_parameters():
        if not wanted(name):
            continue
        shape, spec = shapes[name], shard_specs.get(name)
        if len(shape) == 1:
            value = np.full(parameter.shape, 0.0 if roles[name] is Role.BIAS else 1.0, np.float32)
        elif spec is not None and spec.over == "experts":
            index, _ = model.shard.share(spec)
            held = range(index * parameter.shape[0], (index + 1) * parameter.shape[0])
            value = np.stack([normal(seed, f"{name}.{expert}", shape[1:], std) for expert in held])
        else:
            value = normal(seed, name, shape, std)
            value = value if spec is None else shard(value, spec, *model.shard.share(spec))
        value = value.astype(np.float32, copy=False)
        wide = parameter.dtype == paddle.float32
        parameter.set_value(value if wide else paddle.to_tensor(value).astype(parameter.dtype))


def normal(seed: int, name: str, shape: Shape, std: float) -> np.ndarray:
    """Normal float32 numbers of standard deviation `std` that follow from (seed, name)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = np.random.Generator(np.random.SFC64(np.frombuffer(digest, np.uint32)))
    return generator.standard_normal(shape, dtype=np.float32) * np.float32(std)
