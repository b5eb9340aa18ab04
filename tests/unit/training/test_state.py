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
from erniekit.training.moment_codes import CODES, Rounding
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


def wide_model():
    """Matrices with at least 32 inputs, which is what is coded."""
    return tiny_model("moe", hidden_size=64, moe_intermediate_size=32, intermediate_size=64)


@pytest.mark.parametrize("stage", CODES)
def test_coded_moments_are_read_back_and_all_else_is_exact(tmp_path, stage):
    """Bounds of the moments: test_moment_codes.py. Here each is that of its own parameter, and nothing else changed."""
    optimizer, rounding, code = optimizer_of(wide_model(), 1), Rounding(), CODES[stage]
    optimizer_rank_files(optimizer, Shares.alone(), code, rounding).write(tmp_path)
    expected, again = state_arrays(optimizer), optimizer_of(wide_model())
    load_optimizer(tmp_path, again, Shares.alone())
    coded = 0
    for key, array in state_arrays(again).items():
        name, _, field = key.rpartition("/")
        if field.startswith("moment") and code.applies(array.shape):
            coded += 1
            parts = code.encode(name, expected[f"{name}/moment1"], expected[f"{name}/moment2"], Rounding())
            np.testing.assert_array_equal(array, code.decode(parts)[field], err_msg=key)
        else:
            np.testing.assert_array_equal(array, expected[key], err_msg=key)
    assert coded == 2 * rounding.tensors > 0
    size = sum(path.stat().st_size for path in (tmp_path / OPTIMIZER_DIR).iterdir())
    assert (
        size < sum(array.nbytes for array in expected.values()) - rounding.bytes_before + rounding.bytes_after + 20000
    )


@pytest.mark.parametrize("bounds", [(0, 2, 4), (0, 3, 4)])
def test_coded_rows_of_experts_are_put_together(tmp_path, bounds):
    """Codes of a stack are those of its matrices, so pieces that ranks coded are pieces of the whole's codes."""
    model, code = wide_model(), CODES["O2"]
    optimizer_rank_files(optimizer_of(model, 1), Shares.alone(), code).write(tmp_path / "whole")
    whole = Reader(tmp_path / "whole" / OPTIMIZER_DIR)
    tensors = {name: (whole.info(name), whole.read(name)) for name in whole.keys()}  # noqa: SIM118
    for name in [name for name in tensors if name.startswith(EXPERTS.removesuffix("moment1")) and "_pow" not in name]:
        info, array = tensors.pop(name)
        tensors |= {f"{name}[{a}:{b}]": (info, array[a:b]) for a, b in itertools.pairwise(bounds)}
    plan = [(name, info.dtype, array.shape) for name, (info, array) in tensors.items()]
    with Writer(tmp_path / "pieces" / OPTIMIZER_DIR, plan, metadata=whole.metadata) as writer:
        for name, (_, array) in tensors.items():
            writer.write(name, array)
    left, right = (optimizer_of(model) for _ in range(2))
    load_optimizer(tmp_path / "whole", left, Shares.alone())
    load_optimizer(tmp_path / "pieces", right, Shares.alone())
    expected = state_arrays(left)
    for key, array in state_arrays(right).items():
        np.testing.assert_array_equal(array, expected[key], err_msg=key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "truncated"),
        (
            lambda file: replace_once(file, b'"ckpt_quant_stage":"O1"', b'"ckpt_quant_stage":"O7"'),
            "is 'O7' in its head",
        ),
        (
            lambda file: replace_once(file, b'"ckpt_quant_stage":"O1"', b'"ckpt_quant_stage":"O2"'),
            "expected .*/moments U8",
        ),
        (lambda file: replace_once(file, b'"ckpt_quant_stage":"O1"', b'"ckpt_quant_sta__":"O1"'), "is I8, not F32"),
        (lambda file: replace_once(file, b"moment2_lowest", b"moment2_lowesT"), "expected .*moment2_lowest F32"),
    ],
)
def test_damaged_codes_are_found(tmp_path, damage, message):
    optimizer_rank_files(optimizer_of(wide_model(), 1), Shares.alone(), CODES["O1"]).write(tmp_path)
    damage(tmp_path / OPTIMIZER_DIR / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_optimizer(tmp_path, optimizer_of(wide_model()), Shares.alone())


def replace_once(file, old, new):
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))


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
