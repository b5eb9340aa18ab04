"""Pipeline layout: which layers each stage holds, and the order in which it runs them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from erniekit.config import pointless
from erniekit.config.methods import Records
from erniekit.config.pointless import Facts
from erniekit.config.schema import Config
from erniekit.models.config import ModelConfig
from erniekit.models.fp8_keys import check_fp8_keys, fp8_notes
from erniekit.parallel.mesh import ParallelDims, check_model
from erniekit.parallel.pipeline_schedule import Action, describe, plan
from erniekit.parallel.pipeline_split import layer_costs, split_layers
from erniekit.utils.errors import ConfigError
from erniekit.utils.wording import count_of

if TYPE_CHECKING:  # the agent plans a job without Paddle
    from erniekit.models.decoder import CausalLM


def schedule_of(cfg: Config) -> str:
    """The name of the pipeline's schedule; several chunks a stage are interleaved."""
    return "interleaved" if cfg.virtual_pp_degree > 1 and cfg.pipeline_schedule == "1f1b" else cfg.pipeline_schedule


def assign_layers(cfg: Config, model_config: ModelConfig, stages: int) -> list[list[tuple[int, ...]]]:
    """The layers of each chunk of each stage: piece c * stages + s of the model is chunk c of stage s."""
    chunks = max(cfg.virtual_pp_degree, 1)
    costs = layer_costs(model_config, cfg.max_seq_len // 2)
    pieces = split_layers(model_config.num_hidden_layers, stages * chunks, cfg.pp_seg_method, costs)
    return [[pieces[c * stages + s] for c in range(chunks)] for s in range(stages)]


def check_layout(cfg: Config, degrees: ParallelDims, model_config: ModelConfig) -> None:
    """Refuse what does not divide, and what the model does not have, from the model's config.json alone: before any
    process starts. ConfigError with the arithmetic.
    """
    _check_recompute(cfg, model_config)
    _check_method(cfg, model_config)
    check_fp8_keys(cfg, model_config)
    check_model(degrees, model_config)
    if degrees.context > 1 and cfg.cp_comm_type == "a2a":
        _check_heads(degrees, model_config)
    assign_layers(cfg, model_config, degrees.pipeline)


def chunks_to_use(cfg: Config, model_config: ModelConfig, degrees: ParallelDims, stage: int) -> list[tuple[int, ...]]:
    """The layers of each chunk of a stage where the model is used without training: keys that only training reads are
    not looked at. ConfigError, with the arithmetic, for degrees that do not divide the model.
    """
    check_model(degrees, model_config)
    if degrees.pipeline == 1:
        return [tuple(range(model_config.num_hidden_layers))]
    return assign_layers(cfg, model_config, degrees.pipeline)[stage]


def _check_heads(degrees: ParallelDims, model_config: ModelConfig) -> None:
    """ConfigError where the heads of a tensor rank cannot be divided over the context ranks."""
    product = degrees.context * degrees.tensor
    for size, what in (
        (model_config.num_attention_heads, "attention"),
        (model_config.num_key_value_heads, "key-value"),
    ):
        if size % product:
            raise ConfigError(
                f"cp_comm_type: a2a: context_parallel_degree {degrees.context} * tensor_parallel_degree "
                f"{degrees.tensor} = {product} does not divide the model's {size} {what} heads. Set cp_comm_type: p2p, "
                "which divides no heads, or another degree"
            )


def _check_method(cfg: Config, model_config: ModelConfig) -> None:
    """ConfigError where the method does not go together with the model."""
    if cfg.method.reads("router_replay") and cfg.router_replay != "none" and not model_config.sparse_layers:
        raise ConfigError(
            f"router_replay: {cfg.router_replay}: the model is dense, so no experts are chosen. Leave the key out"
        )
    scaling = model_config.rope_scaling
    # The two answers of a pair share their prompt, of which each could want another rotation.
    if cfg.method.records is not Records.PAIRS or scaling is None or scaling.kind != "dynamic":
        return
    if cfg.max_seq_len > scaling.length:
        raise ConfigError(
            f"max_seq_len: {cfg.max_seq_len}: this model's positions (rope_type dynamic) depend on a text's length "
            f"beyond {scaling.length} tokens, and the answers of a pair share their prompt: set it to at most "
            f"{scaling.length}, or rope_type: yarn in config.json"
        )


def _check_recompute(cfg: Config, model_config: ModelConfig) -> None:
    strange = sorted(number for number in set(cfg.no_recompute_layers) if number >= model_config.num_hidden_layers)
    if strange:
        last = model_config.num_hidden_layers - 1
        raise ConfigError(f"no_recompute_layers: {strange}: the model has layers 0 to {last}")
    if cfg.recompute and cfg.recompute_granularity == "moe" and not model_config.moe_num_experts:
        raise ConfigError("recompute_granularity: moe: this model has no experts. Use full, full_attn or core_attn.")
    if cfg.recompute and cfg.recompute_granularity == "selective":
        missing = _missing_modules(model_config)
        for module in cfg.recompute_modules:
            if module in missing:
                raise ConfigError(f"recompute_modules: {module}: {missing[module]}. Leave it out.")


def _missing_modules(model_config: ModelConfig) -> dict[str, str]:
    """The words of recompute_modules for what the model does not have, with the reason."""
    missing: dict[str, str] = {}
    if not model_config.moe_num_experts:
        missing |= dict.fromkeys(("moe", "experts", "shared_experts"), "this model has no experts")
    elif not model_config.moe_num_shared_experts:
        missing["shared_experts"] = "this model has no shared experts"
    if "dense" not in model_config.layer_types:
        missing["mlp"] = "every layer of this model has experts, which moe or experts recompute"
    if model_config.vision is None:
        missing["vision"] = "this model has no vision transformer"
    return missing


@lru_cache(maxsize=8)
def plan_actions(
    schedule: str, stages: int, chunks: int, blocking_sends: bool, stage: int, num_microbatches: int
) -> list[Action]:
    """The actions of a stage in a step of `num_microbatches` microbatches."""
    return plan(schedule, stages, num_microbatches, chunks, blocking_sends)[stage]


def layout_lines(cfg: Config, model_config: ModelConfig, degrees: ParallelDims) -> list[str]:
    """Log lines about the ranks, and about keys that have no effect with this model on these ranks."""
    notes = [*pointless.notes(cfg, "train", facts_of(model_config, degrees)), *fp8_notes(cfg, model_config)]
    if cfg.sharding_parallel_degree > 1 and not cfg.sharding:
        notes.append(
            f"sharding_parallel_degree: {cfg.sharding_parallel_degree}: plain data ranks: nothing is divided over them "
            "without sharding: stage1, stage2 or stage3"
        )
    if degrees.world == 1:
        return notes
    shares = degrees.expert * degrees.tensor if model_config.moe_num_experts else 1
    experts = f", experts over {shares} of them" if shares > 1 else ""
    shared = f", {degrees.context} data ranks sharing each row's tokens" if degrees.context > 1 else ""
    tokens = " sharing the tokens" if cfg.sequence_parallel and degrees.tensor > 1 else ""
    microbatches = cfg.num_microbatches(degrees.batch)
    lines = [
        f"{degrees.world} ranks = {degrees.describe()}{tokens}{experts}{shared}; a step takes "
        f"{count_of(cfg.batch_size, 'row')} x {count_of(microbatches, 'microbatch', 'microbatches')} x "
        f"{degrees.batch} = {count_of(cfg.batch_size * microbatches * degrees.batch, 'row')}"
    ]
    if degrees.pipeline > 1:
        stages = assign_layers(cfg, model_config, degrees.pipeline)
        lines.append(describe(schedule_of(cfg), microbatches, stages))
    return lines + notes


def facts_of(model_config: ModelConfig, degrees: ParallelDims) -> Facts:
    """The facts about the model and the job that decide which keys have an effect."""
    aux_free = bool(model_config.extra.get("moe_use_aux_free", False))
    sees_pictures = model_config.vision is not None
    return Facts(model_config.moe_num_experts, aux_free, degrees.data, degrees.world, sees_pictures)


def parameter_chunks(model: "CausalLM", chunks: Sequence[Sequence[int]]) -> dict[str, int]:
    """The chunk of this process's stage that each parameter is reached by: its layer's, or the last for what stands
    behind the layers. The embedding belongs to the first chunk where tokens are looked up, to the last where the head
    shares it.
    """
    of_layer = {layer: number for number, layers in enumerate(chunks) for layer in layers}
    last = len(chunks) - 1
    of_depth = {layer + 1: number for layer, number in of_layer.items()} | {0: of_layer.get(0, last)}
    return {name: of_depth.get(depth, last) for name, depth in model.parameter_depths().items()}
