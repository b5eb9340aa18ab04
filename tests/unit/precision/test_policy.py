"""Which dtype weights get, wherever they come from."""

import paddle
import pytest
from support.tiny_models import tiny_model

from erniekit.build import inference_options, training_options
from erniekit.config import load
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights
from erniekit.moe.layer import MoELayer, MoESizes
from erniekit.moe.router import RouterOptions
from erniekit.nn import fused
from erniekit.precision import policy
from erniekit.precision.policy import Policy
from erniekit.utils.errors import ConfigError


def dtypes(model: CausalLM) -> tuple[set, set]:
    """Of routers, and of all else."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    routers = {t.dtype for name, t in tensors if ".gate." in name or name.endswith("correction_bias")}
    others = {t.dtype for name, t in tensors if not (".gate." in name or name.endswith("correction_bias"))}
    return routers, others


@pytest.mark.parametrize(
    ("compute_type", "device", "expected"),
    [("bf16", "gpu:0", "bfloat16"), ("bf16", "cpu", "float32"), ("fp32", "gpu:0", "float32")],
)
def test_the_device_decides_with_the_compute_type(compute_type: str, device: str, expected: str):
    assert policy.choose(compute_type, device).param_dtype == expected


@pytest.mark.parametrize(("compute_type", "expected"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_a_cpu_emulates_sixteen_bits_where_it_is_asked_to(compute_type: str, expected: str):
    assert policy.choose(compute_type, "cpu", emulate=True).param_dtype == expected
    assert policy.choose(compute_type, "gpu:0").param_dtype == expected
    with pytest.raises(ConfigError, match=f"emulate_precision: this run is on gpu:0, which has {compute_type} itself"):
        policy.choose(compute_type, "gpu:0", emulate=True)


@pytest.mark.parametrize(
    ("compute_type", "capability", "refused"),
    [("bf16", (7, 5), True), ("wint8", (7, 0), True), ("fp16", (7, 5), False), ("bf16", (8, 0), False)],
)
def test_a_gpu_without_bf16_is_refused_before_weights_are_read(
    compute_type: str, capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(fused, "compute_capability", lambda: capability)
    keys = {"model_name_or_path": "m", "output_dir": "o", "train_dataset_path": "t.jsonl", "fine_tuning": "LoRA"}
    cfg = load(None, keys | {"compute_type": compute_type}, "train")
    for options in (training_options, inference_options):
        if refused:
            with pytest.raises(ConfigError, match=rf"compute_type: {compute_type} .* 8\.0 .* {capability[0]}\."):
                options(cfg)
        else:
            assert options(cfg).precision.param_dtype in ("bfloat16", "float16")
    assert training_options(cfg, "gpu:0"), "a device that is only assumed is not asked"


def test_a_model_that_exists_is_cast_where_it_is():
    model = tiny_model("moe")
    before = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    policy.apply(model, Policy("bfloat16"))
    assert dtypes(model) == ({paddle.float32}, {paddle.bfloat16})
    for name, parameter in model.named_parameters():
        expected = paddle.to_tensor(before[name]).astype(parameter.dtype)
        assert parameter.numpy().tobytes() == expected.numpy().tobytes()
        assert not parameter.stop_gradient
    assert policy.describe(model, has_masters=True) == "weights bfloat16, routers float32, masters float32"


def test_a_model_is_built_and_drawn_in_the_policys_dtype():
    config = tiny_model("moe").config
    with policy.default_dtype(Policy("bfloat16")), paddle.LazyGuard():
        model = CausalLM(ModelConfig.from_dict(config.to_dict()))
    init_weights(model, 3)
    assert dtypes(model) == ({paddle.float32}, {paddle.bfloat16})
    policy.apply(model, Policy("bfloat16"))  # has nothing to do
    assert paddle.get_default_dtype() == "float32"
    wide = tiny_model("moe")
    init_weights(wide, 3)
    name = "model.layers.0.mlp.down_proj.weight"
    rounded = dict(wide.named_parameters())[name].astype("bfloat16").numpy()
    assert dict(model.named_parameters())[name].numpy().tobytes() == rounded.tobytes()


def test_the_default_dtype_comes_back_after_an_error():
    with pytest.raises(KeyError), policy.default_dtype(Policy("bfloat16")):
        raise KeyError
    assert paddle.get_default_dtype() == "float32"


def test_fp32_says_so():
    model = tiny_model("dense")
    policy.apply(model, Policy("float32"))
    assert policy.describe(model, has_masters=False) == "weights float32"


def test_the_routers_of_both_modalities_stay_in_float32():
    with policy.default_dtype(Policy("bfloat16")):
        layer = MoELayer(MoESizes(8, (6, 4), 4, 1, bias=False, init_std=0.02), RouterOptions(2))
    policy.apply(layer, Policy("bfloat16"))
    wide = {name for name, tensor in layer.named_parameters() if tensor.dtype == paddle.float32}
    assert wide == {"gate.weight", "gate.weight_1"}
    assert all(buffer.dtype == paddle.float32 for _, buffer in layer.named_buffers())
    cast = tiny_model("moe")
    cast.model.layers[1].mlp = MoELayer(MoESizes(8, (6, 4), 4, 1, bias=False, init_std=0.02), RouterOptions(2))
    policy.apply(cast, Policy("bfloat16"))
    assert cast.model.layers[1].mlp.gate.weight_1.dtype == paddle.float32
    assert dtypes(cast) == ({paddle.float32}, {paddle.bfloat16})
