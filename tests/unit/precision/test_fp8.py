"""Which runs multiply in FP8: what a device lacks is said before a weight is read."""

import paddle
import pytest

from erniekit.build import training_options
from erniekit.config import Config, load
from erniekit.precision.fp8 import choose_fp8
from erniekit.precision.fp8_emulated import Emulated
from erniekit.precision.fp8_kernels import PaddleKernels
from erniekit.utils.errors import ConfigError

BLOCKWISE = {"fp8": "blockwise", "model_name_or_path": "m", "output_dir": "o", "train_dataset_path": "t.jsonl"}


def config(**keys: object) -> Config:
    return load(None, BLOCKWISE | keys, "train")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(paddle.version, "cuda", lambda: "12.9")


def test_a_run_without_fp8_has_no_options():
    assert choose_fp8(config(fp8="none"), "cpu") is None


def test_a_cpu_has_to_be_asked_for_emulation():
    with pytest.raises(ConfigError, match=r"cpu has no products in FP8.*9\.0.*emulate_precision: true"):
        choose_fp8(config(), "cpu")
    options = choose_fp8(config(emulate_precision=True, fp8_gradients="e5m2", fp8_scale="real"), "cpu")
    assert options is not None and isinstance(options.backend, Emulated)
    assert options.describe() == "blockwise, E4M3, gradients E5M2, real scales, emulated"


@pytest.mark.usefixtures("hopper")
def test_a_hopper_gpu_uses_paddles_kernels():
    options = choose_fp8(config(), "gpu:0")
    assert options is not None and isinstance(options.backend, PaddleKernels)
    assert options.parts == {"experts"} and options.stores_fp8 and options.routing_weight == "before"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fp8": "rowwise"}, "blocks only"),
        ({"fp8": "tensorwise"}, "blocks only"),
        ({"fp8_gradients": "e5m2"}, "E4M3"),
        ({"compute_type": "fp16"}, "take and give bf16, not fp16"),
    ],
)
def test_what_the_kernels_lack_is_named(keys: dict[str, str], message: str):
    with pytest.raises(ConfigError, match=rf"{message}.*emulate_precision: true"):
        choose_fp8(config(**keys), "gpu:0")
    options = choose_fp8(config(emulate_precision=True, **keys), "gpu:0")
    assert options is not None and isinstance(options.backend, Emulated)


@pytest.mark.parametrize(
    ("capability", "cuda", "message"), [((8, 0), "12.9", "8.0"), ((10, 0), "12.9", "10.0"), ((9, 0), "12.6", "12.8")]
)
def test_other_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str, message: str):
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(paddle.version, "cuda", lambda: cuda)
    with pytest.raises(ConfigError, match=message):
        choose_fp8(config(), "gpu:0")


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_a_gpu_that_emulates_fp8_has_16_bits_itself(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]):
    """emulate_precision is refused on a GPU otherwise; with FP8 it asks for the emulation of the products alone."""
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: capability)
    precision = training_options(config(emulate_precision=True)).precision
    assert precision.param_dtype == "bfloat16"
    assert precision.fp8 is not None and isinstance(precision.fp8.backend, Emulated)
    with pytest.raises(ConfigError, match="emulate_precision: this run is on gpu:0, which has bf16 itself"):
        training_options(config(fp8="none", emulate_precision=True))


def test_a_device_that_is_only_assumed_is_not_asked():
    options = choose_fp8(config(), "gpu:0", is_assumed=True)
    assert options is not None and isinstance(options.backend, PaddleKernels)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"compute_type": "fp32"}, "16-bit weights in FP8, but compute_type is fp32"),
        ({"compute_type": "wint8", "fine_tuning": "LoRA"}, "but compute_type is wint8"),
        ({"fp8_modules": []}, "fp8_modules: empty"),
        ({"fp8": "mx"}, "fp8: expected one of none, blockwise, rowwise, tensorwise"),
        ({"fp8_modules": "router"}, "fp8_modules: expected"),
        ({"fp8_recompute_up_gate_layers": "-1"}, "fp8_recompute_up_gate_layers"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: dict[str, str], message: str):
    with pytest.raises(ConfigError, match=message):
        config(**keys)
