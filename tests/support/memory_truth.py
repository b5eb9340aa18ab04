"""The memory that a training step really takes on a CPU rank: what Paddle's allocator counts, which is exact, beside
what plan says.

`measure(keys, tokens)` runs on every rank of a world (or in this process) and returns both.
"""

import gc
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from support.tiny_directories import write_lines
from support.vision_directories import picture_records, vision_model_directory

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


class Layout(NamedTuple):
    """A run whose memory is measured: the number of ranks, the model (a directory of `prepare`), and keys."""

    name: str
    ranks: int
    model: str
    keys: dict[str, Any]


_PATHS = ("train_dataset_path", "lora_path", "teacher_model_name_or_path")
_LONG = {"max_seq_len": 1024}
_LORA = {"fine_tuning": "LoRA", "continue_training": True}
_DPO = {"stage": "DPO", "train_dataset_path": str(ROOT / "examples" / "data" / "dpo-train.jsonl"), "max_seq_len": 768}
_OWN_HEAD = {"max_seq_len": 512, "vocab_size": 4096, "tie_word_embeddings": False}
_GKD = {"stage": "GKD", "teacher_model_name_or_path": "tiny-dense", "lmbda": 0.0}
_100M = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000, "max_seq_len": 1024,
}  # fmt: skip
# The exchange of gradients and weights takes more than activations.
_FEW_TOKENS = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 16000, "max_seq_len": 64, "recompute": True,
}  # fmt: skip
_VISION = {
    "stage": "VL-SFT", "train_dataset_type": "messages", "train_dataset_path": "pictures.jsonl", "packing": False,
    "max_seq_len": 768,
}  # fmt: skip
_CORE = {"recompute": True, "recompute_granularity": "core_attn"}
_BF16 = {"compute_type": "bf16", "emulate_precision": True}
_FP8 = _BF16 | {"fp8": "blockwise"}
_SELECTIVE = {"recompute": True, "recompute_granularity": "selective"}
_FOUR_LAYERS = {"pipeline_parallel_degree": 2, "gradient_accumulation_steps": 4}
LAYOUTS = (
    Layout("dense", 1, "tiny-dense", _LONG),
    Layout("dense, documents of 2048", 1, "tiny-dense", {"max_seq_len": 2048}),
    Layout("dense, 2 rows, 8 layers", 1, "tiny-dense", {"max_seq_len": 512, "batch_size": 2, "num_hidden_layers": 8}),
    Layout("dense, vocabulary 32000", 1, "tiny-dense", _LONG | {"vocab_size": 32000}),
    Layout("dense, recompute", 1, "tiny-dense", _LONG | {"recompute": True}),
    Layout("dense, attention recomputed", 1, "tiny-dense",
           _LONG | {"recompute": True, "recompute_granularity": "full_attn"}),
    Layout("dense, core recomputed", 1, "tiny-dense", _LONG | _CORE),
    Layout("dense, multi-token prediction", 1, "tiny-dense", _LONG | {"num_nextn_predict_layers": 1}),
    Layout("dense, average of weights", 1, "tiny-dense", _LONG | {"ema_decay": 0.9}),
    Layout("dense, LoRA", 1, "tiny-dense", _LONG | _LORA),
    Layout("dense, DoRA", 1, "tiny-dense", _LONG | _LORA | {"use_dora": True, "modules_to_save": "norm"}),
    Layout("dense, LoRA on 8 bits", 1, "tiny-dense", _LONG | _LORA | {"compute_type": "wint8"}),
    Layout("dense, DPO", 1, "tiny-dense", _DPO),
    Layout("dense, DPO of an adapter", 1, "tiny-dense", _DPO | _LORA | {"lora_path": "adapter"}),
    Layout("dense, vocabulary 4096 with a head of its own", 1, "tiny-dense", _OWN_HEAD),
    Layout("dense, distilled", 1, "tiny-dense", _LONG | {"qat": "wint8", "qat_distill_weight": 0.5}),
    Layout("dense, GKD", 1, "tiny-dense", _LONG | _GKD),
    Layout("dense, GKD by chunks of 300", 1, "tiny-dense",
           _LONG | _GKD | {"gkd_beta": 0.0, "loss_subbatch_seqlen": 300}),
    Layout("moe", 1, "tiny-moe", _LONG),
    Layout("moe, LoRA", 1, "tiny-moe", _LONG | _LORA),
    Layout("moe, experts recomputed", 1, "tiny-moe", _LONG | {"recompute": True, "recompute_granularity": "moe"}),
    Layout("moe, attention and experts by name", 1, "tiny-moe",
           _LONG | _SELECTIVE | {"recompute_modules": "attention,experts"}),
    Layout("moe, blocks and shared experts by name", 1, "tiny-moe",
           _LONG | _SELECTIVE | {"recompute_modules": "core_attn,mlp,shared_experts"}),
    Layout("moe, Muon", 1, "tiny-moe", _LONG | {"optim": "muon"}),
    Layout("moe, 2 tensor ranks, Muon", 2, "tiny-moe", _LONG | {"tensor_parallel_degree": 2, "optim": "muon"}),
    Layout("dense, recompute, offloaded", 1, "tiny-dense", _LONG | {"recompute": True, "offload_activations": True}),
    Layout("dense, 2 tensor ranks", 2, "tiny-dense", _LONG | {"tensor_parallel_degree": 2}),
    Layout("dense, 2 tensor ranks share tokens", 2, "tiny-dense",
           _LONG | {"tensor_parallel_degree": 2, "sequence_parallel": True}),
    Layout("dense, 2 stages", 2, "tiny-dense", _LONG | _FOUR_LAYERS),
    Layout("dense, 2 stages of 2 chunks", 2, "tiny-dense", _LONG | _FOUR_LAYERS | {"virtual_pp_degree": 2}),
    Layout("dense, stage 1", 2, "tiny-dense", _LONG | {"data_parallel_degree": 2, "sharding": "stage1"}),
    Layout("dense, stage 2", 2, "tiny-dense", _LONG | {"data_parallel_degree": 2, "sharding": "stage2"}),
    Layout("dense, 64 tokens, stage 1", 2, "tiny-dense",
           _FEW_TOKENS | {"data_parallel_degree": 2, "sharding": "stage1"}),
    Layout("dense, 64 tokens, stage 2", 2, "tiny-dense",
           _FEW_TOKENS | {"data_parallel_degree": 2, "sharding": "stage2"}),
    Layout("dense, stage 3", 2, "tiny-dense", _LONG | {"data_parallel_degree": 2, "sharding": "stage3"}),
    Layout("moe, stage 3, average of weights", 2, "tiny-moe",
           _LONG | {"data_parallel_degree": 2, "sharding": "stage3", "ema_decay": 0.9}),
    Layout("moe, stage 3, LoRA", 2, "tiny-moe", _LONG | _LORA | {"data_parallel_degree": 2, "sharding": "stage3"}),
    Layout("moe, 2 expert ranks, stage 1", 2, "tiny-moe",
           _LONG | {"expert_parallel_degree": 2, "sharding": "stage1"}),
    Layout("moe, 2 expert ranks, experts by name", 2, "tiny-moe",
           _LONG | _SELECTIVE | {"expert_parallel_degree": 2, "recompute_modules": "experts"}),
    Layout("moe, 2 tensor ranks", 2, "tiny-moe", _LONG | {"tensor_parallel_degree": 2, "sequence_parallel": True}),
    Layout("moe, 2 stages x 2 expert ranks", 4, "tiny-moe",
           _LONG | _FOUR_LAYERS | {"expert_parallel_degree": 2, "sharding": "stage1"}),
    Layout("dense, 2 context ranks", 2, "tiny-dense", {"max_seq_len": 2048, "context_parallel_degree": 2}),
    Layout("dense, 2 context ranks, recompute", 2, "tiny-dense",
           {"max_seq_len": 4096, "context_parallel_degree": 2, "recompute": True}),
    Layout("moe, 2 context ranks", 2, "tiny-moe", {"max_seq_len": 2048, "context_parallel_degree": 2}),
    Layout("dense, 2 context ranks exchange heads", 2, "tiny-dense",
           {"max_seq_len": 2048, "context_parallel_degree": 2, "cp_comm_type": "a2a"}),
    Layout("dense, 4 context ranks", 4, "tiny-dense", {"max_seq_len": 2048, "context_parallel_degree": 4}),
    Layout("moe, bf16", 1, "tiny-moe", _LONG | _BF16),
    Layout("moe, FP8 experts", 1, "tiny-moe", _LONG | _FP8),
    Layout("moe, FP8 experts, inputs in 16 bits", 1, "tiny-moe", _LONG | _FP8 | {"fp8_store": False}),
    Layout("moe, FP8 experts, LoRA", 1, "tiny-moe", _LONG | _FP8 | _LORA),
    Layout("dense, bf16", 1, "tiny-dense", _LONG | _BF16),
    Layout("dense, bf16, vocabulary 4096 with a head of its own", 1, "tiny-dense", _OWN_HEAD | _BF16),
    Layout("vl", 1, "tiny-vl", _VISION),
    Layout("vl, recompute", 1, "tiny-vl", _VISION | {"recompute": True}),
    Layout("vl, vision frozen", 1, "tiny-vl", _VISION | {"freeze_config": "freeze_vision"}),
    Layout("dense of 100 M", 1, "tiny-dense", _100M),
    Layout("dense of 100 M, recompute", 1, "tiny-dense", _100M | {"recompute": True}),
    Layout("dense of 100 M, 512 tokens, recompute, stage 2", 2, "tiny-dense",
           _100M | {"max_seq_len": 512, "recompute": True, "data_parallel_degree": 2, "sharding": "stage2"}),
    Layout("dense of 100 M, 512 tokens, recompute, stage 3", 2, "tiny-dense",
           _100M | {"max_seq_len": 512, "recompute": True, "data_parallel_degree": 2, "sharding": "stage3"}),
    Layout("dense of 100 M, 2 stages", 2, "tiny-dense", _100M | _FOUR_LAYERS),
)  # fmt: skip


