"""What a plan says beyond one step: the fastest single change, jitter, checkpoints and failures."""

from types import SimpleNamespace

import pytest
from support.tiny_sizes import MOE

from erniekit import config
from erniekit.models.config import ModelConfig
from erniekit.plan.hardware import load_hardware
from erniekit.plan.job import Cluster, Job, make_job
from erniekit.plan.outlook import fastest_change, outlook
from erniekit.plan.timing import plan_time

CARD = load_hardware("H800")


def job(*keys: str, gpus: int = 4) -> Job:
    given = ("model_name_or_path=.", "output_dir=.", "train_dataset_path=x.jsonl", "max_seq_len=4096", *keys)
    return make_job(config.load(None, given, "train"), ModelConfig.from_dict(MOE), Cluster(gpus, "H800", 8))


def memory(fits: bool = True, stored: float = 50e9) -> SimpleNamespace:
    stage = SimpleNamespace(parts={"parameters": stored / 5, "optimizer state": stored * 4 / 5}, headroom=1e9, stage=0)
    return SimpleNamespace(fits=fits, worst=stage, stages=(stage,))


def test_leaving_recomputation_out_saves_most_time_where_it_fits():
    given = job("recompute=true", "gradient_accumulation_steps=1")
    time = plan_time(given, CARD)
    best = fastest_change(given, time, CARD, lambda changed: memory())
    assert best is not None and best.keys == {"recompute": False}
    assert best.seconds == pytest.approx(plan_time(given.changed(recompute=False), CARD).seconds)
    limited = fastest_change(given, time, CARD, lambda changed: memory(changed.cfg.recompute))
    assert limited is not None and limited.keys["recompute"] and limited.seconds >= best.seconds
    assert fastest_change(given, time, CARD, lambda changed: memory(False)) is None


def test_reinforcement_learning_is_not_told_to_accumulate_gradients():
    """Its microbatches follow from its completions, and the key has no effect on it."""
    given = job("stage=RL", "reward_funcs=exact", "batch_size=1", gpus=1)
    best = fastest_change(given, plan_time(given, CARD), CARD, lambda changed: memory())
    assert best is not None and best.keys == {"batch_size": 2}


def test_changes_keep_the_global_batch():
    given = job("pipeline_parallel_degree=2", "gradient_accumulation_steps=8", "recompute=true")
    seen: list[Job] = []
    fastest_change(given, plan_time(given, CARD), CARD, lambda changed: seen.append(changed) or memory(False))
    assert seen and {changed.step_tokens for changed in seen} == {given.step_tokens}


def beyond(*keys: str, gpus: int = 4):
    given = job(*keys, gpus=gpus)
    plan = SimpleNamespace(job=given, **vars(memory()))
    return outlook(plan, plan_time(given, CARD), CARD, lambda changed: memory(False))


def test_a_large_job_saves_more_often():
    small, large = beyond(), beyond("expert_parallel_degree=2", gpus=2048)
    assert large.goodput.interval < small.goodput.interval
    text = "\n".join(large.to_lines())
    assert f"save_steps={large.goodput.steps} is best" in text and "2048 ranks" in text
    assert large.to_dict()["save_steps"] == large.goodput.steps


def test_saving_in_the_background_stops_the_training_for_less():
    background, at_once = beyond("use_async_save=true"), beyond()
    assert background.checkpoint == pytest.approx(1.0)
    assert at_once.checkpoint > 50 * background.checkpoint
    assert background.goodput.share > at_once.goodput.share


def test_one_device_has_no_one_to_wait_for():
    assert beyond(gpus=1).jitter is None
    assert not any("jitter" in line for line in beyond(gpus=1).to_lines())


def test_a_million_microbatches_are_not_simulated_one_by_one():
    def jitter(microbatches: int) -> float:
        given = ("pipeline_parallel_degree=2", f"gradient_accumulation_steps={microbatches}")
        found = beyond(*given).jitter
        assert found is not None
        return found

    assert jitter(10**6) == jitter(1024)
    assert jitter(10**6 + 1) == jitter(1025) != jitter(1024)
