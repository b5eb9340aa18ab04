"""The activations that a stage is planned to take."""

import pytest
from support.tiny_sizes import DENSE, MOE

from erniekit import config
from erniekit.models.config import ModelConfig
from erniekit.plan.activations import device_of, stage_activations
from erniekit.plan.job import Cluster, Job, make_job
from erniekit.training.outline import outline_stage

GIVEN = ("model_name_or_path=.", "output_dir=.", "train_dataset_path=x.jsonl", "compute_type=fp32", "max_seq_len=8")


def job(*keys: str, shape: dict = DENSE, gpu: str = "cpu", gpus: int = 2) -> Job:
    cfg = config.load(None, [*GIVEN, *keys], "train")
    return make_job(cfg, ModelConfig.from_dict(shape), Cluster(gpus, gpu, gpus))


def peak(made: Job) -> float:
    return stage_activations(made, outline_stage(made, 0)[0], 0).peak


def test_whole_gradients_wait_in_stage_2_on_a_cpu():
    """With few tokens they are most of the peak. The gradients of norms are not counted."""
    stage_1, stage_2 = (job(f"sharding=stage{n}", "gradient_accumulation_steps=2") for n in (1, 2))
    weights = sum(4 * p.size for p in outline_stage(stage_2, 0)[0].parameters() if p.ndim > 1)
    assert peak(stage_1) < weights <= peak(stage_2) <= weights + peak(stage_1)


@pytest.mark.parametrize(
    ("keys", "shape", "gpu", "gpus", "expected"),
    [
        (("gradient_accumulation_steps=2",), DENSE, "cpu", 2, (1.0, 1.0)),
        (("gradient_accumulation_steps=1",), DENSE, "cpu", 4, (0.75, 0.75)),  # no chunk of it is kept yet
        (("gradient_accumulation_steps=2",), DENSE, "cpu", 1, (0.0, 0.0)),
        (("gradient_accumulation_steps=2",), DENSE, "H800", 2, (0.0, 0.0)),  # sent while the pass runs
        (("gradient_accumulation_steps=2", "expert_parallel_degree=2"), MOE, "cpu", 2, (1.0, 0.0)),  # of one rank each
    ],
)
def test_the_part_that_waits(keys: tuple[str, ...], shape: dict, gpu: str, gpus: int, expected: tuple[float, float]):
    device = device_of(job("sharding=stage2", *keys, shape=shape, gpu=gpu, gpus=gpus))
    assert (device.waiting, device.waiting_of_experts) == expected


def test_stages_of_the_same_kinds_differ_where_a_key_names_a_layer():
    """Stages 1 and 2 have a sparse layer each; one of them computes gate and up again."""
    keys = [*GIVEN[:3], "max_seq_len=8", "compute_type=bf16", "emulate_precision=true", "fp8=blockwise"]
    keys += ["pipeline_parallel_degree=4", "gradient_accumulation_steps=4"]
    model = ModelConfig.from_dict(MOE | {"num_hidden_layers": 4, "moe_layer_start_index": 0})
    kept = []
    for named in ([], ["fp8_recompute_up_gate_layers=2"]):
        made = make_job(config.load(None, [*keys, *named], "train"), model, Cluster(4, "cpu", 4))
        kept.append([stage_activations(made, outline_stage(made, stage)[0], stage).peak for stage in (1, 2)])
    assert kept[0][0] == kept[1][0] and kept[0][1] > kept[1][1]
