"""An exported directory is a model that others load."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from erniekit import config
from erniekit.build import load_model
from erniekit.checkpoint.model_files import model_files
from erniekit.checkpoint.model_io import save_model
from erniekit.export import export as module
from erniekit.export.export import export, export_checkpoint
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.weights import export_tensors
from erniekit.utils.errors import CheckpointError, ConfigError

MODELS = Path(__file__).resolve().parents[3] / "examples" / "models"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def trained(directory, name, **changes):
    """A checkpoint as a run leaves it, of an untrained tiny model with visible weights."""
    paddle.seed(3)
    config = ModelConfig.from_dir(MODELS / name)
    model = CausalLM(dataclasses.replace(config, initializer_range=0.1, **changes))
    model.eval()
    for file in ("generation_config.json", *TOKENIZER):
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(MODELS / name / file, directory / file)
    save_model(model, directory)
    return model


def load(overrides):
    return config.load(None, overrides, "export")


def test_the_newest_checkpoint_of_a_run(tmp_path):
    model = trained(tmp_path / "checkpoint-12", "tiny-moe")
    report = export(load({"output_dir": str(tmp_path), "max_shard_size": 0.001}))
    assert report.num_files > 1
    out = tmp_path / "export"
    for name in ("config.json", "generation_config.json", "chat_template.jinja", *TOKENIZER):
        assert (out / name).is_file()
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 64
    again = dict(export_tensors(load_model(out)))
    for name, value in export_tensors(model):
        np.testing.assert_array_equal(again[name], value)


@pytest.mark.parametrize("quantised", [{}, {"quantization": "wint8"}])
def test_a_checkpoint_that_is_not_there(tmp_path, quantised):
    with pytest.raises(CheckpointError, match="checkpoint: there is no directory 'nowhere'"):
        export(load({"output_dir": str(tmp_path), "checkpoint": "nowhere"} | quantised))


def test_a_checkpoint_may_be_a_run_as_in_eval(tmp_path):
    trained(tmp_path / "run" / "checkpoint-12", "tiny-moe")
    export(load({"output_dir": str(tmp_path / "out"), "checkpoint": str(tmp_path / "run")}))
    assert (tmp_path / "out" / "export" / "model.safetensors").is_file()


def test_a_lora_path_that_is_no_adapter_is_refused(tmp_path):
    """A whole model would be exported without a word, and without any adapter."""
    trained(tmp_path / "model", "tiny-moe")
    with pytest.raises(CheckpointError, match=r"lora_path: .*model holds no adapter"):
        export(load({"output_dir": str(tmp_path / "out"), "lora_path": str(tmp_path / "model")}))
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"holds no adapter .*adapter_model.bin is PEFT's older form"):
        export(load({"output_dir": str(tmp_path / "out"), "lora_path": str(tmp_path / "older")}))


@pytest.mark.parametrize("key", ["checkpoint", "output_dir"])
def test_a_lora_path_beside_a_whole_model_is_said_to_have_no_effect(tmp_path, caplog, key):
    trained(tmp_path / "model", "tiny-dense")
    keys = {"output_dir": str(tmp_path / "out"), "lora_path": "adapter", key: str(tmp_path / "model")}
    export(load(keys))
    assert model_files(load(keys)).path == tmp_path / "model"  # eval, chat and server
    verb = "names" if key == "checkpoint" else "holds"
    said = f"lora_path: adapter is not applied, since {key} {verb} a whole model, {tmp_path / 'model'}. To apply"
    assert caplog.text.count(said) == 1


def test_layout_dtype_and_template_can_be_chosen(tmp_path):
    trained(tmp_path / "run", "tiny-dense")
    export(load({"output_dir": str(tmp_path / "out"), "checkpoint": str(tmp_path / "run"), "format": "paddle"}))
    config = json.loads((tmp_path / "out" / "export" / "config.json").read_text())
    assert config["architectures"] == ["Ernie4_5_ForCausalLM"] and config["dtype"] == "float32"
    export_checkpoint(tmp_path / "run", tmp_path / "b", dtype="bfloat16", chat_template="thinking")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    thinking = (tmp_path / "b" / "chat_template.jinja").read_text()
    assert thinking != (tmp_path / "out" / "export" / "chat_template.jinja").read_text()
    # A checkpoint's own template wins over the built-in ones.
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    export_checkpoint(tmp_path / "b", tmp_path / "c")
    assert (tmp_path / "c" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_without_a_tokenizer(tmp_path, monkeypatch):
    trained(tmp_path / "run", "tiny-dense")
    export_checkpoint(tmp_path / "run", tmp_path / "a", copy_tokenizer=False)
    names = {file.name for file in (tmp_path / "a").iterdir() if not file.name.startswith(".")}
    assert names == {"model.safetensors", "config.json", "generation_config.json"}
    said = []
    monkeypatch.setattr(module.log, "warning", said.append)
    export_checkpoint(tmp_path / "a", tmp_path / "b")
    assert len(said) == 1 and "no tokenizer" in said[0]


def test_refusals(tmp_path):
    with pytest.raises(CheckpointError, match="No valid checkpoint found in"):
        export(load({"output_dir": str(tmp_path)}))
    with pytest.raises(ConfigError, match="output_dir"):
        export(load({"format": "pt"}))
    with pytest.raises(CheckpointError, match="same directory"):
        export_checkpoint(tmp_path, tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "changes"),
    [("tiny-dense", {}), ("tiny-moe", {}), ("tiny-moe", {"tie_word_embeddings": False, "num_nextn_predict_layers": 1})],
)
def test_transformers_loads_it_and_computes_the_same(name, changes, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = trained(tmp_path / "run", name, **changes)
    export_checkpoint(tmp_path / "run", tmp_path / "paddle", format="paddle")
    export_checkpoint(tmp_path / "paddle", tmp_path / "pt", format="pt", max_shard_size="1MB")

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "pt")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pt", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin_of_sentence|>User: What is the capital of France?\nAssistant: "
    ids = tokenizer(text, add_special_tokens=False, return_tensors="np")["input_ids"]
    with torch.no_grad(), paddle.no_grad():
        expected = theirs.eval()(torch.from_numpy(ids)).logits.numpy()
        logits = model(paddle.to_tensor(ids)).numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-5)


def test_degrees_of_the_yaml_change_nothing_and_are_named(tmp_path, caplog):
    """One process streams tensor by tensor (test_merge.py and test_convert.py bound its memory)."""
    trained(tmp_path / "checkpoint-1", "tiny-dense")
    cfg = load({"output_dir": str(tmp_path), "tensor_parallel_degree": 8, "pipeline_parallel_degree": 4})
    streams = "`export` streams tensor by tensor in one process and needs no parallel degrees"
    assert any(note.startswith("tensor_parallel_degree") and streams in note for note in cfg.notes)
    assert export(cfg).num_files == 1
