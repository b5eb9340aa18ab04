"""Every key of ERNIEKit's vision-language files is honoured, noted with its reason, or refused by name.

The files are rebuilt here from what each is known to say: one in full, the others as differences from it. Files for
other hardware have the keys of the file of the same name.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from erniekit.config import Config, load, schema, unsupported
from erniekit.config.compat import Alias, Fixed
from erniekit.config.compat_keys import RULES

LORA: dict[str, Any] = {
    "stage": "VL-SFT",
    "model_name_or_path": "baidu/ERNIE-4.5-VL-28B-A3B-Paddle/",
    "multimodal": True,
    "fuse_linear": True,
    "fuse_rms_norm": False,
    "use_flash_attention": 1,
    "use_moe": True,
    "fine_tuning": "LoRA",
    "lora_rank": 32,
    "use_sparse_head_and_loss_fn": False,
    "use_recompute_loss_fn": False,
    "moe_group": "mp",
    "moe_use_aux_free_update_coef": 0.0,
    "moe_aux_loss_lambda": 0.0,
    "moe_use_aux_free": True,
    "moe_use_hard_gate": True,
    "moe_multimodal_dispatch_use_allgather": "v2-alltoall-unpad-text",
    "train_dataset_path": "examples/data/sft_vl-train_demo1.jsonl",
    "train_dataset_prob": "1.0",
    "text_dataset_path": "",
    "text_dataset_prob": "",
    "max_seq_len": 8192,
    "num_samples_each_epoch": 10000000,
    "modality_ratio": "[1,1]",
    "variable_resolution": 1,
    "pad_to_max_seqlen": 8192,
    "render_timestamp": True,
    "serialize_output": False,
    "one_sample_in_one_seq": True,
    "dataloader_num_workers": 1,
    "do_train": True,
    "batch_size": 1,
    "prefetch_factor": 10,
    "seed": 42,
    "gradient_accumulation_steps": 4,
    "max_steps": 8000,
    "save_steps": 10000,
    "logging_steps": 1,
    "weight_decay": 0.1,
    "warmup_steps": 100,
    "output_dir": "./output",
    "add_sys_token": True,
    "same_data": True,
    "freeze_config": "freeze_vision",
    "trigger_data_prob": 1.0,
    "from_scratch": 0,
    "gc_interval": 100000,
    "drop_history_with_k": True,
    "overwrite_output_dir": True,
    "lr_scheduler_type": "cosine",
    "learning_rate": 3.0e-4,
    "min_lr": 1.0e-6,
    "moe_gate_lr_ratio": 0.01,
    "visual_ld": 0.9,
    "vit_lr_ratio": 0.9,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1.0e-8,
    "scale_loss": 4096,
    "sequence_parallel": 1,
    "use_sp_callback": True,
    "tensor_parallel_degree": 2,
    "pipeline_parallel_degree": 2,
    "pp_need_data": True,
    "pp_need_data_degree": 2,
    "virtual_pp_degree": 1,
    "tensor_parallel_config": "sync_param sync_grad sync_moment",
    "pipeline_parallel_config": "enable_offload_queue enable_delay_scale_loss best_unbalanced_scheduler",
    "disable_pipeline_warmup": False,
    "sharding": "stage1",
    "sharding_parallel_config": "split_param enable_fuse_optimizer_states",
    "sharding_comm_buffer_size_MB": 2048,
    "save_sharding_stage1_model_include_freeze_params": True,
    "offload_optim": True,
    "tensorwise_offload_optimizer": True,
    "unified_checkpoint_config": "ignore_merge_optimizer",
    "use_recompute_moe": True,
    "recompute": True,
    "recompute_granularity": "full",
    "pre_alloc_memory": 60,
    "bf16": True,
    "fp16_opt_level": "O2",
    "amp_master_grad": 1,
    "unified_checkpoint": True,
}
FULL = {"fine_tuning": "Full", "learning_rate": 1e-5, "tensor_parallel_degree": 4, "pipeline_parallel_degree": 2}
SHARDED = FULL | {"load_sharded_model": True, "save_sharded_model": True}
THINKING = {
    "model_name_or_path": "baidu/ERNIE-4.5-VL-28B-A3B-Thinking/",
    "chat_template": "ernie_vl_thinking",
}
CALLS = {
    "dataset_name": "FunctionCallSFTReader",
    "train_dataset_path": "examples/data/sft_function_call_vl-train_demo1.jsonl",
    "text_dataset_path": "examples/data/function-call-train.jsonl",
    "text_dataset_prob": "1.0",
    "chat_template": None,
    "tensorwise_offload_optimizer": None,
    "unified_checkpoint_config": None,
}
LOW_BIT = FULL | {"fine_tuning": "LoRA", "learning_rate": 3e-4, "compute_type": "wint4/8", "max_steps": 1000}
BIG = {"model_name_or_path": "baidu/ERNIE-4.5-VL-424B-A47B-Paddle/"}
EXPORT: dict[str, Any] = {
    "model_name_or_path": "baidu/ERNIE-4.5-VL-28B-A3B-Paddle",
    "fine_tuning": "LoRA",
    "max_shard_size": 5,
    "hf_hub_id": None,
    "output_dir": "./output",
    "tensor_parallel_degree": 1,
    "pipeline_parallel_degree": 1,
    "sharding_parallel_degree": 1,
    "sharding": "stage1",
    "pipeline_parallel_config": "disable_partial_send_recv enable_clear_every_step_cache",
    "sequence_parallel": True,
    "compute_type": "bf16",
    "fp16_opt_level": "O2",
}
CHAT: dict[str, Any] = {
    "model_name_or_path": "baidu/ERNIE-4.5-VL-28B-A3B-Paddle",
    "output_dir": None,
    "tensor_parallel_degree": 4,
    "max_model_len": 32768,
    "port": 8188,
    "quantization": "wint4",
    "max_num_seqs": 32,
    "enable_mm": True,
    "limit_mm_per_prompt": '{"image":100,"video":100}',
    "reasoning_parser": "ernie-45-vl",
    "max_num_batched_tokens": 384,
    "max_new_tokens": 8192,
    "top_p": 0.7,
    "temperature": 0.95,
}


def _lengths(name: str, lengths: str, *changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A training file in several lengths of rows."""
    files = {}
    for length in lengths.split(","):
        tokens = int(length.removesuffix("k")) * 1024
        values = LORA | {"max_seq_len": tokens, "pad_to_max_seqlen": tokens}
        for change in changes:
            values |= change
        files[f"{name}_{length}"] = values
    return files


