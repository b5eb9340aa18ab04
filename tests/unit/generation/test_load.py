"""Which model a command takes: checkpoint, else what output_dir holds, else model_name_or_path."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from support.tiny_directories import DEMO_MODEL, model_directory

from erniekit.build import load_model
from erniekit.checkpoint.peft_attach import save_adapter
from erniekit.config import Config, load
from erniekit.generation.generate import generate
from erniekit.generation.load import open_model
from erniekit.lora import LoraOptions, attach, state_of
from erniekit.utils.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("base"))


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("erniekit"), "propagate", True)
    return caplog


def settings(**keys: object) -> Config:
    return load(None, {"compute_type": "fp32"} | {name: str(value) for name, value in keys.items()}, command="chat")


def test_the_run_comes_before_the_model_it_started_from(base: Path, tmp_path: Path, heard: pytest.LogCaptureFixture):
    output = tmp_path / "output"
    assert open_model(settings(model_name_or_path=base, output_dir=output)).path == base
    assert f"output_dir: {output} holds no model yet" in heard.text
    newest = model_directory(output / "checkpoint-20")
    model_directory(output / "checkpoint-3")
    assert open_model(settings(model_name_or_path=base, output_dir=output)).path == newest
    model_directory(output)
    assert open_model(settings(model_name_or_path=base, output_dir=output)).path == output
    chosen = settings(model_name_or_path=base, output_dir=output, checkpoint=output / "checkpoint-3")
    assert open_model(chosen).path == output / "checkpoint-3"


def test_a_checkpoint_without_tokenizer_takes_that_of_the_model(
    base: Path, tmp_path: Path, heard: pytest.LogCaptureFixture
):
    bare = model_directory(tmp_path / "bare")
    for file in bare.glob("*tokenizer*"):
        file.unlink()
    opened = open_model(settings(model_name_or_path=base, checkpoint=bare))
    assert opened.path == bare and opened.tokenizer.directory == base
    assert f"{bare} has no tokenizer" in heard.text
    with pytest.raises(CheckpointError, match="tokenizer"):
        open_model(settings(checkpoint=bare))


def test_answers_end_at_the_ends_of_template_and_model(tmp_path: Path):
    several = model_directory(tmp_path / "several", eos_token_id=[2, 77])
    cfg = settings(model_name_or_path=several, max_new_tokens=9, min_tokens=3)
    opened = open_model(cfg)
    limits = opened.limits(cfg)
    assert {2, 77, opened.tokenizer.token_id("<|end_of_sentence|>")} == set(limits.stop_ids)
    assert (limits.max_new_tokens, limits.min_new_tokens) == (9, 3)


def test_end_tokens_and_settings_of_generation_config(base: Path, tmp_path: Path, heard: pytest.LogCaptureFixture):
    several = Path(shutil.copytree(base, tmp_path / "several"))
    content = {"eos_token_id": [2, 78], "temperature": 0.8, "top_p": 0.7, "no_repeat_ngram_size": 3, "do_sample": True}
    (several / "generation_config.json").write_text(json.dumps(content))
    cfg = settings(model_name_or_path=several, temperature=0.5)
    opened = open_model(cfg)
    assert {2, 78, opened.tokenizer.token_id("<|end_of_sentence|>")} == set(opened.limits(cfg).stop_ids)
    line = f"{several}/generation_config.json: no_repeat_ngram_size 3, temperature 0.8: not used"
    assert heard.text.count(line) == 1
    greedy = settings(model_name_or_path=several, temperature=0)
    opened.limits(greedy)
    assert "generation_config.json: do_sample True, no_repeat_ngram_size 3: not used" in heard.text


def test_an_answer_stops_at_a_second_end_token(base: Path, tmp_path: Path):
    several = Path(shutil.copytree(base, tmp_path / "several"))
    prompt = [[5, 6, 7]]
    whole = generate(load_model(base), prompt, max_new_tokens=8).numpy()[0, 3:].tolist()
    assert len(whole) == 8
    (several / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, whole[2]]}))
    stopped = generate(load_model(several), prompt, max_new_tokens=8).numpy()[0, 3:].tolist()
    assert stopped == whole[: whole.index(whole[2]) + 1]


def test_an_adapter_does_not_decide_what_is_asked_of_a_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the network"))
    model = load_model(base)
    attach(model, LoraOptions(rank=2))
    state_of(model).base = "stranger/model"
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"model_name_or_path: .*'stranger/model', which is not a directory here"):
        open_model(settings(checkpoint=tmp_path / "adapter"))
    opened = open_model(settings(checkpoint=tmp_path / "adapter", model_name_or_path=base))
    assert opened.path == tmp_path / "adapter"


def test_thinking_that_the_template_does_not_know_is_said_once(base: Path, heard: pytest.LogCaptureFixture):
    opened = open_model(settings(model_name_or_path=base, enable_thinking=True))
    assert opened.enable_thinking is None
    assert heard.text.count("enable_thinking: True: no effect") == 1


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path):
    small = model_directory(tmp_path / "small")
    other = model_directory(tmp_path / "other", weights=False)
    text = (other / "config.json").read_text(encoding="utf-8")
    (other / "config.json").write_text(text.replace('"vocab_size": 576', '"vocab_size": 500'), encoding="utf-8")
    assert open_model(settings(model_name_or_path=small)).path == small
    cfg = settings(model_name_or_path=other, continue_training=False)
    with pytest.raises(CheckpointError, match="vocab_size is 500"):
        open_model(cfg)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"checkpoint": "nowhere"}, "checkpoint: there is no directory"),
        ({"output_dir": "nowhere"}, "No valid checkpoint"),
        ({"model_name_or_path": "nowhere"}, "model_name_or_path"),
        ({"model_name_or_path": str(Path(__file__).parent)}, "config.json"),
        ({"model_name_or_path": str(DEMO_MODEL)}, "no weights"),
    ],
)
def test_what_cannot_be_is_said(keys: dict[str, object], message: str):
    with pytest.raises((CheckpointError, ConfigError), match=message):
        open_model(settings(**keys))
