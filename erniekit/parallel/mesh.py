"""The degrees of each form of parallelism, the coordinates of this process, and the groups that it is in.

Axes: pipeline P, data D, tensor T; rank = (p * D + d) * T + t. Experts are sharded over E adjacent data ranks (and over
the tensor ranks). Optimizer state is divided over S adjacent data ranks. C adjacent data ranks, the context ranks,
share the tokens of the same rows: a data rank is one whose gradients are added to those of others, whether it has other
rows than they or other tokens of the same rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from erniekit.config.schema import Config
from erniekit.parallel.model_sizes import ModelSizes
from erniekit.parallel.process_group import ALONE, Group, Ranks
from erniekit.utils.errors import ConfigError
from erniekit.utils.wording import count_of


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the axes. `data` counts all data ranks, of which sharding, expert and context ranks are groups.

    Raises:
        ConfigError: a degree does not divide the data ranks.
    """

    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    expert: int = 1
    sharding: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for key, degree in (
            ("expert_parallel_degree", self.expert),
            ("sharding_parallel_degree", self.sharding),
            ("context_parallel_degree", self.context),
        ):
            if self.data % degree:
                raise ConfigError(
                    f"{key}: {degree} does not divide the {self.data} data ranks ({self.data} / {degree} = "
                    f"{self.data / degree:.2f}): the data ranks must form whole groups. Make data_parallel_degree * "
                    f"sharding_parallel_degree a multiple of {degree}."
                )

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.pipeline * self.data * self.tensor

    def describe(self) -> str:
        """The three axes as text, such as 2 pipeline stages x 4 data ranks x 1 tensor rank."""
        return (
            f"{count_of(self.pipeline, 'pipeline stage')} x {count_of(self.data, 'data rank')} x "
            f"{count_of(self.tensor, 'tensor rank')}"
        )

    @property
    def batch(self) -> int:
        """Number of groups of context ranks: of data ranks that have different rows."""
        return self.data // self.context

    @classmethod
    def from_config(cls, cfg: Config, world: int | None = None) -> "ParallelDims":
        """The degrees in a configuration; 1 and -1 mean that the key was not given.

        Args:
            cfg: its pipeline_, tensor_, sharding_, data_, expert_ and context_parallel_degree. A
                sharding_parallel_degree of -1 stands for all data ranks, those that share rows included.
            world: the number of processes, from which the number of data ranks follows where data_parallel_degree is
                not given; None: as many processes as the degrees multiply to.

        Raises:
            ConfigError: the degrees do not multiply to `world`, or one does not divide the data ranks.
        """
        pipeline, tensor = max(cfg.pipeline_parallel_degree, 1), max(cfg.tensor_parallel_degree, 1)
        sharding, replicas = max(cfg.sharding_parallel_degree, 1), max(cfg.data_parallel_degree, 1)
        expert, context = max(cfg.expert_parallel_degree, 1), max(cfg.context_parallel_degree, 1)
        data = sharding * replicas * context if sharding * replicas > 1 else math.lcm(expert, context)
        if world is not None and replicas == 1 and world % (pipeline * tensor * sharding * context) == 0:
            data = world // (pipeline * tensor)
        if world not in (None, pipeline * data * tensor):
            shared = f" * context_parallel_degree {context}" if context > 1 else ""
            raise ConfigError(
                f"pipeline_parallel_degree {pipeline} * data ranks {data} (data_parallel_degree {replicas} * "
                f"sharding_parallel_degree {sharding}{shared}, at least expert_parallel_degree {expert}) * "
                f"tensor_parallel_degree {tensor} = {count_of(pipeline * data * tensor, 'process', 'processes')}, but "
                f"there are {world}. Change a degree, or start "
                f"{count_of(pipeline * data * tensor, 'process', 'processes')}."
            )
        return cls(pipeline, data, tensor, expert, data if cfg.sharding_parallel_degree == -1 else sharding, context)

    @classmethod
    def of_one_copy(cls, cfg: Config) -> "ParallelDims":
        """The ranks that one copy of the model needs: as `from_config`, with no data ranks but those that share
        experts.
        """
        expert = max(cfg.expert_parallel_degree, 1)
        return cls(max(cfg.pipeline_parallel_degree, 1), expert, max(cfg.tensor_parallel_degree, 1), expert)


