"""A profile of several ranks: one table, one trace, and the time of collectives."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.equality import keys_for, prepare
from support.worlds import World


def profiled(keys: dict[str, Any]) -> list[float]:
    from erniekit import config
    from erniekit.parallel import backend
    from erniekit.parallel.mesh import ParallelDims, build_mesh
    from erniekit.training.build import build_run
    from erniekit.training.trainer import Trainer

    cfg = config.load(None, keys, "train")
    run = build_run(cfg, build_mesh(ParallelDims.from_config(cfg, backend.world().size)))
    trainer = Trainer(run, [])
    trainer.fit()
    return [float(trainer.state.step)]


@pytest.mark.parametrize(
    "degrees",
    [
        {"expert_parallel_degree": 2, "sharding_parallel_degree": 2, "sharding": "stage1"},
        {"pipeline_parallel_degree": 2},
    ],
    ids=["experts", "pipeline"],
)
def test_every_rank_is_in_the_profile(world2: World, tmp_path: Path, degrees: dict[str, Any]):
    prepare(tmp_path)
    more = {"profile": True, "profile_step_start": 2, "profile_step_end": 2, "max_steps": 2, "save_strategy": "no"}
    keys = keys_for(str(tmp_path), "moe", 2, **degrees, **more) | {"output_dir": str(tmp_path / "out")}
    world2.run(profiled, keys=keys)
    trace = json.loads((tmp_path / "out" / "profile.json").read_text())["traceEvents"]
    kinds = {(event["pid"], event["cat"]) for event in trace if event["ph"] == "X"}
    assert {(rank, kind) for rank in (0, 1) for kind in ("forward", "backward", "communication")} <= kinds
    table = (tmp_path / "out" / "profile.txt").read_text()
    name = "recv" if "pipeline_parallel_degree" in degrees else "all_to_all"
    assert f"communication: {name}" in table
