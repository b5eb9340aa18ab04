"""Optimizer state in host memory: the same training, and no more of it on the device than is needed."""

import numpy as np
import paddle
import pytest

from erniekit.parallel.zero import ShardedParameters
from erniekit.training import state_storage
from erniekit.training.adamw import AdamW, ParamRule
from erniekit.training.state_storage import CpuCopies, OnDevice, OnHost, StateStorage, build_storage


class Watched(CpuCopies):
    """Counts the states that are on the device."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def to_device(self, tensor: paddle.Tensor):
        self.order.append("in")
        copy, _ = super().to_device(tensor)
        return copy, lambda: self.order.append("arrived")

    def to_host(self, tensor: paddle.Tensor):
        self.order.append("out")
        copy, _ = super().to_host(tensor)
        return copy, lambda: self.order.append("left")


def optimizer_of(storage: StateStorage, moment_dtype: str = "fp32") -> tuple[AdamW, dict[str, paddle.Tensor]]:
    parameters = {}
    for number in range(3):
        values = np.random.default_rng(number).normal(size=(64, 80)).astype(np.float32)
        parameters[f"p{number}"] = paddle.create_parameter(
            values.shape, "float32", default_initializer=paddle.nn.initializer.Assign(values)
        )
    sharded = ShardedParameters.single(parameters.items())
    rules = dict.fromkeys(parameters, ParamRule(1.0, 0.1))
    return AdamW(sharded, rules, 0.9, 0.999, 1e-8, moment_dtype, storage), parameters


def train(optimizer: AdamW, steps: int = 3, begin: int = 0) -> None:
    for step in range(begin, begin + steps):
        gradients = {
            name: paddle.to_tensor(np.random.default_rng((step, int(name[1]))).normal(size=(64, 80)).astype(np.float32))
            for name in optimizer.parameters.tensors
        }
        optimizer.step(gradients, 1e-2, seed=step)


def bits(optimizer: AdamW, parameters: dict[str, paddle.Tensor]) -> dict[str, bytes]:
    found = {name: p.numpy().tobytes() for name, p in parameters.items()}
    return found | {key: optimizer.state_array(key).tobytes() for key in optimizer.state_shapes()}


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("moment_dtype", ["fp32", "bf16", "8bit"])
def test_training_is_the_same_wherever_the_state_is(moment_dtype: str, ahead: int):
    here, there = optimizer_of(OnDevice(), moment_dtype), optimizer_of(OnHost(CpuCopies(), ahead), moment_dtype)
    for optimizer, _ in (here, there):
        train(optimizer)
    assert bits(*here) == bits(*there)
    assert here[0].state_bytes() == there[0].state_bytes()


@pytest.mark.parametrize(("ahead", "order"), [(0, "in arrived out left"), (1, "in in arrived out in arrived out left")])
def test_the_next_state_is_fetched_while_one_is_updated(ahead: int, order: str):
    copies = Watched()
    storage = OnHost(copies, ahead)
    for name in "abc":
        storage.put(name, {"moment1": paddle.zeros([1])})
    copies.order.clear()
    for _ in storage.iterate("abc"):
        pass
    assert " ".join(copies.order).startswith(order)
    assert copies.order.count("left") == copies.order.count("arrived") == 3  # all copies have ended


def test_a_parameter_without_a_gradient_keeps_its_state():
    optimizer, _ = optimizer_of(OnHost(CpuCopies()))
    before = optimizer.state_array("p1/moment1")
    optimizer.step({"p0": paddle.ones([64, 80])}, 1e-2)
    assert optimizer.state_array("p1/moment1").tobytes() == before.tobytes()
    assert optimizer.state_array("p0/moment1").any()


@pytest.mark.parametrize("moment_dtype", ["fp32", "bf16", "8bit"])
def test_a_checkpoint_resumes_bit_for_bit(moment_dtype: str):
    whole, first, second = (optimizer_of(OnHost(CpuCopies()), moment_dtype) for _ in range(3))
    train(whole[0], 4)
    train(first[0], 2)
    saved = {key: first[0].state_array(key) for key in first[0].state_shapes()}
    for name, parameter in second[1].items():
        parameter.set_value(first[1][name])
    for key, array in saved.items():
        second[0].load_state_array(key, array)
    train(second[0], 2, begin=2)
    assert bits(*second) == bits(*whole)


def test_the_place_follows_the_keys_and_the_device(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert isinstance(build_storage(False, False), OnDevice)
    assert isinstance(build_storage(True, False), OnDevice)
    assert "offload_optim: no effect on a CPU" in capfd.readouterr().err
    assert isinstance(build_storage(True, True, emulate=True), OnHost)
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(state_storage, "GpuCopies", CpuCopies)  # needs a GPU
    assert isinstance(build_storage(False, True), OnHost)
