"""Keys of FP8 that do not fit the model are refused or reported before a weight is read."""

import pytest
from support.tiny_sizes import KINDS

from erniekit.config import Config, load
from erniekit.models.config import ModelConfig
from erniekit.models.pipeline_layout import check_layout, layout_lines
from erniekit.parallel.mesh import ParallelDims
from erniekit.utils.errors import ConfigError


def config(**keys: object) -> Config:
    given = {"fp8": "blockwise", "model_name_or_path": "m", "output_dir": "o", "train_dataset_path": "t.jsonl"}
    return load(None, given | keys, "train")


def shape(kind: str, **changes: object) -> ModelConfig:
    return ModelConfig.from_dict(KINDS[kind] | changes)


def test_a_dense_model_has_no_experts_to_multiply_in_fp8():
    message = "fp8_modules: experts: the model has none of these.* It has attention, mlp: name some of them, or set fp8"
    with pytest.raises(ConfigError, match=message):
        check_layout(config(), ParallelDims(), shape("dense"))
    check_layout(config(fp8="none"), ParallelDims(), shape("dense"))
    check_layout(config(fp8_modules="experts,mlp"), ParallelDims(), shape("dense"))
    check_layout(config(), ParallelDims(), shape("moe"))


def test_layers_that_the_model_lacks_are_refused():
    with pytest.raises(ConfigError, match=r"fp8_recompute_up_gate_layers: \[2, 9\]: the model has layers 0 to 1"):
        check_layout(config(fp8_recompute_up_gate_layers="9,1,2"), ParallelDims(), shape("moe"))


def test_values_without_effect_are_named():
    keys = {"fp8_modules": "experts,shared_experts,mlp", "fp8_recompute_up_gate_layers": "0,1"}
    sparse = shape("moe", moe_num_shared_experts=0, moe_layer_start_index=0, moe_layer_end_index=1)
    lines = layout_lines(config(**keys), sparse, ParallelDims())
    assert "fp8_modules: shared_experts,mlp: no effect: the model has none" in lines
    half = shape("moe", moe_layer_start_index=1, moe_layer_end_index=1)
    lines = layout_lines(config(**keys), half, ParallelDims())
    assert "fp8_recompute_up_gate_layers: [0]: no effect: these layers have no routed experts" in lines
    assert not any(line.startswith("fp8_modules") for line in lines)
    assert not any("fp8" in line for line in layout_lines(config(), sparse, ParallelDims()))
