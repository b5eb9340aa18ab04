"""The same training on one rank and on several: what the tests of every layout compare.

`train_some(directory, **keys)` runs a few optimizer steps of the real trainer on real data and returns every loss and
this rank's parameters; `compare` joins the ranks' shares and holds them against one rank's.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from support import tiny_sizes
from support.tiny_directories import write_lines
from support.vision_directories import picture_records, vision_model_directory

ROOT = Path(__file__).resolve().parents[2]
SIZES = tiny_sizes.SIZES | {"num_hidden_layers": 4, "initializer_range": 0.1}
SPARSE = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_end_index": 3}
ROUTERS = {
    "moe_use_aux_free": True,
    "moe_use_aux_free_update_coef": 0.01,
    "moe_aux_loss_lambda": 0.01,
    "moe_z_loss_lambda": 0.001,
    "moe_orthogonal_loss_lambda": 0.01,
}
STEPS = 5
ROWS = 8  # of an optimizer step, over all data ranks


def prepare(directory: Path) -> None:
    """Models `dense` and `moe` (tied), `untied`, `lopsided` (sparse, and most experts get no token) and `vl` (it sees
    pictures); questions of unequal length, and questions about pictures.
    """
    from erniekit.checkpoint.model_io import save_model
    from erniekit.models.config import ModelConfig
    from erniekit.models.decoder import CausalLM
    from erniekit.models.init import init_weights

    for name, source, changes in (
        ("dense", "tiny-dense", {}),
        ("untied", "tiny-dense", {"tie_word_embeddings": False, "use_bias": True}),
        ("moe", "tiny-moe", SPARSE),
        ("lopsided", "tiny-moe", SPARSE),
    ):
        shutil.copytree(ROOT / "examples" / "models" / source, directory / name)
        file = directory / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | SIZES | changes))
        model = CausalLM(ModelConfig.from_dir(directory / name))
        init_weights(model, 7)
        for layer, buffer in model.named_buffers() if name == "lopsided" else ():
            assert layer.endswith("e_score_correction_bias")
            buffer[:, :3] = 10.0  # every token goes to two of the first three experts, the first rank's
        save_model(model, directory / name)
    lines = [
        {"src": [f"{a}加{b}" + "等于几？" * (1 + a * b % 5)], "tgt": [str(a + b)]} for a in range(12) for b in range(9)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (directory / "train.jsonl").write_text(text, encoding="utf-8")
    vision_model_directory(directory / "vl", num_hidden_layers=4)
    model = CausalLM(ModelConfig.from_dir(directory / "vl"))
    init_weights(model, 7)
    save_model(model, directory / "vl")
    write_lines(directory / "pictures.jsonl", picture_records(directory, count=40))


def keys_for(directory: str, model: str, data_ranks: int = 1, rows: int = 1, **keys: Any) -> dict[str, Any]:
    """Overrides of a run with ROWS rows a step, `rows` at a time on each of `data_ranks`."""
    routers = ROUTERS if model in ("moe", "lopsided", "vl") else {}
    if model == "vl":
        pictures = {"stage": "VL-SFT", "train_dataset_type": "messages", "packing": False}
        keys = pictures | {"train_dataset_path": f"{directory}/pictures.jsonl"} | keys
    return (
        {
            "model_name_or_path": f"{directory}/{model}",
            "continue_training": False,
            "stage": "SFT",
            "train_dataset_type": "erniekit",
            "train_dataset_path": f"{directory}/train.jsonl",
            "output_dir": f"{directory}/out",
            "max_seq_len": 64,
            "packing": True,
            "batch_size": rows,
            "gradient_accumulation_steps": ROWS // rows // data_ranks,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "adam_epsilon": 1e-6,
            "max_grad_norm": 0.5,
            "compute_type": "fp32",
            "disable_tqdm": True,
            "dataloader_num_workers": 0,
        }
        | routers
        | keys
    )


def train_some(keys: dict[str, Any]) -> dict[str, Any]:
    """STEPS optimizer steps (fewer if the data ends) on this rank: losses, gradient norms and parts by step, and this
    rank's parameters and buffers as name -> (array, axis parts over of its cut or None, index, count).
    """
    import paddle

    from erniekit import config
    from erniekit.nn.shard import named_shard_specs
    from erniekit.parallel import backend
    from erniekit.parallel.mesh import ParallelDims, build_mesh
    from erniekit.precision import policy
    from erniekit.training.build import build_run
    from erniekit.training.trainer import Trainer

    cfg = config.load(None, keys, "train")
    mesh = build_mesh(ParallelDims.from_config(cfg, backend.world().size))
    steps, sent = [], []
    with policy.products(cfg.matmul_precision, paddle.get_device()):
        run = build_run(cfg, mesh)
        trainer = Trainer(run, [])
        for _ in range(STEPS):
            try:
                batches = run.loader.next_step()
            except StopIteration:
                break
            metrics = trainer.train_step(batches)
            steps.append({"loss": metrics.loss, "norm": metrics.grad_norm} | metrics.parts)
            sent.append(metrics.sent)
        run.close()
    shard_specs, part = named_shard_specs(run.model), run.model.shard
    tensors, units = {}, run.model.units
    for name, tensor in [*run.model.named_parameters(), *run.model.named_buffers()]:
        spec = shard_specs.get(name)
        tensor = units.values[name].whole() if units is not None and name in units.values else tensor
        tensors[name] = (tensor.numpy(), spec, *((0, 1) if spec is None else part.share(spec)))
    return {"steps": steps, "tensors": tensors, "sent": sent}


def evaluate_some(keys: dict[str, Any]) -> dict[str, float]:
    """The evaluation's metrics on this rank, before any training."""
    from erniekit import config
    from erniekit.parallel import backend
    from erniekit.parallel.mesh import ParallelDims, build_mesh
    from erniekit.training.build import build_run
    from erniekit.training.evaluation import evaluate

    data = {f"eval_dataset_{what}": keys[f"train_dataset_{what}"] for what in ("path", "type")}
    cfg = config.load(None, keys | {"do_eval": True} | data, "train")
    run = build_run(cfg, build_mesh(ParallelDims.from_config(cfg, backend.world().size)))
    try:
        return evaluate(run)
    finally:
        run.close()


def compare(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> tuple[float, float]:
    """Largest difference of any loss, norm or part, and of any parameter. Copies of a share must be equal bit for
    bit; together the ranks must hold every parameter.
    """
    from erniekit.nn.shard import unshard

    losses = 0.0
    for rank in ranks:
        assert rank["steps"] == ranks[0]["steps"], "the ranks report different numbers"
        for mine, other in zip(rank["steps"], alone["steps"], strict=True):
            assert mine.keys() == other.keys()
            losses = max(losses, *(abs(mine[name] - other[name]) for name in mine))
    shares: dict[str, dict[int, np.ndarray]] = {}
    shard_specs = {}
    for rank in ranks:
        for name, (array, spec, index, count) in rank["tensors"].items():
            held = shares.setdefault(name, {}).setdefault(index, array)
            assert np.array_equal(held, array), f"{name}: two ranks hold different copies"
            shard_specs[name] = spec, count
    assert shares.keys() == alone["tensors"].keys()
    parameters = 0.0
    for name, (whole, *_) in alone["tensors"].items():
        spec, count = shard_specs[name]
        assert sorted(shares[name]) == list(range(count)), name
        pieces = [shares[name][index] for index in range(count)]
        joined = pieces[0] if spec is None else unshard(pieces, spec)
        parameters = max(parameters, float(np.abs(joined - whole).max()))
    return losses, parameters
