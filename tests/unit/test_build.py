"""One way to a model: every command builds the same one, and a wrong key shows before a weight is read."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_directories import model_directory, write_lines
from support.tiny_sizes import MOE

from erniekit import build, lora
from erniekit.build import AdapterDirectory, ModelOptions, load_model, prepare_model, training_options
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.checkpoint.peft_attach import save_adapter
from erniekit.config import Config, load
from erniekit.evaluate.reference import find_reference
from erniekit.evaluate.run import evaluate
from erniekit.export.export import export
from erniekit.generation.load import find_model, open_model
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.overrides import Overrides
from erniekit.nn.frequencies import scaled_frequencies
from erniekit.parallel.mesh import Mesh, ParallelDims
from erniekit.precision.policy import Policy
from erniekit.training.build import build_run
from erniekit.training.recipes.gkd import prepared_teacher, teacher_chunks
from erniekit.training.reference import SecondModel
from erniekit.training.run import train
from erniekit.utils.errors import ConfigError, UserError

IDS = np.arange(1, 41).reshape(2, 20)
PAIR = {"src": ["1?"], "tgt": [], "response": [["one"], ["two"]], "sort": [1, 0]}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with weights (dense, moe), one without (bare), an adapter of another model, and data."""
    path = tmp_path_factory.mktemp("build")
    # A short context: what max_seq_len does shows. A head of its own: opening the directory compares no weights.
    changes = {"max_position_embeddings": 32, "tie_word_embeddings": False}
    model_directory(path / "dense", **changes)
    sparse = {name: value for name, value in (MOE | changes).items() if name != "vocab_size"}
    model_directory(path / "moe", **sparse)
    model_directory(path / "bare", weights=False, **changes)
    model_directory(path / "bare_moe", weights=False, **sparse)
    wider = load_model(model_directory(path / "wider", hidden_size=64))
    lora.attach(wider, lora.LoraOptions(rank=2))
    save_adapter(wider, path / "adapter_of_wider")
    write_lines(path / "data.jsonl", [{"src": [f"{n}?"], "tgt": [str(n)]} for n in range(8)])
    write_lines(path / "text.jsonl", [{"text": "nothing is asked"}])
    write_lines(path / "pairs.jsonl", [PAIR] * 4)
    return path


def settings(workspace: Path, command: str, model: str = "dense", **keys: Any) -> Config:
    paths = {"train_dataset_path": "data.jsonl", "eval_dataset_path": "data.jsonl"}
    values: dict[str, Any] = {
        "model_name_or_path": workspace / model,
        "output_dir": workspace / "out",
        "compute_type": "fp32",
        "train_dataset_type": "erniekit",
        "eval_dataset_type": "erniekit",
        "max_seq_len": 64,
        "batch_size": 2,
        "max_steps": 1,
    }
    values |= {name: workspace / file for name, file in paths.items()} | keys
    return load(None, {name: value if value is None else str(value) for name, value in values.items()}, command)


def first_logits(cfg: Config) -> tuple[np.ndarray, ModelConfig]:
    """What training's model computes before its first step."""
    run = build_run(cfg, Mesh.single())
    run.close()
    run.model.eval()
    return run.model(IDS).numpy(), run.model.config


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("bare", {"continue_training": False}),
        ("dense", {"continue_training": False, "seed": 7}),  # its weights are not used
        ("bare_moe", {"continue_training": False, "moe_group_experts": True}),
        ("dense", {"rope_theta": 77.0}),
        ("moe", {"moe_group_experts": True, "rope_theta": 77.0}),
    ],
    ids=str,
)
def test_evaluation_and_chat_start_where_training_starts(workspace: Path, model: str, keys: dict[str, Any]):
    trained, training_config = first_logits(settings(workspace, "train", model, **keys))
    for command in ("eval", "chat"):
        used = open_model(settings(workspace, command, model, **keys)).model
        assert np.array_equal(used(IDS).numpy(), trained)
        for name in ("rope_theta", "max_position_embeddings", "moe_group_experts"):
            assert vars(used.config)[name] == vars(training_config)[name]
    assert used.config.max_position_embeddings == 64


def test_a_random_start_and_the_overrides_make_another_model(workspace: Path):
    """Otherwise the test above would compare nothing."""
    plain, _ = first_logits(settings(workspace, "train", "moe"))
    for keys in ({"continue_training": False}, {"rope_theta": 77.0}, {"moe_group_experts": True}):
        assert not np.allclose(plain, first_logits(settings(workspace, "train", "moe", **keys))[0])


