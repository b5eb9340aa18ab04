"""Files in PaddleFormers' words: every key is honoured, noted, or refused by name."""

from pathlib import Path

import pytest

from erniekit.config import Config, load, require_supported, schema, unsupported
from erniekit.config.compat import Alias, Fixed, Later
from erniekit.config.compat_keys import RULES
from erniekit.utils.errors import ConfigError

TEXT = """
train_dataset_type: erniekit
eval_dataset_type: erniekit
train_dataset_path: ./sft/train.jsonl
train_dataset_prob: "1.0"
eval_dataset_path: ./sft/eval.jsonl
eval_dataset_prob: "1.0"
max_seq_len: 8192
packing: true
truncate_packing: false
mix_strategy: concat
template_backend: custom
template: text
model_name_or_path: baidu/ERNIE-4.5-21B-A3B-PT
_attn_implementation: flashmask
copy_custom_file_list: ""
stage: SFT
fine_tuning: full
seed: 7
do_train: true
do_eval: true
per_device_eval_batch_size: 1
per_device_train_batch_size: 1
num_train_epochs: 1
max_steps: -1
eval_steps: 100
evaluation_strategy: steps
save_steps: 100
save_strategy: steps
logging_steps: 1
gradient_accumulation_steps: 4
logging_dir: ./vdl_log
output_dir: ./checkpoints/sft
disable_tqdm: true
eval_accumulation_steps: 16
warmup_steps: 20
learning_rate: 1.0e-5
tensor_model_parallel_size: 4
pipeline_model_parallel_size: 2
virtual_pipeline_model_parallel_size: 1
sequence_parallel: true
sharding: stage1
tensorwise_offload_optimizer: true
recompute_granularity: full
recompute_method: uniform
recompute_num_layers: 1
bf16: true
fp16_opt_level: O2
unified_checkpoint: false
save_checkpoint_format: flex_checkpoint
load_checkpoint_format: flex_checkpoint
router_aux_loss_coef: 0.001
moe_expert_fusion: true
"""
LORA = TEXT.replace("fine_tuning: full", "fine_tuning: lora") + "lora: true\nlora_rank: 8\n"
PREFERENCE = (
    TEXT.replace("stage: SFT", "stage: DPO")
    + """
clear_every_step_cache: true
partial_send_recv: false
batch_p2p_comm: false
overlap_p2p_comm: true
best_unbalanced_scheduler: true
use_expert_parallel: true
expert_model_parallel_size: 4
sharding_parallel_size: 4
split_param: true
amp_master_grad: true
tp_delay_scale_loss: true
tp_sync_param: true
sync_grad: true
"""
)
PRETRAINING = """
stage: ernie_pretrain
dataset_type: pretrain
input_dir: "0.4 ./data/part0 0.6 ./data/part1"
split: "998,1,1"
data_load_process_num: 40
max_seq_len: 4096
base_seq_length: 4096
dataloader_num_workers: 8
prefetch_factor: 32
ignore_data_skip: 0
model_name_or_path: model_configs/ERNIE-4.5-300B-A47B/
tokenizer_name_or_path: ./tokenizer_model
moe_router_bias_update_rate: 0.001
moe_with_send_router_loss: False
moe_group: ep
use_moe: true
continue_training: False
output_dir: ./output/
num_consecutive: 32
enable_global_training_logs: False
global_logging_interval: 10
enable_mtp_magic_send: True
use_sp_callback: true
moe_gate_lr_ratio: 0.01
do_train: True
overwrite_output_dir: 1
disable_tqdm: 1
logging_steps: 1
eval_steps: 1000
eval_iters: -1
save_steps: 100
max_steps: 100
adam_beta2: 0.95
adam_epsilon: 1e-8
learning_rate: 2.2e-4
min_lr: 2.2e-5
gradient_accumulation_steps: 90
per_device_train_batch_size: 1
per_device_eval_batch_size: 1
lr_scheduler: wsd:231084
decay_function: 1-sqrt
max_grad_norm: 1.0
use_async_save: True
weight_decay: 0.1
warmup_steps: 200
save_total_limit: 5
bf16: True
fp16_opt_level: "O2"
use_fp8: False
scale_loss: 4096
seed: 666
use_train_part_sharding: 1
pre_alloc_memory: 60
tensorwise_offload_optimizer: True
pipeline_model_parallel_size: 4
tensor_model_parallel_size: 1
virtual_pipeline_model_parallel_size: 1
data_parallel_size: 1
use_expert_parallel: True
expert_model_parallel_size: 8
sharding: "stage1"
sharding_parallel_size: 8
amp_master_grad: 1
global_batch_size: 128
overlap_p2p_comm: true
best_unbalanced_scheduler: true
split_param: true
sharding_comm_buffer_size_MB: 2048
tp_sync_param: true
sync_grad: true
tp_sync_moment: true
hybrid_parallel_topo_order: sharding_first
skip_profile_timer: True
shuffle_consecutive: True
load_sharded_model: True
save_sharded_model: True
ignore_load_lr_and_optim: False
metrics_output_path: ./output/logs/
pdc_download_ckpt: true
pdc_download_timeout: 300
log_global_grad_norm: True
enable_optimizer_timer: False
gc_interval: 100000
pad_token_id: 0
moe_deep_gemm: false
ernie_model_config:
  num_hidden_layers: 24
  moe_num_experts: 16
  moe_k: 4
  moe_capacity: [4, 4, 4]
  num_empty_layers_add_in_tail: 0
  num_nextn_predict_layers: 1
  use_ep_comm_overlap: false
  use_combine_before_a2a: true
  use_quant_before_a2a: true
  use_async_a2a: false
  use_rms_qkv_recompute: true
  moe_logging: True
  moe_use_aux_free: true
  use_recompute: false
  use_fp8_mlp: false
  use_fp8_fuse_node: true
  fp8_mem_configs:
    shared_expert: false
    recompute_fwd_gate_up: [4, 5, 6]
    dequant_input: true
    offline_quant_expert_weight: true
    clear_origin_weight_when_offline_quant: true
  fp8_fused_ops_configs:
    stack_quant: true
    split_group_gemm: false
  transpose_split_quant: true
  moe_gate: top2_fused
"""
VISION = """
train_dataset_type: messages
train_dataset_path: ./vl/train.jsonl
max_seq_len: 8192
packing: false
padding_free: True
truncate_packing: False
template: ernie_vl
random_shuffle: false
model_name_or_path: baidu/ERNIE-4.5-VL-28B-A3B-Thinking
_attn_implementation: flashmask
stage: VL-SFT
fine_tuning: full
per_device_train_batch_size: 1
output_dir: ./checkpoints/vl
tensor_model_parallel_size: 4
pipeline_model_parallel_size: 2
sharding: stage1
use_sparse_head_and_loss_fn: true
bf16: true
load_via_cpu: true
recompute: true
recompute_granularity: full
recompute_method: uniform
recompute_num_layers: 1
recompute_modules: ["loss_fn"]
pp_seg_method: layer:Ernie4_5_DecoderLayer|ErnieDecoderLayer|EmptyLayer
offload_queue: true
pp_delay_scale_loss: true
pp_need_data_degree: 2
use_attn_mask_startend_row_indices: true
max_estimate_samples: 500
warmup_ratio: 0.01
"""


