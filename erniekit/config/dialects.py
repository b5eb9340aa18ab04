"""Finds out which toolkit a file was written for, and reports defaults that differ between that toolkit and this one.

A file with a key that only PaddleFormers has (paddleformers_keys.MARKS) was written for PaddleFormers. Otherwise a file
with a key that only ERNIEKit has (MARKS) was written for ERNIEKit. Nothing is concluded about any other file.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from erniekit.config import paddleformers_keys
from erniekit.config.schema import Config

# Keys of ERNIEKit's files that neither Hugging Face's tools nor LLaMA-Factory have.
MARKS = (
    "unified_checkpoint disable_ckpt_quant fp16_opt_level amp_custom_white_list "
    "amp_custom_black_list fuse_rope fuse_linear fuse_rms_norm fuse_swiglu use_sparse_head_and_loss_fn "
    "use_fused_head_and_loss_fn use_attn_mask_start_row_indices recompute_use_reentrant release_grads offload_optim "
    "tensorwise_offload_optimizer pipeline_parallel_config tensor_parallel_config sharding_parallel_config moe_group "
    "use_sp_callback distributed_dataloader in_tokens_batching moe_gate pp_need_data"
).split()


# Keys that LLaMA-Factory's files have and that are unknown here.
_LLAMA_FACTORY = (
    "finetuning_type cutoff_len dataset_dir val_size plot_loss preprocessing_num_workers overwrite_cache neat_packing "
    "pref_beta pref_loss flash_attn infer_backend"
).split()


def advice(unknown: Collection[str]) -> str:
    """Names the migration page for unknown keys of LLaMA-Factory; empty if the keys are not LLaMA-Factory's."""
    known = [name for name in unknown if name in _LLAMA_FACTORY]
    if len(known) < 2:
        return ""
    return (
        f"this file looks like one of LLaMA-Factory's (it has {' and '.join(known[:2])}); docs/from-llama-factory.md "
        "has a table of its keys and ours"
    )


@dataclass(frozen=True)
class _Dialect:
    """A toolkit ("ERNIEKit's"), the keys that only its files have, and those of its defaults that differ from ours."""

    owner: str
    marks: Collection[str]
    defaults: dict[str, Any]


_LEARNING = {"fine_tuning": "LoRA", "logging_steps": 500, "do_train": False}
_DIALECTS = (
    _Dialect("PaddleFormers'", paddleformers_keys.MARKS, _LEARNING | {"sharding": "stage1", "split": "950,50"}),
    _Dialect("ERNIEKit's", MARKS, _LEARNING | {"normalize_logps": True, "amp_master_grad": False}),
)


def note(cfg: Config, names: Collection[str], command: str) -> list[str]:
    """One line about the defaults that differ and affect this run; none if there are no such defaults. `names`: every
    key that was given, under the name in the file and under our name.
    """
    for dialect in _DIALECTS:
        mark = next((mark for mark in dialect.marks if mark in names), None)
        if mark is not None and command == "train":
            differences = [
                f"{name} {default} (here {_shown(vars(cfg)[name])})"
                for name, default in dialect.defaults.items()
                if name not in names and _matters(cfg, name)
            ]
            line = (
                f"defaults: this file looks like one of {dialect.owner} (it has {mark}), where keys that it leaves "
                f"out mean something else: {', '.join(differences)}"
            )
            return [line] if differences else []
    return []


def _matters(cfg: Config, name: str) -> bool:
    """Whether this run reads the key."""
    return cfg.method.reads(name) and (name != "split" or cfg.dataset_type == "pretrain")


def _shown(value: Any) -> str:
    return "nothing" if value == "" else str(value)
