"""Files as ERNIEKit's users have them: they load as they are, and every key is honoured, noted, or refused by name."""

import pytest

from erniekit.config import Config, load, unsupported
from erniekit.utils.errors import ConfigError

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
PREFERENCE = """
train_dataset_type: "erniekit"
train_dataset_path: "./examples/data/dpo-train.jsonl"
train_dataset_prob: "1.0"
max_seq_len: 8192
num_samples_each_epoch: 6000000
mix_strategy: random
packing: true
model_name_or_path: baidu/ERNIE-4.5-0.3B-Paddle
fine_tuning: Full
fuse_rope: True
stage: DPO
seed: 42
do_train: True
distributed_dataloader: True
dataloader_num_workers: 4
batch_size: 1
num_train_epochs: 1
max_steps: 800
save_steps: 100
save_strategy: epoch
logging_steps: 1
gradient_accumulation_steps: 36
output_dir: ./output/
warmup_steps: 50
learning_rate: 5.0e-7
lr_scheduler_type: cosine
min_lr: 5.0e-7
layerwise_lr_decay_bound: 0.5
attention_probs_dropout_prob: 0.1
dropout_warmup_steps: 100
offset_alpha: 0.0
scale_loss: 8192
use_sp_callback: True
tensor_parallel_config: "sync_param sync_grad sync_moment"
sharding: stage1
compute_type: bf16
amp_master_grad: True
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
    use_fp8_fuse_node: true
    fp8_mem_configs: {shared_expert: false, recompute_fwd_gate_up: [4, 5], dequant_input: true}
    fp8_fused_ops_configs: {stack_quant: true, split_group_gemm: false}
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
        "defaults",
        *(
            "amp_custom_white_list",
            "amp_custom_black_list",
            "fp16_opt_level",
            "fuse_rope",
            "use_sparse_head_and_loss_fn",
            "release_grads",
        ),
        *("logging_dir", "pipeline_parallel_config", "disable_ckpt_quant"),
        *("recompute_use_reentrant", "unified_checkpoint", "unified_checkpoint_config"),
    }


def test_vision_language_is_honoured(read):
    cfg = read(VISION)
    assert unsupported(cfg) == []
    assert cfg.freeze_config == ("freeze_vision",)
    assert cfg.model_name_or_path == "baidu/ERNIE-4.5-VL-28B-A3B-Paddle"  # the file ends it in a slash
    assert cfg.continue_training is True and cfg.amp_master_grad is True


def test_pretraining_blocks_are_understood(read):
    cfg = read(PRETRAINING)
    assert (cfg.stage, cfg.dataset_type, cfg.split) == ("PT", "pretrain", (998.0, 1.0, 1.0))
    assert cfg.input_dir == ("0.4", "./demo_data/part0", "0.6", "./demo_data/part1")
    assert (cfg.num_nextn_predict_layers, cfg.recompute, cfg.max_seq_len, cfg.batch_size) == (1, True, 4096, 2)
    assert (cfg.lr_scheduler_type, cfg.adam_epsilon, cfg.continue_training) == ("wsd:603000", 1e-8, False)
    assert unsupported(cfg) == []
    assert (cfg.fp8, cfg.fp8_store, cfg.fp8_recompute_up_gate_layers) == ("blockwise", True, (4, 5))
    assert cfg.fp8_modules == ("experts",) and cfg.compute_type == "bf16"
    assert cfg.tokenizer_name_or_path == "./tokenizer_model"
    assert {"env", "use_fp8_fuse_node", "stack_quant", "dataset_type", "stage"} <= keys(cfg.notes)


def test_layers_that_recompute_gate_and_up_may_be_a_switch(read):
    layers = "recompute_fwd_gate_up: [4, 5]"
    assert read(PRETRAINING.replace(layers, "recompute_fwd_gate_up: false")).fp8_recompute_up_gate_layers == ()
    with pytest.raises(ConfigError, match=r"recompute_fwd_gate_up: True is every layer there; list the numbers"):
        read(PRETRAINING.replace(layers, "recompute_fwd_gate_up: true"))


def test_automatic_parallelism_alone_is_refused_of_its_files(read):
    automatic = """
    use_fast_ln: True
    moe_group_orthogonal_loss: True
    moe_use_all2all: True
trainer_args:
  adaptive_norm_force_clear_state: 0
  adaptive_norm_enable_record: 1
  n_microbatches: 2
  enable_auto_parallel: 1"""
    cfg = read(PRETRAINING.replace("\ntrainer_args:", automatic))
    assert keys(unsupported(cfg)) == {"enable_auto_parallel"}


def test_export_and_chat_need_no_degrees(read):
    export = (
        "model_name_or_path: m\nmax_shard_size: 5\nhf_hub_id: null\noutput_dir: ./output\ntensor_parallel_degree: 8\n"
    )
    assert unsupported(read(export, "export"), "export") == []
    chat = "model_name_or_path: m\noutput_dir: None\nmax_model_len: 131072\nport: 8188\nmax_new_tokens: 8192\n"
    cfg = read(chat, "chat")
    assert unsupported(cfg, "chat") == [] and cfg.output_dir is None and "port, max_model_len" in keys(cfg.notes)


def test_preference_files_keep_their_attention_dropout(read):
    cfg = read(PREFERENCE)
    assert unsupported(cfg) == []
    assert (cfg.attention_probs_dropout_prob, cfg.dropout_warmup_steps) == (0.1, 100)
    assert not {"attention_probs_dropout_prob", "dropout_warmup_steps"} & keys(cfg.notes)
    without = read(PREFERENCE.replace("attention_probs_dropout_prob: 0.1", "attention_probs_dropout_prob: 0.0"))
    assert "dropout_warmup_steps: no effect: attention_probs_dropout_prob is 0" in without.notes


def test_token_files_may_count_evaluation_batches_twice(read):
    text = """
