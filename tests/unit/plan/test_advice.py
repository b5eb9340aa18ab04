"""The smallest cluster: what it proposes fits, and layouts that cannot fit are not planned one by one."""

import pytest
from support.tiny_sizes import DENSE, MOE

from erniekit import config
from erniekit.models.config import ModelConfig
from erniekit.plan.advice import changes, least_cluster
from erniekit.plan.hardware import load_hardware
from erniekit.plan.job import Cluster, Job, make_job
from erniekit.plan.memory import plan_memory
from erniekit.training.outline import outline_stage

GIVEN = ("model_name_or_path=.", "output_dir=.", "train_dataset_path=x.jsonl", "compute_type=fp32")


def job(shape: dict, max_seq_len: int) -> Job:
    cfg = config.load(None, [*GIVEN, f"max_seq_len={max_seq_len}"], "train")
    return make_job(cfg, ModelConfig.from_dict(shape), Cluster(1, "cpu", 8))


@pytest.mark.parametrize("shape", [DENSE, MOE])
def test_what_is_proposed_fits(shape: dict):
    given = job(shape, 64)
    whole = plan_memory(given, 1e9, outline_stage).worst.peak
    least = least_cluster(given, whole / 0.9 * 0.75, outline_stage)
    assert least is not None and least.fits and least.job.cluster.gpus > 1


def test_rows_that_no_number_of_data_ranks_makes_fit_are_found_at_once():
    """The activations of one row are too large, and only pipeline and tensor ranks divide them."""
    planned: list[tuple[int, int]] = []

    def outline(candidate: Job, stage: int):
        if stage == 0:
            planned.append((candidate.degrees.pipeline, candidate.degrees.tensor))
        return outline_stage(candidate, stage)

    given = job(MOE, 65536)
    assert least_cluster(given, 30e6, outline) is None
    assert 0 < len(planned) == len(set(planned))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_change_keeps_the_tokens_of_a_step(batch_size: int):
    """Else the time and memory that are printed would be those of another training."""
    cfg = config.load(None, [*GIVEN, "max_seq_len=64", f"batch_size={batch_size}"], "train")
    given = make_job(cfg, ModelConfig.from_dict(MOE | {"vocab_size": 64}), Cluster(4, "cpu", 4))
    found = changes(plan_memory(given, 1e9, outline_stage), 1e9, outline_stage, load_hardware("cpu"))
    assert {key for change in found for key in change.keys} >= {"tensor_parallel_degree", "batch_size"}
    assert {change.plan.job.step_tokens for change in found} == {given.step_tokens}


@pytest.mark.parametrize(("card", "compute_type", "proposed"), [("V100", "fp16", False), ("A100", "fp16", True)])
def test_a_base_in_8_bits_is_not_proposed_for_a_gpu_without_bf16(card: str, compute_type: str, proposed: bool):
    cfg = config.load(None, [*GIVEN[:3], f"compute_type={compute_type}", "max_seq_len=64", "fine_tuning=LoRA"], "train")
    given = make_job(cfg, ModelConfig.from_dict(DENSE), Cluster(1, card, 1))
    plan = plan_memory(given, 1e9, outline_stage)
    keys = [change.keys for change in changes(plan, 1e9, outline_stage, load_hardware(card))]
    assert keys and ({"compute_type": "wint8"} in keys) == proposed
    assert {"compute_type": "wint8"} not in [change.keys for change in changes(plan, 1e9, outline_stage)]


@pytest.mark.parametrize(
    ("keys", "proposed"),
    [(("stage=DPO",), True), (("stage=KTO",), False), (("stage=RL", "reward_funcs=exact", "kl_coef=0.1"), False)],
)
def test_a_file_of_log_probabilities_saves_the_reference_only_where_it_is_read(keys: tuple[str, ...], proposed: bool):
    def planned(*more: str):
        cfg = config.load(None, [*GIVEN, "max_seq_len=1024", "batch_size=1", *keys, *more], "train")
        return plan_memory(make_job(cfg, ModelConfig.from_dict(DENSE), Cluster(1, "cpu", 8)), 1e9, outline_stage)

    plan = planned()
    names = {name for change in changes(plan, 1e9, outline_stage) for name in change.keys}
    assert ("ref_logps_cache" in names) == proposed
    assert (planned("ref_logps_cache=x.safetensors").worst.peak < plan.worst.peak) == proposed
