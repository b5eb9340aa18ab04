"""Kernel launches of a training step on one GPU: how many times the host has to start something.

The tables count calls of Paddle's operators for one microbatch, as Paddle's profiler shows them; a test compares them
with the steps of small models (tests/gpu/test_launches.py). Operators that only change a tensor's shape start nothing,
and are left out. Some operators start several kernels (`kernels_of`). What is counted: the decoder of a text model
without biases, with all weights trained in 16 bits, or the layers of one rank of several; what ranks send to one
another comes on top.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

from erniekit.config.schema import Config
from erniekit.models.config import ModelConfig
from erniekit.plan.job import Job

ROUTER_LOSSES = ("balance", "z", "orthogonal")


@dataclass(frozen=True)
class LaunchOptions:
    """What decides the number of launches. `rows` of a microbatch; `recompute`: whole layers are computed again;
    `router_losses` of ROUTER_LOSSES; `head_chunks`: chunks of tokens of the output head in each microbatch. Without
    `fused`, documents are taken to have similar lengths, up to 256 tokens, and `used_experts` (None: all) to have rows
    in each layer: longer or more varied documents need more. `layers`: the numbers of this rank's layers (None: all);
    `has_ends`: embedding, output head and loss are on it; `expert_ranks`: ranks over which the experts are divided.
    """

    fused: bool = True
    microbatches: int = 1
    rows: int = 1
    recompute: bool = False
    router_losses: tuple[str, ...] = ()
    head_chunks: int = 1
    used_experts: int | None = None
    layers: tuple[int, ...] | None = None
    has_ends: bool = True
    expert_ranks: int = 1

    def kinds(self, config: ModelConfig) -> list[str]:
        """ "dense" or "sparse" for each layer of this rank."""
        return [config.layer_types[layer] for layer in self.layers] if self.layers is not None else config.layer_types


def options_of(cfg: Config) -> LaunchOptions:
    """The options of a run whose whole model is on one rank. Where only parts of a layer are computed again, none is
    counted as such.
    """
    losses = {
        "balance": cfg.moe_aux_loss_lambda,
        "z": cfg.moe_z_loss_lambda,
        "orthogonal": cfg.moe_orthogonal_loss_lambda,
    }
    return LaunchOptions(
        fused=cfg.fused_operators,
        microbatches=cfg.gradient_accumulation_steps,
        rows=cfg.batch_size,
        recompute=cfg.recompute and cfg.recompute_granularity == "full",
        router_losses=tuple(name for name, weight in losses.items() if weight),
    )


def _table(text: str) -> Counter[str]:
    """ "add 2 matmul 4" as a Counter."""
    words = text.split()
    return Counter({name: int(count) for name, count in zip(words[::2], words[1::2], strict=True)})


_ATTENTION_FORWARD = """fused_rms_norm_ext 2 fused_rotary_position_embedding 1 flashmask_attention 1"""
_ATTENTION_BACKWARD = """
    fused_rms_norm_ext_grad 2 fused_rotary_position_embedding_grad 1 flashmask_attention_grad 1 concat 2
