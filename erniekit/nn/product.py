"""The slot in which a projection's matrix product is replaced: by quantised weights, FP8 or fake quantisation.

    class Fp8(Product):                      # trains the projection's own weight
        def forward(self, x, weight, counts=None): return _Fp8.apply(x, weight, ...)

    attach_products(model, lambda projection: Fp8(...))          # models/products.py

Nothing else has to know the new class: LoRA, tensor and expert parallelism, pipelines, activation checkpointing, the
optimizer, checkpoints and export ask `Projection` and the methods below.
"""

import numpy as np
import paddle

from erniekit.nn.roles import Role
from erniekit.nn.shard import Shardable


class Product(Shardable):
    """How a projection computes x W, and how it keeps W. There are two kinds.

    * The projection keeps its parameter (`holds_weight` is False; FP8, fake quantisation). Each call receives it, in
      the model's dtype (an fp32 master copy belongs to the optimizer). It is initialised, loaded, saved, sharded and
      trained as in a plain model, so a product need not do anything for any of these.
    * The product keeps the weight (`holds_weight` is True; quantised weights). Attaching it removes the parameter, so
      the weight is frozen and unknown to the optimizer. `fill` receives this process's share of each matrix, which the
      projection's `shard_specs` describe for "weight" as if the parameter were there.

    A product may have parameters and buffers of its own, such as the range of activations. As on any layer, `roles` and
    `shard_specs` declare them (Role.QUANTIZER keeps fp32), and the optimizer trains the parameters. The constructor
    initialises them, as no model file has them; a checkpoint keeps them beside the weights. A parameter is whole on
    every tensor rank unless `shard_specs` names it; `partial_gradients` names those whose gradient is then a rank's
    part of a sum. A buffer that follows from a rank's own tokens must be reduced by the product, so that all ranks with
    a copy agree.

    An adapter (LoRA) is independent of the product: it takes the same x, adds to the result, and never sees the weight.
    A product is therefore the same with and without an adapter, and a frozen weight (`weight.stop_gradient`) needs no
    gradient. `merge` adds the adapter to the projection's parameter, and is refused where there is none. A product that
    `quantises_adapted` gets W + s A B as its weight instead (LoRA, not DoRA), because that is what an export quantises.
    """

    name = "product"  # for the log, such as "int8"
    holds_weight = False
    quantises_adapted = False

    def forward(self, x: paddle.Tensor, weight: paddle.Tensor | None, counts: list[int] | None = None) -> paddle.Tensor:
        """x W in the dtype of x, differentiable in x and, where there is one that is trained, in the weight.

        Args:
            x: [..., in]; with `counts`, rows [R, in] sorted by expert.
            weight: the projection's parameter, [in, out] or [E, in, out]; None if the product holds the weight. Its
                gradient has its dtype; the sum over microbatches is fp32 (parallel/grad_sync.py). The optimizer
                increments `weight.inplace_version`, so what is derived from a weight (its FP8 copy in both
                orientations) is valid while that number stays.
            counts: rows of each of this process's experts, on the host; they sum to R. An expert without rows has a
                gradient of zeros.

        Returns:
            [..., out], or [R, out].
        """
        raise NotImplementedError(type(self).__name__)

    def fill(self, index: int, values: np.ndarray) -> None:
        """Take matrix `index` (0, or the number of a local expert), fp32 [in, out]. Matrices arrive one at a time, so
        that no whole weight exists. ValueError if the format cannot hold the values. Only where `holds_weight`.
        """
        raise NotImplementedError(type(self).__name__)

    def dense(self, weight: paddle.Tensor | None) -> np.ndarray:
        """The values by which `forward` multiplies: fp32 of the weight's shape, after any rounding."""
        raise NotImplementedError(type(self).__name__)

    def quantized_tensors(self, weight: paddle.Tensor | None) -> list[dict[str, paddle.Tensor]]:
        """The arrays of each matrix in a quantised file, by kind ("codes", "scales"): one entry, or one per expert."""
        raise NotImplementedError(type(self).__name__)

    def num_bytes(self, weight: paddle.Tensor | None) -> int:
        """Bytes of `quantized_tensors`."""
        tensors = [tensor for matrix in self.quantized_tensors(weight) for tensor in matrix.values()]
        return sum(tensor.element_size() * tensor.size for tensor in tensors)

    def roles(self) -> dict[str, Role]:
        """See DeclaresRoles."""
        return {}
