"""An unknown key is answered with our name for it, or with nothing, but never with an unrelated key."""

import pytest

from erniekit.config import checks, dialects, load, schema, synonyms, value_synonyms
from erniekit.config.compat_keys import RULES
from erniekit.utils.errors import ConfigError

KNOWN = [*schema.fields(), *RULES]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pref_beta", "did you mean beta?"),
        ("deepspeed", "sharding: stage1, stage2 or stage3"),
        ("router_z_loss_coef", "did you mean moe_z_loss_lambda?"),
        ("lr", "did you mean learning_rate?"),
        ("val_size", "eval_dataset_path"),
        ("dataset", "did you mean train_dataset_path?"),
        ("cutoff_len", "did you mean max_seq_len?"),
        ("finetuning_type", "fine_tuning takes Full or LoRA"),
        ("flash_attn", "remove it"),
        ("gradient_checkpointing", "did you mean recompute?"),
        ("num_epochs", "did you mean num_train_epochs?"),
        ("resume", "did you mean resume_from_checkpoint?"),
        ("adapter_name_or_path", "did you mean lora_path?"),
        ("quantization_bit", "compute_type: wint8"),
        ("lerning_rate", "did you mean learning_rate?"),
        ("image_max_pixels", "did you mean max_pixels?"),
        ("max_pixel", "did you mean max_pixels?"),
        ("freeze_vision_tower", "freeze_config: freeze_vision"),
        ("learning-rate", "did you mean learning_rate?"),
        ("Max_Steps", "did you mean max_steps?"),
        ("cutof_len", "did you mean max_seq_len?"),
        ("export_dir", "`erniekit export` writes to export/ in output_dir"),
        ("pure_bf16", "compute_type takes bf16, fp16 or fp32"),
        ("n_shot", "did you mean num_fewshot?"),
        ("task", "eval_benchmark takes mmlu, ceval or cmmlu"),
        ("galore_target", "optim takes"),
        ("oft_block_size", "adapters are LoRA"),
        ("swanlab_api_key", "SWANLAB_API_KEY"),
        ("export_quantization_nsamples", "did you mean quantization_calibration_samples?"),
    ],
)
def test_hints(name: str, expected: str):
    with pytest.raises(ConfigError, match="unknown key; ") as caught:
        load(None, {name: 1}, "version")
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["vision_tower", "my_own_key", "pref_bco_weight", "vllm_config", "x", "infer_backend"])
def test_no_hint_is_better_than_a_wrong_one(name: str):
    assert synonyms.hint(name, KNOWN) == ""


def test_the_table_names_only_keys_that_are_there_and_no_key_is_in_it():
    assert set(synonyms.same().values()) <= set(schema.fields())
    assert not synonyms.table().keys() & set(KNOWN)


@pytest.mark.parametrize("name", sorted(synonyms.same()))
def test_what_a_hint_says_is_taken(name: str):
    assert synonyms.same()[name] in synonyms.hint(name, KNOWN)


def test_a_file_of_llama_factory_is_sent_to_its_page():
    with pytest.raises(ConfigError) as caught:
        load(None, {"finetuning_type": "lora", "cutoff_len": 2048})
    assert "looks like one of LLaMA-Factory's (it has finetuning_type and cutoff_len)" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load(None, {"cutoff_len": 2048})
    assert "LLaMA-Factory" not in str(caught.value)
    assert dialects.advice(["a", "b"]) == ""


def test_a_bare_no_is_not_another_word_for_no():
    assert not [note for note in load(None, ["save_strategy=no"], "version").notes if note.startswith("save_strategy")]
    assert load(None, ["save_strategy=False"], "version").notes[0].startswith("save_strategy: False: read as no")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("stage=ppo", "got 'ppo'; stage: RL with rl_algorithm: ppo"),
        ("stage=orpo", "got 'orpo'; stage: DPO with loss_type: orpo"),
        ("loss_type=dpo", "got 'dpo'; DPO's loss is sigmoid"),
        ("loss_type=apo_zero_unpaired", "stage: KTO, with kto_loss_type: apo_zero_unpaired"),
        ("kto_loss_type=apo_zero", "judged answers have apo_zero_unpaired"),
        ("scale_rewards=true", "got 'true'; TRL's true is group"),
        ("optim=adamw_torch", "got 'adamw_torch'; it is adamw"),
        ("optim=adamw_8bit", "it is adamw with moment_dtype: 8bit"),
        ("lr_scheduler_type=cosine_with_min_lr", "got 'cosine_with_min_lr'; it is cosine, which ends at min_lr"),
        ("fp8=true", "got 'true'; a recipe is named, such as blockwise"),
        ("freeze_config=freeze_vision,freeze_aligner", "got 'freeze_aligner'; frozen_parameters: resampler leaves"),
        ("loss_type=sigmoyd", "did you mean sigmoid?"),
    ],
)
def test_values_of_other_toolkits_are_named(given: str, said: str):
    with pytest.raises(ConfigError) as error:
        load(None, [given])
    assert said in str(error.value)


@pytest.mark.parametrize("given", ["loss_type=cpo", "loss_type=aot", "loss_type=bco_pair", "rl_loss_type=sapo"])
def test_another_method_is_no_typo(given: str):
    with pytest.raises(ConfigError, match="expected one of") as error:
        load(None, [given])
    assert "did you mean" not in str(error.value)


def test_each_value_of_other_toolkits_belongs_to_a_key_and_is_none_here():
    fields = schema.fields()
    for key, values in value_synonyms.table().items():
        choices = {choice.lower() for choice in fields[key].metadata["choices"] or checks.SCHEDULES}
        assert choices and not choices & set(values), key


def test_a_cache_of_encoded_data_is_not_taken_for_a_tokenizer():
    with pytest.raises(ConfigError, match=r"tokenized_path: unknown key; remove it: .*`erniekit tokenize`"):
        load(None, ["tokenized_path=x"])


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ({"compute_type": "wint8"}, "or compute_type: bf16 (overrides)"),
        ({"quantization": "wint8"}, "or compute_type: bf16 (overrides, compute_type is written quantization)"),
        ({"weight_quantize_algo": "weight_only_int8"}, "(overrides, compute_type is written weight_quantize_algo)"),
        (
            {"fine_tuning": "LoRA", "fp8": "blockwise", "quantization": "wint8"},
            "Set compute_type: bf16, or fp8: none (overrides, compute_type is written quantization)",
        ),
        ({"per_device_train_batch_size": 4, "max_step": 1}, "did you mean max_steps? (overrides)"),
    ],
)
def test_a_problem_names_the_keys_that_the_user_wrote(given: dict, end: str):
    """A cure such as compute_type: bf16 does not help beside another name of the key, which is to be changed."""
    with pytest.raises(ConfigError) as caught:
        load(None, {"model_name_or_path": "m", "train_dataset_path": "t.jsonl", "output_dir": "o", **given})
    assert str(caught.value).endswith(end)
