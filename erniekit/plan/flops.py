"""FLOPs of a step. Two conventions are in use for attention: the causal half, which is what a causal kernel computes
(Megatron-LM, DeepSeek-V3's "causal"), and the full square of queries and keys (PaLM, arXiv 2204.02311, appendix B).

Model FLOPs are those of a forward and a backward pass over real tokens. A frozen weight has no gradient, so its
backward pass is one product instead of two. Recomputation is not part of model FLOPs; with it they are hardware FLOPs
(HFU).
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from erniekit.plan.work import Layer, Work


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token, on average. `causal` and `full`: model FLOPs in the two conventions. `recomputed`: forward
    FLOPs that are computed again. `reference`: the forward passes before the step, part of the first two.
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
    attention, the projections of attention, the feed-forward block, and elementwise kernels. `parts`: parts of the
    feed-forward block that are computed again in any case, by the names of plan/work.py; with "router" tokens are sent
    to their experts again.
    """

    core: float = 0.0
    attention: float = 0.0
    mlp: float = 0.0
    elementwise: float = 0.0
    parts: frozenset[str] = frozenset()
    in_ahead: bool = False  # also in the blocks for multi-token prediction
    not_in: tuple[int, ...] = ()  # decoder layers that keep everything

    def share(self, part: str) -> float:
        """The share of products of this part that is computed again."""
        if part in self.parts:
            return 1.0
        return self.attention if part == "attention" else 0.0 if part in ("head", "vision") else self.mlp

    @property
    def dispatches(self) -> float:
        """The share of sparse layers that send tokens to their experts again."""
        return 1.0 if "router" in self.parts else self.mlp

    def saved_values(self, layer: Layer) -> float:
        """Values of each token that a layer's recomputed parts keep as their inputs, with modules as the YAML names
        them.
        """
        if self.elementwise == self.attention == self.mlp == 1:
            return float(layer.hidden)
        values = layer.hidden * self.attention
        if self.core and not self.attention:
            values += max((float(p.outputs) for p in layer.products if p.part == "attention"), default=0.0)
        if layer.kind == "sparse" and "router" not in self.parts:
            return values + layer.hidden * layer.top_k * ("experts" in self.parts)
        whole = "router" if layer.kind == "sparse" else "mlp"
        return values + layer.hidden * (whole in self.parts)


NOTHING = Recomputed()
FULL = Recomputed(1.0, 1.0, 1.0, 1.0)
_PARTS = {
    "mlp": ("mlp",),
    "moe": ("router", "experts", "shared_experts"),
    "experts": ("experts",),
    "shared_experts": ("shared_experts",),
}


def forward_flops(layer: Layer, lengths: list[int], half: bool = True) -> float:
    """FLOPs of a layer's forward pass for one token, as model FLOPs count them."""
    products = sum(product.flops for product in layer.products if product.counted)
    return products + sum(core.flops(lengths, half) for core in layer.cores)


def _weight_gradients(layer: Layer) -> float:
    return sum(product.flops for product in layer.products if product.counted and product.trained)


def _input_gradients(layer: Layer, lengths: list[int], half: bool) -> float:
    """The FLOPs of the gradients of inputs: for products as many as forward, for attention twice as many, since it has
    two inputs.
    """
    cores = sum(core.flops(lengths, half) for core in layer.cores)
    return forward_flops(layer, lengths, half) + cores


def recomputed_flops(layer: Layer, lengths: list[int], recomputed: Recomputed) -> float:
    """FLOPs of one token that the layer computes again."""
    if layer.kind not in ("dense", "sparse"):
        return 0.0
    products = sum(product.flops * recomputed.share(product.part) for product in layer.products if product.counted)
    return products + recomputed.core * sum(core.flops(lengths) for core in layer.cores)


def token_flops(
    work: Work, lengths: list[int], recomputed: Recomputed = NOTHING, passes_ahead: float = 0
) -> TokenFlops:
    """FLOPs of one token in rows of documents of these lengths. The first frozen layers still pass gradients on, except
    for a vision part without trained weights, which nothing below needs. `passes_ahead`: see Job.passes_ahead.
    """
    totals = []
    for half in (True, False):
        total = 0.0
        for layer in work:
            total += forward_flops(layer, lengths, half) + _weight_gradients(layer)
            if layer.kind != "vision" or any(product.trained for product in layer.products):
                total += _input_gradients(layer, lengths, half)
        totals.append(total)
    forward = [sum(forward_flops(layer, lengths, half) for layer in work) * passes_ahead for half in (True, False)]
    again = sum(
        recomputed_flops(layer, lengths, recomputed)
        for number, layer in enumerate(work.layers)
        if number not in recomputed.not_in
    )
    if recomputed.in_ahead:
        again += sum(recomputed_flops(layer, lengths, recomputed) for layer in work.last)
    return TokenFlops(totals[0] + forward[0], totals[1] + forward[1], again, forward[0])


def recomputed_by(modules: Collection[str], in_ahead: bool, not_in: tuple[int, ...]) -> Recomputed:
    """What the YAML asks for: Config.recomputed_modules, use_recompute_mtp and no_recompute_layers."""
    if "layer" in modules:
        return replace(FULL, in_ahead=in_ahead, not_in=not_in)
    attention = 1.0 if "attention" in modules else 0.0
    core = 1.0 if attention or "core_attn" in modules else 0.0
    parts = frozenset(part for module in modules for part in _PARTS.get(module, ()))
    elementwise = 0.5 * attention + 0.5 * bool(parts - {"shared_experts"})
    return Recomputed(core, attention, 0.0, elementwise, parts, in_ahead, not_in)
