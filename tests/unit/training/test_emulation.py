"""`emulate_precision`: bf16 and fp16 on a CPU train as fp32 does, and save what a GPU would."""

import json
from pathlib import Path
from typing import Any

import paddle
import pytest
from support import equality, sixteen_bits
from support.sixteen_bits import CASES, dtypes_of, keys_of

from erniekit import config, load_model
from erniekit.build import inference_options, training_options
from erniekit.export.export import export_checkpoint
from erniekit.nn.roles import FP32_ROLES, named_roles
from erniekit.parallel.mesh import Mesh
from erniekit.training.build import Run, build_run
from erniekit.training.trainer import Trainer
from erniekit.utils.errors import ConfigError

STEPS = 20
# Of losses of 0.7 to 8.4 that fall by 0.3 to 2.5 in 20 steps. A weight that is trained twice, or in the wrong place,
# is ten times as far off after five steps. Of bf16, fp16 has the three more bits.
LOSS, NORM = {"bf16": 0.03, "fp16": 0.008}, {"bf16": 0.2, "fp16": 0.03}
QUICK = ("mtp", "lora")
PADDLE = {"bf16": paddle.bfloat16, "fp16": paddle.float16}
FILES = {"bf16": ("BF16", "bfloat16"), "fp16": ("F16", "float16")}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("emulation")
    sixteen_bits.prepare(path)
    return path


def check(directory: Path, case: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality, "STEPS", steps)
    model, more = CASES[case]
    wide, *others = (
        equality.train_some(keys_of(directory, model, kind, max_steps=steps, **more))["steps"]
        for kind in ("fp32", "bf16", "fp16")
    )
    for kind, narrow in zip(LOSS, others, strict=True):
        assert all(step.pop("skipped") == 0 for step in narrow if kind == "fp16")
        distances: list[float] = []
        for mine, other in zip(narrow, wide, strict=True):
            distances.append(abs(mine["loss"] - other["loss"]))
            assert distances[-1] < LOSS[kind], (kind, mine, other)
            assert abs(mine["norm"] / other["norm"] - 1) < NORM[kind], (kind, mine, other)
        assert any(distances)
        print(f"{case}, {kind}: {steps} steps, losses within {max(distances):.4f} of fp32's")


