"""A model that the YAML alone describes: its shape, and a tokenizer's directory."""

import json
import shutil

import numpy as np
import pytest

import erniekit
from erniekit.checkpoint import model_shape as shape
from erniekit.config import load
from erniekit.generation.load import open_model
from erniekit.utils.errors import CheckpointError, ConfigError

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}
EXPERTS = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture
def words(workspace):
    """A directory with nothing but a tokenizer."""
    (workspace / "words").mkdir()
    for name in TOKENIZER:
        shutil.copy(workspace / "dense" / name, workspace / "words")
    return workspace / "words"


def train(workspace, words, **keys):
    vocab = json.loads((workspace / "dense" / "config.json").read_text())["vocab_size"]
    alone = {"model_name_or_path": None, "tokenizer_name_or_path": str(words)}
    return erniekit.train(str(workspace / "run.yaml"), **(alone | SHAPE | {"vocab_size": vocab} | keys))


@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["dense", "sparse"])
def test_a_run_from_a_shape_and_a_tokenizer_leaves_a_whole_model(workspace, words, experts):
    result = train(workspace, words, **experts)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    for directory in (workspace / "out", workspace / "out" / "checkpoint-4"):
        model = erniekit.load_model(str(directory))
        config = model.config
        assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (32, 2, 8)
        assert (config.moe_num_experts, config.moe_k) == ((4, 2) if experts else (0, 0))
        assert config.is_moe_layer(1) is bool(experts) and not config.is_moe_layer(0)
        assert config.max_position_embeddings == 64 and config.tie_word_embeddings
        assert model(np.array([[5, 6, 7]])).shape == [1, 3, config.vocab_size]
        for name in TOKENIZER:
            assert (directory / name).read_bytes() == (words / name).read_bytes()
    opened = open_model(load(str(workspace / "run.yaml"), {"model_name_or_path": None}, "chat"))
    assert opened.tokenizer.eos_id == opened.model.config.eos_token_id


def test_it_resumes_and_knows_another_shape(workspace, words):
    train(workspace, words, max_steps=4)
    train(workspace, words, max_steps=6)
    with pytest.raises(CheckpointError, match=r"config.json: num_hidden_layers: 2 there, 3 here"):
        train(workspace, words, max_steps=8, num_hidden_layers=3)


def test_a_shape_changes_a_config_json_and_a_tokenizer_replaces_the_models(workspace, words):
    settings = json.loads((words / "tokenizer_config.json").read_text()) | {"model_max_length": 77}
    (words / "tokenizer_config.json").write_text(json.dumps(settings))
    train(
        workspace,
        words,
        **dict.fromkeys(SHAPE)
        | {"model_name_or_path": str(workspace / "moe"), "num_hidden_layers": 3, "moe_k": 1, "max_steps": 1},
    )
    config = json.loads((workspace / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["moe_k"], config["hidden_size"]) == (3, 1, 32)
    assert config["moe_layer_end_index"] == 2
    assert json.loads((workspace / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 77


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"hidden_size": None, "vocab_size": None}, "hidden_size: a model without model_name_or_path needs its whole"),
        (
            {"moe_num_experts": 4},
            "needs its whole shape; missing: moe_k, moe_intermediate_size",
        ),
        ({"tokenizer_name_or_path": None}, "tokenizer_name_or_path: needed with a shape and no model_name_or_path"),
        ({"continue_training": True}, "continue_training: a shape without model_name_or_path has no weights"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_read(workspace, words, keys, expected):
    with pytest.raises(ConfigError) as caught:
        train(workspace, words, **keys)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 5}, "needed, since hidden_size: 32 does not divide by num_attention_heads: 5"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
        (EXPERTS | {"moe_k": 5}, "moe_k 5 is larger than moe_num_experts 4"),
        (EXPERTS | {"moe_layer_start_index": 2}, "leave no layer of 2 with experts"),
        ({"hidden_size": 10**7, "head_dim": 128, "intermediate_size": 10**7}, "more than any model has"),
        ({"vocab_size": 10}, "vocab_size: 10: the tokenizer in"),
    ],
)
def test_a_shape_that_contradicts_itself_is_one_message(workspace, words, keys, expected):
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        train(workspace, words, **keys)
    assert expected in str(caught.value) and "Copy config.json" not in str(caught.value)
    assert not (workspace / "out" / "config.json").exists()


def test_weights_have_the_shape_that_they_have(workspace, words):
    train(workspace, words, max_steps=1)
    again = {
        "model_name_or_path": str(workspace / "out"),
        "continue_training": True,
        "output_dir": str(workspace / "b"),
    }
    train(workspace, words, **again, max_steps=1)  # the same keys once more
    with pytest.raises(ConfigError, match=r"num_hidden_layers: 3 \(there 2\): not the shape of the weights"):
        train(workspace, words, **again, num_hidden_layers=3)


def test_the_launcher_checks_the_shape_before_it_starts_anybody(workspace, words):
    cfg = load(
        str(workspace / "run.yaml"),
        {"model_name_or_path": None, "tokenizer_name_or_path": str(words)} | SHAPE,
        "train",
    )
    directory, tokenizer = shape.directories(cfg)
    assert directory == tokenizer == words
    assert shape.model_config(cfg, directory).num_attention_heads == 4
