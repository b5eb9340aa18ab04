"""What keys mean together: other names, derived values, checks over several keys, notes and refusals."""

import re

import pytest

from erniekit.config import load, require_supported, unsupported
from erniekit.config.compat import Later
from erniekit.utils.errors import ConfigError

TRAIN = {"model_name_or_path": "m", "train_dataset_path": "a.jsonl", "output_dir": "out"}
TOKENS = {"train_dataset_path": None, "dataset_type": "pretrain", "stage": "PT", "input_dir": "data/a"}


def cfg(command: str = "train", **given: object):
    return load(None, {**TRAIN, **given}, command)


def message(command: str = "train", **given: object) -> str:
    with pytest.raises(ConfigError) as caught:
        cfg(command, **given)
    return str(caught.value)


def test_batch_size_wins_over_the_inherited_names_and_says_so():
    both = cfg(batch_size=1, per_device_train_batch_size=8, per_device_eval_batch_size=8)
    assert both.batch_size == 1
    assert any(note.startswith("per_device_train_batch_size: 8") for note in both.notes)
    assert cfg(per_device_train_batch_size=8).batch_size == 8
    different = cfg(per_device_eval_batch_size=4, per_device_train_batch_size=2)
    assert different.batch_size == 2 and "per_device_eval_batch_size: 4" in different.notes[0]


@pytest.mark.parametrize(
    ("given", "compute_type"),
    [
        ({}, "bf16"),
        ({"bf16": True}, "bf16"),
        ({"fp16": 1}, "fp16"),
        ({"bf16": False}, "fp32"),
        ({"bf16": False, "fp16": True}, "fp16"),
        ({"bf16": True, "fp16": False}, "bf16"),
        ({"bf16": False, "compute_type": "bf16"}, "bf16"),
        ({"compute_type": "FP32"}, "fp32"),
        ({"bf16": True, "compute_type": "wint4/8", "fine_tuning": "LoRA"}, "wint4/8"),
        ({"bf16": True, "fp16": True}, "fp16"),
    ],
)
def test_precision_flags(given, compute_type):
    assert cfg(**given).compute_type == compute_type


def test_contradicting_names_of_one_key():
    assert "compute_type: given twice: fp16: True" in message(fp16=True, compute_type="fp32")
    assert "continue_training: given twice" in message(continue_training=True, from_scratch=1)