dataset_type: pretrain
input_dir: "0.4 ./data/part0 0.6 ./data/part0"
split: "998,1,1"
stage: PT
model_name_or_path: m
output_dir: ./output
max_evaluate_steps: 10000
eval_iters: 10
"""
    cfg = read(text)
    assert cfg.max_evaluate_steps == 10000
    assert any(line.startswith("eval_iters: 10") and "max_evaluate_steps: 10000 decides" in line for line in cfg.notes)
    assert read(text.replace("max_evaluate_steps: 10000\n", "")).max_evaluate_steps == 10


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "use_attn_mask_startend_row_indices: false",
            "use_attn_mask_startend_row_indices: no effect",
        ),
        ("FLAGS_use_stride_kernel: 0", "FLAGS_use_stride_kernel: no effect: Paddle's flags are set in the environment"),
        ("resume_from_checkpoint: True", "resume_from_checkpoint: True: read as auto"),
        ("bf16: true", ""),
        ("gc_interval: 100000", "gc_interval: no effect: Python's garbage collector"),
        ("release_grads: True", "release_grads: no effect: gradients are freed after every step"),
        ("offload_recompute_inputs: True", "offload_activations: no effect: recompute is False"),
    ],
)
def test_lines_of_theirs_that_load_with_a_note(read, line, expected):
    name = line.partition(":")[0]
    text = "".join(f"{given}\n" for given in SFT.splitlines() if not given.startswith(name))
    cfg = read(text + line + "\n")
    assert unsupported(cfg) == []
    assert any(note.startswith(expected) for note in cfg.notes)


def test_mixed_precision_beside_a_quantised_base_is_noted(read):
    text = SFT.replace("compute_type: bf16", "compute_type: wint4/8\nbf16: true").replace("Full", "LoRA")
    cfg = read(text)
    assert cfg.compute_type == "wint4/8"
    assert any(note.startswith("bf16: True") and note.endswith("compute_type: wint4/8 decides") for note in cfg.notes)


def test_text_that_stands_under_the_vision_models_key(read):
    empty = SFT.replace('"./examples/data/sft-train.jsonl"', '""') + "text_dataset_path: fc.jsonl\n"
    cfg = read(empty + 'text_dataset_prob: "1.0"\n')
    assert (cfg.train_dataset_path, cfg.train_dataset_prob, unsupported(cfg)) == (("fc.jsonl",), (1.0,), [])
    assert any(note.startswith("train_dataset_path: empty, so fc.jsonl") for note in cfg.notes)
    with pytest.raises(ConfigError, match="train_dataset_path: needed"):
        read(empty.replace("stage: SFT", "stage: VL-SFT"))
    beside = read(SFT.replace("stage: SFT", "stage: VL-SFT") + "text_dataset_path: fc.jsonl\nmodality_ratio: '[3,1]'\n")
    assert (beside.text_dataset_path, beside.modality_ratio, unsupported(beside)) == (("fc.jsonl",), (3, 1), [])


def test_defaults_that_mean_something_else_there_are_named_once(read):
    short = "fuse_rope: True\nmodel_name_or_path: m\ntrain_dataset_path: t.jsonl\noutput_dir: o\n"
    (line,) = [note for note in read(short).notes if note.startswith("defaults:")]
    assert "one of ERNIEKit's (it has fuse_rope)" in line
    for theirs in ("fine_tuning LoRA (here Full)", "logging_steps 500 (here 1)", "do_train False (here True)"):
        assert theirs in line
    assert "normalize_logps" not in line
    (preference,) = [note for note in read(PREFERENCE).notes if note.startswith("defaults:")]
    assert preference.endswith("mean something else: normalize_logps True (here False)")
    assert "defaults" not in keys(read(PREFERENCE + "normalize_logps: true\n").notes)


@pytest.mark.parametrize("line", ["run_name: x", "eval_strategy: 'no'", "lora: False", "report_to: none", "host: h"])
def test_a_file_without_keys_of_theirs_alone_is_nobodys(read, line):
    text = f"model_name_or_path: m\ntrain_dataset_path: t.jsonl\noutput_dir: o\n{line}\n"
    assert "defaults" not in keys(read(text).notes)


def test_a_file_of_the_successor_is_known_by_its_words(read):
    text = (
        "tensor_model_parallel_size: 2\nfuse_rope: True\nmodel_name_or_path: m\ntrain_dataset_path: t\noutput_dir: o\n"
    )
    (line,) = [note for note in read(text).notes if note.startswith("defaults:")]
    assert "one of PaddleFormers's" not in line and "PaddleFormers' (it has tensor_model_parallel_size)" in line
    assert "sharding stage1 (here nothing)" in line
