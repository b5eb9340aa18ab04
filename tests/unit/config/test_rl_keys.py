"""Keys of stage RL: presets, TRL's names, what is refused, and what is warned of."""

import pytest

from erniekit.config import load
from erniekit.config.schema import Config
from erniekit.config.schema_rl import PRESETS
from erniekit.utils.errors import ConfigError

NEEDED = {
    "stage": "RL",
    "model_name_or_path": "x",
    "output_dir": "o",
    "train_dataset_path": "d",
    "reward_funcs": "exact",
}


def cfg(**given: object) -> Config:
    return load(None, NEEDED | given)


@pytest.mark.parametrize("name", PRESETS)
def test_an_algorithm_is_a_set_of_defaults(name: str):
    made = cfg(rl_algorithm=name)
    assert {key: vars(made)[key] for key in PRESETS[name]} == PRESETS[name]
    assert cfg(rl_algorithm=name, epsilon=0.11).epsilon == 0.11


def test_defaults_of_the_method():
    made = cfg()
    assert (made.learning_rate, made.temperature, made.top_p, made.moe_aux_loss_lambda) == (1e-6, 1.0, 1.0, 0.0)
    assert (made.rl_loss_type, made.epsilon, made.epsilon_high) == ("gspo", 3e-4, 4e-4)
    assert cfg(temperature=0.9, learning_rate=2e-6).temperature == 0.9
    assert load(None, NEEDED | {"stage": "SFT"}).learning_rate == 5e-5


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_length_of_new_tokens_bounds_the_completions(command: str, tmp_path):
    given = NEEDED | {"eval_dataset_path": "d", "max_new_tokens": 16}
    made = load(None, given, command)
    assert made.max_completion_length == 16
    assert "max_completion_length: not given, so 16, because max_new_tokens is" in made.notes
    (tmp_path / "config.yaml").write_text(cfg().to_yaml())
    saved = load(str(tmp_path / "config.yaml"), {"eval_dataset_path": "d", "max_new_tokens": 16}, command)
    assert saved.max_completion_length == 512 and any(
        note.startswith("max_new_tokens: no effect: max_completion_length bounds") for note in saved.notes
    )
    mmlu = {"eval_benchmark": "mmlu", "eval_benchmark_path": "d"}
    assert load(None, given | mmlu, "eval").max_completion_length == 512


def test_a_saved_configuration_is_read_as_it_was(tmp_path):
    made = cfg(beta=0.04, rl_algorithm="dapo")
    (tmp_path / "config.yaml").write_text(made.to_yaml())
    again = load(str(tmp_path / "config.yaml"))
    assert again.kl_coef == made.kl_coef == 0.04 and again.beta == made.beta
    assert again == made