def check_model(degrees: ParallelDims, model: ModelSizes) -> None:
    """Raise where degrees do not divide a model.

    Args:
        model: its configuration.

    Raises:
        ConfigError: names the degree and the size, with the division.
    """
    if model.num_hidden_layers < degrees.pipeline:
        raise ConfigError(
            f"pipeline_parallel_degree: {degrees.pipeline} stages need a layer each, but the model has "
            f"{model.num_hidden_layers}."
        )
    if degrees.expert > 1 and not model.moe_num_experts:
        raise ConfigError(f"expert_parallel_degree: {degrees.expert}, but the model has no experts. Leave it out.")
    tensor = ("tensor_parallel_degree", degrees.tensor)
    both = ("expert_parallel_degree * tensor_parallel_degree", degrees.expert * degrees.tensor)
    for (key, degree), size, what in (
        (tensor, model.num_attention_heads, "attention heads"),
        (tensor, model.num_key_value_heads, "key-value heads"),
        (tensor, model.vocab_size, "entries of the vocabulary"),
        (tensor, model.intermediate_size, "features of intermediate_size"),
        (tensor, model.moe_intermediate_size * model.moe_num_shared_experts, "features of the shared experts"),
        (both, model.moe_num_experts, "experts"),
    ):
        if size % degree:
            raise ConfigError(
                f"{key}: {degree} does not divide the model's {size} {what} ({size} / {degree} = {size / degree:.2f}). "
                f"Possible: {', '.join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)}."
            )


@dataclass(frozen=True)
class Mesh:
    """This process among all: coordinates and groups. `expert` is its place in its expert group."""

    degrees: ParallelDims
    rank: int
    pipe: int
    data: int
    tensor: int
    expert: int
    world_group: Group
    data_group: Group  # same stage, same tensor rank
    tensor_group: Group
    pipe_group: Group
    expert_group: Group  # E data ranks that share the experts
    expert_data_group: Group  # data ranks that hold the same experts
    shard_group: Group  # S data ranks that share optimizer state
    shard_replica_group: Group  # data ranks that hold the same shard
    expert_shard_group: Group  # the same for weights of experts: within expert_data_group
    expert_shard_replica_group: Group
    context_group: Group  # C data ranks that share the tokens of the same rows
    ends_group: Group  # first and last stage: they share embeddings

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.degrees.world

    @property
    def batch(self) -> int:
        """The group of context ranks that this one is in; all ranks of a group have the same rows."""
        return self.data // self.degrees.context

    @property
    def is_first_stage(self) -> bool:
        return self.pipe == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipe == self.degrees.pipeline - 1

    @property
    def holds_results(self) -> bool:
        """Whether this is the one rank that reports what the head has made of its rows: tensor and context ranks of the
        last stage all have the same.
        """
        return self.is_last_stage and self.tensor == 0 and self.context_group.index == 0

    @property
    def blocking_sends(self) -> bool:
        """Whether all ranks must start a pipeline's transfers in one order, which NCCL requires of communicators that
        are used at the same time. Over TCP a send never waits.
        """
        return self.pipe_group.handle is not None

    @staticmethod
    def single() -> "Mesh":
        """The mesh of a single process, whatever its world."""
        return Mesh(ParallelDims(), 0, 0, 0, 0, 0, *[ALONE] * len(group_names()))

    @staticmethod
    def outline(degrees: ParallelDims, rank: int) -> "Mesh":
        """The mesh of a rank of a world that does not run: its groups know their ranks and cannot communicate."""
        lists = rank_lists(degrees, rank)
        pipe, data, tensor = coordinates(degrees, rank)
        groups = [Group(lists[name], lists[name].index(rank)) for name in group_names()]
        return Mesh(degrees, rank, pipe, data, tensor, data % degrees.expert, *groups)


def coordinates(degrees: ParallelDims, rank: int) -> tuple[int, int, int]:
    """(pipe, data, tensor) of a rank."""
    rest, tensor = divmod(rank, degrees.tensor)
    pipe, data = divmod(rest, degrees.data)
    return pipe, data, tensor


