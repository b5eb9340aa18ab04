"""The chat template that a run trained with lies beside what it saved, and is the one that is used from there."""

import json
from pathlib import Path
from typing import Any

import pytest

import erniekit
from erniekit import config
from erniekit.data.chat.template import load_template
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.export.convert import convert
from erniekit.export.export import export
from erniekit.export.split import split
from erniekit.generation.load import open_model
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights

OWN = (
    "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}"
    "{{ '<|im_end|>' if m.role == 'assistant' else '\\n' }}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
QUESTION = [{"role": "user", "content": "1 + 1?"}]


@pytest.fixture
def own(workspace: Path) -> Path:
    """A template of the user's; the base model has another, inside tokenizer_config.json."""
    path = workspace / "own.jinja"
    path.write_text(OWN)
    base = CausalLM(ModelConfig.from_dir(workspace / "dense"))
    init_weights(base, 5)
    erniekit.save_model(base, workspace / "dense")
    settings = workspace / "dense" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "of the base"}))
    return path


def keys(workspace: Path, **more: Any) -> dict[str, Any]:
    return {"max_steps": 2, "save_steps": 1, "continue_training": True, "output_dir": str(workspace / "out")} | more


def load(workspace: Path, command: str, **more: Any) -> config.Config:
    given = {"output_dir": str(workspace / "out"), "continue_training": True} | more
    return config.load(str(workspace / "run.yaml"), given, command=command)


@pytest.mark.parametrize("tuning", ["Full", "LoRA"])
def test_it_lies_beside_all_that_is_saved_and_is_used(workspace: Path, own: Path, tuning: str) -> None:
    erniekit.train(str(workspace / "run.yaml"), **keys(workspace, chat_template=str(own), fine_tuning=tuning))
    out = workspace / "out"
    for directory in (out, out / "checkpoint-1", out / "checkpoint-2"):
        assert (directory / "chat_template.jinja").read_text() == OWN
        assert "chat_template" not in json.loads((directory / "tokenizer_config.json").read_text())
        assert load_template(load_tokenizer(directory)).render(QUESTION) == "Q: 1 + 1?\n"
    opened = open_model(load(workspace, "chat"))
    assert opened.template.source == OWN and "out/chat_template.jinja" in opened.template.name
    export(load(workspace, "export"))
    written = [out / "export"]
    if tuning == "Full":
        split(load(workspace, "split"))
        convert(out / "export", workspace / "paddle", "paddle")
        written += [out / "split_export", workspace / "paddle"]
    for directory in written:
        assert (directory / "chat_template.jinja").read_text() == OWN
        assert "chat_template" not in json.loads((directory / "tokenizer_config.json").read_text())
        ends = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
        assert load_tokenizer(directory).token_id("<|im_end|>") in ends  # where its trained answers end


def test_another_template_than_that_of_the_training_is_said(
    workspace: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    erniekit.train(str(workspace / "run.yaml"), **keys(workspace, chat_template=str(own)))
    said: list[str] = []
    monkeypatch.setattr("erniekit.utils.log.info", said.append)
    monkeypatch.setattr("erniekit.utils.log.warning", said.append)
    assert open_model(load(workspace, "chat", chat_template="text")).template.name == "text"
    assert any("chat_template: text is used" in line and "out/chat_template.jinja" in line for line in said)
    said.clear()
    open_model(load(workspace, "chat", chat_template=str(own)))
    open_model(load(workspace, "chat"))
    assert not any("chat_template" in line and "differs" in line for line in said)
    # a checkpoint of the time before templates were written beside the weights
    (workspace / "out" / "chat_template.jinja").unlink()
    open_model(load(workspace, "chat"))
    assert any("config.yaml" in line and "own.jinja" in line for line in said)


def test_a_run_without_a_template_of_its_own_leaves_the_bases(workspace: Path, own: Path) -> None:
    (workspace / "text.jsonl").write_text('{"text": "a"}\n' * 9)
    text = {"train_dataset_type": "text", "train_dataset_path": str(workspace / "text.jsonl")}
    erniekit.train(str(workspace / "run.yaml"), **keys(workspace, eval_dataset_path=None, **text))
    assert not (workspace / "out" / "chat_template.jinja").exists()
    assert load_tokenizer(workspace / "out").chat_template.source == "of the base"
