"""A block with PEFT's names."""

from pathlib import Path

import pytest

from erniekit.config import Config, load
from erniekit.config.peft_keys import BLOCKS
from erniekit.utils.errors import ConfigError

BLOCK = """
fine_tuning: LoRA
{name}:
  r: 16
  lora_alpha: 32
  lora_dropout: 0.05
  target_modules: [q_proj, v_proj]
  modules_to_save: [embed_tokens]
  bias: none
  use_rslora: True
  use_dora: False
  task_type: CAUSAL_LM
  rank_pattern: {{}}
  alpha_pattern: null
  init_lora_weights: True
  inference_mode: False
"""


def read(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return load(str(path), None, "version")


@pytest.mark.parametrize("name", BLOCKS)
def test_the_names_of_peft_mean_what_they_mean_there(tmp_path: Path, name: str):
    cfg = read(tmp_path, BLOCK.format(name=name))
    assert (cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.rslora) == (16, 32.0, 0.05, True)
    assert (cfg.lora_target_modules, cfg.modules_to_save) == (("q_proj", "v_proj"), ("embed_tokens",))
    assert not cfg.extras


def test_they_mean_it_nowhere_else(tmp_path: Path):
    for text in ("r: 8\n", "training_args: {r: 8}\n", "bias: none\n", "rank_pattern: {}\n"):
        with pytest.raises(ConfigError, match="unknown key"):
            read(tmp_path, text)
    with pytest.raises(ConfigError, match=r"r: unknown key; did you mean lora_rank\?"):
        load(None, ["r=8"], "version")


def test_an_override_in_the_block(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("lora_config: {r: 4}\n")
    assert load(str(path), ["lora_config.r=8"], "version").lora_rank == 8
    assert load(str(path), ["lora_rank=8"], "version").lora_rank == 8


def test_a_contradiction_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"lora_rank: given twice: r: 4 .* and lora_rank: 8"):
        read(tmp_path, "lora_config:\n  r: 4\nlora_rank: 8\n")


@pytest.mark.parametrize("value", ["all-linear", "all"])
def test_all_modules_are_the_default(tmp_path: Path, value: str):
    assert read(tmp_path, f"lora_config: {{target_modules: {value}}}\n").lora_target_modules == ()
    assert load(None, [f"lora_target={value}"], "version").lora_target_modules == ()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("bias: all", "bias: all: adapters train no biases; only bias: none"),
        ("rank_pattern: {q_proj: 4}", "rank_pattern: {'q_proj': 4}: all adapters have the same rank"),
        ("alpha_pattern: {q_proj: 4}", "alpha_pattern"),
        ("layers_to_transform: [1]", "layers_to_transform: [1]"),
        ("init_lora_weights: pissa", "init_lora_weights: pissa"),
        ("peft_type: LOHA", "peft_type: LOHA: only LoRA"),
        ("task_type: SEQ_CLS", "task_type: SEQ_CLS"),
        ("loftq_config: {bits: 4}", "bits: unknown key"),
        ("target_module: [q_proj]", "target_module: unknown key; did you mean lora_target_modules?"),
    ],
)
def test_what_is_not_built_is_refused_with_its_line(tmp_path: Path, line: str, expected: str):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"lora_config:\n  {line}\n")
    assert expected in str(caught.value) and "x.yaml:2" in str(caught.value)
