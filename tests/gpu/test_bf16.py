"""`compute_type: bf16` on a GPU, as far as a CPU shows it (tests/support/gpu_stand_in.py): dtypes, losses, resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.equality import keys_for, prepare
from support.worlds import World

LORA = {"continue_training": True, "fine_tuning": "LoRA", "lora_rank": 4, "learning_rate": 1e-2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "untied with biases": ("untied", {}),
    "moe": ("moe", {}),
    "mtp": ("moe", {"num_nextn_predict_layers": 1}),
    "recompute": ("moe", {"recompute": True}),
    "lora": ("moe", LORA),
    "dora": ("dense", LORA | {"use_dora": True}),
    "dpo": ("dense", {"stage": "DPO", "train_dataset_path": "pairs.jsonl"}),
    "dpo lora": ("moe", LORA | {"stage": "DPO", "train_dataset_path": "pairs.jsonl"}),
}
QUICK = ("dense", "mtp", "dora", "dpo")  # together they take every branch


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu")
    prepare(path)
    pairs = [
        {"src": [f"{a}加{b}等于？"], "response": [[str(a + b)], [f"是{a + b}"]], "sort": [1, 0]}
        for a in range(9)
        for b in range(9)
    ]
    (path / "pairs.jsonl").write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    return path


def trained(keys: dict[str, Any]) -> dict[str, Any]:
    """Five steps on the GPU path: losses, dtypes of everything, the replaced kernels' calls."""
    from support import equality, gpu_stand_in

    from erniekit.training import build

    gpu_stand_in.start()
    gpu_stand_in.calls.clear()
    seen: dict[str, Any] = {}
    built = build.build_run

    def watched(*args: Any) -> Any:
        run = built(*args)
        seen["run"] = run
        return run

    build.build_run = watched
    try:
        steps = equality.train_some(keys)["steps"]
    finally:
        build.build_run = built
    run = seen["run"]

    def dtype(tensor: Any) -> str:
        return str(tensor.dtype).removeprefix("paddle.")

    return {
        "steps": steps,
        "calls": dict(gpu_stand_in.calls),
        "weights": {name: dtype(p) for name, p in [*run.model.named_parameters(), *run.model.named_buffers()]},
        "state": {name: {key: dtype(t) for key, t in fields.items()} for name, fields in run.optimizer.state.items()},
    }


def check(gpu: World, directory: Path, case: str) -> None:
    model, more = CASES[case]
    keys = dict(more)
    if "train_dataset_path" in keys:
        keys["train_dataset_path"] = str(directory / keys["train_dataset_path"])
    keys = keys_for(str(directory), model, rows=2, **keys)
    (wide,), (narrow,) = (gpu.run(trained, keys=keys | {"compute_type": kind}) for kind in ("fp32", "bf16"))
    for name, dtype in narrow["weights"].items():
        stays = ".gate." in name or name.endswith(("correction_bias", "_squares")) or ".magnitude" in name
        assert dtype == ("float32" if stays else "bfloat16"), name
    for name, state in narrow["state"].items():
        assert ("master" in state) == (narrow["weights"][name] == "bfloat16"), name
        assert set(state.values()) == {"float32"}, name
    assert narrow["calls"]["flashmask_attention"] > 0
    updates = {call for call in narrow["calls"] if call.startswith("adamw")}
    assert updates <= {"adamw of bf16 by float32", "adamw of fp32 by float32"}, updates
    assert set(wide["weights"].values()) == {"float32"} and "flashmask_attention" not in wide["calls"]
    for mine, other in zip(narrow["steps"], wide["steps"], strict=True):
        # Of losses of 0.7 to 6; a weight that is not trained, or twice, is ten times as far off after five steps.
        assert abs(mine["loss"] - other["loss"]) < 0.015, (mine, other)
        assert abs(mine["norm"] / other["norm"] - 1) < 0.08, (mine, other)


@pytest.mark.parametrize("case", QUICK)
def test_bf16_is_bf16_and_trains_as_fp32_does(gpu: World, directory: Path, case: str):
    check(gpu, directory, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK])
def test_so_it_is_with_every_method(gpu: World, directory: Path, case: str):
    check(gpu, directory, case)


def run_to_the_end(keys: dict[str, Any]) -> dict[str, Any]:
    """Train by the trainer's own loop; the bits of weights, optimizer state and average at the end."""
    from support import gpu_stand_in

    gpu_stand_in.start()
    from erniekit import config
    from erniekit.parallel.mesh import Mesh
    from erniekit.training.build import build_run
    from erniekit.training.trainer import Trainer

    run = build_run(config.load(None, keys, "train"), Mesh.single())
    Trainer(run, []).fit()
    assert run.average is not None
    arrays = {name: tensor.numpy() for name, tensor in run.model.named_parameters()}
    arrays |= {f"{name}/{key}": t.numpy() for name, state in run.optimizer.state.items() for key, t in state.items()}
    arrays |= {f"{name}/average": t.numpy() for name, t in run.average.average.items()}
    return {name: array.tobytes() for name, array in arrays.items()}