def test_evaluation_follows_from_its_strategy():
    assert cfg().do_eval is False
    assert cfg(evaluation_strategy="epoch", eval_dataset_path="e.jsonl").do_eval is True
    given = {"evaluation_strategy": "steps", "eval_dataset_path": "e.jsonl"}
    assert cfg(**given, logging_steps=20).eval_steps == 20
    assert any(note.startswith("eval_steps: not given") for note in cfg(**given, logging_steps=20).notes)
    assert cfg(**given, eval_steps=7).eval_steps == 7
    for stage, name in (("SFT", "eval_token_accuracy"), ("DPO", "kl"), ("KTO", "margin"), ("RL", "reward_mine")):
        more = {"reward_funcs": "accuracy,f.py:mine"} if stage == "RL" else {}
        assert cfg(**given, **more, stage=stage, metric_for_best_model=name).metric_for_best_model == name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"lr_scheduler_type": "wsd:"}, "lr_scheduler_type: wsd takes the step up to which the rate is steady"),
        ({"lr_scheduler_type": "wsd:-1"}, "lr_scheduler_type: wsd takes the step up to which the rate is steady"),
        ({"loss_type": "apo_zero", "stage": "KTO"}, "kto_loss_type: expected one of kto, apo_zero_unpaired"),
        ({"lr_scheduler_type": "cosine:5"}, "lr_scheduler_type: expected one of"),
        ({"lr_scheduler_type": "cosine:5"}, "lr_scheduler_type: expected one of linear, cosine"),
        ({"lr_scheduler": "cosin"}, "wsd (wsd:N), got 'cosin'; did you mean cosine?"),
        ({"min_lr": 0.1}, "min_lr: 0.1 is more than learning_rate: 5e-05"),
        (
            {"lr_scheduler_type": "polynomial", "learning_rate": 1e-8},
            "lr_end: 1e-07 is more than learning_rate: 1e-08, which is the highest rate",
        ),
        ({"mix_strategy": "random"}, "max_steps: mix_strategy: random has no end"),
        (
            {"train_dataset_path": "a,b", "train_dataset_prob": "1.0"},
            "train_dataset_path: 2 paths, but train_dataset_prob has 1. Give one for each path, or leave the key out.",
        ),
        ({"train_dataset_type": "erniekit,alpaca"}, "train_dataset_path: 1 path, but train_dataset_type has 2."),
        ({"train_dataset_prob": "much"}, "train_dataset_prob: expected a number, got 'much'"),
        ({"train_dataset_prob": "0"}, "train_dataset_prob: must be more than 0"),
        ({"train_dataset_type": "text", "stage": "DPO"}, "train_dataset_type: stage: DPO reads pairs of answers"),
        ({"train_dataset_type": "alpaca", "stage": "PT"}, "train_dataset_type: stage: PT reads plain text"),
        ({"train_dataset_type": "messages", "stage": "VL-PT"}, "Use erniekit or text, or stage: VL-SFT"),
        (
            {"text_dataset_path": "t", "text_dataset_type": "alpaca", "stage": "VL-PT"},
            "text_dataset_type: stage: VL-PT reads plain text",
        ),
        (
            {"eval_dataset_path": "e", "eval_dataset_type": "text", "do_eval": True, "stage": "DPO"},
            "eval_dataset_type: stage: DPO reads pairs of answers",
        ),
        ({"virtual_pp_degree": 2}, "virtual_pp_degree: 2 with pipeline_parallel_degree: 1"),
        (
            {"pipeline_parallel_degree": 2, "pipeline_schedule": "memory_efficient"},
            "pipeline_schedule: memory_efficient needs at least 2 chunks",
        ),
        ({"pp_seg_method": "quick"}, "pp_seg_method: expected layer:DecoderLayer"),
        (
            {"train_dataset_path": "a,b", "train_dataset_prob": "0.5,0.6", "mix_strategy": "interleave_over"},
            "train_dataset_prob: shares must sum to 1 with mix_strategy: interleave_over, they sum to 1.1",
        ),
        ({"evaluation_strategy": "epoch"}, "eval_dataset_path: needed with evaluation_strategy: epoch"),
        (
            {
                "stage": "RL",
                "evaluation_strategy": "epoch",
                "eval_dataset_path": "e",
                "metric_for_best_model": "completion_length",
            },
            "greater_is_better: needed with metric_for_best_model: completion_length",
        ),
        ({"do_eval": True}, "eval_dataset_path: needed with do_eval: True"),
        ({"do_train": False}, "do_train: False leaves `erniekit train` nothing to do"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end: needs evaluations to compare"),
        (
            {"evaluation_strategy": "epoch", "eval_dataset_path": "e", "metric_for_best_model": "eval_accuracy"},
            "metric_for_best_model: accuracy: an evaluation of stage: SFT gives no such number, but loss, perplexity",
        ),
        *(
            (
                {"evaluation_strategy": "epoch", "eval_dataset_path": "e", "metric_for_best_model": name, **more},
                f"metric_for_best_model: {name}: an evaluation of stage: {more['stage']} gives no such number",
            )
            for name, more in (
                ("kl", {"stage": "DPO", "reference_free": True}),
                ("kl", {"stage": "DPO", "loss_type": "simpo"}),
                ("kl", {"stage": "VL-DPO", "loss_type": "orpo"}),
                ("kl", {"stage": "KTO", "kto_loss_type": "apo_zero_unpaired"}),
                ("accuracy", {"stage": "RL", "reward_funcs": "exact"}),
                ("reward_std", {"stage": "RL", "reward_funcs": "exact"}),
            )
        ),
        ({"early_stopping_patience": 2}, "early_stopping_patience: needs evaluations to compare"),
        ({"min_tokens": 5, "max_new_tokens": 4}, "min_tokens: 5 is more than max_new_tokens: 4"),
        ({"output_dir": None}, "output_dir: needed"),
        ({"model_name_or_path": ""}, "model_name_or_path: needed"),
        ({"train_dataset_path": None}, "train_dataset_path: needed"),
        ({**TOKENS, "input_dir": None}, "input_dir: needed with dataset_type: pretrain"),
        ({**TOKENS, "stage": "SFT"}, "stage: dataset_type: pretrain is for stage: PT, got SFT"),
        ({**TOKENS, "train_dataset_path": "a"}, "train_dataset_path: dataset_type: pretrain trains on input_dir"),
        ({**TOKENS, "long_document_weight": 2}, "long_document_min_tokens: needed with long_document_weight: 2"),
        ({"min_pixels": 9000, "max_pixels": 3136, "stage": "VL-SFT"}, "min_pixels: 9000 is more than max_pixels: 3136"),
        ({"video_min_pixels": 9, "video_max_pixels": 8}, "video_min_pixels: 9 is more than video_max_pixels: 8"),
        ({"video_min_frames": 9, "video_max_frames": 8}, "video_min_frames: 9 is more than video_max_frames: 8"),
        ({"truncation": "cut", "stage": "VL-SFT"}, "truncation: cut: with stage: VL-SFT pictures are never cut"),
        ({"truncation": "shrink"}, "truncation: shrink: with stage: SFT there are no pictures to make smaller"),
        ({"video_fps": 0}, "video_fps: must be more than 0 and at most 1000, got 0.0"),
        ({"video_frames_sample": "rand"}, "video_frames_sample: expected one of middle, leading, got 'rand'"),
        ({"box_coordinates": "pixel"}, "did you mean pixels?"),
        ({"variable_resolution": 0}, "variable_resolution: 0: pictures always keep their shape"),
        ({"use_pic_id": False}, "use_pic_id: False: the chat template writes `Picture 1:`"),
    ],
)
def test_checks_over_several_keys(given, expected):
    assert expected in message(**given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"eval_dataset_type": "text"}, "the evaluation data is plain text, which has no questions"),
        ({"eval_dataset_type": "erniekit", "stage": "PT"}, "the evaluation data is plain text"),
        ({"eval_dataset_path": None, "input_dir": "a", "dataset_type": "pretrain", "stage": "PT"}, "token files"),
    ],
)
def test_text_has_no_questions_to_answer(given, expected):
    text = message("eval", **{"eval_dataset_path": "e", "predict_with_generate": True, **given})
    assert text.startswith("predict_with_generate: ") and expected in text


