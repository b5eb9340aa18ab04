"""The table of schemes: what is quantised and what is not, sizes, degrees, and what config.json says."""

import dataclasses
import re

import pytest

from erniekit.config.schema_quantization import SCHEMES as NAMES
from erniekit.models.config import ModelConfig
from erniekit.models.weights import logical_tensors
from erniekit.plan.shapes import published_shape
from erniekit.quantize.schemes import SCHEMES, Options, Scheme, scheme_for
from erniekit.quantize.settings import linear_modules
from erniekit.quantize.tensor_parallel import degrees_of
from erniekit.utils.errors import ConfigError

MODELS = ("0.3B", "21B-A3B", "300B-A47B", "VL-28B-A3B")
ROWS = pytest.mark.parametrize(("name", "format"), SCHEMES)


def published(name: str, **changes: object) -> ModelConfig:
    """The first five layers of a published model."""
    config = published_shape(f"baidu/ERNIE-4.5-{name}-PT")
    assert config is not None
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_layer_end_index": 4} if config.moe_num_experts else {}
    return dataclasses.replace(config, num_hidden_layers=5, **experts, **changes)


def schemes_of(config: ModelConfig, format: str) -> list[Scheme]:
    """Every scheme of a layout that a model can have."""
    found = []
    for name, layout in SCHEMES:
        try:
            if layout == format:
                found.append(scheme_for(name, layout, config))
        except ConfigError:
            assert config.vision is not None or not config.moe_num_experts or name == "fp8"
    return found


def matches(module: str, patterns: list[str]) -> bool:
    """As compressed-tensors and vLLM match a module's name."""
    return any(re.match(each[3:], module) if each.startswith("re:") else module == each for each in patterns)


@pytest.mark.parametrize("changes", [{"num_nextn_predict_layers": 1}, {"has_score_head": True}])
@pytest.mark.parametrize("model", MODELS)
def test_every_linear_module_is_quantised_or_ignored_and_never_both(model: str, changes: dict[str, object]):
    """With multi-token prediction, or as a reward model. Targets of config groups reach every quantised module once."""
    config = published(model, **changes)
    every = [
        piece.name.rpartition(".")[0]
        for logical in logical_tensors(config)
        for piece in logical.pt
        if len(piece.shape) == 2 and not piece.name.endswith(("embed_tokens.weight", "e_score_correction_bias"))
    ]
    for scheme in schemes_of(config, "pt"):
        quantised = {matrix.name for matrix in scheme.every_matrix(config)}
        ignored = scheme.settings.get("ignore", scheme.settings.get("modules_to_not_convert"))
        for module in every:
            assert (module in quantised) != matches(module, ignored), (scheme.name, module)
        assert matches("lm_head", ignored) and not matches("model.layers.0.mlp.gate_proj", ignored)
        groups = [group["targets"] for group in scheme.settings.get("config_groups", {}).values()]
        if len(groups) > 1:
            assert all(sum(matches(module, targets) for targets in groups) == 1 for module in quantised)
    for part in ("embed", "norm", "gate.weight", "mtp", "vision_model", "resampler", "lm_head"):
        assert not any(part in module for module in quantised)
    assert quantised == set(linear_modules(config, quantised=True))


@ROWS
def test_a_row_is_good_for_some_published_model(name: str, format: str):
    config = published("300B-A47B")
    scheme = scheme_for(name, format, config)
    assert scheme.name == name and scheme.format == format and scheme.method and scheme.readers
    bits = {matrix.place.role: matrix.codec.spec.bits for matrix in scheme.every_matrix(config)}
    expected = {"wint4": (4, 4), "wint8": (8, 8), "wint4/8": (8, 4), "w8a8": (8, 8), "fp8": (8, 8), "w4a8": (8, 4)}
    assert (bits["attention"], bits["experts"]) == expected.get(name, (8, 2))
    needs_ranges = any(matrix.codec.needs_range for matrix in scheme.every_matrix(config))
    assert needs_ranges == (format == "paddle" and name in ("w4a8", "fp8"))


def test_transformers_has_no_class_for_a_reward_model():
    for name in ("wint4", "wint8", "w8a8", "fp8"):
        assert "transformers" in scheme_for(name, "pt", published("0.3B")).readers
        assert "transformers" not in scheme_for(name, "pt", published("0.3B", has_score_head=True)).readers


def test_every_scheme_of_the_key_is_in_the_table():
    assert {name for name, _ in SCHEMES} == set(NAMES)


