"""The search: what it proposes fits, is the fastest of what fits, and keeps the global batch."""

import contextlib
import math
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from support.tiny_sizes import DENSE, MOE

from erniekit import config
from erniekit.models.config import ModelConfig
from erniekit.plan.bounds import LeastMemory
from erniekit.plan.hardware import load_hardware
from erniekit.plan.job import Cluster, Job, make_job
from erniekit.plan.layout import run_of
from erniekit.plan.memory import plan_memory
from erniekit.plan.search import layouts, search, words
from erniekit.plan.timing import least_seconds, plan_time, step_time
from erniekit.plan.typed import differences
from erniekit.plan.work import work_of
from erniekit.training.outline import outline_layers, outline_stage
from erniekit.utils.errors import ConfigError

CARD = load_hardware("H800")
GIVEN = ("model_name_or_path=.", "output_dir=.", "train_dataset_path=x.jsonl", "max_seq_len=256")


def job(*keys: str, shape: dict = MOE, gpus: int = 4) -> Job:
    cfg = config.load(None, [*GIVEN, "gradient_accumulation_steps=8", *keys], "train")
    return make_job(cfg, ModelConfig.from_dict(shape), Cluster(gpus, "H800", 8))


def memory_of(limit: float, planned: list[Job] | None = None):
    """A plan of memory in which a rank needs its microbatch's tokens, four times as many without recomputation."""

    def plan(candidate: Job, stages: Sequence[int] | None = None) -> SimpleNamespace:
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


def accepted(given: Job) -> list[tuple[dict, Job]]:
    """Every layout that the configuration accepts."""
    found = []
    for keys in layouts(given):
        with contextlib.suppress(ConfigError):
            found.append((keys, given.changed(**keys)))
    return found


@pytest.mark.parametrize(("limit", "gpus"), [(100.0, 4), (600.0, 8), (5000.0, 4)])
def test_what_it_finds_is_what_an_exhaustive_search_finds(limit: float, gpus: int):
    given = job(shape=MOE | {"num_hidden_layers": 4}, gpus=gpus)
    planned: list[Job] = []
    found = search(given, CARD, memory_of(limit, planned))
    best: dict[tuple, float] = {}  # by degrees, which are listed once
    for _, changed in accepted(given):
        if memory_of(limit)(changed).fits:
            degrees = (*vars(changed.degrees).values(), changed.num_chunks)
            best[degrees] = min(best.get(degrees, math.inf), plan_time(changed, CARD).seconds)
    expected = sorted(best.values())[:3]
    assert [candidate.time.seconds for candidate in found.fits] == pytest.approx(expected, rel=1e-12)
    assert len(planned) < found.tried
    for candidate in found.fits:
        assert "left on stage 0" in candidate.binds
        again = plan_time(given.changed(**candidate.keys), CARD)
        assert again.seconds == pytest.approx(candidate.time.seconds)


@pytest.mark.parametrize("shape", [DENSE, MOE])
def test_no_layout_takes_less_than_its_bounds(shape: dict):
    """What the search leaves out, it leaves out because of these. Memory: of every tenth layout."""
    given = job("pp_seg_method=balanced", shape=shape | {"num_hidden_layers": 5}, gpus=8)
    work, bounds = work_of(given), LeastMemory(outline_layers)
    for number, (_, changed) in enumerate(accepted(given)):
        run = run_of(changed, work)
        assert least_seconds(run, CARD) <= step_time(run, CARD).seconds * (1 + 1e-12)
        if number % 10 == 0:
            worst = max(stage.peak for stage in plan_memory(changed, CARD.memory_bytes, outline_stage).stages)
            for least in (LeastMemory(), bounds):
                assert least.of(changed, run) <= worst


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
    assert len(planned) < found.tried / 2  # one plan shows for all numbers of rows that they do not fit


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