def test_eval_reports_the_loss_of_the_random_start(workspace: Path, tmp_path: Path):
    keys = {"continue_training": False, "output_dir": tmp_path, "do_eval": True}
    run = build_run(settings(workspace, "train", "bare", **keys), Mesh.single())
    from erniekit.training.evaluation import evaluate as evaluate_in_training

    with run.loader:
        assert run.eval_loader is not None
        with run.eval_loader:
            before = evaluate_in_training(run)["eval_loss"]
    results = evaluate(settings(workspace, "eval", "bare", **keys))
    assert results["loss"] == pytest.approx(before, rel=1e-6)


def test_a_context_that_is_not_given_is_not_raised(workspace: Path):
    cfg = settings(workspace, "chat")
    left_out = dataclasses.replace(cfg, given=cfg.given - {"max_seq_len"})
    assert find_model(left_out).prepared.config.max_position_embeddings == 32


def test_a_run_opens_its_model_once_also_for_a_second_copy(workspace: Path, monkeypatch: pytest.MonkeyPatch):
    opened = []
    real = ModelReader.__init__

    def note(self: ModelReader, *args: Any, **more: Any) -> None:
        opened.append(args)
        real(self, *args, **more)

    monkeypatch.setattr(ModelReader, "__init__", note)
    pairs = {"train_dataset_path": workspace / "pairs.jsonl", "eval_dataset_path": workspace / "pairs.jsonl"}
    run = build_run(settings(workspace, "train", stage="DPO", rope_theta=77.0, **pairs), Mesh.single())
    run.close()
    assert len(opened) == 1
    reference = run.recipe.reference
    assert isinstance(reference, SecondModel)
    for model in (reference.model, run.model):
        model.eval()
    assert np.array_equal(reference.model(IDS).numpy(), run.model(IDS).numpy())


def test_the_reference_of_an_evaluation_is_that_of_training(workspace: Path, tmp_path: Path):
    model_directory(tmp_path / "trained", tie_word_embeddings=False)
    keys = {
        "stage": "DPO",
        "continue_training": False,
        "rope_theta": 77.0,
        "eval_dataset_path": workspace / "pairs.jsonl",
    }
    start, _ = first_logits(settings(workspace, "train", "bare", train_dataset_path=workspace / "pairs.jsonl", **keys))
    cfg = settings(workspace, "eval", "bare", checkpoint=tmp_path / "trained", **keys)
    reference = find_reference(cfg, find_model(cfg))
    assert reference is not None and np.array_equal(reference.build()(IDS).numpy(), start)


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights cannot be read, and a model cannot be built."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(ModelReader, "read", fail)
    monkeypatch.setattr(build, "fill_weights", fail)
    yield


def train_only_as_far_as_weights(cfg: Config) -> None:
    build_run(cfg, Mesh.single())


USES = {"train": train_only_as_far_as_weights, "eval": evaluate, "chat": open_model}
LORA = {"fine_tuning": "LoRA"}


@pytest.mark.parametrize("command", USES)
def test_without_a_mistake_the_weights_are_read(workspace: Path, unreadable: None, command: str):
    with pytest.raises(AssertionError, match="a weight is read"):
        USES[command](settings(workspace, command, eval_output=workspace))


