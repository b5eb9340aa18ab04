"""Attach fake quantisation (precision/qat.py) to a model, say what is quantised, and move the ranges of inputs."""

from collections import defaultdict
from collections.abc import Iterator

import paddle

from erniekit.models.decoder import CausalLM
from erniekit.models.products import attach_products, parts_of, products
from erniekit.models.weights import projection_shapes
from erniekit.nn.linear import EVERY_PART, Linear, Part, Projection
from erniekit.parallel import comm
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.process_group import Group
from erniekit.precision.fake_quant import FakeQuant
from erniekit.precision.qat import QatOptions, describe_recipe
from erniekit.utils.errors import ConfigError
from erniekit.utils.wording import count_of


def attach_qat(model: CausalLM, options: QatOptions) -> None:
    """Let the projections of the decoder's layers multiply fake-quantised operands. Raises ConfigError for a matrix
    that cannot be trained so; no weight has to be read before. What can be exported is quantize/trained.py's.
    """
    attach_products(model, _sized(model, options).product)
    for name, projection, product in _found(model):
        reason = _refused(projection, product, model.shard.tensor_degree)
        if reason:
            raise ConfigError(f"qat: {options.name}: {name} {list(projection.weight_shape)}: {reason}")


def _sized(model: CausalLM, options: QatOptions) -> QatOptions:
    """The options for the sizes of the whole model, of which this process may have a part."""
    shapes = projection_shapes(model.config)
    experts = [shape[-2] for shape in shapes.values() if len(shape) == 3]
    return options.for_widths([shape[-2] for shape in shapes.values()], experts)


def _found(model: CausalLM) -> Iterator[tuple[str, Projection, FakeQuant]]:
    for name, (projection, product) in products(model).items():
        if isinstance(product, FakeQuant):
            yield name, projection, product


def _refused(projection: Projection, product: FakeQuant, tensor_degree: int) -> str:
    """Why a matrix cannot be quantised; empty if it can. Sizes are those of this process."""
    recipe, spec = product.recipe, product.recipe.weight
    split = projection.split if isinstance(projection, Linear) and tensor_degree > 1 else None
    fewer = f"Use fewer than tensor_parallel_degree: {tensor_degree} ranks"
    if recipe.rotation is not None and projection.in_features % recipe.rotation.order:
        return (
            f"hadamard_block_size: {recipe.rotation.order} does not divide its {projection.in_features} inputs. Choose "
            "a smaller power of two, or set apply_hadamard: False"
        )
    tile = spec.group or (spec.block[1] if spec.block else 1)
    if split == "row" and projection.in_features % tile:
        return f"{tile} inputs share a scale, and a tensor rank has {projection.in_features} of them. {fewer}"
    if split == "column" and spec.block is not None and any(each % spec.block[0] for each in product.widths):
        return f"{spec.block[0]} outputs share a scale, and a tensor rank has {list(product.widths)} of them. {fewer}"
    return ""


def connect_ranks(layer: Linear, mesh: Mesh) -> None:
    """Let a projection's fake quantisation find the scales of the whole matrix where tensor ranks divide it."""
    product = layer.product
    if not isinstance(product, FakeQuant) or layer.split is None or mesh.degrees.tensor == 1:
        return
    spec = product.recipe.weight
    if spec.whole or (layer.split == "row" and spec.group is None and spec.block is None):
        product.over_ranks = lambda largest: comm.all_reduce_(largest, mesh.tensor_group, op="max")


def describe_qat(model: CausalLM, options: QatOptions) -> str:
    """For the log: which projections of this process are fake-quantised, how, and what is not."""
    matrices: dict[Part, int] = defaultdict(int)
    for layer in model.model.layers:
        for part, module in parts_of(layer):
            matrices[part] += sum(isinstance(each, FakeQuant) for each in module.sublayers())
    options = _sized(model, options)
    ways: dict[str, list[str]] = {}
    for part in sorted(EVERY_PART & matrices.keys()):
        how = describe_recipe(options.experts if part == "experts" else options.projections)
        if part == "experts" and options.experts_down != options.experts:
            how += f"; their last projection: {describe_recipe(options.experts_down)}"
        ways.setdefault(how, []).append(f"{part} ({count_of(matrices[part], 'weight')})")
    found = "; ".join(f"{', '.join(parts)}: {how}" for how, parts in ways.items())
    others = "routers, norms, biases, embedding, head, multi-token prediction"
    if model.config.vision is not None:
        others += ", vision transformer, resampler"
    return f"qat: {options.name}: {found}. Not quantised: {others}"


class MovingRanges:
    """The static ranges of a model's inputs, which move once a step by the largest magnitude on all ranks."""

    def __init__(self, model: CausalLM, mesh: Mesh) -> None:
        found = [(projection, product) for _, projection, product in _found(model) if product.moving is not None]
        self._experts = [product for projection, product in found if projection.num_experts is not None]
        self._others = [product for projection, product in found if projection.num_experts is None]
        self._mesh = mesh

    @paddle.no_grad()
    def update(self) -> None:
        """Update the ranges at the end of a step; all ranks call it."""
        mesh = self._mesh
        self._update(self._experts, [mesh.expert_data_group])
        self._update(self._others, [mesh.data_group, mesh.tensor_group])

    def forget(self) -> None:
        """Instead of `update`, for a step whose update is skipped."""
        for product in (*self._experts, *self._others):
            product.forget_present()

    @staticmethod
    def _update(moving: list[FakeQuant], groups: list[Group]) -> None:
        if not moving:
            return
        present = paddle.concat([product.present for product in moving])
        for group in groups:
            if group.size > 1:
                present = comm.all_reduce_(present, group, op="max")
        for product, own in zip(moving, present.split([len(each.present) for each in moving]), strict=True):
            product.update_range(own)