def test_trls_name_of_kto_s_loss():
    given = cfg(stage="KTO", loss_type="apo_zero_unpaired")
    assert given.kto_loss_type == "apo_zero_unpaired" and given.loss_type == "sigmoid"
    assert any(note.startswith("loss_type: read as kto_loss_type, as stage: KTO means") for note in given.notes)
    assert load(None, [f"{k}={v}" for k, v in TRAIN.items()] + ["stage=kto", "loss_type=kto"]).kto_loss_type == "kto"


def test_formats_that_a_command_does_not_read_are_not_its_business():
    assert cfg(eval_dataset_path="e", eval_dataset_type="text", stage="DPO").stage == "DPO"
    assert cfg("eval", eval_dataset_path="e", train_dataset_type="text", stage="DPO").stage == "DPO"


def test_token_files_need_no_text_and_ask_for_stage_pt():
    given = {"train_dataset_path": None, "input_dir": "data/a"}
    guessed = cfg(**given)
    assert (guessed.dataset_type, guessed.stage) == ("pretrain", "PT") and unsupported(guessed) == []
    assert {note.partition(":")[0] for note in guessed.notes} == {"dataset_type", "stage"}
    cfg(**TOKENS, do_eval=True, evaluation_strategy="epoch")  # the split has documents for it
    assert load(None, {**TOKENS, "output_dir": "o", "model_name_or_path": "m"}, "eval").dataset_type == "pretrain"


