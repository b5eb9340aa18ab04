import sys
import types

import pytest
from support.tiny_directories import model_directory

from erniekit import config
from erniekit.checkpoint.model_files import model_files
from erniekit.checkpoint.model_shape import directories
from erniekit.hub import resolve_dataset, resolve_model, resolve_tokenizer
from erniekit.utils.errors import CheckpointError, DataError


def test_a_local_path_wins(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    assert resolve_model("owner/name").samefile(tmp_path / "owner" / "name")
    assert resolve_dataset(str(tmp_path)) == tmp_path


def test_a_name_is_downloaded_as_what_it_is(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append((name, options)) or str(tmp_path)
    )
    assert resolve_model("owner/name") == tmp_path
    assert resolve_dataset("owner/set", "huggingface") == tmp_path
    assert [(name, options["repo_type"]) for name, options in asked] == [
        ("owner/name", "model"),
        ("owner/set", "dataset"),
    ]
    assert "*.safetensors" in asked[0][1]["allow_patterns"] and "*.parquet" in asked[1][1]["allow_patterns"]


@pytest.mark.parametrize("continues", [True, False])
def test_a_random_start_downloads_no_weights(continues, tmp_path, monkeypatch):
    """examples/configs/ERNIE-4.5-300B-A47B/pretrain names a model of 600 GB of which only the shape is read."""
    asked = []
    model = model_directory(tmp_path / "model", weights=False)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append(options) or str(model)
    )
    words = ["model_name_or_path=owner/name", f"output_dir={tmp_path}/out", "train_dataset_path=x.jsonl"]
    cfg = config.load(None, [*words, f"continue_training={continues}"])
    assert directories(cfg) == (model, model)
    assert model_files(cfg).path == model
    assert [("*.safetensors" in options["allow_patterns"]) for options in asked] == [continues, continues]
    assert all("*.json" in options["allow_patterns"] for options in asked)


def test_offline_is_one_clear_error_that_names_the_key(monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("name resolution failed\nlong tale")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        CheckpointError, match=r"model_name_or_path: 'owner/name' is not a local path .*name resolution failed.*Hint:"
    ) as error:
        resolve_model("owner/name")
    assert "long tale" not in str(error.value)
    with pytest.raises(DataError, match="eval_dataset_path: 'owner/set'"):
        resolve_dataset("owner/set", key="eval_dataset_path")


@pytest.mark.parametrize("path", ["missing", "/a/b/missing", "./a/b", "a/b/c", "data/train.jsonl"])
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(DataError, match=f"train_dataset_path: there is no file or directory '{path}'"):
        resolve_dataset(path)


def test_a_pattern_of_file_names_is_named_as_that():
    with pytest.raises(DataError, match=r"'data/\*\.jsonl' .*Hint: patterns are not expanded: name the files"):
        resolve_dataset("data/*.jsonl")


@pytest.fixture
def other_hubs(tmp_path, monkeypatch):
    """Stand-ins for the packages of ModelScope and AI Studio, which note what they are asked for. The signatures are
    those of modelscope 1.40.2 and aistudio-sdk 0.3.9.
    """
    asked = []

    def modelscope(model_id=None, revision=None, cache_dir=None, *, repo_type=None, allow_patterns=None):
        asked.append(("modelscope", model_id, repo_type, allow_patterns))
        return str(tmp_path)

    def aistudio(
        revision=None, local_files_only=False, local_dir=None, allow_patterns=None, *, repo_id=None, repo_type="model"
    ):
        asked.append(("aistudio", repo_id, repo_type, allow_patterns))
        return str(tmp_path)

    for package, parent, function in (
        ("modelscope", "modelscope.hub", modelscope),
        ("aistudio_sdk", "aistudio_sdk", aistudio),
    ):
        for name in (package, parent, f"{parent}.snapshot_download"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[f"{parent}.snapshot_download"].snapshot_download = function
    return asked


@pytest.mark.parametrize("hub", ["modelscope", "aistudio"])
def test_the_other_hubs_download_models_tokenizers_and_data(hub, other_hubs, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked Hugging Face"))
    assert resolve_model("owner/name", hub) == tmp_path
    assert resolve_tokenizer("owner/words", hub) == tmp_path
    assert resolve_dataset("owner/set", hub) == tmp_path
    assert [call[:3] for call in other_hubs] == [
        (hub, "owner/name", "model"),
        (hub, "owner/words", "model"),
        (hub, "owner/set", "dataset"),
    ]
    patterns = [call[3] for call in other_hubs]
    assert "*.safetensors" in patterns[0] and "*.parquet" in patterns[2]
    assert "tokenizer*" in patterns[1] and "*.safetensors" not in patterns[1]


@pytest.mark.parametrize(("hub", "module"), [("modelscope", "modelscope"), ("aistudio", "aistudio_sdk")])
def test_a_hub_whose_package_is_missing_names_the_extra(hub, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(CheckpointError, match=rf"download_hub: {hub} needs the extra `hubs`.*erniekit\[hubs\]"):
        resolve_model("owner/name", hub)


def test_a_failed_download_names_the_hub_that_was_asked(other_hubs, monkeypatch):
    def refused(*args, **options):
        raise ValueError("no such repository\nlong tale")

    sys.modules["aistudio_sdk.snapshot_download"].snapshot_download = refused
    with pytest.raises(CheckpointError, match=r"not be downloaded from AI Studio .ValueError: no such repository"):
        resolve_model("owner/name", "aistudio")


def test_the_cache_of_the_hub_is_not_taken_for_a_model(tmp_path):
    for revision in ("ab12", "cd34"):
        (tmp_path / "models--owner--name" / "snapshots" / revision).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"name one of them: .*snapshots/ab12, .*snapshots/cd34"):
        resolve_model(str(tmp_path / "models--owner--name"))
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "cd34"
    assert resolve_model(str(snapshot)) == snapshot


def test_a_file_is_not_a_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model_name_or_path: .*model.safetensors is a file. Hint: name the dir"):
        resolve_model(str(tmp_path / "model.safetensors"))