@pytest.fixture
def read(tmp_path: Path):
    """Loads a text as a file for a command."""

    def read_text(text: str, command: str = "train") -> Config:
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        return load(str(path), None, command)

    return read_text


def reasons(cfg: Config) -> dict[str, str]:
    return {name: line.partition(": ")[2] for line in cfg.notes for name in line.partition(":")[0].split(", ")}


def test_fine_tuning_means_the_same_in_megatrons_words(read):
    cfg = read(TEXT)
    assert unsupported(cfg) == []
    assert (cfg.tensor_parallel_degree, cfg.pipeline_parallel_degree, cfg.virtual_pp_degree) == (4, 2, 1)
    assert (cfg.moe_aux_loss_lambda, cfg.compute_type, cfg.batch_size, cfg.fine_tuning) == (0.001, "bf16", 1, "Full")
    noted = reasons(cfg)
    assert "attention kernels" in noted["_attn_implementation"]
    assert "safetensors" in noted["save_checkpoint_format"] and "safetensors" in noted["load_checkpoint_format"]
    assert "never cut" in noted["truncate_packing"] and "fused kernels" in noted["moe_expert_fusion"]
    assert "transformers' coefficient of this name weighs their mean" in noted["router_aux_loss_coef"]


def test_to_say_what_is_recomputed_asks_for_it_there(read):
    assert read(TEXT).recompute and "PaddleFormers' rule" in reasons(read(TEXT))["recompute"]
    assert not read(TEXT + "recompute: false\n").recompute
    assert not read(TEXT.replace("recompute_method: uniform\nrecompute_num_layers: 1\n", "")).recompute
    named = TEXT + 'recompute_modules: ["loss_fn", "core_attn"]\n'
    assert "full decides" in reasons(read(named))["recompute_modules"]
    for text in (TEXT, named):  # core_attn is the default; the loss never keeps its logits
        selective = text.replace("granularity: full", "granularity: selective")
        assert read(selective).recomputed_modules == {"core_attn"}
    with pytest.raises(ConfigError, match=r"did you mean experts\?"):
        read(TEXT + "recompute_modules: expert\n")
    with pytest.raises(ConfigError, match="core_attn is a part of attention"):
        read(TEXT.replace("granularity: full", "granularity: selective") + "recompute_modules: attention,core_attn\n")
    with pytest.raises(ConfigError, match="names nothing to recompute"):
        read(TEXT.replace("granularity: full", "granularity: selective") + "recompute_modules: loss_fn\n")