@pytest.mark.parametrize(
    ("command", "keys", "message"),
    [
        ("train", {"recompute": True, "no_recompute_layers": "0,9"}, "no_recompute_layers: [9]"),
        ("train", {"recompute": True, "no_recompute_layers": "first"}, "no_recompute_layers"),
        ("train", {"recompute": True, "recompute_granularity": "moe"}, "recompute_granularity: moe"),
        ("train", LORA | {"lora_target_modules": "q_porj"}, "did you mean q_proj"),
        ("train", LORA | {"lora_rank": 100000}, "lora_rank: 100000 is above the width"),
        ("train", LORA | {"modules_to_save": "head"}, "modules_to_save: head"),
        ("train", LORA | {"lora_path": "adapter_of_wider"}, "adapter_of_wider"),
        ("train", LORA | {"lora_path": "nowhere"}, "nowhere"),
        ("train", {"train_dataset_path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ("train", {"do_eval": True, "eval_dataset_path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ("train", {"chat_template": "nosuch"}, "chat_template"),
        ("train", {"pipeline_parallel_degree": 1, "virtual_pp_degree": 3}, "virtual_pp_degree"),
        ("eval", {"eval_dataset_path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ("eval", {"chat_template": "nosuch"}, "chat_template"),
        ("eval", {"eval_dataset_path": "text.jsonl", "stage": "PT", "predict_with_generate": True}, "predict_with"),
        ("eval", {"lora_path": "adapter_of_wider"}, "adapter_of_wider"),
        ("chat", {"lora_path": "adapter_of_wider"}, "adapter_of_wider"),
        ("chat", {"chat_template": "nosuch"}, "chat_template"),
    ],
    ids=str,
)
def test_a_mistake_is_reported_before_a_weight_is_read(
    workspace: Path, unreadable: None, command: str, keys: dict[str, Any], message: str
):
    paths = {name: workspace / value for name, value in keys.items() if name.endswith("_path")}
    with pytest.raises(UserError) as caught:
        USES[command](settings(workspace, command, eval_output=workspace, **(keys | paths)))
    assert message in str(caught.value)


def test_an_adapter_is_exported_with_what_its_training_changed(workspace: Path, tmp_path: Path):
    model = load_model(workspace / "dense")
    lora.attach(model, lora.LoraOptions(rank=2))
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            parameter.set_value(parameter + 0.05)
    save_adapter(model, tmp_path / "out")
    keys = {"output_dir": tmp_path / "out", "rope_theta": 77.0}
    export(settings(workspace, "export", **keys))
    used = open_model(settings(workspace, "eval", **keys)).model
    exported = load_model(tmp_path / "out" / "export")
    assert (exported.config.rope_theta, exported.config.max_position_embeddings) == (77.0, 64)
    assert np.abs(exported(IDS).numpy() - used(IDS).numpy()).max() < 1e-4


def test_load_model_rounds_and_adapts_as_it_was_asked(workspace: Path):
    plain = load_model(workspace / "dense")
    rounded = load_model(workspace / "dense", dtype="bfloat16")
    weight = rounded.model.norm.weight
    assert not rounded.training and weight.dtype == plain.model.norm.weight.dtype
    name = "model.layers.0.mlp.down_proj.weight"
    exact, short = (dict(m.named_parameters())[name].numpy() for m in (plain, rounded))
    assert 0 < np.abs(exact - short).max() < 1e-2 and not (short.view(np.uint32) & 0xFFFF).any()


def test_tensor_ranks_do_not_divide_the_columns_of_dora(workspace: Path, tmp_path: Path, unreadable: None):
    """A saved adapter decides that, whatever the YAML says: in training, evaluation, chat and plans."""
    model = CausalLM(ModelConfig.from_dir(workspace / "dense"))
    lora.attach(model, lora.LoraOptions(rank=2, dora=True))
    save_adapter(model, tmp_path / "dora")
    options = ModelOptions(Policy("float32"), adapter=AdapterDirectory(tmp_path / "dora"))
    prepared = prepare_model(workspace / "dense", options)
    mesh = Mesh.outline(ParallelDims(tensor=2), 1)
    with pytest.raises(ConfigError, match=r"tensor_parallel_degree: 2: not with the DoRA of the adapter .*dora: "):
        prepared.build(mesh)
    with pytest.raises(ConfigError, match="tensor_parallel_degree: 2"):
        build.outline(prepared.config, options, mesh, [[0, 1]], prepared.adapter)


def test_an_adapter_is_used_with_the_ranges_that_its_training_for_a_scheme_measured(workspace: Path, tmp_path: Path):
    scheme = {"qat": "fp8_static", "hadamard_block_size": 4, "apply_online_actscale_step": 1}
    keys = LORA | scheme | {"do_eval": True, "output_dir": tmp_path / "out", "max_steps": 2, "save_strategy": "no"}
    during = train(settings(workspace, "train", **keys)).summary["eval_loss"]
    assert evaluate(settings(workspace, "eval", **keys))["loss"] == pytest.approx(during, rel=1e-6)


def test_an_adapter_of_a_reward_model_is_not_merged_and_none_of_a_language_model_becomes_one(
    workspace: Path, tmp_path: Path
):
    pairs = {"train_dataset_path": workspace / "pairs.jsonl", "save_strategy": "no"}
    reward = {"stage": "RM", "output_dir": tmp_path / "reward"} | LORA | pairs
    train(settings(workspace, "train", **reward))
    with pytest.raises(UserError, match=r"reward is the adapter of a reward model .* Use the adapter as it is"):
        export(settings(workspace, "export", **reward))
    language = {"output_dir": tmp_path / "language", "save_strategy": "no"} | LORA
    train(settings(workspace, "train", **language))
    with pytest.raises(ConfigError, match=r"stage: RM: .*language is the adapter of a language model"):
        build_run(settings(workspace, "train", **reward, lora_path=tmp_path / "language"), Mesh.single())


def test_a_teacher_stays_as_its_config_json_has_it(workspace: Path):
    """The keys that change the trained model are not about another one; nor are the numbers of its layers."""
    keys = {"stage": "GKD", "teacher_model_name_or_path": workspace / "moe", "rope_theta": 77.0}
    cfg = settings(workspace, "train", **keys, pipeline_parallel_degree=2, pp_seg_method="[0,3,4]")
    student = prepare_model(workspace / "dense", training_options(cfg))
    teacher = prepared_teacher(cfg, student)
    assert student.config.rope_theta == 77.0
    assert teacher.config.rope_theta == ModelConfig.from_dir(workspace / "moe").rope_theta != 77.0
    assert teacher_chunks(cfg, teacher.config, ParallelDims(pipeline=2, data=2, expert=2)) == [[(0,)], [(1,)]]
    with pytest.raises(ConfigError, match="key-value heads"):
        teacher_chunks(cfg, teacher.config, ParallelDims(pipeline=2, tensor=4))


def test_overrides_leave_what_they_do_not_name(workspace: Path):
    stored = ModelConfig.from_dir(workspace / "moe")
    assert Overrides().apply(stored) == stored
    assert Overrides(min_positions=16, rope_theta=stored.rope_theta).apply(stored) == stored


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_positions_are_scaled_as_by_the_key_of_the_same_name_in_config_json(workspace: Path, kind: str):
    stored = ModelConfig.from_dir(workspace / "dense")
    length = stored.max_position_embeddings
    scaled = Overrides(rope_scaling=kind, min_positions=4 * length).apply(stored)
    values = json.loads((workspace / "dense" / "config.json").read_text())
    rope = {"rope_type": kind, "factor": 4.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = length
    in_file = length if kind == "dynamic" else 4 * length  # dynamic positions are scaled beyond it
    values["max_position_embeddings"] = in_file
    expected = ModelConfig.from_dict(values | {"rope_scaling": rope})
    assert scaled.rope_scaling == expected.rope_scaling and scaled.rope_scaling is not None
    assert scaled.max_position_embeddings == 4 * length
    assert scaled.to_dict()["max_position_embeddings"] == in_file
    # What a run saves has it in its config.json, and the same YAML changes nothing.
    again = ModelConfig.from_dict(scaled.to_dict())
    assert again.rope_scaling == scaled.rope_scaling
    assert Overrides(rope_scaling=kind, min_positions=4 * length).apply(again).to_dict() == again.to_dict()
    assert Overrides(rope_scaling=kind, min_positions=length).apply(stored) == stored
    with pytest.raises(ConfigError, match=f"rope_type {kind} in its config.json"):
        Overrides(rope_scaling="yarn" if kind == "linear" else "linear", min_positions=8 * length).apply(again)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_longer_row_leaves_the_scaling_of_positions_that_config_json_asks_for(workspace: Path, kind: str):
    """Also in the file that is written, where dynamic and yarn start from max_position_embeddings."""
    values = json.loads((workspace / "dense" / "config.json").read_text())
    rope = {"rope_type": kind, "factor": 4.0}
    stored = ModelConfig.from_dict(values | {"rope_scaling": rope, "max_position_embeddings": 4096, "head_dim": 64})
    longer = Overrides(min_positions=2 * stored.max_position_embeddings).apply(stored)
    assert longer.max_position_embeddings == 2 * stored.max_position_embeddings
    again = ModelConfig.from_dict(longer.to_dict()).rope_scaling
    positions = np.arange(3 * stored.max_position_embeddings)
    expected, found = (
        scaled_frequencies(stored.head_dim, stored.rope_theta, scaling, positions)
        for scaling in (stored.rope_scaling, again)
    )
    assert np.array_equal(expected, found)


def test_a_model_is_built_in_the_mode_that_is_asked(workspace: Path):
    prepared = prepare_model(workspace / "dense", ModelOptions(Policy("float32"), training=True))
    assert prepared.build().training
    assert not load_model(workspace / "dense").training