@pytest.mark.parametrize("case", QUICK)
def test_sixteen_bits_train_as_fp32_does(directory: Path, case: str, monkeypatch: pytest.MonkeyPatch):
    check(directory, case, 3, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_for_twenty_steps_of_every_method(directory: Path, case: str, monkeypatch: pytest.MonkeyPatch):
    check(directory, case, STEPS, monkeypatch)


def built(keys: dict[str, Any]) -> Run:
    return build_run(config.load(None, keys, "train"), Mesh.single())


@pytest.mark.parametrize("kind", PADDLE)
def test_weights_have_sixteen_bits_and_masters_thirty_two(directory: Path, kind: str):
    run = built(keys_of(directory, "moe", kind))
    run.close()
    roles = named_roles(run.model)
    for name, parameter in run.model.named_parameters():
        narrow = roles[name] not in FP32_ROLES
        assert parameter.dtype == (PADDLE[kind] if narrow else paddle.float32), name
        state = run.optimizer.state[name]
        assert ("master" in state) == narrow and {tensor.dtype for tensor in state.values()} == {paddle.float32}


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_an_evaluation_during_training_is_near_that_in_fp32(directory: Path, kind: str):
    losses = []
    for each in (kind, "fp32"):
        keys = keys_of(directory, "dense", each)
        data = {f"eval_dataset_{what}": keys[f"train_dataset_{what}"] for what in ("path", "type")}
        losses.append(equality.evaluate_some(keys | data | {"max_evaluate_steps": 2})["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] != losses[1]


def fitted(keys: dict[str, Any]) -> dict[str, bytes]:
    """Train by the trainer's own loop; the bits of weights, optimizer state and average at the end."""
    run = built(keys)
    Trainer(run, []).fit()
    assert run.average is not None
    arrays = {name: tensor.numpy() for name, tensor in run.model.named_parameters()}
    arrays |= {f"{name}/{key}": t.numpy() for name, state in run.optimizer.state.items() for key, t in state.items()}
    arrays |= {f"{name}/average": t.numpy() for name, t in run.average.average.items()}
    return {name: array.tobytes() for name, array in arrays.items()}


@pytest.mark.parametrize("kind", PADDLE)
def test_a_run_resumes_bit_for_bit_from_files_in_its_dtype(directory: Path, tmp_path: Path, kind: str):
    whole, again = tmp_path / "whole", tmp_path / "again"
    keys = keys_of(directory, "moe", kind, save_steps=2, ema_decay=0.9, max_steps=4)
    expected = fitted(keys | {"output_dir": str(whole)})
    resumed = {"output_dir": str(again), "resume_from_checkpoint": str(whole / "checkpoint-2")}
    assert fitted(keys | resumed) == expected
    header, name = FILES[kind]
    for place, stored, dtype in (
        ("checkpoint-2", header, name),
        ("checkpoint-2/ema", "F32", "float32"),
        ("", header, name),
    ):
        assert json.loads((whole / place / "config.json").read_text())["torch_dtype"] == dtype
        kinds = dtypes_of(whole / place / "model.safetensors")
        routers = {name for name in kinds if ".gate." in name or name.endswith("correction_bias")}
        assert routers and {kinds[name] for name in routers} == {"F32"}
        assert {kinds[name] for name in kinds.keys() - routers} == {stored}
    for optimizer in (whole / "checkpoint-2" / "optimizer").glob("*.safetensors"):
        assert set(dtypes_of(optimizer).values()) == {"F32"}
    # The final model is loaded with the values that it was trained with.
    weights = dict(load_model(whole).named_parameters())
    assert weights["model.norm.weight"].astype(name).numpy().tobytes() == expected["model.norm.weight"]


@pytest.mark.parametrize("kind", PADDLE)
def test_an_exported_model_keeps_its_dtype(directory: Path, tmp_path: Path, kind: str):
    out = tmp_path / "out"
    Trainer(built(keys_of(directory, "dense", kind, max_steps=1, output_dir=str(out))), []).fit()
    export_checkpoint(out, tmp_path / "exported")
    assert set(dtypes_of(tmp_path / "exported" / "model.safetensors").values()) == {FILES[kind][0]}


def test_a_step_that_overflows_in_fp16_is_skipped_and_said(
    directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    keys = keys_of(directory, "moe", "fp16", scale_loss=2.0**19, max_steps=4, output_dir=str(tmp_path / "out"))
    trainer = Trainer(built(keys | {"save_steps": 2}), [])
    before = {name: p.numpy() for name, p in trainer.run.model.named_parameters()}
    biases = {name: b.numpy() for name, b in trainer.run.model.named_buffers()}
    first = trainer.train_step(trainer.run.loader.next_step())
    assert not first.grad_norm < float("inf") and first.parts["skipped"] == 1 and first.parts["loss_scale"] == 2**19
    assert (
        "step 1: a gradient overflowed in fp16: nothing is updated, loss scale 524288 -> 262144"
        in capfd.readouterr().err
    )
    for name, parameter in trainer.run.model.named_parameters():
        assert parameter.numpy().tobytes() == before[name].tobytes(), name
    for name, buffer in trainer.run.model.named_buffers():
        assert buffer.numpy().tobytes() == biases[name].tobytes(), name
    state = trainer.state
    assert (state.step, state.loss_scale, state.skipped_steps) == (1, 2**18, 1)
    second = trainer.train_step(trainer.run.loader.next_step())
    assert second.parts["loss_scale"] == 2**18
    trainer.run.close()


def test_the_scale_is_saved_and_resumed(directory: Path, tmp_path: Path):
    keys = keys_of(directory, "dense", "fp16", scale_loss=2.0**22, save_steps=3, max_steps=6)
    whole = tmp_path / "whole"
    first = Trainer(built(keys | {"output_dir": str(whole)}), [])
    first.fit()
    resumed = {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(whole / "checkpoint-3")}
    second = Trainer(built(keys | resumed), [])
    second.fit()
    saved = json.loads((whole / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["loss_scale"] == 2**19 and saved["skipped_steps"] == 3
    assert vars(first.state) == vars(second.state) | {"data": first.state.data}
    bits = [{n: p.numpy().tobytes() for n, p in t.run.model.named_parameters()} for t in (first, second)]
    assert bits[0] == bits[1]


def test_gradients_do_not_depend_on_the_scale(directory: Path, monkeypatch: pytest.MonkeyPatch):
    """Powers of two are exact, and the tiny gradients that fp16 loses do not move the norm."""
    monkeypatch.setattr(equality, "STEPS", 1)
    norms = [
        equality.train_some(keys_of(directory, "dense", "fp16", scale_loss=scale))["steps"][0]["norm"]
        for scale in (2.0**12, 2.0**16)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_without_the_key_a_cpu_computes_in_fp32_and_says_so(directory: Path, capfd: pytest.CaptureFixture[str]):
    keys = keys_of(directory, "dense", "fp32") | {"compute_type": "fp16"}
    assert training_options(config.load(None, keys, "train")).precision.param_dtype == "float32"
    said = capfd.readouterr().err
    assert "compute_type: fp16 computes in float32 on a CPU. emulate_precision: true computes in fp16" in said


def test_the_key_is_proposed_only_where_it_is_accepted(directory: Path, capfd: pytest.CaptureFixture[str]):
    """`eval` does not read it, and a method that generates refuses it."""
    keys = keys_of(directory, "dense", "fp32") | {"compute_type": "bf16"}
    inference_options(config.load(None, keys, "chat"))
    rl = {"stage": "RL", "reward_funcs": "exact", "max_completion_length": 8}
    training_options(config.load(None, keys | rl, "train"))
    said = capfd.readouterr().err
    assert said.count("compute_type: bf16 computes in float32 on a CPU\n") == 2 and "emulate_precision" not in said


@pytest.mark.parametrize("kind", ["fp32", "wint8", "nf4"])
def test_there_is_nothing_to_emulate_with_other_types(directory: Path, kind: str):
    keys = keys_of(directory, "dense", "fp32", emulate_precision=True) | {"compute_type": kind}
    if kind != "fp32":
        keys |= sixteen_bits.LORA
    with pytest.raises(ConfigError, match=f"emulate_precision: it is for compute_type: bf16 or fp16.* not for {kind}"):
        config.load(None, keys, "train")
