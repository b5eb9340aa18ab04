"""What a model computes for one token: matrix products and attention, as sizes.

Both the count of FLOPs (plan/flops.py) and the time (plan/timing.py) are sums over these; `work_of` makes them
from a job. Models of other families can be written as operations by hand, which is how published runs are reproduced.

Legend: D hidden size, E experts, K experts of a token.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from erniekit.models.config import ModelConfig
from erniekit.models.vision_config import VisionConfig
from erniekit.plan.job import Job

# The tokens of one frame that are assumed to attend to one another in the vision transformer, at most.
FRAME_TOKENS = 1024


@dataclass(frozen=True)
class Product:
    """The product of rows with a matrix [inputs, outputs].

    `part`: attention, mlp, experts, shared_experts, router, head, vision or adapter. `rows`: rows for each token (K for
    routed experts;
    the share of tokens that have it otherwise). `experts`: the number of matrices among which the rows are divided.
    `tensor_split`: the dimension that tensor ranks divide. `trained`: whether the weight has a gradient.
    `counted`: whether the model's FLOPs include it; by custom those of the router are left out.
    """

    part: str
    inputs: int
    outputs: int
    rows: float = 1.0
    experts: int = 1
    tensor_split: str = "outputs"  # outputs, inputs, experts or "" (not divided)
    trained: bool = True
    counted: bool = True

    @property
    def parameters(self) -> int:
        """The number of elements of its weights."""
        return self.inputs * self.outputs * self.experts

    @property
    def flops(self) -> float:
        """FLOPs of the forward product for one token."""
        return 2.0 * self.inputs * self.outputs * self.rows


@dataclass(frozen=True)
class Core:
    """The attention between its projections: `heads` query heads, `kv_heads` key-value heads, features of a query (or
    key) and of a value. `window`: tokens that a token attends to at most (0: all of the document). `causal`: or to both
    sides. `rows`: as of a Product; `context`: the length of a sequence if it is not the document.
    """

    heads: int
    kv_heads: int
    query_size: int
    value_size: int
    window: int = 0
    causal: bool = True
    rows: float = 1.0
    context: int = 0

    def flops(self, lengths: list[int], half: bool = True) -> float:
        """FLOPs of the forward pass for one token of documents of these lengths; `half`: of the causal half alone."""
        lengths = [self.context] if self.context else lengths
        area = sum(self._area(length, half) for length in lengths) / sum(lengths)
        return 2.0 * self.heads * (self.query_size + self.value_size) * area * self.rows

    def _area(self, length: int, half: bool) -> float:
        """Pairs of tokens that attend to one another in one document."""
        if not self.window or self.window >= length:
            return length**2 / (2 if half and self.causal else 1)
        return (length - self.window) * self.window + self.window**2 / (2 if half and self.causal else 1)


@dataclass(frozen=True)
class Layer:
    """One layer, the head, or another block with its own products.

    `hidden`: the width of its rows. `values`: numbers that elementwise kernels of the forward pass read and write for
    each token (norms, rotation, activation, residual sums), fused as far as is usual; `permuted`: those of kernels that
    sort rows by expert and back.
    `top_k`, `num_experts`: of a sparse layer.
    """

    kind: str  # dense, sparse, head, vision or join
    hidden: int
    products: tuple[Product, ...]
    cores: tuple[Core, ...] = ()
    values: float = 0.0
    top_k: int = 0
    num_experts: int = 0
    shared: bool = False
    permuted: float = 0.0
    top_hosts: int = 0  # the router limits a token's experts to those of this many hosts; 0: it does not

    @property
    def parameters(self) -> int:
        """The number of elements of its products' weights."""
        return sum(product.parameters for product in self.products)