def test_keys_of_the_other_kind_of_data_are_named():
    assert cfg(**TOKENS, packing=True, mix_strategy="interleave_over").notes == (
        "mix_strategy, packing: no effect: not read with dataset_type: pretrain",
    )
    assert cfg(input_dir="a", split="1,1").notes == (
        "input_dir, split: no effect: not read with dataset_type: iterable",
    )
    assert cfg(**TOKENS, packing=True, eval_dataset_path="e.jsonl", do_eval=True).notes == ()  # that text is packed


def test_a_check_names_the_place_of_its_key(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model_name_or_path: m\ntrain_dataset_path: a\noutput_dir: o\nmin_lr: 1\n")
    with pytest.raises(ConfigError, match=r"min_lr: 1 is more than learning_rate: 5e-05 \(.*x\.yaml:4\)"):
        load(str(path))


def test_shares_need_not_be_exact_and_do_not_matter_to_concat():
    three = {"train_dataset_path": "a,b,c", "max_steps": 1}
    cfg(**three, train_dataset_prob="0.33,0.33,0.33", mix_strategy="random")
    assert cfg(**three, train_dataset_prob="1,2,3").train_dataset_prob == (1.0, 2.0, 3.0)
    cfg(**three, eval_dataset_path="a,b", eval_dataset_prob="1,1", mix_strategy="interleave_under")


def test_each_command_needs_only_its_own_keys():
    assert load(None, {"model_name_or_path": "m"}, "chat").temperature == 0.95
    assert load(None, {"output_dir": "o"}, "export").format == "pt"
    evaluation = {"output_dir": "o", "eval_dataset_path": "e.jsonl", "do_train": False, "mix_strategy": "random"}
    assert load(None, evaluation, "eval").do_train is False
    with pytest.raises(ConfigError, match="eval_dataset_path: needed"):
        load(None, {"output_dir": "o"}, "eval")
    with pytest.raises(ConfigError, match="eval_output: needed"):
        load(None, {"model_name_or_path": "m", "eval_dataset_path": "e.jsonl"}, "eval")
    with pytest.raises(ConfigError, match="`chat` needs a model"):
        load(None, {"temperature": 0}, "chat")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"stage": "OCR-VL-SFT"}, "stage: OCR-VL-SFT (PaddleOCR-VL)"),
        ({"use_fp8": True}, "use_fp8: True (FP8 with scales of earlier steps"),
        ({"sep_parallel_degree": "4"}, "sep_parallel_degree: 4 (heads exchanged for tokens: context_parallel_degree"),
        ({"hidden_dropout_prob": 0.1}, "hidden_dropout_prob: 0.1 (dropout between layers)"),
        ({"data_filelist": "list.txt"}, "data_filelist: list.txt (pretraining data in HDF5"),
    ],
)
def test_what_this_version_cannot_do_is_refused_by_name(given, expected):
    asked = cfg(**given)  # loading alone does not refuse
    assert any(expected in line for line in unsupported(asked)), unsupported(asked)
    with pytest.raises(ConfigError, match="does not support"):
        require_supported(asked)


@pytest.mark.parametrize(
    "given",
    [
        {"tensor_parallel_degree": 1, "pipeline_parallel_degree": -1, "sharding": "stage1", "sequence_parallel": 1},
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": "0"},
        {"lora": False, "lora_rank": 32, "lora_alpha": -1},
        {"ckpt_quant_stage": "O0", "weight_quantize_algo": None, "freeze_config": ""},
        {"dataset_type": "map", "use_fp8": 0, "virtual_pp_degree": "1", "hf_hub_id": "None"},
    ],
)
def test_values_that_ask_for_nothing_are_not_refused(given):
    assert unsupported(cfg(**given)) == []


