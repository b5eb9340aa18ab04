"""What is planned follows from the configuration, the model's shape and the cluster."""

import dataclasses

import pytest
from support.tiny_sizes import DENSE, MOE

from erniekit import config
from erniekit.models.config import ModelConfig
from erniekit.plan.job import Cluster, Job, make_job
from erniekit.utils.errors import ConfigError

GIVEN = ("model_name_or_path=.", "output_dir=.", "train_dataset_path=x.jsonl")


def job(*keys: str, shape: dict = DENSE, gpus: int = 1, gpu: str = "H800") -> Job:
    cfg = config.load(None, [*GIVEN, *keys], "train")
    return make_job(cfg, ModelConfig.from_dict(shape), Cluster(gpus, gpu, 8))


def test_the_data_ranks_fill_the_cluster():
    made = job("pipeline_parallel_degree=2", "sharding=stage2", gpus=16)
    assert (made.degrees.pipeline, made.degrees.data, made.zero_stage, made.cluster.nodes) == (2, 8, 2, 2)
    assert made.stages == [[(0,)], [(1,)]]


def test_tokens_of_a_step():
    made = job("batch_size=2", "max_seq_len=100", "gradient_accumulation_steps=3", gpus=4)
    assert (made.microbatch_tokens, made.step_tokens) == (200, 200 * 3 * 4)
    assert dataclasses.replace(made, document_tokens=40).document_lengths == [40, 40, 20]


def test_a_changed_job_is_that_of_the_changed_keys():
    made = job("expert_parallel_degree=2", shape=MOE, gpus=4)
    changed = made.changed(batch_size=7, expert_parallel_degree=4)
    assert (changed.microbatch_tokens, changed.degrees.expert) == (7 * made.row_tokens, 4)
    assert made.changed(Cluster(8, "H800", 8)).degrees.data == 8


def test_a_reference_belongs_to_the_losses_that_compare_with_one():
    assert job("stage=DPO").has_reference
    assert not job("stage=DPO", "loss_type=simpo").has_reference
    assert not job("stage=SFT").has_reference
    assert not job("stage=RL").has_reference and job("stage=RL", "kl_coef=0.1").has_second_model


def test_passes_without_gradients_are_counted():
    """KTO's mismatched pairs take one of the policy and one of the reference; a rollout of policies is scored once, and
    its entropies are those of each update.
    """
    passes = {
        ("stage=SFT",): 0,
        ("stage=DPO",): 1,
        ("stage=KTO",): 3,
        ("stage=KTO", "kto_loss_type=apo_zero_unpaired"): 1,
        ("stage=RL",): 0,
        ("stage=RL", "kl_coef=0.1", "num_iterations=4"): 0.5,
        ("stage=RL", "top_entropy_quantile=0.2", "num_iterations=4"): 1.25,
    }
    assert {keys: job(*keys).passes_ahead for keys in passes} == passes


@pytest.mark.parametrize(
    ("keys", "gpus", "expected"),
    [
        (["tensor_parallel_degree=2"], 3, "there are 3"),
        (["pipeline_parallel_degree=4"], 4, "4 stages need a layer each"),
        ([], 0, "give at least 1"),
    ],
)
def test_what_does_not_divide_is_refused(keys: list[str], gpus: int, expected: str):
    with pytest.raises(ConfigError, match=expected):
        job(*keys, gpus=gpus)