FILES: dict[str, dict[str, Any]] = {
    "VL-28B-A3B/run_chat": CHAT,
    "VL-28B-A3B/run_export": EXPORT,
    **_lengths("VL-28B-A3B/pt/run_sft", "8k", FULL, {"text_dataset_path": CALLS["text_dataset_path"]}),
    **_lengths("VL-28B-A3B/sft/run_sft", "8k,32k,128k", SHARDED),
    **_lengths("VL-28B-A3B/sft/run_sft_lora", "8k,32k,128k"),
    **_lengths("VL-28B-A3B-Thinking/sft/run_sft", "8k,32k,128k", SHARDED, THINKING),
    **_lengths("VL-28B-A3B-Thinking/sft/run_sft_lora", "8k,32k,128k", THINKING),
    **_lengths("VL-28B-A3B-Thinking/sft_function_call/run_sft", "8k,32k,128k", FULL, THINKING, CALLS),
    **_lengths("VL-28B-A3B-Thinking/sft_function_call/run_sft_lora", "8k,32k,128k", THINKING, CALLS),
    "VL-424B-A47B/run_export": EXPORT,
    **_lengths("VL-424B-A47B/sft/run_sft_lora", "8k,32k", BIG),
    **_lengths("VL-424B-A47B/sft/run_sft_wint8mix_lora", "8k,32k,128k", LOW_BIT, BIG, {"warmup_steps": 0}),
    **_lengths("xpu/VL-28B-A3B/sft/run_sft", "32k", SHARDED),
    **_lengths("xpu/VL-28B-A3B-Thinking/sft/run_sft", "32k", SHARDED, THINKING),
    **_lengths("xpu/VL-28B-A3B-Thinking/sft/run_sft_lora", "32k", THINKING),
    **_lengths("xpu/VL-28B-A3B-Thinking/sft_function_call/run_sft", "8k,32k", FULL, THINKING, CALLS),
    **_lengths("xpu/VL-28B-A3B-Thinking/sft_function_call/run_sft_lora", "32k", THINKING, CALLS),
    "iluvatar_gpu/VL-28B-A3B/run_chat": CHAT,
    "iluvatar_gpu/VL-28B-A3B/run_export": EXPORT,
    **_lengths("iluvatar_gpu/VL-28B-A3B/sft/run_sft_lora", "8k"),
}


