"""Where the layers of a run lie, and in which order a stage works on them."""

from collections.abc import Sequence
from functools import lru_cache

from erniekit.config.schema import Config
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.parallel.mesh import ParallelDims, check_model
from erniekit.parallel.pipeline_schedule import Action, check_schedule, describe, plan
from erniekit.parallel.pipeline_split import cut, layer_costs


def schedule_of(cfg: Config) -> str:
    """The name of the pipeline's schedule; several chunks a stage are interleaved."""
    return "interleaved" if cfg.virtual_pp_degree > 1 and cfg.pipeline_schedule == "1f1b" else cfg.pipeline_schedule


def cut_layers(cfg: Config, config: ModelConfig, stages: int) -> list[list[tuple[int, ...]]]:
    """The layers of each chunk of each stage: piece c * stages + s of the model is chunk c of stage s."""
    chunks = max(cfg.virtual_pp_degree, 1)
    costs = layer_costs(config, cfg.max_seq_len // 2)
    pieces = cut(config.num_hidden_layers, stages * chunks, cfg.pp_seg_method, costs)
    return [[pieces[c * stages + s] for c in range(chunks)] for s in range(stages)]


def check_layout(cfg: Config, degrees: ParallelDims, config: ModelConfig) -> None:
    """Refuse what does not divide, from the model's config.json alone: before any process starts. ConfigError with the
    arithmetic.
    """
    check_model(degrees, config)
    check_schedule(schedule_of(cfg), degrees.pipeline, max(cfg.virtual_pp_degree, 1))
    cut_layers(cfg, config, degrees.pipeline)


@lru_cache(maxsize=8)
def plan_actions(
    schedule: str, stages: int, chunks: int, blocking_sends: bool, stage: int, num_microbatches: int
) -> list[Action]:
    """The actions of a stage in a step of `num_microbatches` microbatches."""
    return plan(schedule, stages, num_microbatches, chunks, blocking_sends)[stage]


def layout_lines(cfg: Config, config: ModelConfig, degrees: ParallelDims) -> list[str]:
    """What the log says about the ranks; nothing for one."""
    inert = []
    if cfg.sharding and degrees.data == 1:
        inert = [f"sharding: {cfg.sharding}: no effect: there is one data rank"]
    elif cfg.sharding_parallel_degree > 1 and not cfg.sharding:
        inert = [
            f"sharding_parallel_degree: {cfg.sharding_parallel_degree}: plain data ranks: nothing is divided over them "
            "without sharding: stage1 or stage2"
        ]
    if degrees.world == 1:
        return inert
    shares = degrees.expert * degrees.tensor if config.moe_num_experts else 1
    experts = f", experts over {shares} of them" if shares > 1 else ""
    tokens = " sharing the tokens" if cfg.sequence_parallel and degrees.tensor > 1 else ""
    lines = [
        f"{degrees.world} ranks = {degrees.pipeline} pipeline stages x {degrees.data} data ranks x {degrees.tensor} "
        f"tensor ranks{tokens}{experts}; a step takes {cfg.batch_size} rows x {cfg.gradient_accumulation_steps} "
        f"microbatches x {degrees.data} = {cfg.batch_size * cfg.gradient_accumulation_steps * degrees.data} rows"
    ]
    if degrees.pipeline > 1:
        stages = cut_layers(cfg, config, degrees.pipeline)
        lines.append(describe(schedule_of(cfg), cfg.gradient_accumulation_steps, stages))
    return lines + inert


def parameter_chunks(model: CausalLM, chunks: Sequence[Sequence[int]]) -> dict[str, int]:
    """The chunk of this process's stage that each parameter is reached by: its layer's, or the last for what stands
    behind the layers. The embedding belongs to the first chunk where tokens are looked up, to the last where the head
    shares it.
    """
    of_layer = {layer: number for number, layers in enumerate(chunks) for layer in layers}
    last = len(chunks) - 1
    of_depth = {layer + 1: number for layer, number in of_layer.items()} | {0: of_layer.get(0, last)}
    return {name: of_depth.get(depth, last) for name, depth in model.parameter_depths().items()}
