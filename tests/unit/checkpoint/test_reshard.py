"""Whatever the layout, the ranks together write every tensor of a checkpoint, and none twice."""

from types import SimpleNamespace

import paddle
import pytest
from support.tiny_sizes import DENSE, MOE

from erniekit.checkpoint.model_io import model_rank_files, named_tensors
from erniekit.checkpoint.model_reader import plan_for
from erniekit.checkpoint.reshard import Shares
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.parallelize import rank_shard_of
from erniekit.models.weights import logical_tensors, our_shapes
from erniekit.parallel.mesh import Mesh, ParallelDims, coordinates, rank_lists
from erniekit.parallel.pipeline_split import split_layers
from erniekit.parallel.process_group import Group
from erniekit.training.state import optimizer_rank_files

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st


def mesh_of(degrees, rank):
    pipe, data, tensor = coordinates(degrees, rank)
    groups = {name: Group(ranks, ranks.index(rank)) for name, ranks in rank_lists(degrees, rank).items()}
    return Mesh(degrees, rank, pipe, data, tensor, data % degrees.expert, **groups)


def part_of(config, degrees, rank):
    """A rank's part of the model, without memory, and its shares."""
    mesh = mesh_of(degrees, rank)
    stages = split_layers(config.num_hidden_layers, degrees.pipeline, "layer:DecoderLayer", [])
    with paddle.LazyGuard():
        model = CausalLM(config, rank_shard_of(mesh, [stages[mesh.pipe]]))
    return model, Shares.of(model, mesh)


@st.composite
def layouts(draw):
    pipeline, tensor = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    expert = draw(st.sampled_from([1, 2]))
    sharding = draw(st.sampled_from([1, 2]))
    data = max(expert, sharding) * draw(st.sampled_from([1, 2]))
    sparse = draw(st.booleans())
    changes = {
        "num_hidden_layers": 3,
        "tie_word_embeddings": draw(st.booleans()),
        "num_nextn_predict_layers": draw(st.sampled_from([0, 1])),
        "use_bias": draw(st.booleans()),
        "vocab_size": 62,
    }
    config = ModelConfig.from_dict((MOE if sparse else DENSE) | changes)
    return config, ParallelDims(pipeline, data, tensor, expert if sparse else 1, sharding)


@settings(max_examples=25)
@given(layouts(), st.sampled_from(["pt", "paddle"]))
def test_each_tensor_of_the_model_is_written_by_one_rank(layout, format):
    config, degrees = layout
    written = []
    for rank in range(degrees.world):
        model, shares = part_of(config, degrees, rank)
        written += model_rank_files(model, shares, format).plan
    assert sorted(written) == sorted(plan_for(logical_tensors(config), format, "F32"))


@settings(max_examples=25)
@given(layouts())
def test_each_row_of_the_optimizers_state_is_written_by_one_rank(layout):
    config, degrees = layout
    plans = []
    for rank in range(degrees.world):
        model, shares = part_of(config, degrees, rank)
        parameters = dict(model.named_parameters())
        shapes = {f"{name}/moment1": tuple(p.shape) for name, p in parameters.items()}
        shapes |= {f"{name}/beta1_pow": (1,) for name in parameters}
        optimizer = SimpleNamespace(
            state_shapes=lambda shapes=shapes: shapes, parameters=SimpleNamespace(tensors=parameters)
        )
        plans += optimizer_rank_files(optimizer, shares).plan
    names = [name for name, _, _ in plans]
    assert len(set(names)) == len(names)
    rows = {}
    for name, _, shape in plans:
        whole, _, piece = name.partition("[")
        begin, end = map(int, piece[:-1].split(":")) if piece else (0, shape[0])
        assert end - begin == shape[0]
        rows.setdefault(whole, []).append((begin, end, shape[1:]))
    buffers = {name for name in our_shapes(config) if "correction_bias" in name}
    expected = {name: shape for name, shape in our_shapes(config).items() if name not in buffers}
    assert rows.keys() == {f"{name}/{key}" for name in expected for key in ("moment1", "beta1_pow")}
    for name, shape in expected.items():
        pieces = sorted(rows[f"{name}/moment1"])
        assert [begin for begin, _, _ in pieces] == [0, *(end for _, end, _ in pieces[:-1])]
        assert pieces[-1][1] == shape[0] and {rest for _, _, rest in pieces} == {shape[1:]}
        assert rows[f"{name}/beta1_pow"] == [(0, 1, ())]


def test_the_writers_of_experts_share_the_work():
    degrees = ParallelDims(pipeline=1, data=4, tensor=1, expert=2)
    config = ModelConfig.from_dict(MOE)
    count = []
    for rank in range(4):
        model, shares = part_of(config, degrees, rank)
        count.append(sum(".experts." in name for name, _, _ in model_rank_files(model, shares, "pt").plan))
    assert count == [6, 6, 0, 0]  # 4 experts of three matrices, on two ranks; the other two repeat them


def test_one_process_writes_everything():
    model = CausalLM(ModelConfig.from_dict(MOE))
    shares = Shares.alone()
    for name, tensor in named_tensors(model).items():
        assert shares.writes(name) and shares.rows(name, tensor.shape) is None
        assert shares.whole_shape(name, tensor.shape) == tuple(tensor.shape)
        assert shares.gather(name, tensor).tobytes() == tensor.numpy().tobytes()
