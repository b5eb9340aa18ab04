"""ERNIEKit's two files of FP8-QAT train a tiny model: every key of theirs but the sizes and the degrees."""

from pathlib import Path

import pytest
from support.equality import ROOT

from erniekit import config
from erniekit.models.products import products
from erniekit.parallel.mesh import Mesh
from erniekit.training.build import build_run
from erniekit.training.trainer import Trainer

SFT = ROOT / "examples" / "configs" / "ERNIE-4.5-300B-A47B" / "sft"


@pytest.mark.slow
@pytest.mark.parametrize("length", ["8k", "32k"])
def test_it_trains_a_tiny_model(tmp_path: Path, length: str):
    small = {
        "model_name_or_path": str(ROOT / "examples" / "models" / "tiny-moe"),
        "continue_training": False,
        "train_dataset_path": str(ROOT / "examples" / "data" / "sft-train.jsonl"),
        "eval_dataset_path": str(ROOT / "examples" / "data" / "sft-eval.jsonl"),
        "tensor_parallel_degree": 1,
        "pipeline_parallel_degree": 1,
        "gradient_accumulation_steps": 1,
        "max_seq_len": 64,
        "max_steps": 2,
        "max_evaluate_steps": 1,
        "output_dir": str(tmp_path / "out"),
    }
    cfg = config.load(str(SFT / f"run_sft_fp8_{length}.yaml"), small, "train")
    assert cfg.qat == "fp8_static" and cfg.apply_hadamard and cfg.moment_dtype == "bf16"
    run = build_run(cfg, Mesh.single())
    Trainer(run, []).fit()
    moved = [product.updates.numpy().max() for _, product in products(run.model).values()]
    assert len(moved) > 10 and all(updates == 2 for updates in moved)