def prepare(directory: Path) -> None:
    """The models of LAYOUTS with weights, for adapters, and questions for the data file, which is opened, not read."""
    from erniekit import lora
    from erniekit.checkpoint.model_io import save_model
    from erniekit.checkpoint.peft_attach import save_adapter
    from erniekit.models.config import ModelConfig
    from erniekit.models.decoder import CausalLM
    from erniekit.models.init import init_weights

    vision_model_directory(directory / "tiny-vl", num_hidden_layers=4)
    write_lines(directory / "pictures.jsonl", picture_records(directory))
    for name in sorted({layout.model for layout in LAYOUTS} - {"tiny-vl"}):
        shutil.copytree(ROOT / "examples" / "models" / name, directory / name)
        model = CausalLM(ModelConfig.from_dir(directory / name))
        init_weights(model, 7)
        save_model(model, directory / name)
        if name == "tiny-dense":
            lora.attach(model, lora.LoraOptions(rank=8), tied=model.config.tie_word_embeddings)
            save_adapter(model, directory / "adapter")
    write_lines(directory / "train.jsonl", [{"src": [f"{n}+{n}等于几？"], "tgt": [str(2 * n)]} for n in range(40)])


def run_keys(layout: Layout, directory: Path) -> dict[str, Any]:
    """The keys of a layout's run."""
    keys = keys_of(directory / layout.model, directory / "train.jsonl", directory / "out", **layout.keys)
    paths = {key: str(directory / keys[key]) for key in _PATHS if key in keys}
    return keys | paths