@dataclass(frozen=True)
class Work:
    """A whole model: what comes before the first layer, the layers, and what comes after the last (blocks for
    multi-token prediction, heads). `embedding`: elements of the embedding that are not also the head's.
    """

    hidden: int
    first: tuple[Layer, ...]
    layers: tuple[Layer, ...]
    last: tuple[Layer, ...]
    embedding: int = 0

    def __iter__(self) -> Iterator[Layer]:
        yield from (*self.first, *self.layers, *self.last)

    def chunk(self, numbers: tuple[int, ...]) -> tuple[Layer, ...]:
        """The layers of a pipeline chunk that has the decoder layers of these numbers."""
        first = self.first if numbers[0] == 0 else ()
        last = self.last if numbers[-1] == len(self.layers) - 1 else ()
        return (*first, *(self.layers[number] for number in numbers), *last)

    @property
    def parameters(self) -> int:
        """Elements of all weights; norms and biases, below a thousandth, are left out."""
        return self.embedding + sum(layer.parameters for layer in self)


def attention_products(hidden: int, heads: int, kv_heads: int, head_dim: int) -> tuple[Product, ...]:
    """The two projections of attention with grouped queries; q, k and v are one product."""
    into = Product("attention", hidden, (heads + 2 * kv_heads) * head_dim)
    return into, Product("attention", heads * head_dim, hidden, tensor_split="inputs")


def mlp_products(hidden: int, size: int, part: str = "mlp", matrices: int = 3) -> tuple[Product, ...]:
    """A feed-forward block: gate and up as one product with SwiGLU (3 matrices), one with GELU (2)."""
    up = Product(part, hidden, (matrices - 1) * size)
    return up, Product(part, size, hidden, tensor_split="inputs")


def expert_products(hidden: int, size: int, top_k: float, experts: int, matrices: int = 3) -> tuple[Product, ...]:
    """Routed experts of width `size`, of which each token has `top_k`."""
    up = Product("experts", hidden, (matrices - 1) * size, rows=top_k, experts=experts, tensor_split="experts")
    return up, replace(up, inputs=size, outputs=hidden)


def router_product(hidden: int, experts: int) -> Product:
    """The router."""
    return Product("router", hidden, experts, tensor_split="", counted=False)


def scaled(layer: Layer, share: float) -> Layer:
    """A layer that only this share of the tokens passes."""
    products = tuple(replace(product, rows=product.rows * share) for product in layer.products)
    cores = tuple(replace(core, rows=core.rows * share) for core in layer.cores)
    return replace(layer, products=products, cores=cores, values=layer.values * share, permuted=layer.permuted * share)


def head_layer(hidden: int, vocabulary: int, share: float = 1.0) -> Layer:
    """The output head with its loss: fp32 logits are written once and read twice."""
    return Layer(
        "head", hidden, (Product("head", hidden, vocabulary, rows=share),), values=4.0 * hidden + 6 * vocabulary * share
    )


def attention_values(hidden: int, heads: int, kv_heads: int, head_dim: int) -> float:
    """Numbers that are read and written around attention: norm 2 D, residual sum 3 D, rotation of q and k."""
    return 5.0 * hidden + 2.0 * (heads + kv_heads) * head_dim


def mlp_values(hidden: int, size: float, matrices: int = 3) -> float:
    """Numbers around a feed-forward block of `size` features for each token: norm 2 D, residual sum 3 D, activation."""
    return 5.0 * hidden + matrices * size


def routing_values(hidden: int, top_k: float) -> float:
    """Numbers of permuting rows to their experts and back: read and written once each way, and summed."""
    return (4.0 * top_k + 1.0) * hidden


def work_of(job: Job) -> Work:
    """What a job's model computes for each token."""
    model, frozen = job.model, job.is_lora
    kinds = {
        sparse: _layer(model, job, sparse) for sparse in {*map(model.is_moe_layer, range(model.num_hidden_layers))}
    }
    layers = tuple(kinds[model.is_moe_layer(i)] for i in range(model.num_hidden_layers))
    head = head_layer(model.hidden_size, model.vocab_size, job.supervised_share)
    ahead: list[Layer] = []
    for _ in range(job.mtp_depths):
        join = Product("mlp", 2 * model.hidden_size, model.hidden_size, tensor_split="")
        ahead += [Layer("join", model.hidden_size, (join,), values=6.0 * model.hidden_size)]
        ahead += [_layer(model, job, sparse=False), head]
    vision = () if model.vision is None or not job.picture_tokens else _vision(model, model.vision, job)
    tied = model.tie_word_embeddings
    work = Work(model.hidden_size, vision, layers, (*ahead, head), 0 if tied else model.hidden_size * model.vocab_size)
    return _with_adapters(work, job.cfg.lora_rank) if frozen else work