def test_refusals_are_of_the_command():
    given = {"tensor_parallel_degree": 8, "stage": "OCR-VL-SFT", "hf_hub_id": "me/model"}
    asked = cfg("export", **given)
    assert [line.partition(":")[0] for line in unsupported(asked, "export")] == ["hf_hub_id"]
    assert any(note.startswith("tensor_parallel_degree: no effect: `export`") for note in asked.notes)
    assert [line.partition(":")[0] for line in unsupported(asked, "train")] == ["stage"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"use_recompute_mtp": True}, "use_recompute_mtp: no effect: recompute is False"),
        ({"recompute": True, "use_recompute_moe": True}, "use_recompute_moe: no effect: recompute_granularity: full"),
        ({"recompute": True, "use_recompute_mtp": True}, "use_recompute_mtp: no effect: num_nextn_predict_layers"),
        ({"pipeline_schedule": "memory_efficient"}, "pipeline_schedule: no effect: pipeline_parallel_degree is 1"),
        ({"pp_seg_method": "balanced"}, "pp_seg_method: no effect: pipeline_parallel_degree is 1"),
        ({"elastic": True}, "elastic: no effect: max_restarts is 0"),
        ({"stage": "DPO", "simpo_gamma": 1.0}, "simpo_gamma: no effect: read only with loss_type: simpo"),
        ({"stage": "DPO", "dpop_lambda": 5.0}, "dpop_lambda: no effect: read only with loss_type: dpop"),
        ({"stage": "DPO", "loss_type": "orpo", "beta": 0.5}, "beta: no effect: loss_type: orpo has none"),
    ],
)
def test_keys_that_others_make_pointless_are_named(given, named):
    assert any(note.startswith(named) for note in cfg(**given).notes), cfg(**given).notes


def test_keys_that_work_are_not_named():
    given = {"recompute": True, "recompute_granularity": "core_attn", "use_recompute_moe": True, "max_restarts": 1}
    pipeline = {"pipeline_parallel_degree": 2, "virtual_pp_degree": 2, "pipeline_schedule": "memory_efficient"}
    assert cfg(**given, **pipeline, elastic=True).notes == ()


def test_every_key_without_effect_is_named_once_with_a_reason():
    given = {"fuse_rope": True, "lora_rank": 32, "unified_checkpoint": True, "port": 8188, "max_steps": 3}
    notes = [note for note in cfg(**given).notes if not note.startswith("defaults:")]
    assert sorted(note.partition(":")[0] for note in notes) == ["fuse_rope", "lora_rank", "port", "unified_checkpoint"]
    assert all(len(note.split(": no effect: ")[1]) > 10 for note in notes)