def test_adapters(read):
    cfg = read(LORA)
    assert (cfg.fine_tuning, cfg.lora_rank, unsupported(cfg)) == ("LoRA", 8, [])


def test_flat_switches_of_pipeline_and_sharding_are_noted(read):
    cfg = read(PREFERENCE)
    assert unsupported(cfg) == []
    assert (cfg.stage, cfg.expert_parallel_degree, cfg.sharding_parallel_degree) == ("DPO", 4, 4)
    flat = (
        "clear_every_step_cache partial_send_recv batch_p2p_comm overlap_p2p_comm best_unbalanced_scheduler split_param"
    )
    noted = reasons(cfg)
    assert all("follows from the degrees" in noted[name] for name in flat.split())
    cfg = read(PREFERENCE + "moe_token_dispatcher_type: deepep\nloss_subbatch_sequence_length: 8192\n")
    assert {"moe_token_dispatcher_type", "loss_subbatch_sequence_length"} <= reasons(cfg).keys()
    assert "check_replicas_steps" in noted["tp_sync_param"] and "divided once" in noted["tp_delay_scale_loss"]


def test_pretraining_from_a_shape(read):
    cfg = read(PRETRAINING)
    assert unsupported(cfg) == []
    assert (cfg.stage, cfg.dataset_type, cfg.continue_training) == ("PT", "pretrain", False)
    assert (cfg.num_hidden_layers, cfg.moe_num_experts, cfg.moe_k, cfg.num_nextn_predict_layers) == (24, 16, 4, 1)
    assert cfg.tokenizer_name_or_path == "./tokenizer_model" and cfg.moe_use_aux_free_update_coef == 0.001
    degrees = (cfg.pipeline_parallel_degree, cfg.expert_parallel_degree, cfg.sharding_parallel_degree)
    assert degrees == (4, 8, 8) and cfg.data_parallel_degree == 1
    assert "stage" in reasons(cfg) and "moe_capacity_factor" in reasons(cfg)["moe_capacity"]
    assert cfg.fp8 == "none" and "fp8 is none" in reasons(cfg)["fp8_recompute_up_gate_layers"]
    switched_on = PRETRAINING.replace("use_fp8_mlp: false", "use_fp8_mlp: true")
    cfg = read(switched_on.replace("shared_expert: false", "shared_expert: true"))
    assert unsupported(cfg) == []
    assert (cfg.fp8, cfg.fp8_modules) == ("blockwise", ("experts", "shared_experts"))
    assert cfg.fp8_recompute_up_gate_layers == (4, 5, 6)
    assert "quantised for each product" in reasons(cfg)["offline_quant_expert_weight"]
    assert "quantised there" in reasons(cfg)["use_quant_before_a2a"]
    refused = read(switched_on.replace("use_fp8: False", "use_fp8: True"))
    assert [line.partition(":")[0] for line in unsupported(refused)] == ["use_fp8"]


@pytest.mark.parametrize("stage", ["VL-SFT", "dpo-vl"])
def test_vision_language(read, stage):
    cfg = read(VISION.replace("stage: VL-SFT", f"stage: {stage}"))
    assert unsupported(cfg) == [] and cfg.method.vision


def test_a_stage_of_another_model_is_refused_by_its_name_alone(read):
    cfg = read(VISION.replace("stage: VL-SFT", "stage: ocr-sft"))
    assert [line.partition(":")[0] for line in unsupported(cfg)] == ["stage"]


