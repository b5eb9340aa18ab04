"""Another toolkit's switch on the command line (use_fp8_mlp=false) decides over what a file switched on."""

from pathlib import Path

import pytest

from erniekit.config import Config, load, unsupported
from erniekit.utils.errors import ConfigError

BASE = "model_name_or_path: m\ntrain_dataset_path: a.jsonl\noutput_dir: out\n"


def read(directory: Path, text: str, *words: str) -> Config:
    path = directory / "x.yaml"
    path.write_text(BASE + text, encoding="utf-8")
    return load(str(path), list(words))


@pytest.mark.parametrize(
    ("file", "word", "key", "value"),
    [
        ("use_fp8_mlp: true", "use_fp8_mlp=false", "fp8", "none"),
        ("fp8: blockwise", "use_fp8_mlp=false", "fp8", "none"),
        ("fp8: rowwise", "use_fp8_mlp=false", "fp8", "rowwise"),
        ("fp16: true", "fp16=false", "compute_type", "bf16"),
        ("compute_type: fp32", "fp16=false", "compute_type", "fp32"),
        ("lora: true", "lora=false", "fine_tuning", "Full"),
        ("fine_tuning: LoRA", "lora=0", "fine_tuning", "Full"),
        ("use_lowprecision_moment: 1", "use_lowprecision_moment=false", "moment_dtype", "fp32"),
        ("zcc_save_ema_coef: 0.9", "zcc_save_ema_coef=0", "ema_decay", None),
        ("ema_decay: 0.9", "zcc_save_ema_coef=0", "ema_decay", None),
        ("unified_checkpoint_config: async_save", "unified_checkpoint_config=x", "use_async_save", False),
        ("use_async_save: true", "unified_checkpoint_config=x", "use_async_save", True),
        ("fp8: blockwise\nshared_expert: true", "shared_expert=false", "fp8_modules", ("experts",)),
        ("fine_tuning: LoRA\nlora_target: q_proj", "lora_target=all", "lora_target_modules", ()),
        ("fine_tuning: LoRA\nlora_target_modules: q_proj", "lora_target=all", "lora_target_modules", ()),
    ],
)
def test_a_switch_that_is_off_takes_back_what_a_file_switched_on(tmp_path, file, word, key, value):
    assert vars(read(tmp_path, file, word))[key] == value


def test_what_is_taken_back_from_another_name_is_said(tmp_path):
    said = [note for note in read(tmp_path, "fp8: blockwise", "use_fp8_mlp=false").notes if note.startswith("fp8: ")]
    assert len(said) == 1 and said[0].endswith("no effect: use_fp8_mlp: False (command line) decides")
    assert not [note for note in read(tmp_path, "use_fp8_mlp: true", "use_fp8_mlp=false").notes if "decides" in note]


def test_in_one_file_the_key_decides_over_a_switch_that_is_off(tmp_path):
    cfg = read(tmp_path, "fine_tuning: LoRA\nlora: false")
    assert cfg.fine_tuning == "LoRA"
    assert next(note for note in cfg.notes if note.startswith("lora: False")).endswith("fine_tuning: LoRA decides")
    assert not [note for note in read(tmp_path, "compute_type: bf16\nfp16: false").notes if note.startswith("fp16")]


def test_the_command_line_may_replace_a_value_that_is_refused(tmp_path):
    """ERNIEKit's file of PaddleOCR has use_pic_id: False."""
    assert unsupported(read(tmp_path, "stage: VL-SFT\nuse_pic_id: False", "use_pic_id=true")) == []
    with pytest.raises(ConfigError, match="use_pic_id: False: the chat template"):
        read(tmp_path, "stage: VL-SFT\nuse_pic_id: true", "use_pic_id=False")