def test_a_run_resumes_bit_for_bit_from_files_in_bf16(gpu: World, directory: Path, tmp_path: Path):
    keys = keys_for(str(directory), "moe", rows=2, compute_type="bf16", save_steps=2, ema_decay=0.9, max_steps=4)
    whole, again = tmp_path / "whole", tmp_path / "again"
    (expected,) = gpu.run(run_to_the_end, keys=keys | {"output_dir": str(whole)})
    keys |= {"output_dir": str(again), "resume_from_checkpoint": str(whole / "checkpoint-2")}
    (found,) = gpu.run(run_to_the_end, keys=keys)
    assert found == expected
    for place, dtype in (("checkpoint-2", "bfloat16"), ("checkpoint-2/ema", "float32"), ("", "bfloat16")):
        assert json.loads((whole / place / "config.json").read_text())["torch_dtype"] == dtype
        kinds = header_dtypes(whole / place / "model.safetensors")
        routers = {name for name in kinds if ".gate." in name or name.endswith("correction_bias")}
        assert {kinds[name] for name in routers} == {"F32"}
        others = {kinds[name] for name in kinds.keys() - routers}
        assert others == {"BF16" if dtype == "bfloat16" else "F32"}


def header_dtypes(file: Path) -> dict[str, str]:
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


def average_of_small_steps() -> tuple[float, float]:
    """The average of a weight that moves by less than a step of bfloat16, and its master copy's true average."""
    from support import gpu_stand_in

    gpu_stand_in.start()
    import paddle
    from support.tiny_models import tiny_model

    from erniekit.parallel.grad_sync import GradientSync
    from erniekit.parallel.zero import ShardedParameters
    from erniekit.precision import policy
    from erniekit.training.adamw import AdamW, ParamRule
    from erniekit.training.ema import WeightAverage

    model = tiny_model("dense")
    policy.apply(model, policy.Policy("bfloat16"))
    named = list(model.named_parameters())
    parameters = ShardedParameters.single(named)
    sync = GradientSync(parameters)
    optimizer = AdamW(parameters, {name: ParamRule(1.0, 0.0) for name, _ in named}, 0.9, 0.9, 1e-8)
    average, name, decay = WeightAverage(model, 0.5, optimizer), "model.norm.weight", 0.5
    expected = optimizer.state[name]["master"].numpy().copy()
    for _ in range(4):
        gradient = paddle.ones(dict(named)[name].shape, dtype="bfloat16")
        dict(named)[name].grad = gradient
        sync.begin(1)
        sync.after_backward()
        optimizer.step(sync.finish(), 1e-4)
        sync.clear()
        average.update()
        expected = decay * expected + (1 - decay) * optimizer.state[name]["master"].numpy()
    return float(average.average[name].numpy()[0]), float(expected[0])


def test_the_average_follows_the_masters(gpu: World):
    ((found, expected),) = gpu.run(average_of_small_steps)
    assert found == pytest.approx(expected, rel=1e-7) and found < 0.9999


def head_gradient(chunks: int) -> float:
    """Relative error of the head's gradient in bf16, summed over chunks, with a loss divided by 6151."""
    from support import gpu_stand_in

    gpu_stand_in.start()
    import numpy as np
    import paddle

    from erniekit.losses import lm

    random = np.random.default_rng(0)
    hidden, weight = random.normal(size=(256, 16)), 0.3 * random.normal(size=(40, 16))
    labels = random.integers(0, 40, 256)
    narrow = [paddle.to_tensor(x.astype(np.float32)).astype("bfloat16") for x in (hidden, weight)]
    for tensor in narrow:
        tensor.stop_gradient = False
    hidden, weight = (tensor.astype("float32").numpy().astype(np.float64) for tensor in narrow)
    loss, *_ = lm.linear_cross_entropy(
        narrow[0], lm.Head(narrow[1], True), paddle.to_tensor(labels), paddle.ones([256]), 256 // chunks
    )
    (loss / 6151).backward()
    p = np.exp(hidden @ weight.T)
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(256), labels] -= 1
    true = p.T @ hidden / 6151
    found = narrow[1].grad.astype("float32").numpy()
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


@pytest.mark.parametrize("chunks", [1, 64])
def test_the_heads_gradient_is_rounded_once(gpu: World, chunks: int):
    (error,) = gpu.run(head_gradient, chunks=chunks)
    assert error < 0.0035  # summed and scaled in 16 bits it is 0.008 with 64 chunks
