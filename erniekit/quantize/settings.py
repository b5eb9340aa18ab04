"""What config.json says of quantised weights (`quantization_config`), in the words of each engine."""

from typing import Any

from erniekit.models.config import ModelConfig
from erniekit.models.weights import EMBEDDINGS, logical_tensors
from erniekit.precision.codes import FP8_BLOCK, CodeSpec
from erniekit.quantize.places import place_of

# The modules of two config groups of compressed-tensors, by their names in -PT files. transformers takes a group for
# that of the routed experts if the word "experts" is in an expression, so the shared ones are written without it; vLLM
# takes the class "Linear" for the routed experts, so it is not used here.
EXPERT_PROJECTIONS = r"re:.*\.mlp\.experts\.\d+\.(gate|up|down)_proj$"
OTHER_PROJECTIONS = (r"re:.*\.self_attn\.[qkvo]_proj$", r"re:.*\.mlp\.(shared_\w+\.)?(gate|up|down)_proj$")


def ignored_modules(config: ModelConfig) -> list[str]:
    """The modules of a -PT checkpoint that are not quantised, as compressed-tensors and vLLM name them: a name, or a
    regular expression behind `re:`, which has to match from the beginning. `mlp.gate` ends there: it is not gate_proj.
    """
    names = ["lm_head"]
    if config.has_score_head:
        names.append("score")
    if config.moe_num_experts:
        names.append(r"re:.*\.mlp\.gate$")
    if config.vision is not None:
        names += [r"re:.*(text|vision)_experts_gate$", r"re:.*vision_(model|tower)\..*", r"re:.*resampler_model\..*"]
    if config.num_nextn_predict_layers:
        names.append(r"re:.*mtp_.*")
    return names


def group(spec: CodeSpec, targets: list[str], format: str, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """A config group of compressed-tensors: the modules `targets` have codes of `spec`."""
    weights = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if spec.group is None else "group",
        "group_size": spec.group,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": format,
    }


def dynamic_inputs(bits: int) -> dict[str, Any]:
    """Activations that the engine quantises, with a scale for each token."""
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
        "actorder": None,
        "block_structure": None,
    }


def compressed(config: ModelConfig, groups: list[dict[str, Any]], format: str) -> dict[str, Any]:
    """The quantization_config of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "ignore": ignored_modules(config),
        "kv_cache_scheme": None,
    }


def block_fp8(config: ModelConfig) -> dict[str, Any]:
    """The quantization_config of FP8 in blocks. It lists every linear module that keeps 16 bits by its full name: vLLM
    compares whole names, and transformers takes a name for the beginning of others.
    """
    assert FP8_BLOCK.block is not None
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(FP8_BLOCK.block),
        "modules_to_not_convert": linear_modules(config, quantised=False),
    }


def linear_modules(config: ModelConfig, quantised: bool) -> list[str]:
    """The linear modules of a -PT checkpoint, by their names there: those that a scheme may quantise, or all others.
    Routers of a vision-language model have the names of vLLM's modules, too.
    """
    names = [] if quantised else ["lm_head"]
    for logical in logical_tensors(config):
        if (place_of(logical) is not None) == quantised and logical.param not in EMBEDDINGS.values():
            names += [piece.name.rpartition(".")[0] for piece in logical.pt if len(piece.shape) == 2]
    if config.vision is not None and not quantised:
        blocks = [name.removesuffix("gate") for name in dict.fromkeys(names) if name.endswith(".mlp.gate")]
        names += [f"{block}{kind}_experts_gate" for block in blocks for kind in ("text", "vision")]
    return [name for name in dict.fromkeys(names) if not name.endswith(".moe_statics")]


def fastdeploy(method: str, **more: Any) -> dict[str, Any]:
    """The quantization_config of a -Paddle directory whose weights are quantised already."""
    return {"quantization": method, "is_quantized": True, **more}


def wint2(last_of_4_bits: int, last: int) -> dict[str, Any]:
    """The quantization_config of FastDeploy's wint2, with the keys of the published model. FastDeploy reads the last
    layer of 4 bits.
    """
    four = {
        "quant_type": "wint4",
        "quant_granularity": "per_channel",
        "quant_start_layer": 0,
        "quant_end_layer": last_of_4_bits,
    }
    two = {
        "quant_type": "wint2",
        "quant_granularity": "pp_acc",
        "quant_group_size": 64,
        "quant_start_layer": last_of_4_bits + 1,
        "quant_end_layer": last,
    }
    return fastdeploy(
        "wint2",
        dense_quant_type="wint8",
        moe_quant_type="w4w2",
        moe_quant_config={"moe_w4_quant_config": four, "moe_w2_quant_config": two},
    )