def test_a_log_directory_without_a_logger_is_said():
    assert any(note.startswith("logging_dir: no effect") for note in cfg(logging_dir="./vdl_log").notes)
    assert not cfg(logging_dir="./vdl_log", report_to="visualdl").notes


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"lora": True}, {"fine_tuning": "LoRA"}),
        ({"lora": False}, {"fine_tuning": "Full"}),
        ({"fine_tuning": "lora", "lora_target": ["q_proj", "v_proj"]}, {"lora_target_modules": ("q_proj", "v_proj")}),
        ({"lora": 1, "rslora_plus": True}, {"rslora": True, "lora_plus_scale": 4.0, "lora_alpha": 4.0}),
        ({"lora": 1, "rslora_plus": True, "lora_alpha": 9}, {"lora_plus_scale": 4.0, "lora_alpha": 9.0}),
    ],
)
def test_ways_to_ask_for_adapters(given: dict, expected: dict):
    asked = cfg(**given)
    assert {name: vars(asked)[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"compute_type": "wint8", "fine_tuning": "LoRA"}, "does not divide weights in 8 or 4 bits"),
        ({"compute_type": "bf16", "fp8": "blockwise"}, "does not divide the FP8 copies of weights (fp8: blockwise)"),
        ({"compute_type": "bf16", "qat": "w8a8"}, "is not built for the rounded weights of qat: w8a8"),
        ({"fine_tuning": "LoRA", "use_dora": True}, "does not shard the magnitudes of use_dora"),
    ],
)
def test_what_divided_weights_cannot_do(given: dict, expected: str):
    assert f"sharding: stage3 {expected}" in message(**{"sharding": "stage3"} | given)
    assert cfg(**{"sharding": "stage2"} | given).sharding == "stage2"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"continue_training": False}, "continue_training: fine_tuning: LoRA adapts trained weights"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers: 1: fine_tuning: LoRA does not train"),
        ({"use_dora": True, "tensor_parallel_degree": 2}, "use_dora: not with tensor_parallel_degree: 2"),
        ({"lora_rank": 0}, "lora_rank: must be at least 1"),
        ({"fine_tuning": "Full", "lora_path": "adapter"}, "lora_path: adapter with fine_tuning: Full"),
    ],
)
def test_what_adapters_cannot_do(given: dict, expected: str):
    assert expected in message(**{"fine_tuning": "LoRA"} | given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"compute_type": "nf4"}, "nf4"),
        ({"compute_type": "bf16", "weight_quantize_algo": "weight_only_mix"}, "wint4/8"),
        ({"weight_quantize_algo": "weight_only_int8", "quantization": "wint8"}, "wint8"),
        ({"compute_type": "wint4", "quantization": None}, "wint4"),
    ],
)
def test_ways_to_ask_for_a_base_in_few_bits(given: dict, expected: str):
    asked = cfg(fine_tuning="LoRA", **given)
    assert asked.compute_type == expected
    overruled = given.get("compute_type") == "bf16"
    assert any(note.startswith("compute_type: bf16") and "no effect" in note for note in asked.notes) == overruled


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"compute_type": "wint8"}, "fine_tuning: Full trains it: set fine_tuning: LoRA"),
        ({"quantization": "wint4"}, "fine_tuning: Full trains it: set fine_tuning: LoRA"),
        ({"compute_type": "nf4", "fine_tuning": "LoRA", "continue_training": False}, "adapts trained weights"),
        ({"weight_quantize_algo": "a4w4linear"}, "weight_quantize_algo: expected one of weight_only_int8"),
        ({"weight_quantize_algo": {"weight_only_int4": [".*"]}}, "weight_quantize_algo: expected one of"),
        ({"quantization": "wint8", "weight_quantize_algo": "nf4"}, "compute_type: given twice: "),
    ],
)
def test_a_base_in_few_bits_that_cannot_be(given: dict, expected: str):
    with pytest.raises(ConfigError, match=expected):
        cfg(**given)


def test_a_base_in_few_bits_is_used_without_lora():
    assert load(None, {"model_name_or_path": "m", "quantization": "wint4"}, "chat").compute_type == "wint4"


def test_values_that_ask_for_nothing():
    rule = Later("x", safe=(1, "o0"))
    off = (None, "", "none", 0, False, "False", "0.0", 1, "1", True, "O0", [])
    assert not any(rule.is_unsupported(value) for value in off)
    assert all(rule.is_unsupported(value) for value in (2, "2", 0.1, "stage2", [1]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"beta": 0.2}, ["beta: no effect: read only with stage: DPO, VL-DPO or KTO"]),
        ({"max_prompt_len": 9}, ["max_prompt_len: no effect: read only with stage: DPO, RM, RL or VL-RL"]),
        ({"stage": "DPO", "beta": 0.2}, []),
        ({"stage": "DPO", "num_nextn_predict_layers": 1}, ["num_nextn_predict_layers: no effect: stage DPO: prefer"]),
        (
            {"stage": "DPO", "reference_free": True, "ref_logps_cache": "x"},
            ["ref_logps_cache: no effect: loss_type: s"],
        ),
        ({"stage": "DPO", "loss_type": "simpo", "normalize_logps": True}, ["normalize_logps: no effect: loss_type: s"]),
        (
            {"stage": "DPO", "fine_tuning": "LoRA", "ref_model_update_steps": 5},
            ["ref_model_update_steps: no effect: the reference is the model without its adapter"],
        ),
        (
            {"stage": "DPO", "fine_tuning": "LoRA", "num_nextn_predict_layers": 1},
            ["num_nextn_predict_layers: no effect: stage DPO: prefer"],
        ),
        ({"stage": "DPO", "num_comparisons": 6}, ["num_comparisons: no effect: a record of preference data has two"]),
    ],
)
def test_preference_keys_that_do_nothing_are_said(given: dict, expected: list):
    notes = cfg(**given).notes
    assert len(notes) == len(expected)
    assert all(note.startswith(text) for note, text in zip(notes, expected, strict=True)), notes


