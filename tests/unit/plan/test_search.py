"""The search: what it proposes fits, is the fastest of what fits, and keeps the global batch."""

from types import SimpleNamespace

import pytest
from support.tiny_sizes import DENSE, MOE

from erniekit import config
from erniekit.models.config import ModelConfig
from erniekit.plan.hardware import load_hardware
from erniekit.plan.job import Cluster, Job, make_job
from erniekit.plan.search import layouts, search, words
from erniekit.plan.timing import plan_time
from erniekit.plan.typed import differences

CARD = load_hardware("H800")
GIVEN = ("model_name_or_path=.", "output_dir=.", "train_dataset_path=x.jsonl", "max_seq_len=256")


def job(*keys: str, shape: dict = MOE, gpus: int = 4) -> Job:
    cfg = config.load(None, [*GIVEN, "gradient_accumulation_steps=8", *keys], "train")
    return make_job(cfg, ModelConfig.from_dict(shape), Cluster(gpus, "H800", 8))


def memory_of(limit: float, planned: list[Job] | None = None):
    """A plan of memory in which a rank needs its microbatch's tokens, four times as many without recomputation."""

    def plan(candidate: Job) -> SimpleNamespace:
        if planned is not None:
            planned.append(candidate)
        needed = candidate.microbatch_tokens * (1 if candidate.cfg.recompute else 4) / candidate.degrees.pipeline
        worst = SimpleNamespace(headroom=limit - needed, stage=0)
        return SimpleNamespace(fits=needed <= limit, worst=worst)

    return plan


@pytest.mark.parametrize("shape", [DENSE, MOE])
def test_every_layout_keeps_the_cluster_and_the_global_batch(shape: dict):
    given = job(shape=shape)
    accepted = 0
    for keys in layouts(given):
        try:
            changed = given.changed(**keys)
        except ValueError:
            continue
        accepted += 1
        assert changed.degrees.world == 4
        assert changed.step_tokens == given.step_tokens
    assert accepted > 20


def test_what_it_finds_is_the_fastest_that_fits():
    given = job()
    limit = 600.0
    found = search(given, CARD, memory_of(limit))
    assert 1 <= len(found.fits) <= 3
    seconds = [candidate.time.seconds for candidate in found.fits]
    assert seconds == sorted(seconds)
    others = []
    for keys in layouts(given):
        try:
            changed = given.changed(**keys)
        except ValueError:
            continue
        if memory_of(limit)(changed).fits:
            others.append(plan_time(changed, CARD).seconds)
    assert seconds[0] == pytest.approx(min(others), rel=0.02)
    best = found.fits[0]
    assert "left on stage 0" in best.binds
    assert plan_time(given.changed(**best.keys), CARD).seconds == pytest.approx(seconds[0])


def test_runners_up_have_other_degrees():
    found = search(job(), CARD, memory_of(1e9))
    degrees = [tuple(vars(candidate.job.degrees).values()) + (candidate.job.num_chunks,) for candidate in found.fits]
    assert len(set(degrees)) == len(degrees) == 3
    assert not found.faster


def test_nothing_fits():
    planned: list[Job] = []
    found = search(job(), CARD, memory_of(1.0, planned))
    assert found.fits == ()
    assert found.tried > 20
    assert len(planned) < found.tried / 3  # one plan shows for all variants of the same degrees that they do not fit


def test_what_is_typed_is_the_layout_that_was_proposed():
    given = job("pipeline_parallel_degree=2", "no_recompute_layers=0", "recompute=true")
    found = search(given, CARD, memory_of(1e9))
    keys = (*GIVEN, "gradient_accumulation_steps=8", "pipeline_parallel_degree=2")
    assert found.fits
    for candidate in found.fits:
        text = words(given, candidate.keys)
        again = config.load(None, [*keys, "no_recompute_layers=0", "recompute=true", *text.split()], "train")
        assert differences(again, candidate.job.cfg) == {}
        assert "batch_size=" in text and "recompute=" in text