def command_of(name: str) -> str:
    return {"run_chat": "chat", "run_export": "export"}.get(Path(name).name, "train")


def read(name: str) -> Config:
    return load(None, FILES[name], command_of(name))


def names_in(lines) -> set[str]:
    """The keys that open lines of the form `key: ...`, `key, key: ...` or `key: value: ...`."""
    return {name for line in lines for name in line.partition(":")[0].split(", ")}


def test_there_are_36_files():
    assert len(FILES) == 36


@pytest.mark.parametrize("name", FILES)
def test_nothing_of_a_file_is_dropped_without_a_word(name):
    cfg, command = read(name), command_of(name)
    refused, noted = names_in(unsupported(cfg, command)), names_in(cfg.notes)
    for key, value in FILES[name].items():
        if value in (None, "") or key in refused | noted:
            continue
        rule = RULES.get(key)
        assert key in schema.fields() or isinstance(rule, Alias | Fixed), f"{name}: {key} is dropped"


@pytest.mark.parametrize("name", FILES)
def test_a_file_asks_for_nothing_that_is_missing(name):
    assert unsupported(read(name), command_of(name)) == []


def test_what_happens_to_the_keys():
    """docs/from-erniekit.md has these numbers."""
    keys = {key for values in FILES.values() for key in values}
    kinds = Counter(
        "honoured" if key in schema.fields() or isinstance(RULES[key], Alias) else type(RULES[key]).__name__
        for key in keys
    )
    page = (Path(__file__).parents[3] / "docs" / "from-erniekit.md").read_text(encoding="utf-8")
    noted = kinds["NoEffect"] + kinds["Detail"]
    sentence = (
        f"{len(FILES)} vision-language files have {len(keys)} keys: {kinds['honoured']} are honoured, {noted} do "
        f"nothing here and are named with the reason, {kinds['Fixed']} has one value alone (which the files give), and "
        f"{kinds['Later']} is refused unless it is off."
    )
    assert sentence in " ".join(page.split()), sentence


def test_what_a_vision_file_means():
    cfg = read("VL-28B-A3B-Thinking/sft/run_sft_lora_8k")
    assert (cfg.stage, cfg.fine_tuning, cfg.chat_template) == ("VL-SFT", "LoRA", "ernie_vl_thinking")
    assert (cfg.packing, cfg.render_timestamp, cfg.continue_training, cfg.compute_type) == (False, True, True, "bf16")
    assert "multimodal" in names_in(cfg.notes) and "add_sys_token" in names_in(cfg.notes)


def test_the_reader_of_function_calls_says_what_their_texts_are():
    assert read("VL-28B-A3B-Thinking/sft_function_call/run_sft_8k").text_dataset_type == ("messages",)
    other = load(None, THINKING | CALLS | {"output_dir": "o", "dataset_name": "KnowledgeBasedSFTReader"}, "train")
    assert other.text_dataset_type == () and "dataset_name" in names_in(other.notes)


def test_paddleocr_is_refused_by_name():
    values = LORA | {
        "stage": "OCR-VL-SFT",
        "model_name_or_path": "PaddlePaddle/PaddleOCR-VL",
        "sft_replace_ids": True,
        "sft_image_normalize": True,
        "sft_image_rescale": True,
        "image_dtype": "float32",
        "packing_size": 8,
        "one_sample_in_one_seq": None,
        "packing": True,
    }
    assert "stage: OCR-VL-SFT (PaddleOCR-VL)" in unsupported(load(None, values, "train"))[0]
