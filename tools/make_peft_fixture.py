"""Rebuild tests/parity/peft/{dense,moe,vl_moe}: adapters that PEFT wrote, and the logits it computes with them.

    python tools/make_peft_fixture.py

Each directory holds `base` (a random model of a few kilobytes), `adapter` (random, saved by PEFT), and `logits.npz`:
ids, logits of the base, logits with the adapter. The mixture of experts has adapters on stacked experts, shared experts
and attention, as this package writes them. The base of `vl_moe` is the vision-language model of
tests/parity/fixtures, with adapters on all experts, the resampler and the vision transformer; its logits are those of
the inputs "mixed" and "video" there. Needs the extra `parity`.
"""

import shutil
from pathlib import Path
from typing import Any

import make_vision_fixtures as vision
import numpy as np
import peft
import torch
import transformers

PARITY = Path(__file__).resolve().parents[1] / "tests" / "parity"
FIXTURES = PARITY / "peft"
SHARED = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "moe_num_experts": 3,
    "moe_k": 2,
    "moe_intermediate_size": 12,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
}
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
VISION = {
    "target_modules": r".*(self_attn\.[qo]_proj|shared_experts\.up_proj|vision_tower.*(qkv|fc2)|_linear\.fc[12])",
    "target_parameters": [f"{kind}_moe.experts.{name}" for kind in ("text", "vision") for name in EXPERT_PARAMETERS],
}
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
# name -> (model_type, configuration, options of LoraConfig)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense": (
        "ernie4_5",
        SHARED,
        {
            "target_modules": ["q_proj", "v_proj", "o_proj", *FEED_FORWARD],
            "rank_pattern": {"v_proj": 5},
            "alpha_pattern": {"layers.1.mlp.up_proj": 3},
            "modules_to_save": ["model.norm"],
            "use_rslora": True,
        },
    ),
    "moe": (
        "ernie4_5_moe",
        SHARED | EXPERTS,
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "target_parameters": [
                *(f"mlp.{name}.weight" for name in FEED_FORWARD),
                *(f"mlp.shared_experts.{name}.weight" for name in FEED_FORWARD),
                "mlp.experts.gate_up_proj",
                "mlp.experts.down_proj",
            ],
        },
    ),
}


def random_adapter(base: Any, options: dict[str, Any]) -> Any:
    """`base` with an adapter of random values, in eval mode."""
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **options)).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.2)
    return adapted


def save(adapted: Any, directory: Path, base: str) -> None:
    """Write the adapter."""
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(directory / "adapter")
    (directory / "adapter" / "README.md").unlink(missing_ok=True)


def make(name: str) -> None:
    """Write one directory anew."""
    model_type, fields, options = CASES[name]
    directory = FIXTURES / name
    shutil.rmtree(directory, ignore_errors=True)
    torch.manual_seed(11)
    config = transformers.AutoConfig.for_model(model_type, **fields)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    base.save_pretrained(directory / "base")
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, fields["vocab_size"], (2, 9)))
    with torch.no_grad():
        plain = base(ids).logits.numpy()
        adapted = random_adapter(base, options)
        logits = adapted(ids).logits.numpy()
    save(adapted, directory, "base")
    np.savez(directory / "logits.npz", ids=ids.numpy(), plain=plain, logits=logits)


def make_vision() -> None:
    """Write the directory `vl_moe` anew."""
    directory = FIXTURES / "vl_moe"
    shutil.rmtree(directory, ignore_errors=True)
    torch.manual_seed(12)
    base = transformers.Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
        PARITY / "fixtures" / "vl_moe", attn_implementation="eager", experts_implementation="eager"
    )
    inputs = vision.make_inputs(41, 3 * vision.VISION["patch_size"] ** 2)
    with torch.no_grad():
        adapted = random_adapter(base, VISION)
        logits = {name: vision.run_logits(adapted, inputs[name]).numpy() for name in ("mixed", "video")}
    save(adapted, directory, "vl_moe")
    np.savez(directory / "logits.npz", **logits)


if __name__ == "__main__":
    for case in CASES:
        make(case)
    make_vision()
