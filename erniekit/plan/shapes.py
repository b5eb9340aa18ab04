"""The shapes of the published ERNIE 4.5 models, so that a run can be planned before a model is downloaded.

The numbers are those of the models' config.json. A local directory, if there is one, is read instead.
"""

import re
from typing import Any

from erniekit.models.config import ModelConfig

_TEXT: dict[str, Any] = {
    "head_dim": 128,
    "vocab_size": 103424,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
_21B = _TEXT | {
    "model_type": "ernie4_5_moe",
    "hidden_size": 2560,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "intermediate_size": 12288,
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_intermediate_size": 1536,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "num_nextn_predict_layers": 1,
}
_300B = _21B | {
    "hidden_size": 8192,
    "num_hidden_layers": 54,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "moe_k": 8,
    "moe_intermediate_size": 3584,
    "moe_num_shared_experts": 0,
    "moe_layer_start_index": 3,
    "tie_word_embeddings": False,
}
_03B = _TEXT | {
    "model_type": "ernie4_5",
    "hidden_size": 1024,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 3072,
}
_VISION: dict[str, Any] = {
    "model_type": "ernie4_5_moe_vl",
    "moe_num_experts": [64, 64],
    "num_nextn_predict_layers": 0,
    "rope_3d": True,
    "freq_allocation": 20,
    "moe_use_hard_gate": True,
    "use_temporal_conv": True,
    "spatial_conv_size": 2,
    "temporal_conv_size": 2,
    "pixel_hidden_size": 1280,
    "im_patch_id": 100295,
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "patch_size": 14, "mlp_ratio": 4},
}
_SHAPES: dict[str, dict[str, Any]] = {
    "0.3B": _03B,
    "21B-A3B": _21B,
    "300B-A47B": _300B,
    "VL-28B-A3B": _21B
    | _VISION
    | {
        "moe_layer_start_index": [1, 1],
        "moe_layer_end_index": [27, 27],
        "moe_intermediate_size": [1536, 512],
    },
    "VL-424B-A47B": _300B
    | _VISION
    | {
        "moe_layer_start_index": [3, 3],
        "moe_layer_end_index": [53, 53],
        "moe_intermediate_size": [3584, 1194],  # the second number is not published for certain: about a third
    },
}
NAMES = tuple(_SHAPES)
THINKING = ("21B-A3B", "VL-28B-A3B")  # published a second time, trained to think
_HUB_NAME = re.compile(r"baidu/ERNIE-4\.5-(.+?)(-Base)?(-Thinking)?(-PT|-Paddle)?")


def published_values(size: str) -> dict[str, Any]:
    """The config.json of the model of one of NAMES, as far as it gives sizes. KeyError: there is none."""
    return dict(_SHAPES[size])


def published_shape(name: str) -> ModelConfig | None:
    """The shape of the model with this name on a hub ("baidu/ERNIE-4.5-21B-A3B-Paddle"); None: not a published one."""
    match = _HUB_NAME.fullmatch(name)
    values = _SHAPES.get(match[1]) if match else None
    return None if values is None else ModelConfig.from_dict(values, source=name)