"""
# One layer and microbatch, with fused operators.
_DENSE_FORWARD = _table(f"{_ATTENTION_FORWARD} matmul 4 cast 2 swiglu 1 add 2")
_DENSE_BACKWARD = _table(f"{_ATTENTION_BACKWARD} matmul_grad 4 cast 2 swiglu_grad 1 add_grad 2")
_SPARSE_FORWARD = _table(
    f"""{_ATTENTION_FORWARD} matmul 5 cast 5 add 4 swiglu 2 expand 2 batched_gemm 2 clip 1 multiply 1 sum 1 softmax 1
    topk 1 take_along_axis 1 divide 1 moe_permute 1 moe_unpermute 1"""
)
_SPARSE_BACKWARD = _table(
    f"""{_ATTENTION_BACKWARD} matmul_grad 5 cast 9 add_grad 3 swiglu_grad 2 expand 2 batched_gemm 4 clip 2 multiply 3
    sum 1 take_along_axis 1 moe_permute 1 moe_unpermute 1 gather 1 greater_equal 1 scale 1 full 1 divide_grad 1
    clip_grad 1 sum_grad 1 take_along_axis_grad 1 expand_grad 1 softmax_grad 1"""
)
_SPARSE_STATISTICS = _table("clip 1 log 1 multiply 1 sum 1")  # the entropy of the routers
_RECOMPUTED_SPARSE = _table("full_like 4")  # gradients of what a layer returns beside its output
# The same by plain operations.
_PLAIN_DENSE = _table(
    """cast 28 matmul 16 scale 8 multiply 13 concat 3 gather 6 multiply_grad 5 add 4 matmul_grad 4 square 2 subtract 2
    mean 2 rsqrt 2 rsqrt_grad 2 mean_grad 2 square_grad 2 add_grad 2 as_complex 2 as_real 2 softmax 2 silu 1 silu_grad 1
    sum 2"""
)
_PLAIN_SPARSE = _table(
    """cast 40 matmul 18 scale 9 multiply 18 concat 9 gather 15 multiply_grad 6 full 3 matmul_grad 5 add 8 add_grad 3
    softmax 3 clip 2 sum 4 subtract 2 expand 2 square 2 mean 2 rsqrt 2 rsqrt_grad 2 mean_grad 2 square_grad 2 silu 2
    silu_grad 2 as_complex 2 as_real 2 stack 2 log 1 divide 1 divide_grad 1 clip_grad 1 sum_grad 1 take_along_axis 1
    take_along_axis_grad 1 expand_grad 1 softmax_grad 1 topk 1"""
)
_PLAIN_EXPERT = _table("matmul 6")  # two projections, forward and for both gradients
# One router and microbatch.
_ROUTER_LOSS = {
    "balance": _table("full 1 topk 1 one_hot 1 sum 1 scale 1"),
    "z": _table("logsumexp 1 square 1 sum 1 scale 1 sum_grad 1 square_grad 1 logsumexp_grad 1"),
    "orthogonal": _table(
        """scale 3 full 1 p_norm 1 maximum 1 divide 1 matmul 1 eye 1 subtract 1 square 1 mean 1 mean_grad 1
        square_grad 1 subtract_grad 1 matmul_grad 1 divide_grad 1 maximum_grad 1 p_norm_grad 1 transpose_grad 1"""
    ),
}
_BALANCE_ROW = _table("sum 2 scale 2 sum_grad 2 mean 1 multiply 1 add 1 add_grad 1 multiply_grad 1")
_LOSS_TERM = _table("scale 3 div_scale 2")  # one of the step's losses, in each microbatch
# A microbatch outside of the layers: embedding, tables of angles, final norm, head and loss.
_HEAD_CHUNK = _table(
    "matmul 2 cross_entropy_with_softmax 1 put_along_axis 1 fused_linear_param_grad_add 1 cast 5 full_like 1 multiply 2"
)
_OUTSIDE = _table(
    """cast 2 scale 4 concat 2 multiply 4 add 1 fused_rms_norm_ext 1 fused_rms_norm_ext_grad 1 full_like 3 full 1
    expand 2 sum 2 div_scale 2 repeat_interleave 2 gather 1 gather_grad 1 embedding 1 embedding_grad 1 real 1 imag 1"""
)
_PARAMETER_STEP = _table("squared_l2_norm 1 scale 1 adamw 1")  # its norm, clipping, and update
_STEP = _table("concat 2 full 1")  # one read of all numbers; the learning rate


def operators(config: ModelConfig, options: LaunchOptions) -> Counter[str]:
    """Calls of Paddle's operators in one optimizer step."""
    total: Counter[str] = Counter(_STEP)
    tensors = num_tensors(config, options)
    for count, calls in ((options.microbatches, _microbatch(config, options)), (tensors, _PARAMETER_STEP)):
        for name, number in calls.items():
            total[name] += count * number
    # Gradients in 16 bits are added up in fp32: converted, and from the second microbatch on added.
    narrow = tensors - options.kinds(config).count("sparse")  # routers have fp32
    total["cast"] += options.microbatches * narrow
    total["add"] += (options.microbatches - 1) * narrow
    return total


