"""What a rank sends in one optimizer step, counted and by formula; and its memory and its waiting likewise.

`measure(keys)` is a job for every rank of a world (tests/support/worlds.py): one step of the real trainer, and what
`expected_bytes` derives from sizes alone, given how many rows the routers sent where. It covers text models in fp32
without adapters or multi-token prediction, and recomputation of whole layers with expert parallelism only.

Legend: D hidden size; of a microbatch t tokens (those of the filling included) and m tokens with loss; n tensor ranks;
bytes as `parallel.comm` counts them: an all-reduce of B bytes 2 (n-1)/n B, a reduce-scatter of B bytes (n-1)/n B, an
all-gather that makes B bytes (n-1)/n B, a broadcast B at the source.
"""

from collections import Counter
from typing import Any

FLOAT, INT = 4, 8  # bytes of float32 and of int64


def expected_bytes(run: Any, microbatches: list[Any], away: list[tuple[int, int]]) -> dict[str, int]:
    """Bytes by kind, host messages left out. `away`: of each dispatch to experts, the rows for other ranks and those
    from other ranks.
    """
    from erniekit.parallel.buckets import step_traffic

    sync = run.optimizer.sync
    sent = Counter(step_traffic(sync.buckets, sync.stage, len(microbatches), sync.master_grad, run.mesh.world))
    del sent["host"]
    for batch in microbatches:
        sent += tensor_bytes(run, batch)
        sent += pipeline_bytes(run, batch)
    sent += expert_bytes(run, away)
    return dict(sent)


