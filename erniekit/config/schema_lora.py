"""Keys of fine_tuning: LoRA."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key, list_of
from erniekit.config.values import split_patterns


@dataclass(frozen=True, kw_only=True)
class LoraArgs:
    """Adapters: their size, which projections they adapt, and what they continue from. Read only with
    fine_tuning: LoRA, except for lora_path.
    """

    group: ClassVar[str] = "LoRA"

    lora_rank: int = key(8, "Rank of the adapters: higher learns more and costs more.", ge=1)
    lora_alpha: float = key(
        -1.0, "Scaling is lora_alpha / lora_rank; -1: twice the rank, or 4 with rslora (ERNIEKit's rule).", gt=0, off=-1
    )
    lora_dropout: float = key(0.0, "Share of an adapter's inputs that is dropped while training.", ge=0, lt=1)
    rslora: bool = key(False, "Scaling is lora_alpha / sqrt(lora_rank) (rsLoRA).")
    lora_plus_scale: float = key(1.0, "Learning rate of the B factors as a multiple of the A factors' (LoRA+).", gt=0)
    rslora_plus: bool = key(False, "rslora, with lora_plus_scale 4 and lora_alpha 4 where they are not given.")
    use_dora: bool = key(False, "Train the magnitude of each column separately from its direction (DoRA).")
    lora_target_modules: tuple[str, ...] = list_of(
        str,
        "Modules to adapt: names (qkv_proj, or Hugging Face's q_proj; mlp.down_proj) or regular expressions; empty: "
        "attention, feed-forward and all experts, not routers or head.",
        split=split_patterns,
    )
    modules_to_save: tuple[str, ...] = list_of(
        str,
        "Modules that are trained in full and saved with the adapter: embed_tokens, lm_head, norm, input_layernorm, "
        "post_attention_layernorm.",
        split=split_patterns,
    )
    lora_path: str | None = key(
        None,
        "An adapter directory, PEFT's or ours: train continues it (with its rank, scaling and targets); eval, chat, "
        "server and export apply it to model_name_or_path where neither checkpoint nor output_dir has a model.",
        path=True,
    )