def group_names() -> tuple[str, ...]:
    """The groups of a mesh, in the order of its fields."""
    return tuple(name for name in Mesh.__dataclass_fields__ if name.endswith("_group"))


def rank_lists(degrees: ParallelDims, rank: int) -> dict[str, Ranks]:
    """The ranks of each group that `rank` is in, by the group's name."""
    pipe, data, tensor = coordinates(degrees, rank)
    num_data, num_expert = degrees.data, degrees.expert

    def at(stage: int, data_ranks: range) -> Ranks:
        return tuple((stage * num_data + d) * degrees.tensor + tensor for d in data_ranks)

    all_data = range(num_data)
    same_experts = range(data % num_expert, num_data, num_expert)
    # Optimizer state of expert weights is divided over the ranks of a sharding group with the same experts.
    expert_sharding = 1 if degrees.sharding % num_expert else degrees.sharding // num_expert
    stages = range(degrees.pipeline)
    along_pipe = tuple((stage * num_data + data) * degrees.tensor + tensor for stage in stages)
    ends = along_pipe[:1] + along_pipe[-1:] if degrees.pipeline > 1 else along_pipe
    return {
        "world_group": tuple(range(degrees.world)),
        "data_group": at(pipe, all_data),
        "tensor_group": tuple(rank - tensor + t for t in range(degrees.tensor)),
        "pipe_group": along_pipe,
        "expert_group": at(pipe, _block(all_data, data, num_expert)),
        "expert_data_group": at(pipe, same_experts),
        "shard_group": at(pipe, _block(all_data, data, degrees.sharding)),
        "shard_replica_group": at(pipe, all_data[data % degrees.sharding :: degrees.sharding]),
        "expert_shard_group": at(pipe, _block(same_experts, data // num_expert, expert_sharding)),
        "expert_shard_replica_group": at(pipe, same_experts[data // num_expert % expert_sharding :: expert_sharding]),
        "context_group": at(pipe, _block(all_data, data, degrees.context)),
        "ends_group": ends if rank in ends else (rank,),
    }


def _block(ranks: range, place: int, length: int) -> range:
    """The block of `length` adjacent entries that contains `place`."""
    start = place // length * length
    return ranks[start : start + length]


def pipe_pairs(degrees: ParallelDims) -> Iterator[tuple[int, int]]:
    """(sender, receiver) of all neighbours along a pipeline, in both directions; the ends are neighbours, too."""
    for rank in range(degrees.world):
        stages = rank_lists(degrees, rank)["pipe_group"]
        place = stages.index(rank)
        for step in (-1, 1):
            if degrees.pipeline > 1:
                yield rank, stages[(place + step) % degrees.pipeline]


def build_mesh(degrees: ParallelDims) -> Mesh:
    """Create the groups. All ranks call it, after `backend.init()`, with the same degrees.

    Raises:
        ConfigError: another number of processes was started than the degrees multiply to.
    """
    from erniekit.parallel import backend

    world = backend.world()
    if world.size != degrees.world:
        raise ConfigError(
            f"The degrees need {degrees.pipeline} (pipeline) * {degrees.data} (data) * {degrees.tensor} (tensor) = "
            f"{count_of(degrees.world, 'process', 'processes')}, but {world.size} started."
        )
    backend.open_channels(list(dict.fromkeys(pipe_pairs(degrees))))
    local_lists = rank_lists(degrees, world.rank)
    # Tokens are sent to experts, and keys and values to context ranks, within a pass, gradients as soon as they are
    # complete: they need communicators of their own, even where the ranks are the same.
    within_a_pass = {"expert_group": "experts", "context_group": "context"}
    roles = {name: within_a_pass.get(name, "") for name in local_lists}
    lists: dict[str, dict[Ranks, None]] = {role: {} for role in sorted(set(roles.values()))}
    for rank in range(degrees.world):
        for name, ranks in rank_lists(degrees, rank).items():
            lists[roles[name]][ranks] = None
    groups = {role: backend.groups(list(every), role) for role, every in lists.items()}
    pipe, data, tensor = coordinates(degrees, world.rank)
    by_name = {name: groups[roles[name]][ranks] for name, ranks in local_lists.items()}
    return Mesh(degrees, world.rank, pipe, data, tensor, data % degrees.expert, **by_name)