def expert_bytes(run: Any, away: list[tuple[int, int]]) -> Counter[str]:
    """Expert parallelism. A token's row goes to its expert and comes back, its gradient goes the same ways: a pass
    sends what is for others and returns what came from others, forward and backward alike. A layer that is recomputed
    dispatches twice (and `away` has both); its backward pass is still one.
    """
    recomputed = run.cfg.recompute and run.cfg.recompute_granularity == "full"
    rows = sum(out + back for out, back in away)
    return Counter(all_to_all=(rows + rows // (2 if recomputed else 1)) * run.model.config.hidden_size * FLOAT)


def pipeline_bytes(run: Any, batch: Any) -> Counter[str]:
    """Pipeline. [t, D] goes forward from every piece of the model but the last, its gradient back from every piece but
    the first. With sequence parallelism each tensor rank sends its stretch of t / n tokens.
    """
    from erniekit.models.inputs import padded_length

    stages, stage = run.mesh.degrees.pipeline, run.mesh.pipe
    pieces = [chunk * stages + stage for chunk in range(len(run.chunks))]
    crossings = sum((piece < stages * len(pieces) - 1) + (piece > 0) for piece in pieces)
    tokens = padded_length(run.model, batch) // run.model.token_multiple
    return Counter(send=crossings * tokens * run.model.config.hidden_size * FLOAT)


def tensor_bytes(run: Any, batch: Any) -> Counter[str]:
    """Tensor parallelism. A column-split projection needs whole rows and adds up their gradients, a row-split one adds
    up its results: two exchanges of [t, D] for each of the two such pairs of a layer (attention; dense feed-forward or
    shared experts). The embedding is one more, the head another (where a token has loss), with 3 numbers a token of
    loss for the softmax over a divided vocabulary. Routed experts: their result, and the gradients of their input
    [tokens, D] and of the weights [tokens, K]; the first rank tells the others which experts it chose.

    Without sequence parallelism every exchange is an all-reduce. With it each is an all-gather one way and a
    reduce-scatter the other, and the routers gather their input on top.
    """
    from erniekit.models.inputs import padded_length
    from erniekit.moe.layer import MoELayer

    n, config, model = run.mesh.degrees.tensor, run.model.config, run.model
    if n == 1:
        return Counter()
    size, hidden, supervised = padded_length(model, batch), config.hidden_size * FLOAT, len(batch.supervised)
    sparse = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MoELayer)]
    dense = len(model.model.layers.numbers) - len(sparse)
    pairs = 2 * dense + len(sparse) + sum(layer.shared_experts is not None for layer in sparse)
    ends = model.shard.has_embedding + (model.shard.has_head and supervised > 0)
    softmax = 3 * FLOAT * supervised * model.shard.has_head
    weights = len(sparse) * batch.num_tokens * config.moe_k * FLOAT
    chosen = len(sparse) * batch.num_tokens * config.moe_k * INT
    sent = Counter(broadcast=chosen if run.mesh.tensor == 0 else 0)
    of_rows = batch.num_tokens * hidden * len(sparse)
    if not shares_tokens(run):
        reduced = (2 * pairs + len(sparse) + ends) * size * hidden + of_rows + softmax + weights
        return sent + Counter(all_reduce=2 * (n - 1) * reduced // n)
    ways = (2 * pairs + 2 * len(sparse) + ends, 2 * pairs + len(sparse) + ends)  # the routers' all-gather has no other
    gathered, scattered = ((n - 1) * count * size * hidden // n for count in ways)
    reduced = of_rows + softmax + weights
    return sent + Counter(all_gather=gathered, reduce_scatter=scattered, all_reduce=2 * (n - 1) * reduced // n)


def shares_tokens(run: Any) -> bool:
    """Whether tensor ranks share the tokens between projections."""
    return run.model.tensor is not None and run.model.tensor.sequence


def measure(keys: dict[str, Any]) -> dict[str, Any]:
    """One step on this rank: pairs (counted, by formula) of bytes sent by kind, of bytes of optimizer state, and of
    chunks whose activations are kept at most.
    """
    import numpy as np

    from erniekit import config
    from erniekit.models.pipeline_layout import schedule_of
    from erniekit.parallel import comm, pipeline
    from erniekit.parallel.buckets import state_bytes
    from erniekit.parallel.mesh import ParallelDims, build_mesh
    from erniekit.parallel.pipeline_schedule import peak_live
    from erniekit.training.build import build_run
    from erniekit.training.trainer import Trainer

    cfg = config.load(None, keys, "train")
    mesh = build_mesh(ParallelDims.from_config(cfg, comm.world().size))
    run = build_run(cfg, mesh)
    trainer = Trainer(run, [])
    batches = run.loader.next_step()
    away: list[tuple[int, int]] = []
    peaks: list[int] = []
    exchange_counts, run_pipeline = comm.exchange_counts, pipeline.run

    def spy_on_counts(counts: np.ndarray, group: Any) -> np.ndarray:
        incoming = exchange_counts(counts, group)
        others = np.arange(group.size) != group.index
        # The last number of each rank is not of rows: it says how many tokens the rank has.
        away.append((int(counts[others, :-1].sum()), int(incoming[others, :-1].sum())))
        return incoming

    def spy_on_peak(*args: Any) -> int:
        peaks.append(run_pipeline(*args))
        return peaks[-1]

    comm.traffic.take()  # building it all is no part of a step
    comm.exchange_counts, pipeline.run = spy_on_counts, spy_on_peak
    try:
        sent = trainer.train_step(batches).sent
    finally:
        comm.exchange_counts, pipeline.run = exchange_counts, run_pipeline
        run.close()
    host = sent.pop("host", 0)
    entries = list(run.optimizer.sync.entries.values())
    depth = (schedule_of(cfg), mesh.pipe, mesh.degrees.pipeline, len(batches), len(run.chunks))
    return {
        "sent": (_without_zeros(sent), _without_zeros(expected_bytes(run, batches, away))),
        "host": host,
        "away": away,
        "state": (run.optimizer.state_bytes(), state_bytes(entries)),
        "undivided": state_bytes(entries, divided=False),
        "peak": (peaks[0], peak_live(*depth)),
        "depth": depth,
    }


def _without_zeros(sent: dict[str, int]) -> dict[str, int]:
    return {kind: num_bytes for kind, num_bytes in sent.items() if num_bytes}
