"""FLOPs of a step. Two conventions are in use for attention: the causal half, which is what a causal kernel computes
(Megatron-LM, DeepSeek-V3's "causal"), and the full square of queries and keys (PaLM, arXiv 2204.02311, appendix B).

Model FLOPs are those of a forward and a backward pass over real tokens. A frozen weight has no gradient, so its
backward pass is one product instead of two. Recomputation is not part of model FLOPs; with it they are hardware FLOPs
(HFU).
"""

from dataclasses import dataclass

from erniekit.plan.work import Layer, Work

RECOMPUTE = ("full", "full_attn", "core_attn", "moe")


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token, on average. `causal` and `full`: model FLOPs in the two conventions. `recomputed`: forward
    FLOPs that are computed again. `reference`: the forward pass of a reference model, part of the first two.
    """

    causal: float
    full: float
    recomputed: float
    reference: float

    @property
    def hardware(self) -> float:
        """What the devices compute: the causal model FLOPs and those of recomputation."""
        return self.causal + self.recomputed


@dataclass(frozen=True)
class Recomputed:
    """What is computed again in the backward pass, as shares (0 to 1) of a decoder layer's parts: the core of
    attention, the projections of attention, the feed-forward block, and elementwise kernels.
    """

    core: float = 0.0
    attention: float = 0.0
    mlp: float = 0.0
    elementwise: float = 0.0
    in_ahead: bool = False  # also in the blocks for multi-token prediction
    not_in: tuple[int, ...] = ()  # decoder layers that keep everything

    def share(self, part: str) -> float:
        """The share of products of this part that is computed again."""
        return self.attention if part == "attention" else 0.0 if part in ("head", "vision") else self.mlp


NOTHING = Recomputed()
FULL = Recomputed(1.0, 1.0, 1.0, 1.0)


def forward_flops(layer: Layer, lengths: list[int], half: bool = True) -> float:
    """FLOPs of a layer's forward pass for one token, as model FLOPs count them."""
    products = sum(product.flops for product in layer.products if product.counted)
    return products + sum(core.flops(lengths, half) for core in layer.cores)


def _weight_gradients(layer: Layer) -> float:
    return sum(product.flops for product in layer.products if product.counted and product.trained)


def _input_gradients(layer: Layer, lengths: list[int], half: bool) -> float:
    """Of the products, as many FLOPs as forward; of attention twice as many, for both of its inputs."""
    cores = sum(core.flops(lengths, half) for core in layer.cores)
    return forward_flops(layer, lengths, half) + cores


def recomputed_flops(layer: Layer, lengths: list[int], recomputed: Recomputed) -> float:
    """FLOPs of one token that the layer computes again."""
    if layer.kind not in ("dense", "sparse"):
        return 0.0
    products = sum(product.flops * recomputed.share(product.part) for product in layer.products if product.counted)
    return products + recomputed.core * sum(core.flops(lengths) for core in layer.cores)


def token_flops(
    work: Work, lengths: list[int], recomputed: Recomputed = NOTHING, reference: bool = False
) -> TokenFlops:
    """FLOPs of one token in rows of documents of these lengths. The first frozen layers still pass gradients on, except
    for a vision part without trained weights, which nothing below needs.
    """
    totals = []
    for half in (True, False):
        total = 0.0
        for layer in work:
            total += forward_flops(layer, lengths, half) + _weight_gradients(layer)
            if layer.kind != "vision" or any(product.trained for product in layer.products):
                total += _input_gradients(layer, lengths, half)
        totals.append(total)
    forward = [sum(forward_flops(layer, lengths, half) for layer in work) * reference for half in (True, False)]
    again = sum(
        recomputed_flops(layer, lengths, recomputed)
        for number, layer in enumerate(work.layers)
        if number not in recomputed.not_in
    )
    if recomputed.in_ahead:
        again += sum(recomputed_flops(layer, lengths, recomputed) for layer in work.last)
    return TokenFlops(totals[0] + forward[0], totals[1] + forward[1], again, forward[0])


def recomputed_by(granularity: str, sparse: bool, in_ahead: bool, not_in: tuple[int, ...]) -> Recomputed:
    """The YAML's recompute_granularity ("" for none), use_recompute_moe, use_recompute_mtp and no_recompute_layers."""
    if granularity == "full":
        return Recomputed(1.0, 1.0, 1.0, 1.0, in_ahead, not_in)
    mlp = 1.0 if sparse or granularity == "moe" else 0.0
    attention = 1.0 if granularity == "full_attn" else 0.0
    core = 1.0 if granularity in ("full_attn", "core_attn") else 0.0
    return Recomputed(core, attention, mlp, 0.5 * attention + 0.5 * mlp, in_ahead, not_in)
