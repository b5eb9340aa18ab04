"""Keys about the model, its precision and its experts."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config import methods
from erniekit.config.fields import key, list_of
from erniekit.config.schema_qat import QAT_COMPUTE_TYPES

# See recompute_modules. loss_fn: other tools' name for what is always done (losses/lm.py).
RECOMPUTE_MODULES = ("attention", "core_attn", "mlp", "moe", "experts", "shared_experts", "vision", "loss_fn")


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """Which model, what is done with it, and in which precision."""

    group: ClassVar[str] = "model"

    model_name_or_path: str | None = key(
        None, "A model directory, or a Hub name such as baidu/ERNIE-4.5-0.3B-PT.", path=True
    )
    tokenizer_name_or_path: str | None = key(
        None,
        "The tokenizer's directory, or a Hub name; not given: the model's own. Saved with the weights.",
        path=True,
    )
    download_hub: str | None = key(
        None,
        "Where a name is downloaded from: huggingface (also when not given), or with the extra `hubs` modelscope or "
        "aistudio.",
        choices=("huggingface", "modelscope", "aistudio"),
    )
    continue_training: bool = key(True, "Start from the model's weights; False: a random start from its config.json.")
    stage: str = key(
        methods.DEFAULT,
        methods.stage_doc(),
        choices=tuple(methods.METHODS),
        words={
            "ernie_pretrain": "PT",
            "ocr-sft": "OCR-VL-SFT",
            "dpo-vl": "VL-DPO",
            "sft-vl": "VL-SFT",
            "pt-vl": "VL-PT",
        },
    )
    fine_tuning: str = key(
        "Full",
        "Full trains every weight; LoRA trains adapters on frozen weights (ERNIEKit's default is LoRA).",
        choices=("Full", "LoRA"),
    )
    compute_type: str = key(
        "bf16",
        "Precision of weights and products: bf16, fp16 (with loss scaling), fp32; or a frozen base in 8 or 4 bits, for "
        "LoRA or to use: wint8, wint4, wint4/8 (experts in 4), nf4. ERNIEKit's fp8, w8a8 and w4a8 are read as qat.",
        choices=("bf16", "fp16", "fp32", "wint8", "wint4", "wint4/8", "nf4", *QAT_COMPUTE_TYPES),
    )
    fused_operators: bool = key(
        True, "On a GPU, Paddle's fused operators where they apply (docs/gpu.md); false: plain operations, to compare."
    )
    amp_master_grad: bool = key(True, "With 16-bit weights (bf16 on a GPU): gradients are accumulated in fp32.")
    emulate_precision: bool = key(
        False,
        "Train in bf16 or fp16 on a CPU as a GPU does: 16-bit weights and activations, fp32 masters. Without it a CPU "
        "computes in fp32.",
    )
    matmul_precision: str = key(
        "fp32",
        "bf16, on a CPU with avx512_bf16: matrix products round their factors to bfloat16 and sum in fp32, which is "
        "faster; tensors stay fp32 (docs/precision.md).",
        choices=("fp32", "bf16"),
    )
    scale_loss: float = key(
        65536.0, "With compute_type: fp16: the loss is multiplied by this at first; see docs/precision.md.", ge=1
    )
    recompute: bool = key(
        False, "Activation checkpointing: compute activations again in the backward pass; less memory, more time."
    )
    recompute_granularity: str = key(
        "full",
        "What is recomputed in each layer: all of it (full), attention with its projections (full_attn), attention "
        "without them (core_attn), only sparse feed-forward layers (moe), or recompute_modules (selective).",
        choices=("full", "full_attn", "core_attn", "moe", "selective"),
    )
    recompute_modules: tuple[str, ...] = list_of(
        str,
        "With recompute_granularity: selective, what is recomputed: attention (with projections), core_attn (without), "
        "mlp (dense feed-forward), moe (sparse ones; of these, experts or shared_experts), vision; loss_fn changes "
        "nothing.",
        ("core_attn",),
        choices=RECOMPUTE_MODULES,
    )
    offload_activations: bool = key(
        False,
        "With recompute: the inputs of what is recomputed wait in host memory. Saves memory on a GPU only.",
    )
    use_recompute_moe: bool = key(
        False, "With full_attn, core_attn or selective, also recompute sparse feed-forward layers."
    )
    use_recompute_mtp: bool = key(False, "Also recompute the multi-token-prediction blocks.")
    no_recompute_layers: tuple[int, ...] = list_of(
        int, "Numbers of layers that are not recomputed, such as 0,1,2; empty: none.", ge=0
    )
    attention_probs_dropout_prob: float = key(
        0.0,
        "Training: probability of dropping an attention weight in the last layer; layer i of n has i/n of it.",
        ge=0,
        lt=1,
    )
    dropout_warmup_steps: int = key(
        0, "Steps over which attention_probs_dropout_prob grows linearly from 0; 0: no warm-up.", ge=0
    )
    loss_subbatch_seqlen: int = key(32768, "The largest number of tokens whose logits are in memory at a time.", ge=1)
    rope_theta: float | None = key(
        None,
        "Base of the rotary positions, to continue at a longer context; null: as the model's config.json says.",
        gt=0,
    )
    rope_scaling: str = key(
        "",
        "Scale the rotary positions by max_seq_len / the model's max_position_embeddings: linear, dynamic or yarn, as "
        "transformers computes them; empty: as the model's config.json says.",
        choices=("", "linear", "dynamic", "yarn"),
    )
    num_nextn_predict_layers: int = key(0, "Depth of multi-token prediction to train; 0: none.", ge=0)
    z_loss_lambda: float = key(0.0, "Weight of the squared log-partition of the output head (z-loss).", ge=0)
    multi_token_pred_lambda: float = key(0.3, "Weight of the multi-token-prediction loss.", ge=0)


@dataclass(frozen=True, kw_only=True)
class MoEArgs:
    """Router losses and balancing; they have no effect in a dense model."""

    group: ClassVar[str] = "mixture of experts"

    moe_aux_loss_lambda: float = key(1e-5, "Weight of the load-balancing loss.", ge=0)
    moe_z_loss_lambda: float = key(0.0, "Weight of the router z-loss.", ge=0)
    moe_orthogonal_loss_lambda: float = key(0.0, "Weight of the router's orthogonality loss.", ge=0)
    moe_use_aux_free: bool | None = key(
        None, "Balance by moving the router's correction bias; null: as the model's config.json says, else off."
    )
    moe_use_aux_free_update_coef: float = key(0.001, "How far the correction bias moves in one step.", ge=0)
    moe_group_experts: bool = key(
        False,
        "Experts form moe_k groups, and the best expert of each group is chosen; set also by the model's config.json.",
    )
    moe_capacity_factor: float | None = key(
        None,
        "Training: capacity of an expert as a multiple of its even share of a row's tokens; null: no token is dropped.",
        gt=0,
    )
    moe_gate_lr_ratio: float | None = key(None, "The router's learning rate as a share of the others'; null: 1.", ge=0)