def test_names_of_trl_are_read_where_they_are_typed():
    made = cfg(beta=0.04, loss_type="dapo", max_prompt_length=99, use_bias_correction_kl=False)
    assert (made.kl_coef, made.rl_loss_type, made.max_prompt_len, made.kl_bias_correction) == (0.04, "dapo", 99, False)
    assert made.beta == 0.1 and made.loss_type == "sigmoid"
    assert sum("TRL's name" in note for note in made.notes) == 4
    assert load(None, NEEDED | {"stage": "DPO", "beta": 0.04}).beta == 0.04
    both = cfg(beta=0.04, kl_coef=0.1)
    assert both.kl_coef == 0.1 and any(note.startswith("beta: no effect") for note in both.notes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss_type": "sigmoid"}, r"rl_loss_type: expected one of grpo, bnpo.*\(.*, written loss_type\)"),
        ({"loss_type": "grpo", "rl_loss_type": "dapo"}, r"given twice: .*: grpo \(.*, written loss_type\)"),
        ({"max_prompt_length": 8, "max_prompt_len": 20}, "max_prompt_len: given twice: "),
        (
            {"emulate_precision": True},
            "a CPU cannot generate with bf16 .* rollout_dtype: bf16",
        ),
        ({"matmul_precision": "bf16"}, "matmul_precision: bf16: a CPU generates in fp32, so stage: RL would train"),
        ({"num_generations": 1}, "num_generations: must be at least 2"),
        ({"temperature": 0}, "temperature: 0 gives the same completion every time"),
        ({"temperature": 1e-40}, "temperature: 1e-40 is below 0.001: it divides the logits"),
        (
            {"difficulty_metric": "exacd"},
            "difficulty_metric: exacd: none of reward_funcs has this name. Choose from exact",
        ),
        ({"steps_per_generation": 3}, "use one of 1, 2, 4, 8, 16, or rollout_batch_size: 18"),
        ({"max_completion_length": 4096, "max_seq_len": 4096}, "leaves no room for a prompt"),
        ({"delta": 1.1, "rl_algorithm": "grpo"}, "delta: 1.1 must be more than 1 \\+ epsilon_high \\(1.2\\)"),
        ({"icepop_alpha": 1.5}, "the range has to hold 1"),
        ({"sync_ref_model": True}, "there is no reference"),
        ({"sync_ref_model": True, "kl_coef": 0.1, "fine_tuning": "LoRA"}, "model without its adapter"),
        ({"kl_in_reward": True}, "kl_coef: needed with kl_in_reward"),
        ({"upo_weight": 0.1, "batch_size": 12}, "use a multiple of num_generations, such as 8"),
        ({"soft_max_length": 600}, "no completion would reach it"),
        ({"soft_cache_length": 10}, "soft_max_length: needed"),
        ({"reward_funcs": "acuracy"}, "there is no such function"),
        ({"rl_stages": "1,2"}, "rl_stages: 2 entries for 1 data set"),
    ],
)
def test_what_cannot_work_is_refused(given: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        cfg(**given)


@pytest.mark.parametrize(
    ("given", "warning"),
    [
        ({"epsilon": 0.2}, "epsilon: 0.2 clips next to nothing"),
        ({"rl_algorithm": "grpo", "importance_sampling_level": "sequence"}, "epsilon: 0.2 clips next to nothing"),
        ({"top_p": 0.9, "repetition_penalty": 1.1}, "top_p: 0.9, repetition_penalty: 1.1: completions are drawn from"),
        ({"attention_probs_dropout_prob": 0.1}, "with dropout the policy that is trained"),
    ],
)
def test_what_is_rarely_meant_is_warned_of(given: dict, warning: str):
    assert any(note.startswith(warning) or warning in note for note in cfg(**given).notes)


def test_what_has_no_effect_is_said():
    notes = cfg(gradient_accumulation_steps=4, packing=True, kl_estimator="k1", mis_cap=4.0, epsilon_high=0.3).notes
    text = "\n".join(notes)
    for key in ("gradient_accumulation_steps", "packing", "kl_estimator", "mis_cap"):
        assert f"{key}" in text, key
    assert "epsilon_high" not in text
    notes = cfg(rl_algorithm="cispo", delta=5.0).notes  # its range is not that of a delta that has an effect
    assert any(note.startswith("delta: no effect") for note in notes)
    other = load(None, NEEDED | {"stage": "SFT", "num_generations": 4, "temperature": 0.5}).notes
    assert any("num_generations" in note and "stage: RL" in note for note in other)
    assert any(note.startswith("temperature: no effect") for note in other)


@pytest.mark.parametrize("temperature", [0, 1e-40])
def test_a_temperature_that_divides_the_logits_of_a_teacher_has_a_least_value(temperature: float):
    given = {"stage": "GKD", "teacher_model_name_or_path": "t", "temperature": temperature}
    with pytest.raises(ConfigError, match=r"temperature: .* divides the logits of both models.* at least 0\.001"):
        load(None, {name: value for name, value in NEEDED.items() if name != "reward_funcs"} | given)


def test_who_generates_while_training_does_so_in_fp32_on_a_cpu():
    distilled = NEEDED | {"stage": "GKD", "teacher_model_name_or_path": "t", "emulate_precision": True}
    with pytest.raises(ConfigError, match="a CPU cannot generate with bf16 weights, as stage: GKD does"):
        load(None, distilled)
    load(None, distilled | {"lmbda": 0})
    load(None, distilled | {"fp8": "blockwise"})  # which a GPU emulates, and it generates in bf16


def test_a_job_that_shrinks_does_not_grow_its_batch():
    growing = NEEDED | {"stage": "SFT", "gradient_accumulation_steps": 4, "batch_size_warmup_steps": 3}
    with pytest.raises(ConfigError, match="elastic: not with batch_size_warmup_steps: 3"):
        load(None, growing | {"elastic": True, "max_restarts": 1})


def test_a_job_that_shrinks_keeps_the_turns_of_pictures_and_text():
    """A turn of modality_interleave: acc, the default, has as many rows as the data ranks have in a microbatch."""
    elastic = NEEDED | {"stage": "VL-SFT", "text_dataset_path": "t.jsonl", "elastic": True, "max_restarts": 1}
    with pytest.raises(ConfigError, match="elastic: not with modality_interleave: acc"):
        load(None, elastic)
    for interleave in ("batch", "mixed"):
        load(None, elastic | {"modality_interleave": interleave})
