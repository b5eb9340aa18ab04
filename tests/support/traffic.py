"""Measures what a rank sends in one optimizer step, stores and waits for, beside the formulas of the product
(parallel/traffic.py, parallel/memory.py, parallel/pipeline_schedule.py).

`measure(keys)` is a job for every rank of a world (tests/support/worlds.py): one step of the real trainer. It covers
models in fp32 without adapters or multi-token prediction, and recomputation of whole layers with expert
parallelism only.
"""

from collections import Counter
from typing import Any


def expected_bytes(run: Any, microbatches: list[Any], away: list[tuple[int, int]], plans: list[Any]) -> dict[str, int]:
    """Bytes by kind, host messages left out. `away`: of each dispatch to experts, the rows for other ranks and those
    from other ranks. `plans`: how data ranks divide the pictures of each microbatch.
    """
    from erniekit.models.inputs import padded_length
    from erniekit.parallel import traffic

    mesh, config, shard = run.mesh, run.model.config, run.model.shard
    degrees, numbers = mesh.degrees, run.model.model.layers.numbers
    sparse = sum(config.is_moe_layer(number) for number in numbers)
    layers = traffic.StageLayers(
        dense=len(numbers) - sparse,
        sparse=sparse,
        shared=sparse if config.moe_num_shared_experts else 0,
        has_embedding=shard.has_embedding,
        has_head=shard.has_head,
    )
    divides_tokens = run.cfg.sequence_parallel and degrees.tensor > 1
    buckets = run.sync.parameters.buckets
    sent = traffic.gradient_sync_bytes(
        buckets, run.sync.zero_stage, len(microbatches), run.sync.master_grad, mesh.world
    )
    del sent["host"]
    if run.model.units is not None:
        gathered = [bucket for unit in run.model.units.units.values() for bucket in unit.buckets]
        sent["all_gather"] += traffic.weight_gather_bytes(gathered, 2 * len(microbatches))
    recomputed = run.cfg.recompute and run.cfg.recompute_granularity == "full"
    for batch in microbatches:
        size = padded_length(run.model, batch)
        tokens = traffic.TokenCounts(size, *_own_tokens(run.model, batch))
        if run.model.context is not None:
            sent += _context_bytes(run, batch, len(numbers), sparse, recomputed)
        sent += traffic.tensor_parallel_bytes(
            layers, tokens, degrees.tensor, mesh.tensor, config.hidden_size, config.moe_k, divides_tokens
        )
        num_tokens = size // run.model.token_multiple
        sent["send"] += traffic.pipeline_bytes(
            mesh.pipe, degrees.pipeline, len(run.model.chunks), num_tokens, config.hidden_size
        )
    # A recomputed layer dispatches the same rows a second time.
    dispatches = 2 if recomputed else 1
    out, back = (sum(rows) // dispatches for rows in zip(*away)) if away else (0, 0)
    sent["all_to_all"] += traffic.expert_parallel_bytes(out, back, config.hidden_size, recomputed)
    sent["all_to_all"] += sum(_picture_bytes(run.model, plan) for plan in plans if plan is not None)
    return dict(sent)


def _own_tokens(model: Any, batch: Any) -> tuple[int, int]:
    """Tokens of a batch on this rank, and those that have a label."""
    if model.context is None:
        return batch.num_tokens, len(batch.supervised)
    shard = model.context.shard(batch.row_lengths)
    return len(shard.tokens), int(shard.select(batch.supervised)[0].sum())


def _context_bytes(run: Any, batch: Any, layers: int, sparse: int, recomputed: bool) -> Counter[str]:
    from erniekit.models.inputs import head_layout
    from erniekit.parallel import traffic
    from erniekit.parallel.context import ring_plan

    model = run.model
    shard, heads = model.context.shard(batch.row_lengths), head_layout(model.config, model.shard)
    index, sent = shard.group.index, Counter()
    if model.context.exchange == "a2a":
        widths = heads.total * heads.dim, heads.num_heads * heads.dim
        tokens = [len(tokens) for tokens in shard.by_rank]
        sent["all_to_all"] = traffic.head_exchange_bytes(tokens, index, *widths, layers, recomputed)
    else:
        sent_tokens = [len(rows) for rows in ring_plan(shard, batch.segment_ids).sent]
        sent["ring"] = traffic.ring_bytes(sent_tokens, index, heads.num_kv_heads * heads.dim, layers, recomputed)
    if run.cfg.moe_aux_loss_lambda:
        rows, experts = len(batch.row_lengths), model.config.moe_num_experts
        sent["all_reduce"] = sparse * traffic.load_balance_bytes(rows, experts, shard.group.size)
    return sent


def _picture_bytes(model: Any, plan: Any) -> int:
    from erniekit.parallel import traffic

    def to_others(counts: list[int]) -> int:
        return sum(counts) - counts[plan.group.index]

    config, parts = model.config, (model.model.vision_model, model.model.resampler_model)
    trained = any(not parameter.stop_gradient for part in parts for parameter in part.parameters())
    patches, features = to_others(plan.patch_counts[0]), (to_others(counts) for counts in plan.token_counts)
    return traffic.picture_bytes(patches, config.vision.patch_features, *features, config.hidden_size, trained)


def stored_gradient_bytes(sync: Any) -> int:
    """Bytes of gradients that a rank stores now, counted over its tensors."""
    stored = [p.grad for p in sync.parameters.tensors.values() if p.grad is not None]
    stored += [*sync._fp32_sums.values(), *sync._rows.values(), *(matrix for *_, matrix in sync._in_flight)]
    return sum(tensor.size * tensor.element_size() for tensor in stored)


def entries_of_model(run: Any) -> list[Any]:
    """Every parameter of this rank, trained or not."""
    from erniekit.models.parallelize import placements
    from erniekit.parallel.zero import entries_of

    units = {} if run.model.units is None else run.model.units.entries
    where = placements(run.model, run.mesh, bool(run.cfg.sharding))
    unit_of = {name: entry.unit for name, entry in units.items()}
    return list(entries_of(dict(run.model.named_parameters()), where, {}, units=unit_of).values())


def stored_weight_bytes(model: Any) -> int:
    """Bytes of parameters that a rank stores now, counted over the tensors that have memory."""
    stored = [tensor for _, tensor in model.named_parameters() if tensor._is_initialized()]
    stored += [] if model.units is None else model.units.chunks.values()
    return sum(tensor.size * tensor.element_size() for tensor in stored)


def measure(keys: dict[str, Any]) -> dict[str, Any]:
    """One step on this rank: pairs (counted, by formula) of bytes sent by kind, of bytes of optimizer state, and of
    chunks whose activations are kept at most.
    """
    import numpy as np

    from erniekit import config
    from erniekit.models.picture_balance import PictureRanks
    from erniekit.models.pipeline_layout import schedule_of
    from erniekit.parallel import backend, comm, pipeline
    from erniekit.parallel.memory import state_bytes, weight_bytes
    from erniekit.parallel.mesh import ParallelDims, build_mesh
    from erniekit.parallel.pipeline_schedule import peak_live
    from erniekit.training.build import build_run
    from erniekit.training.trainer import Trainer

    cfg = config.load(None, keys, "train")
    mesh = build_mesh(ParallelDims.from_config(cfg, backend.world().size))
    run = build_run(cfg, mesh)
    trainer = Trainer(run, [])
    batches = run.loader.next_step()
    away: list[tuple[int, int]] = []
    peaks: list[int] = []
    plans: list[Any] = []
    exchange_counts, run_pipeline, plan_pictures = comm.exchange_counts, pipeline.run, PictureRanks.plan

    def spy_on_counts(counts: np.ndarray, group: Any) -> np.ndarray:
        incoming = exchange_counts(counts, group)
        others = np.arange(group.size) != group.index
        # The last number of each rank is not of rows: it says how many tokens the rank has.
        away.append((int(counts[others, :-1].sum()), int(incoming[others, :-1].sum())))
        return incoming

    def spy_on_peak(*args: Any) -> int:
        peaks.append(run_pipeline(*args))
        return peaks[-1]

    def spy_on_plans(*args: Any) -> Any:
        found = plan_pictures(*args)
        plans.extend(found[0])
        return found

    comm.traffic.take()  # what was sent while the run was built
    comm.exchange_counts, pipeline.run, PictureRanks.plan = spy_on_counts, spy_on_peak, spy_on_plans
    try:
        sent = trainer.train_step(batches).sent
    finally:
        comm.exchange_counts, pipeline.run, PictureRanks.plan = exchange_counts, run_pipeline, plan_pictures
        run.close()
    host = sent.pop("host", 0)
    entries = list(run.sync.parameters.entries.values())
    all_entries, weights = entries_of_model(run), stored_weight_bytes(run.model)
    depth = (schedule_of(cfg), mesh.pipe, mesh.degrees.pipeline, len(batches), len(run.model.chunks))
    return {
        "sent": (_without_zeros(sent), _without_zeros(expected_bytes(run, batches, away, plans))),
        "host": host,
        "away": away,
        "divided": sum(plan is not None for plan in plans),
        "state": (run.optimizer.state_bytes(), state_bytes(entries)),
        "weights": (weights, weight_bytes(all_entries)),
        "undivided weights": sum(4 * entry.size for entry in all_entries),
        "undivided": state_bytes(entries, divided=False),
        "peak": (peaks[0], peak_live(*depth)),
        "depth": depth,
    }


def _without_zeros(sent: dict[str, int]) -> dict[str, int]:
    return {kind: num_bytes for kind, num_bytes in sent.items() if num_bytes}
