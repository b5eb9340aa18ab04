"""The memory that a training step really takes on a CPU rank: what Paddle's allocator counts, which is exact, beside
what plan says.

`measure(keys, tokens)` runs on every rank of a world (or in this process) and returns both.
"""

import gc
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def allocated() -> int:
    """Bytes of CPU tensors now."""
    from paddle.base import core

    gc.collect()
    return core.host_memory_stat_current_value("Allocated", 0)


def keys_of(model: str | Path, data: str | Path, out: str | Path, **changes: Any) -> dict[str, Any]:
    """Keys of a run that starts at random, two microbatches a step unless `changes` say otherwise."""
    return {
        "model_name_or_path": str(model),
        "continue_training": False,
        "stage": "SFT",
        "train_dataset_type": "erniekit",
        "train_dataset_path": str(data),
        "output_dir": str(out),
        "max_seq_len": 256,
        "packing": True,
        "batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "compute_type": "fp32",
        "dataloader_num_workers": 0,
        "max_estimate_samples": 4,
    } | changes


def measure(keys: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Bytes by kind on this rank: "measured" by the allocator in the second step of the real trainer, and "planned"."""
    import paddle
    from paddle.base import core

    from erniekit import config
    from erniekit.parallel import backend
    from erniekit.parallel.mesh import ParallelDims, build_mesh
    from erniekit.training.build import build_run
    from erniekit.training.trainer import Trainer

    cfg = config.load(None, keys, "train")
    mesh = build_mesh(ParallelDims.from_config(cfg, backend.world().size))
    before = allocated()
    run = build_run(cfg, mesh)
    trainer = Trainer(run, [])
    built = allocated()
    batches = [_batch(cfg, run.model.config, seed) for seed in range(cfg.gradient_accumulation_steps)]
    trainer.train_step(batches)  # caches of sizes and of tables are filled
    resident = allocated()
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    trainer.train_step(batches)
    peak = core.host_memory_stat_peak_value("Allocated", 0)
    gradients = _gradient_bytes(trainer, batches)
    idle = allocated()
    run.optimizer.state.clear()
    state = idle - allocated()
    held = allocated()
    if run.recipe.reference is not None:
        run.recipe.reference = None
    reference = held - allocated()
    measured = {
        "parameters": built - before - state - reference,
        "gradients": gradients,
        "state": state,
        "reference": reference,
        "activations": peak - resident - gradients,
        "cached": resident - built,
    }
    run.close()
    del paddle
    return {"measured": measured, "planned": _planned(cfg, run.model.config, mesh)}


def _gradient_bytes(trainer: Any, batches: list[Any]) -> int:
    """What the gradients of a step take before they are exchanged."""
    run, sync = trainer.run, trainer.run.sync
    finish, found = sync.finish, []

    def counted() -> dict[str, Any]:
        full = allocated()
        # the gradients alone, given up for a moment
        kept = {name: p.grad.numpy() for name, p in sync._tensors.items() if p.grad is not None}
        rows = {index: row.numpy() for index, row in sync._rows.items()}
        before = allocated()
        for name in kept:
            sync._tensors[name].grad = None
        sync._rows.clear()
        found.append(before - allocated())
        import paddle

        for name, array in kept.items():
            sync._tensors[name].grad = paddle.to_tensor(array)
        sync._rows.update({index: paddle.to_tensor(array) for index, array in rows.items()})
        assert full > 0
        return finish()

    sync.finish = counted
    try:
        trainer.train_step(batches)
    finally:
        sync.finish = finish
    return found[0]


def _batch(cfg: Any, model: Any, seed: int) -> Any:
    """A microbatch of full rows, one document each: text, text with one image, or a pair of answers."""
    from erniekit.data.packed_batch import join_rows

    return join_rows([_row(cfg, model, 100 * seed + row) for row in range(cfg.batch_size)])


def _row(cfg: Any, model: Any, seed: int) -> Any:
    from erniekit.data.packed_batch import Document, PairLayout, make_row

    length, random = cfg.max_seq_len, np.random.default_rng(seed)
    ids = random.integers(20, 500, length).astype(np.int32)
    labels = np.append(ids[1:], -100).astype(np.int32)
    pair = None
    if cfg.method.options is not None:
        third = length // 3
        pair = PairLayout(length - 2 * third, third, third, 1.0)
        labels[: length - 2 * third] = -100
    return make_row([Document(ids, labels, pair)], ["test:0"])


def _planned(cfg: Any, model: Any, mesh: Any) -> dict[str, int]:
    from erniekit.plan.job import Cluster, make_job
    from erniekit.plan.activations import stage_activations
    from erniekit.training.outline import outline_stage, stage_tensors

    share = 1 - 1 / cfg.max_seq_len
    job = make_job(cfg, model, Cluster(mesh.degrees.world, "cpu", mesh.degrees.world), supervised_share=share)
    tensors = stage_tensors(job, mesh.pipe)
    return {
        "parameters": tensors.parameters + tensors.average + tensors.copies,
        "gradients": tensors.gradients,
        "state": tensors.state,
        "reference": tensors.reference,
        "activations": round(stage_activations(job, outline_stage(job, mesh.pipe)[0], mesh.pipe).peak),
    }


def text_of(records: int = 40) -> list[dict[str, Any]]:
    """Questions for the data file, which the runs open and do not read."""
    return [{"src": [f"{n}+{n}等于几？"], "tgt": [str(2 * n)]} for n in range(records)]
