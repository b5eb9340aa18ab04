"""The parameters and buffers of products (nn/product.py), for which model files have no name: fp32 tensors in a
directory of their own beside the weights, whole or by rows of experts, so that any layout reads them.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import paddle

from erniekit.checkpoint.rank_files import RankFiles
from erniekit.checkpoint.reshard import Shares
from erniekit.checkpoint.stored_state import StoredState, piece_name
from erniekit.models.decoder import CausalLM
from erniekit.models.products import product_state
from erniekit.nn.shard import named_shard_specs
from erniekit.parallel.mesh import Mesh
from erniekit.utils.errors import CheckpointError

DIRECTORY = "products"


def product_rank_files(
    model: CausalLM, tensors: Mapping[str, paddle.Tensor], shares: Shares, directory: str = ""
) -> RankFiles:
    """This rank's share of the products' state, in `directory` below a checkpoint. `tensors`: the values by name, the
    model's own or an average. Without products nothing is written.
    """
    names = [name for name in product_state(model) if name in tensors]
    rows = {name: shares.rows(name, tensors[name].shape) for name in names}
    plan = [
        (
            piece_name(name, rows[name]),
            "F32",
            tuple(tensors[name].shape) if rows[name] else shares.whole_shape(name, tensors[name].shape),
        )
        for name in names
        if shares.writes(name)
    ]
    arrays = ((piece_name(name, rows[name]), shares.gather(name, tensors[name])) for name in names)
    below = f"{directory}/{DIRECTORY}" if directory else DIRECTORY
    return RankFiles(below, plan, arrays, lambda name, array: [(name, array)], {"format": "pt"})


def load_product_state(model: CausalLM, directory: Path, into: Mapping[str, paddle.Tensor] | None = None) -> None:
    """Set the products' state, or tensors `into` of the same names, from a directory of weights. A directory without
    such state (a plain model) leaves it as it is. CheckpointError where something is missing or misshapen.
    """
    tensors, source = product_state(model) if into is None else into, directory / DIRECTORY
    names = [name for name in product_state(model) if name in tensors]
    if not names or not source.is_dir():
        return
    stored, shares = StoredState(source), Shares(Mesh.single(), model.shard, named_shard_specs(model))
    known = set(stored.keys())
    for name in names:
        tensor = tensors[name]
        whole = shares.whole_shape(name, tensor.shape)
        if name not in known or stored.shape(name) != whole:
            problem = f"has shape {list(stored.shape(name))}" if name in known else "is missing"
            raise CheckpointError(
                f"{source}: {name} {problem}, expected {list(whole)}. The model was saved with other products."
            )
        share = shares.shard_of(name, stored.read(name, shares.rows(name, tensor.shape)))
        tensor.set_value(np.ascontiguousarray(share))
