"""The optimizer's state on disk: whole tensors, or rows of experts put together again."""

import itertools
import json

import numpy as np
import pytest
from support.optimizer_state import state_arrays
from support.tiny_models import tiny_model

from erniekit.checkpoint.reshard import Shares
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.checkpoint.stored_state import StoredState
from erniekit.parallel.zero import ShardedParameters
from erniekit.training.adamw import AdamW, ParamRule
from erniekit.training.state import OPTIMIZER_DIR, load_optimizer, optimizer_rank_files, read_state
from erniekit.utils.errors import CheckpointError

EXPERTS = "model.layers.1.mlp.experts.down_proj.weight/moment1"


def optimizer_of(model, value=None):
    rules = dict.fromkeys((name for name, _ in model.named_parameters()), ParamRule(1.0, 0.0))
    optimizer = AdamW(ShardedParameters.single(model.named_parameters()), rules, 0.9, 0.95, 1e-8)
    if value is not None:
        rng = np.random.default_rng(value)
        for key, array in state_arrays(optimizer).items():
            optimizer.load_state_array(key, rng.random(array.shape, np.float32))
    return optimizer


def write(directory, tensors):
    plan = [(name, "F32", array.shape) for name, array in tensors.items()]
    with Writer(directory, plan) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def test_one_process_writes_one_file_of_whole_tensors_and_reads_it_back(tmp_path):
    model = tiny_model("moe")
    optimizer = optimizer_of(model, 1)
    optimizer_rank_files(optimizer, Shares.alone()).write(tmp_path)
    expected = state_arrays(optimizer)
    assert [path.name for path in (tmp_path / OPTIMIZER_DIR).iterdir()] == ["model.safetensors"]
    assert Reader(tmp_path / OPTIMIZER_DIR).keys() == list(expected)
    again = optimizer_of(model)
    load_optimizer(tmp_path, again, Shares.alone())
    for key, array in state_arrays(again).items():
        np.testing.assert_array_equal(array, expected[key])


def in_pieces(tensors, *bounds):
    """`tensors` with EXPERTS cut at `bounds`."""
    whole = tensors[EXPERTS]
    pieces = {f"{EXPERTS}[{a}:{b}]": whole[a:b] for a, b in itertools.pairwise(bounds)}
    return {name: array for name, array in tensors.items() if name != EXPERTS} | pieces


@pytest.mark.parametrize("bounds", [(0, 2, 4), (0, 1, 2, 3, 4), (0, 3, 4)])
def test_rows_that_several_ranks_wrote_are_put_together(tmp_path, bounds):
    model = tiny_model("moe")
    expected = state_arrays(optimizer_of(model, 1))
    write(tmp_path / OPTIMIZER_DIR, in_pieces(expected, *bounds))
    again = optimizer_of(model)
    load_optimizer(tmp_path, again, Shares.alone())
    for key, array in state_arrays(again).items():
        np.testing.assert_array_equal(array, expected[key])
    stored = StoredState(tmp_path / OPTIMIZER_DIR)
    for begin in range(4):
        for end in range(begin + 1, 5):
            np.testing.assert_array_equal(stored.read(EXPERTS, (begin, end)), expected[EXPERTS][begin:end])


def test_only_the_rows_that_are_wanted_are_read(tmp_path, monkeypatch):
    expected = state_arrays(optimizer_of(tiny_model("moe"), 1))
    write(tmp_path, in_pieces(expected, 0, 2, 4))
    stored, read = StoredState(tmp_path), []
    real = stored.reader.read
    monkeypatch.setattr(stored.reader, "read", lambda name, rows: read.append((name, rows)) or real(name, rows=rows))
    stored.read(EXPERTS, (3, 4))
    assert read == [(f"{EXPERTS}[2:4]", (1, 2))]


@pytest.mark.parametrize("bounds", [(1, 4), (0, 2, 3)])
def test_missing_rows_are_an_error(tmp_path, bounds):
    model = tiny_model("moe")
    write(tmp_path / OPTIMIZER_DIR, in_pieces(state_arrays(optimizer_of(model, 1)), *bounds))
    with pytest.raises(CheckpointError, match=r"leave gaps or overlap|does not fit this model"):
        load_optimizer(tmp_path, optimizer_of(model), Shares.alone())


def test_state_of_another_model_is_refused_by_name(tmp_path):
    write(tmp_path / OPTIMIZER_DIR, state_arrays(optimizer_of(tiny_model("moe"), 1)))
    with pytest.raises(CheckpointError, match=r"does not fit this model.*mlp\.(experts|gate|up_gate).*ignore_load_lr"):
        load_optimizer(tmp_path, optimizer_of(tiny_model("dense")), Shares.alone())


@pytest.mark.parametrize("shape", [(1, 3), (2, 4), ()])
def test_pieces_are_as_large_as_their_names_say(tmp_path, shape):
    write(tmp_path, {"w[0:2]": np.zeros((2, 3), np.float32), "w[2:4]": np.zeros(shape, np.float32)})
    with pytest.raises(CheckpointError, match="the pieces of w leave gaps or overlap"):
        StoredState(tmp_path)


STATE = {"step": 4, "num_tokens": 10, "data": {"version": 1, "position": {"row": 3}}, "layout": {"data": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "4"}, "step: must be an integer"),
        ({"step": -1}, "step: must be an integer"),
        ({"step": True}, "step: must be an integer"),
        ({"step": None}, "step: must not be null"),
        ({"best_metric": "low"}, "best_metric: must be a number"),
        ({"data": []}, "data: must be an object"),
        ({"data": {"position": {"row": -3}}}, "data: position: must hold natural numbers, found -3"),
        ({"data": {"position": {"row": "3"}}}, "data: position: must hold natural numbers"),
        ({"layout": {"data": "1"}}, "layout: must hold integers"),
        ({"stepp": 1}, "'stepp': not a key of this version"),
    ],
)
def test_a_damaged_trainer_state_is_named_by_key(tmp_path, change, message):
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps(STATE))
    assert read_state(tmp_path).step == 4 and read_state(tmp_path).best_metric is None
    file.write_text(json.dumps(STATE | change))
    with pytest.raises(CheckpointError, match=rf"trainer_state\.json: {message}"):
        read_state(tmp_path)
    file.write_text(json.dumps({key: value for key, value in STATE.items() if key != "step"}))
    with pytest.raises(CheckpointError, match="step: missing"):
        read_state(tmp_path)