def measure(keys: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Bytes by kind on this rank: "measured" by the allocator in the second step of the real trainer, and "planned"."""
    from paddle.base import core

    from erniekit import config
    from erniekit.parallel import backend
    from erniekit.parallel.mesh import ParallelDims, build_mesh
    from erniekit.training.build import build_run
    from erniekit.training.outline import drop_outlines
    from erniekit.training.recipes.distilled import Teacher
    from erniekit.training.trainer import Trainer

    cfg = config.load(None, keys, "train")
    mesh = build_mesh(ParallelDims.from_config(cfg, backend.world().size))
    drop_outlines()  # those of the plan of the layout before
    before = allocated()
    run = build_run(cfg, mesh)
    trainer = Trainer(run, [])
    built = allocated()
    batches = [make_batch(cfg, run.model.config, seed) for seed in range(cfg.gradient_accumulation_steps)]
    trainer.train_step(batches)  # caches of sizes and of tables are filled
    resident = allocated()
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    trainer.train_step(batches)
    peak = core.host_memory_stat_peak_value("Allocated", 0)
    gradients = _gradient_bytes(trainer, batches)
    idle = allocated()
    run.optimizer._powers.clear()
    run.optimizer._storage = None
    state = idle - allocated()
    held = allocated()
    if run.recipe.reference is not None:
        run.recipe.reference = None
    for value in vars(run.recipe).values():
        if isinstance(value, Teacher):
            del value.model
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
    return {"measured": measured, "planned": planned_bytes(cfg, run.model.config, mesh)}


def _gradient_bytes(trainer: Any, batches: list[Any]) -> int:
    """What the gradients of a step take before they are exchanged."""
    sync = trainer.run.sync
    finish, found = sync.finish, []

    def counted() -> dict[str, Any]:
        # the gradients alone, given up for a moment
        kept = {name: p.grad.numpy() for name, p in sync._tensors.items() if p.grad is not None}
        rows = {index: row.numpy() for index, row in sync._rows.items()}
        sums = {name: total.numpy() for name, total in sync._fp32_sums.items()}
        before = allocated()
        for name in kept:
            sync._tensors[name].grad = None
        sync._rows.clear()
        sync._fp32_sums.clear()
        found.append(before - allocated())
        import paddle

        for name, array in kept.items():
            sync._tensors[name].grad = paddle.to_tensor(array)
        sync._rows.update({index: paddle.to_tensor(array) for index, array in rows.items()})
        sync._fp32_sums.update({name: paddle.to_tensor(array) for name, array in sums.items()})
        return finish()

    sync.finish = counted
    try:
        trainer.train_step(batches)
    finally:
        sync.finish = finish
    return found[0]


def make_batch(cfg: Any, model: Any, seed: int) -> Any:
    """A microbatch of full rows, one document each: text, text with one image, or a pair of answers."""
    from erniekit.data.packed_batch import join_rows

    return join_rows([_row(cfg, model, 100 * seed + row) for row in range(cfg.batch_size)])


def _row(cfg: Any, model: Any, seed: int) -> Any:
    from erniekit.config.schema_preference import PreferenceArgs
    from erniekit.data.packed_batch import Document, PairLayout, make_row

    length, random = cfg.max_seq_len, np.random.default_rng(seed)
    ids = random.integers(20, 500, length).astype(np.int32)
    labels = np.append(ids[1:], -100).astype(np.int32)
    pair = None
    if PreferenceArgs in cfg.method.options:
        third = length // 3
        pair = PairLayout(length - 2 * third, third, third, 1.0)
        labels[: length - 2 * third] = -100
    row = make_row([Document(ids, labels, pair)], ["test:0"])
    return row if model.vision is None else _with_picture(row, model.vision)


PICTURE_TOKENS = 64


def _with_picture(row: Any, vision: Any) -> Any:
    """The row with one image among its first tokens; the labels stay, so that every token still has one."""
    from dataclasses import replace

    from erniekit.data.packed_batch import PictureTable
    from erniekit.data.vision.positions import token_positions

    side = vision.spatial_merge_size * int(PICTURE_TOKENS**0.5)
    grid = np.array([[1, side, side]], np.int64)
    ids, kinds = row.input_ids.copy(), np.zeros(row.num_tokens, np.int8)
    ids[4 : 4 + PICTURE_TOKENS], kinds[4 : 4 + PICTURE_TOKENS] = vision.image_token_id, 1
    patches = np.random.default_rng(0).integers(0, 256, (side * side, vision.patch_features)).astype(np.uint8)
    positions = token_positions(kinds, grid, row.segment_ids + 1)
    table = PictureTable(patches, grid, np.array([4]))
    return replace(row, input_ids=ids, position_ids=positions, modality=kinds, pictures=table)


def planned_bytes(cfg: Any, model: Any, mesh: Any) -> dict[str, int]:
    from erniekit.plan.job import Cluster, make_job
    from erniekit.plan.memory import plan_memory
    from erniekit.training.outline import outline_stage

    share = 1 - 1 / cfg.max_seq_len
    pictures = PICTURE_TOKENS if model.vision is not None else 0
    cluster = Cluster(mesh.degrees.world, "cpu", mesh.degrees.world)
    job = make_job(cfg, model, cluster, picture_tokens=pictures, supervised_share=share)
    stage = plan_memory(job, 0.0, outline_stage, [mesh.pipe]).stages[0]
    tensors, parts = stage.tensors, dict(stage.parts)
    # Where weights of blocks are divided, buckets are under way in the backward pass, and not at its peak.
    exchange = 0.0 if job.zero_stage == 3 else parts.get("exchange", 0.0)
    return {
        "parameters": tensors.parameters + tensors.average + tensors.copies,
        "gradients": tensors.gradients,
        "state": tensors.state,
        "reference": tensors.reference,
        "activations": round(parts["activations"] + parts.get("states of the teacher", 0.0) + exchange),
    }