def _microbatch(config: ModelConfig, options: LaunchOptions) -> Counter[str]:
    calls: Counter[str] = Counter()
    if options.has_ends:
        calls.update(_OUTSIDE)
    for _ in range(options.head_chunks if options.has_ends else 0):
        calls.update(_HEAD_CHUNK)
    kinds = options.kinds(config)
    for kind in kinds:
        calls.update(_layer(kind, config, options))
    if "sparse" in kinds:
        for _ in options.router_losses:
            calls.update(_LOSS_TERM)
    return calls


def _layer(kind: str, config: ModelConfig, options: LaunchOptions) -> Counter[str]:
    """One layer, one microbatch."""
    sparse = kind == "sparse"
    calls: Counter[str] = Counter()
    if options.fused:
        forward = _SPARSE_FORWARD if sparse else _DENSE_FORWARD
        for table in (forward, _SPARSE_BACKWARD if sparse else _DENSE_BACKWARD):
            calls.update(table)
        if sparse:
            calls.update(_SPARSE_STATISTICS)
        if options.recompute:
            calls.update(forward)
            calls.update(_RECOMPUTED_SPARSE if sparse else {})
    else:
        calls.update(_PLAIN_SPARSE if sparse else _PLAIN_DENSE)
        used = _own_experts(config, options) if options.used_experts is None else options.used_experts
        for _ in range(used if sparse else 0):
            calls.update(_PLAIN_EXPERT)
    if sparse:
        calls.update(_router_losses(options))
    return calls


def _router_losses(options: LaunchOptions) -> Counter[str]:
    calls: Counter[str] = Counter()
    for loss in options.router_losses:
        calls.update(_ROUTER_LOSS[loss])
        for _ in range(options.rows if loss == "balance" else 0):
            calls.update(_BALANCE_ROW)
        calls["concat"] += loss == "balance" and options.rows > 1  # the rows' gradients
    return calls


def _own_experts(config: ModelConfig, options: LaunchOptions) -> int:
    return config.moe_num_experts // options.expert_ranks


def num_tensors(config: ModelConfig, options: LaunchOptions) -> int:
    """Trained parameters: norms and projections of the layers, embedding, final norm, and a head of its own."""
    kinds = options.kinds(config)
    sparse = kinds.count("sparse")
    shared = 2 if config.moe_num_shared_experts else 0
    layers = 6 * (len(kinds) - sparse) + (7 + shared) * sparse
    return layers + (2 + (not config.tie_word_embeddings) if options.has_ends else 0)


def kernels_of(operator: str, experts: int) -> int:
    """Kernels that one call starts on a GPU: of a product's gradient one for each input, of a grouped product one for
    each of the rank's `experts`, of AdamW one for the update and one for the powers of the betas.
    """
    several = {"matmul_grad": 2, "adamw": 2, "batched_gemm": experts, "flashmask_attention_grad": 3}
    return several.get(operator, 1)


def kernels(config: ModelConfig, options: LaunchOptions) -> int:
    """Kernel launches of one optimizer step."""
    experts = _own_experts(config, options)
    return sum(count * kernels_of(name, experts) for name, count in operators(config, options).items())


def host_calls(config: ModelConfig, options: LaunchOptions) -> int:
    """Calls that the host makes in one optimizer step, each of which costs Python and dispatch."""
    return sum(operators(config, options).values())


@dataclass(frozen=True)
class Launches:
    """The number of operator `calls` in one optimizer step on one rank, and of the `kernels` that they start."""

    calls: int
    kernels: int


def launches_of(job: Job) -> Launches:
    """The launches of the stage that starts most kernels. The embedding is counted on the last stage, with the head."""
    last = job.degrees.pipeline - 1
    options = replace(options_of(job.cfg), expert_ranks=job.degrees.expert)
    options = replace(options, head_chunks=math.ceil(job.labelled_tokens / job.head_rows))
    found = []
    for stage, chunks in enumerate(job.stages):
        layers = tuple(layer for chunk in chunks for layer in chunk)
        own = replace(options, layers=layers, has_ends=stage == last)
        found.append(Launches(host_calls(job.model, own), kernels(job.model, own)))
    return max(found, key=lambda each: each.kernels)
