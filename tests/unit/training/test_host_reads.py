"""How often a step makes the host wait for the device. Every place that may is named here, with its number."""

from dataclasses import replace
from operator import methodcaller
from pathlib import Path

import numpy as np
import paddle
import pytest
from support.equality import keys_for, prepare
from support.host_reads import counted, of_a_step, write_pairs

from erniekit import config
from erniekit.parallel import backend
from erniekit.parallel.mesh import ParallelDims, build_mesh
from erniekit.training.build import build_run
from erniekit.training.trainer import Trainer
from erniekit.utils.errors import TrainError

FETCH = "utils/device_sums.py:fetch"  # losses, metrics, norms, routers' numbers and biases: all at once
EXPERTS = "moe/layer.py:_start"  # the choice of experts, which gives the sizes of the dropless products
SPARSE_LAYERS = 3  # of the model "moe"
LORA = {"fine_tuning": "LoRA", "lora_rank": 4, "continue_training": True}
LABELS, PAIRS = 3, 3  # uploads of a microbatch's labels: places, labels, weights; of a set of answers


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("host_reads")
    prepare(path)
    write_pairs(path / "pairs.jsonl")
    return path


def step(directory: Path, model: str, rows: int, **keys):
    if keys.get("stage") == "DPO":
        keys["train_dataset_path"] = f"{directory}/pairs.jsonl"
    return of_a_step(keys_for(str(directory), model, rows=rows, **keys))


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("method", [{}, LORA], ids=["full", "lora"])
def test_a_dense_step_has_one_read(directory: Path, method: dict, microbatches: int):
    found = step(directory, "dense", rows=8 // microbatches, **method)
    assert found["reads"] == {FETCH: 1}
    assert found["uploads"] == {"training/recipes/causal.py": LABELS * microbatches}


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("method", [{}, LORA], ids=["full", "lora"])
def test_a_sparse_layer_adds_one_read_and_one_upload(directory: Path, method: dict, microbatches: int):
    found = step(directory, "moe", rows=8 // microbatches, **method)
    assert found["reads"] == {FETCH: 1, EXPERTS: SPARSE_LAYERS * microbatches}
    biases = {} if method else {"moe/expert_bias.py": 1}  # of all routers; with LoRA they are frozen
    assert found["uploads"] == biases | {
        "training/recipes/causal.py": LABELS * microbatches,
        "moe/dispatch.py": SPARSE_LAYERS * microbatches,
    }


def test_a_layer_of_two_modalities_adds_two_reads_and_what_finds_them_is_uploaded_once(directory: Path):
    found = step(directory, "vl", rows=4)
    assert found["reads"] == {FETCH: 1, EXPERTS: 2 * SPARSE_LAYERS * 2}
    assert found["uploads"]["moe/layer.py"] == 3 * 2


def test_recomputation_and_prediction_ahead(directory: Path):
    found = step(directory, "moe", rows=2, recompute=True)
    assert found["reads"] == {FETCH: 1, EXPERTS: 2 * SPARSE_LAYERS * 4}
    found = step(directory, "moe", rows=2, num_nextn_predict_layers=1)
    assert found["reads"] == {FETCH: 1, EXPERTS: SPARSE_LAYERS * 4}
    assert found["uploads"] == {
        "training/recipes/causal.py": 2 * LABELS * 4,
        "moe/dispatch.py": SPARSE_LAYERS * 4,
        "moe/expert_bias.py": 1,
    }


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("method", [{}, LORA], ids=["second-model", "adapter-off"])
def test_a_reference_adds_no_read(directory: Path, method: dict, microbatches: int):
    found = step(directory, "dense", rows=8 // microbatches, stage="DPO", **method)
    assert found["reads"] == {FETCH: 1}
    # Answers of the reference and of the policy; then the answers' lengths and the scores' differences.
    assert found["uploads"] == {
        "losses/log_probs.py": 2 * PAIRS * microbatches,
        "training/recipes/preference.py": 2 * microbatches,
    }


def test_kto_reads_the_divergence_of_the_whole_step_before_it(directory: Path):
    found = step(directory, "dense", rows=2, stage="DPO", loss_type="kto_pair")
    assert found["reads"] == {FETCH: 2}


def test_every_way_to_read_a_tensor_counts():
    number = paddle.to_tensor(2)
    reads = (*(methodcaller(name) for name in ("numpy", "item", "tolist")), bool, int, float, range(5).__getitem__)
    with counted() as transfers:
        for read in (*reads, np.asarray):
            read(number)
    assert sum(transfers.reads.values()) == len(reads) + 1


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(directory: Path):
    cfg = config.load(None, keys_for(str(directory), "dense", rows=2), "train")
    run = build_run(cfg, build_mesh(ParallelDims.from_config(cfg, backend.world().size)))
    trainer = Trainer(run, [])
    with paddle.no_grad():
        run.model.model.norm.weight[3] = float("nan")
    before = {name: p.numpy() for name, p in run.model.named_parameters()}
    told, batch = (
        r"step 1: .* norm nan: the weight model\.norm\.weight is not finite.*Nothing was",
        run.loader.next_step(),
    )
    with pytest.raises(TrainError, match=f"{told}.* Lower learning_rate"):
        trainer.train_step(batch)
    trainer.cfg = replace(cfg, continue_training=True)  # the weights were read from files
    with pytest.raises(TrainError, match=f"{told}.* copy the files of"):
        trainer.train_step(batch)
    run.close()
    assert trainer.state.step == 0 and not any(each["moment1"].any() for each in run.optimizer.state.values())
    assert all(p.numpy().tobytes() == before[name].tobytes() for name, p in run.model.named_parameters())
