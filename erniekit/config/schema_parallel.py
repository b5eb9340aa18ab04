"""Keys about the processes that train together."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key, list_of

ZERO_STAGES = {"": 0, "stage1": 1, "stage2": 2, "stage3": 3}  # of `sharding`


@dataclass(frozen=True, kw_only=True)
class ParallelArgs:
    """The parallel degrees: over how many processes the model and the data are divided. -1 means not given."""

    group: ClassVar[str] = "parallel"

    tensor_parallel_degree: int = key(
        1,
        "Tensor-parallel size: projections are sharded across these ranks, sparse layers by whole experts.",
        ge=1,
        off=-1,
    )
    sequence_parallel: bool = key(
        False,
        "Sequence parallelism: tensor-parallel ranks shard the tokens between projections; less activation memory.",
    )
    pipeline_parallel_degree: int = key(1, "Pipeline stages that the layers are divided into.", ge=1, off=-1)
    virtual_pp_degree: int = key(
        1, "Chunks of the model on each pipeline stage; above 1 the schedule is interleaved.", ge=1, off=-1
    )
    pp_seg_method: str | tuple[int, ...] = list_of(
        int,
        "How layers are divided: evenly (layer:DecoderLayer), by cost (balanced), or at given layers ([0,29,57]).",
        "layer:DecoderLayer",
        or_word=True,
        ge=0,
    )
    pipeline_schedule: str = key(
        "1f1b",
        "Order of forward and backward passes: 1f1b, or memory_efficient (less activation memory, a larger bubble).",
        choices=("1f1b", "memory_efficient"),
    )
    expert_parallel_degree: int = key(
        -1, "Data ranks that share the experts of a layer; it divides the number of data ranks.", ge=1, off=-1
    )
    context_parallel_degree: int = key(
        -1,
        "Data ranks that share the tokens of each row, for rows too long for one rank; processes are multiplied by it.",
        ge=1,
        off=-1,
    )
    cp_comm_type: str = key(
        "p2p",
        "What context ranks exchange: keys and values around a ring (p2p), or heads for tokens (a2a, Ulysses; the "
        "degree must divide the key-value heads of a tensor rank).",
        choices=("p2p", "a2a"),
    )
    data_parallel_degree: int = key(
        -1,
        "Data ranks that each hold the whole optimizer state; -1: computed from the number of processes.",
        ge=1,
        off=-1,
    )
    sharding: str = key(
        "",
        "ZeRO: shard the optimizer's state over data ranks (stage1), or also the gradients (stage2), or also the "
        "weights of the layers (stage3); empty: none of them.",
        choices=tuple(ZERO_STAGES),
    )
    sharding_parallel_degree: int = key(
        -1, "Data ranks that share one copy of what `sharding` divides; -1: all of them.", ge=1, off=-1
    )
    balance_pictures: bool = key(
        True,
        "Data ranks divide the vision transformer's work on a microbatch's pictures evenly, by patches; False: each "
        "encodes the pictures of its own rows.",
    )
    distributed_timeout: float = key(
        30.0, "Seconds within which a rank that died or hangs ends the whole job, on all hosts.", ge=2
    )
    rendezvous_timeout: float = key(
        600.0, "Seconds that the hosts of a job (NNODES) wait for one another before it begins.", gt=0
    )
    max_restarts: int = key(
        0, "How often a job that lost a rank starts again by itself, from its last checkpoint.", ge=0
    )
    elastic: bool = key(
        False,
        "A restarted job continues without the hosts that do not come back: fewer data ranks, more accumulation, the "
        "same global batch.",
    )
    check_replicas_steps: int = key(
        100, "Every N steps ranks compare their copies of the parameters, bit for bit; -1: never.", ge=1, off=-1
    )
