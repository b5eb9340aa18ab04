"""The lower bounds by which the search leaves layouts out: never above the plan, and close to it."""

import contextlib

import pytest

from erniekit import config
from erniekit.parallel.pipeline_schedule import Backward, Forward, plan
from erniekit.plan.bounds import LeastMemory
from erniekit.plan.hardware import load_hardware
from erniekit.plan.job import Cluster, Job, make_job
from erniekit.plan.layout import run_of
from erniekit.plan.memory import plan_memory
from erniekit.plan.search import layouts
from erniekit.plan.shapes import published_shape
from erniekit.plan.work import work_of
from erniekit.training.outline import outline_layers, outline_stage
from erniekit.utils.errors import ConfigError

CARD = load_hardware("H800")
GIVEN = ("output_dir=.", "train_dataset_path=x.jsonl", "max_seq_len=4096", "gradient_accumulation_steps=32")


def job_of(model: str, *keys: str, gpus: int = 96, pictures: int = 0) -> Job:
    shape = published_shape(model)
    assert shape is not None
    cfg = config.load(None, [f"model_name_or_path={model}", *GIVEN, *keys], "train")
    return make_job(cfg, shape, Cluster(gpus, "H800", 8), picture_tokens=pictures)


def sample(given: Job, number: int) -> list[Job]:
    """Layouts of all kinds, `number` of them, none with many stages."""
    found = []
    for keys in layouts(given):
        if keys["pipeline_parallel_degree"] <= 6:
            with contextlib.suppress(ConfigError):
                found.append(given.changed(**keys))
    step = max(len(found) // number, 1) | 1  # odd: the five levels of recomputation take turns
    return found[::step][:number]


@pytest.mark.parametrize(
    ("model", "keys", "gpus", "pictures"),
    [
        ("baidu/ERNIE-4.5-300B-A47B-Paddle", ("pp_seg_method=balanced",), 96, 0),
        ("baidu/ERNIE-4.5-21B-A3B-Paddle", ("pp_seg_method=balanced", "moment_dtype=bf16", "optim=muon"), 16, 0),
        ("baidu/ERNIE-4.5-21B-A3B-Paddle", ("fine_tuning=LoRA",), 8, 0),
        ("baidu/ERNIE-4.5-21B-A3B-Paddle", ("frozen_parameters=language",), 8, 0),
        ("baidu/ERNIE-4.5-21B-A3B-Paddle", ("recompute=true", "offload_activations=true"), 8, 0),
        ("baidu/ERNIE-4.5-VL-28B-A3B-Paddle", ("stage=VL-SFT", "freeze_config=freeze_vision"), 8, 2048),
    ],
)
def test_no_layout_needs_less_than_its_bound(model: str, keys: tuple[str, ...], gpus: int, pictures: int):
    given = job_of(model, *keys, gpus=gpus, pictures=pictures)
    work, bounds, residual = work_of(given), LeastMemory(outline_layers), LeastMemory()
    shares = []
    for each in sample(given, 7):
        run = run_of(each, work)
        needed = max(stage.peak for stage in plan_memory(each, CARD.memory_bytes, outline_stage).stages)
        least = bounds.of(each, run)
        assert residual.of(each, run) <= needed, each.degrees
        assert least <= needed, each.degrees
        shares.append(least / needed)
    assert len(shares) > 4
    if not given.is_lora and not given.cfg.frozen_parameters and not given.cfg.freeze_config:
        assert sorted(shares)[len(shares) // 2] > 0.7, shares  # a bound far below would exclude nothing


@pytest.mark.parametrize(("pipeline", "chunks"), [(1, 1), (4, 1), (4, 2)])
def test_transfers_do_not_change_the_order_of_passes(pipeline: int, chunks: int):
    keys = (f"pipeline_parallel_degree={pipeline}", f"virtual_pp_degree={chunks}")
    job = job_of("baidu/ERNIE-4.5-21B-A3B-Paddle", *keys, gpus=8)
    for blocking in (False, True):
        lists = plan(job.schedule, pipeline, 9, chunks, blocking)
        for stage, actions in enumerate(lists):
            passes = [action for action in actions if isinstance(action, Forward | Backward)]
            assert job.passes(stage, most=9) == passes
    assert len(job.passes(0, most=1000)) == 2 * chunks * job.num_microbatches
