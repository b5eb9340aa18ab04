"""Files as ERNIEKit's users have them: they load as they are, and every key is honoured, noted, or refused by name."""

import pytest

from erniekit.config import Config, load, unsupported

AMP = """
amp_custom_white_list: [lookup_table, flash_attn, matmul]
amp_custom_black_list: [reduce_sum, sin, cos]
"""
SFT = """
train_dataset_type: "erniekit"
eval_dataset_type: "erniekit"
train_dataset_path: "./examples/data/sft-train.jsonl"
train_dataset_prob: "1.0"
eval_dataset_path: "./examples/data/sft-eval.jsonl"
eval_dataset_prob: "1.0"
max_seq_len: 8192
model_name_or_path: baidu/ERNIE-4.5-0.3B-Paddle
fine_tuning: Full
fuse_rope: True
use_sparse_head_and_loss_fn: True
stage: SFT
do_train: True
do_eval: True
batch_size: 1
num_train_epochs: 1
max_steps: -1
max_evaluate_steps: 10000
eval_steps: 100
evaluation_strategy: steps
save_steps: 100
save_strategy: steps
release_grads: True
gradient_accumulation_steps: 8
logging_dir: ./vdl_log
output_dir: ./output
warmup_steps: 20
learning_rate: 1.0e-5
lr_scheduler_type: cosine
optim: adamw_custom
tensorwise_offload_optimizer: True
tensor_parallel_degree: 1
pipeline_parallel_degree: 1
sharding: stage1
pipeline_parallel_config: enable_delay_scale_loss disable_partial_send_recv
recompute_use_reentrant: True
compute_type: bf16
fp16_opt_level: O2
disable_ckpt_quant: True
unified_checkpoint: True
unified_checkpoint_config: ignore_merge_optimizer
"""
VISION = """
stage: VL-SFT
model_name_or_path: baidu/ERNIE-4.5-VL-28B-A3B-Paddle/
multimodal: true
use_flash_attention: 1
use_moe: true
fine_tuning: LoRA
moe_use_hard_gate: true
train_dataset_path: "examples/data/sft_vl-train_demo1.jsonl"
text_dataset_path: ""
modality_ratio: "[1,1]"
variable_resolution: 1
pad_to_max_seqlen: 8192
freeze_config: "freeze_vision"
from_scratch: 0
sequence_parallel: 1
tensor_parallel_degree: 2
bf16: true
amp_master_grad: 1
output_dir: ./output
"""
PRETRAINING = """
env:
  HOME: null
model_args:
  model_name_or_path: model_configs/ERNIE-4p5-21B-A3B/
  tokenizer_name: ./tokenizer_model
  output_dir: ./output/
  max_seq_length: 4096
  model_config:
    multi_token_pred_depth: 1
    use_recompute: true
    use_fp8_mlp: true
    fp8_mem_configs: {dequant_input: true}
trainer_args:
  input_dir: "0.4 ./demo_data/part0 0.6 ./demo_data/part1"
  split: "998,1,1"
  per_device_train_batch_size: 2
  eval_iters: -1
  adam_epsilon: 1e-8
  learning_rate: 3.14e-4
  lr_scheduler: wsd:603000
  decay_function: 1-sqrt
  bf16: True
  ignore_data_skip: 0
  expert_parallel_degree: 8
  from_scratch: 1
"""


@pytest.fixture
def read(tmp_path):
    """Loads a text as a file for a command."""

    def read_text(text: str, command: str = "train") -> Config:
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        return load(str(path), None, command)

    return read_text


def keys(lines: list[str] | tuple[str, ...]) -> set[str]:
    return {line.partition(":")[0] for line in lines}


def test_fine_tuning_runs_as_it_is_and_names_what_does_nothing(read):
    cfg = read(SFT + AMP)
    assert unsupported(cfg) == []
    assert (cfg.gradient_accumulation_steps, cfg.learning_rate, cfg.eval_steps) == (8, 1e-5, 100)
    assert keys(cfg.notes) == {
        *(
            "amp_custom_white_list",
            "amp_custom_black_list",
            "fp16_opt_level",
            "fuse_rope",
            "use_sparse_head_and_loss_fn",
            "release_grads",
        ),
        *("logging_dir", "tensorwise_offload_optimizer", "pipeline_parallel_config", "disable_ckpt_quant"),
        *("recompute_use_reentrant", "unified_checkpoint", "unified_checkpoint_config"),
    }


def test_vision_language_is_refused_by_name(read):
    cfg = read(VISION)
    assert keys(unsupported(cfg)) == {
        *("stage", "multimodal", "freeze_config"),
    }
    assert cfg.continue_training is True and cfg.amp_master_grad is True


def test_pretraining_blocks_are_understood(read):
    cfg = read(PRETRAINING)
    assert (cfg.stage, cfg.dataset_type, cfg.split) == ("PT", "pretrain", "998,1,1")
    assert cfg.input_dir == "0.4 ./demo_data/part0 0.6 ./demo_data/part1"
    assert (cfg.num_nextn_predict_layers, cfg.recompute, cfg.max_seq_len, cfg.batch_size) == (1, True, 4096, 2)
    assert (cfg.lr_scheduler_type, cfg.adam_epsilon, cfg.continue_training) == ("wsd:603000", 1e-8, False)
    assert keys(unsupported(cfg)) == {"tokenizer_name", "use_fp8_mlp"}
    assert {"env", "fp8_mem_configs", "dataset_type", "stage"} <= keys(cfg.notes)


def test_export_and_chat_need_no_degrees(read):
    export = (
        "model_name_or_path: m\nmax_shard_size: 5\nhf_hub_id: null\noutput_dir: ./output\ntensor_parallel_degree: 8\n"
    )
    assert unsupported(read(export, "export"), "export") == []
    chat = "model_name_or_path: m\noutput_dir: None\nmax_model_len: 131072\nport: 8188\nmax_new_tokens: 8192\n"
    cfg = read(chat, "chat")
    assert unsupported(cfg, "chat") == [] and cfg.output_dir is None and keys(cfg.notes) == {"max_model_len", "port"}