@pytest.mark.parametrize(
    ("given", "scheme", "said"),
    [
        ({"compute_type": "fp8"}, "fp8_static", "compute_type: fp8: read as qat: fp8_static with compute_type: bf16"),
        (
            {"weight_quantize_algo": "fp8linear", "compute_type": "bf16"},
            "fp8_static",
            "where ERNIEKit keeps them in FP8",
        ),
        ({"weight_quantize_algo": "a8w8linear"}, "w8a8", "inputs have a scale for each token, where ERNIEKit has"),
        ({"weight_quantize_algo": "a8w4linear"}, "w4a8", "read as qat: w4a8 with compute_type: bf16"),
        ({"compute_type": "fp8", "qat": "fp8"}, "fp8", "read as qat: fp8 with compute_type: bf16"),
    ],
)
def test_erniekits_names_of_training_for_a_scheme(given, scheme, said):
    read = cfg(**given)
    assert (read.qat, read.compute_type) == (scheme, "bf16") and any(said in note for note in read.notes)
    assert not unsupported(read)


# What ERNIEKit's run_sft_fp8_8k.yaml and run_sft_fp8_32k.yaml give beside the keys of its other files.
ERNIEKIT_FP8 = {
    "compute_type": "fp8",
    "apply_hadamard": True,
    "hadamard_block_size": 32,
    "optim": "adamw_custom",
    "optim_shard_num": 8,
    "use_lowprecision_moment": True,
    "tensorwise_offload_optimizer": True,
    "unified_checkpoint_config": "ignore_merge_optimizer",
    "disable_ckpt_quant": True,
    "quant_input_grad": False,
    "quant_weight_grad": False,
    "apply_online_actscale_step": 200,
    "actscale_moving_rate": 0.01,
    "fp8_format_type": "hybrid",
}


def test_erniekits_fp8_files_are_read_whole():
    read = cfg(**ERNIEKIT_FP8)
    assert read.qat == "fp8_static" and read.apply_hadamard and read.moment_dtype == "bf16" and not unsupported(read)
    silent = {"apply_online_actscale_step", "actscale_moving_rate", "apply_hadamard", "hadamard_block_size"}
    assert not any(f"{name}: no effect" in note for name in silent for note in read.notes)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"qat": "w8a8", "compute_type": "wint4", "fine_tuning": "LoRA"}, "qat: w8a8: it trains 16-bit weights for"),
        ({"qat": "w8a8", "fp8": "blockwise"}, "qat: w8a8: not together with fp8: blockwise"),
        ({"qat": "w8a8", "fine_tuning": "LoRA", "use_dora": True}, "qat: w8a8: weights with a DoRA adapter"),
        ({"qat": "w8a8", "fine_tuning": "LoRA", "lora_dropout": 0.1}, "the adapter is quantised within the weights"),
        ({"qat": "fp8_static", "hadamard_block_size": 24}, "hadamard_block_size: 24 is not a power of two"),
        ({"qat": "w8a9"}, "qat: expected one of none, w8a8"),
        ({"qat_distill_weight": 1.5}, "qat_distill_weight: must be at least 0 and at most 1"),
    ],
)
def test_what_training_for_a_scheme_refuses(given, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)):
        cfg(**given)


def test_options_of_a_scheme_that_is_not_chosen_have_no_effect():
    assert (
        "apply_hadamard, quant_input_grad: no effect: qat is none"
        in cfg(apply_hadamard=True, quant_input_grad=True).notes
    )
    static = "apply_hadamard, actscale_moving_rate: no effect: read only with qat: fp8_static or w4a8"
    assert static in cfg(qat="w8a8", apply_hadamard=True, actscale_moving_rate=0.5).notes