@pytest.mark.parametrize(
    ("name", "format", "cure"),
    [
        ("w4a8", "pt", "paddle"),
        ("wint2", "pt", "paddle"),
        ("w8a8", "paddle", "pt"),
        ("nf4", "pt", "no engine .*use one of wint4"),
    ],
)
def test_a_layout_that_no_reader_of_the_scheme_knows(name: str, format: str, cure: str):
    with pytest.raises(ConfigError, match=f"quantization: {name}: .*{cure}"):
        scheme_for(name, format, published("21B-A3B"))


@pytest.mark.parametrize(
    ("name", "format", "changes", "words"),
    [
        ("wint4", "pt", {"moe_intermediate_size": 1500}, ["experts.0.down_proj", "1500 inputs", "group_size"]),
        ("wint4/8", "pt", {"moe_intermediate_size": 1500}, ["experts.0.down_proj", "1500 inputs"]),
        ("fp8", "pt", {"moe_intermediate_size": 1500}, ["experts.0.gate_proj [1500, 2560]", "128"]),
        ("wint8", "paddle", {"moe_intermediate_size": 1520}, ["experts.0.down_proj [2560, 1520]", "64"]),
        ("w4a8", "paddle", {"intermediate_size": 12280}, ["mlp.down_proj [2560, 12280]", "Use wint8 or wint4 with"]),
        ("w4a8", "paddle", {"moe_intermediate_size": 1472}, ["experts.0.down_proj [2560, 1472]", "128"]),
        ("fp8", "paddle", {"moe_intermediate_size": 1500}, ["experts.0.down_proj", "1500 inputs", "32"]),
        ("wint2", "paddle", {"moe_intermediate_size": 1472}, ["down_proj [2560, 1472]", "128"]),
    ],
)
def test_sizes_that_a_scheme_cannot_take_are_named(name: str, format: str, changes: dict[str, int], words: list[str]):
    with pytest.raises(ConfigError) as raised:
        scheme_for(name, format, published("21B-A3B", **changes))
    for word in (f"quantization: {name}", *words):
        assert word in str(raised.value)


@pytest.mark.parametrize("name", ["wint4/8", "w4a8", "wint2"])
def test_codes_of_experts_need_experts(name: str):
    format = "pt" if name == "wint4/8" else "paddle"
    with pytest.raises(ConfigError, match="experts, which this model does not have"):
        scheme_for(name, format, published("0.3B"))


@pytest.mark.parametrize("name", ["wint4", "w4a8", "wint2"])
def test_vision_and_language_for_fastdeploy_names_what_can_be_written(name: str):
    with pytest.raises(ConfigError, match="format: pt for vLLM") as raised:
        scheme_for(name, "paddle", published("VL-28B-A3B"))
    assert ("quantization: wint4 with" in str(raised.value)) == (name != "wint4")


def test_group_size_is_chosen_or_given():
    config = published("21B-A3B")

    def group(scheme: Scheme) -> set[int | None]:
        return {matrix.codec.spec.group for matrix in scheme.every_matrix(config)}

    assert group(scheme_for("wint4", "pt", config)) == {128}
    assert group(scheme_for("wint4", "pt", config, Options(64))) == {64}
    assert "Marlin" not in scheme_for("wint4", "pt", config, Options(64)).readers
    for name in ("wint4", "wint4/8"):
        assert "Marlin kernels have groups of 128, 64, 32 only" in scheme_for(name, "pt", config, Options(16)).readers
    assert group(scheme_for("wint4/8", "pt", config, Options(32))) == {None, 32}
    with pytest.raises(ConfigError, match="groups of 100"):
        scheme_for("wint4", "pt", config, Options(100))
    with pytest.raises(ConfigError, match="quantization_group_size: 64: FastDeploy"):
        scheme_for("wint4", "paddle", config, Options(64))


@pytest.mark.parametrize(
    ("model", "name", "group", "good"),
    [
        ("21B-A3B", "wint8", None, (1, 2, 4)),  # 20 heads
        ("21B-A3B", "wint4", None, (1, 2, 4)),
        ("300B-A47B", "wint4", None, (1, 2, 4)),  # 3584: 448
        ("300B-A47B", "wint4", 64, (1, 2, 4, 8)),
        ("300B-A47B", "wint8", None, (1, 2, 4, 8, 16)),
        ("300B-A47B", "fp8", None, (1, 2, 4)),
        ("VL-28B-A3B", "wint4", None, (1, 2, 4)),  # vision experts of 512: 64 a rank at 8
    ],
)
def test_degrees(model: str, name: str, group: int | None, good: tuple[int, ...]):
    config = published(model)
    degrees = degrees_of(scheme_for(name, "pt", config, Options(group)), config)
    assert degrees.good == good
    assert bool(degrees.limit) == (good[-1] < 16)
    assert degrees_of(scheme_for("wint4", "paddle", published("21B-A3B")), config).good == (1,)
