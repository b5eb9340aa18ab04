"""The number of kernel launches by formula (erniekit/plan/launches.py) is the number that Paddle's profiler counts in
steps of small models on the GPU path.
"""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.equality import keys_for, prepare
from support.worlds import World

# They change shapes or strides, or belong to the stand-in of AdamW.
NOT_LAUNCHED = {
    *("reshape", "slice", "split", "split_with_num", "squeeze", "unsqueeze", "view_shape", "view_slice", "transpose"),
    *("reshape_grad", "squeeze_grad", "unsqueeze_grad", "assign"),
}
NO_ROUTER_LOSSES = {"moe_aux_loss_lambda": 0.0, "moe_z_loss_lambda": 0.0, "moe_orthogonal_loss_lambda": 0.0}
ROUTER_LOSSES = ("balance", "z", "orthogonal")
# Microbatches of eight rows, keys, and options of the formula.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense": ("dense", {}, {}),
    "dense, two microbatches": ("dense", {"rows": 4}, {"microbatches": 2}),
    "dense, recomputed": ("dense", {"recompute": True}, {"recompute": True}),
    "moe": ("moe", NO_ROUTER_LOSSES, {}),
    "moe, two microbatches": ("moe", NO_ROUTER_LOSSES | {"rows": 4}, {"microbatches": 2}),
    "moe, recomputed": ("moe", NO_ROUTER_LOSSES | {"recompute": True}, {"recompute": True}),
    "moe, router losses": ("moe", dict.fromkeys(NO_ROUTER_LOSSES, 0.01), {"router_losses": ROUTER_LOSSES, "rows": 8}),
    "dense, plain": ("dense", {"fused_operators": False}, {"fused": False}),
    "moe, plain": ("moe", NO_ROUTER_LOSSES | {"fused_operators": False}, {"fused": False}),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launches")
    prepare(path)
    for model in ("dense", "moe"):
        for layers in (2, 3):
            target = path / f"{model}{layers}"
            shutil.copytree(path / model, target)
            config = json.loads((target / "config.json").read_text()) | {"num_hidden_layers": layers}
            if model == "moe":
                config["moe_layer_end_index"] = layers - 1
            (target / "config.json").write_text(json.dumps(config))
    return path


def counted(directory: str, model: str, keys: dict[str, Any]) -> dict[str, int]:
    """Calls of operators in the second step of a run on the GPU path, by Paddle's profiler."""
    from support import gpu_stand_in

    gpu_stand_in.start()
    import paddle

    from erniekit import config
    from erniekit.parallel.mesh import Mesh
    from erniekit.training.build import build_run
    from erniekit.training.trainer import Trainer

    wanted = {"compute_type": "bf16", "rows": 8} | keys
    run = build_run(config.load(None, keys_for(directory, model, **wanted), "train"), Mesh.single())
    trainer = Trainer(run, [])
    trainer.train_step(run.loader.next_step())
    batches = run.loader.next_step()
    profiler = paddle.profiler.Profiler(targets=[paddle.profiler.ProfilerTarget.CPU])
    profiler.start()
    trainer.train_step(batches)
    profiler.stop()
    file = Path(directory) / "trace.json"
    profiler.export(str(file), format="json")
    run.close()
    names = (
        re.match(r"(.*) kernel launch\[", event.get("name", ""))
        for event in json.loads(file.read_text())["traceEvents"]
    )
    found = Counter(name[1] for name in names if name is not None and name[1] not in NOT_LAUNCHED)
    # The stand-in of AdamW converts a master, which a GPU's kernel does itself.
    found["cast"] -= sum("master" in state for state in run.optimizer.state.values())
    return dict(found)


@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_what_the_profiler_counts(gpu: World, directory: Path, case: str):
    from erniekit.models.config import ModelConfig
    from erniekit.plan.launches import LaunchOptions, operators

    model, keys, given = CASES[case]
    # A layer's calls, and those of the whole step.
    found, expected = [], []
    for layers in (2, 3):
        (calls,) = gpu.run(counted, directory=str(directory), model=f"{model}{layers}", keys=keys)
        options = dict(given)
        if case == "moe, plain":  # experts without rows have no product
            options["used_experts"] = (calls["matmul"] - (40 if layers == 2 else 58)) // 6 // (layers - 1)
        by_formula = operators(ModelConfig.from_dir(directory / f"{model}{layers}"), LaunchOptions(**options))
        del by_formula["embedding_grad"]  # the profiler does not show it
        found.append(Counter(calls))
        expected.append(by_formula)
    step = {name: found[1][name] - found[0][name] for name in found[1]}
    formula = {name: expected[1][name] - expected[0][name] for name in expected[1]}
    assert {n: c for n, c in step.items() if c} == {n: c for n, c in formula.items() if c}
    if given.get("fused", True):
        assert dict(found[1]) == dict(expected[1])


def test_fused_operators_save_launches_of_a_21b_model():
    from erniekit.plan.launches import LaunchOptions, host_calls, kernels
    from erniekit.plan.shapes import published_shape

    config = published_shape("baidu/ERNIE-4.5-21B-A3B-Paddle")
    assert config is not None
    fused, plain = LaunchOptions(head_chunks=4), LaunchOptions(fused=False, head_chunks=4)
    assert host_calls(config, fused) < 0.3 * host_calls(config, plain)
    assert kernels(config, fused) < kernels(config, plain)
    one, two = (kernels(config, LaunchOptions(microbatches=n)) for n in (1, 2))
    assert one < two < 2 * one