def test_exporting(read):
    text = "fine_tuning: LoRA\nmodel_name_or_path: m\noutput_dir: o\ncopy_custom_file_list: a.py\ndevice: xpu\n"
    cfg = read(text, "export")
    assert unsupported(cfg, "export") == []
    assert "copy others by hand" in reasons(cfg)["copy_custom_file_list"]


@pytest.mark.parametrize("device", ["xpu", "npu", "iluvatar_gpu", "metax_gpu", "musa"])
def test_other_hardware_is_refused_by_name(read, device):
    with pytest.raises(ConfigError, match=rf"device: {device} \(this version runs on CUDA GPUs and on the CPU"):
        require_supported(read(TEXT + f"device: {device}\n"))


@pytest.mark.parametrize("device", ["gpu", "cpu", "gpu:1"])
def test_a_device_that_paddle_chooses_by_itself_is_noted(read, device):
    cfg = read(TEXT + f"device: {device}\n")
    assert unsupported(cfg) == [] and "Paddle decides the device" in reasons(cfg)["device"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("use_template: false", "for plain text set stage: PT"),
        ("use_global_causal_attn: true", "never see one another"),
        ("data_impl: lazy", "token files are mapped"),
        ("resume_from_huggingface_ckpt: ./m", "give that directory as model_name_or_path"),
        ("muon_ns_coeff_type: aol", "muon_ns_coeff_type: aol: Newton-Schulz steps have the coefficients of `simple`"),
    ],
)
def test_what_has_one_value_here_says_what_to_do(read, line, expected):
    with pytest.raises(ConfigError) as caught:
        read(TEXT + line + "\n")
    assert expected in str(caught.value)
    assert line.partition(":")[0] in str(caught.value)


@pytest.mark.parametrize("line", ["use_template: true", "use_global_causal_attn: false", "data_impl: mmap"])
def test_the_one_value_is_taken(read, line):
    assert unsupported(read(TEXT + line + "\n")) == []


@pytest.mark.parametrize(
    ("line", "feature"),
    [
        ("sep_parallel_size: 2", "context_parallel_degree with cp_comm_type: a2a"),
        ("expert_tensor_model_parallel_size: 2", "tensor parallelism of its own for experts"),
        ("train_mtp_only: true", "frozen_parameters names what is not trained"),
        ("make_offline_data: true", "data sets prepared offline"),
        ("num_empty_layers_add_in_tail: 2", "layers added or left out at the model's end"),
    ],
)
def test_features_that_are_not_there_are_refused(read, line, feature):
    assert [feature in refused for refused in unsupported(read(TEXT + line + "\n"))] == [True]


# Every key of PaddleFormers 1.2.0's argument classes, and of its ERNIE files.
ROOT = Path(__file__).resolve().parents[3]
KEYS = (ROOT / "tests" / "golden" / "paddleformers_keys.txt").read_text(encoding="utf-8").split()


@pytest.mark.parametrize("name", KEYS)
def test_every_key_of_paddleformers_is_known(name):
    """Known: its value may be wrong here, but the key is not."""
    try:
        load(None, {name: "1"}, "version")
    except ConfigError as error:
        assert "unknown key" not in str(error)


def test_the_page_counts_the_keys_of_both():
    """docs/configuration.md: honoured, noted, refused unless the value asks for nothing, one value alone."""
    columns = []
    for dialect in ("erniekit", "paddleformers"):
        names = (ROOT / "tests" / "golden" / f"{dialect}_keys.txt").read_text(encoding="utf-8").split()
        honoured = sum(name in schema.fields() or isinstance(RULES[name], Alias) for name in names)
        later = sum(isinstance(RULES.get(name), Later) for name in names)
        fixed = sum(isinstance(RULES.get(name), Fixed) for name in names)
        columns.append([len(names), honoured, len(names) - honoured - later - fixed, later, fixed])
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert "| ERNIEKit: {} keys | PaddleFormers: {} keys |".format(*(column[0] for column in columns)) in page
    for row in range(1, 5):
        assert f"| {columns[0][row]} | {columns[1][row]} |\n" in page


@pytest.mark.parametrize("name", ["messages", "chatml"])
def test_documents_of_its_guide_to_pretraining_are_taken(read, name):
    """{"messages": [{"role": "assistant", "content": "a document"}]}, see tests/unit/data/records/test_formats.py."""
    text = "model_name_or_path: m\ntrain_dataset_path: a.jsonl\noutput_dir: o\nstage: PT\n"
    assert read(f"{text}train_dataset_type: {name}\n").train_dataset_type == (name,)