def _layer(model: ModelConfig, job: Job, sparse: bool) -> Layer:
    hidden, heads, kv_heads, size = (
        model.hidden_size, model.num_attention_heads, model.num_key_value_heads, model.head_dim,
    )  # fmt: skip
    products = list(attention_products(hidden, heads, kv_heads, size))
    values = attention_values(hidden, heads, kv_heads, size)
    cores = (Core(heads, kv_heads, size, size),)
    if not sparse:
        products += mlp_products(hidden, model.intermediate_size)
        return Layer("dense", hidden, tuple(products), cores, values + mlp_values(hidden, model.intermediate_size))
    pictures = job.picture_tokens / job.row_tokens if model.vision is not None else 0.0
    shared = model.moe_intermediate_size * model.moe_num_shared_experts
    active = float(shared)
    for width, share in zip(model.expert_sizes, (1 - pictures, pictures)):
        products += [router_product(hidden, model.moe_num_experts)]
        products += expert_products(hidden, width, model.moe_k * share, model.moe_num_experts)
        active += width * model.moe_k * share
    if shared:
        products += mlp_products(hidden, shared, "shared_experts")
    return Layer(
        "sparse",
        hidden,
        tuple(products),
        cores,
        values + mlp_values(hidden, active),
        model.moe_k,
        model.moe_num_experts,
        bool(shared),
        routing_values(hidden, model.moe_k),
    )


def _vision(model: ModelConfig, vision: VisionConfig, job: Job) -> tuple[Layer, ...]:
    """Vision transformer and resampler, for the share of the tokens that stand for pictures. A picture is assumed to
    have FRAME_TOKENS tokens, or all picture tokens of a row if they are fewer.
    """
    share = job.picture_tokens / job.row_tokens
    patches = share * vision.spatial_merge_size**2
    size, wide = vision.hidden_size, vision.merged_size
    context = min(job.picture_tokens, FRAME_TOKENS) * vision.spatial_merge_size**2
    core = Core(vision.num_heads, vision.num_heads, vision.head_dim, vision.head_dim, 0, False, patches, context)

    def product(inputs: int, outputs: int, rows: float) -> Product:
        return Product("vision", inputs, outputs, rows=rows, tensor_split="")

    block = Layer(
        "vision",
        size,
        (
            product(size, 3 * size, patches),
            product(size, size, patches),
            product(size, vision.intermediate_size, patches),
            product(vision.intermediate_size, size, patches),
        ),
        (core,),
        patches * (16.0 * size + 2.0 * vision.intermediate_size),
    )
    embed = Layer("vision", size, (product(vision.patch_features, size, patches),), values=patches * 2.0 * size)
    resampler = Layer(
        "vision",
        wide,
        (
            product(wide, wide, share),
            product(wide, wide, share),
            product(wide * vision.temporal_merge_size, wide, share),
            product(wide, wide, share),
            product(wide, model.hidden_size, share),
        ),
        values=share * 12.0 * wide,
    )
    return (embed, *[block] * vision.depth, resampler)


def _with_adapters(work: Work, rank: int) -> Work:
    """The model with frozen weights, and two narrow products beside each projection of the decoder layers."""

    @functools.cache
    def adapted(layer: Layer) -> Layer:
        products: list[Product] = []
        for product in layer.products:
            products.append(replace(product, trained=False))
            if layer.kind in ("dense", "sparse") and product.part != "router":
                split = product.tensor_split if product.experts > 1 else ""
                narrow = replace(product, part="adapter", tensor_split=split)
                products += [replace(narrow, outputs=rank), replace(narrow, inputs=rank)]
        return replace(layer, products=tuple(products))

    return replace(
        work,
        first=tuple(map(adapted, work.first)),
        layers=tuple(map(adapted, work.layers)),
        last=tuple(map(adapted, work.last)),
    )
