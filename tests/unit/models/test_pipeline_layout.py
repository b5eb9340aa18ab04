"""Which chunk of a stage reaches a parameter; what the model does not have is refused before a weight is read."""

import dataclasses

import paddle
import pytest
from support import tiny_sizes
from support.source_tree import REPOSITORY

from erniekit.config import load
from erniekit.models.config import ModelConfig
from erniekit.models.config_rope import scaled_positions
from erniekit.models.decoder import CausalLM
from erniekit.models.pipeline_layout import check_layout, layout_lines, parameter_chunks
from erniekit.nn.shard import RankShard
from erniekit.parallel.mesh import ParallelDims
from erniekit.utils.errors import ConfigError

FIRST, LAST = [(0, 1), (4, 5)], [(2, 3), (6, 7)]  # two stages of two chunks


@pytest.mark.parametrize(
    ("name", "chunks", "chunk"),
    [
        ("model.layers.1.input_layernorm.weight", FIRST, 0),
        ("model.layers.4.mlp.gate.weight", FIRST, 1),
        ("model.embed_tokens.weight", FIRST, 0),
        ("model.embed_tokens.weight", LAST, 1),  # shared with the head
        ("model.norm.weight", LAST, 1),
        ("lm_head.weight", LAST, 1),
        ("model.embed_tokens.weight", [(0, 1, 2)], 0),
    ],
)
def test_a_parameter_belongs_to_the_chunk_whose_backward_pass_reaches_it(name, chunks, chunk):
    layers = tuple(layer for held in chunks for layer in held)
    config = ModelConfig.from_dict(
        tiny_sizes.MOE | {"num_hidden_layers": 8, "tie_word_embeddings": "embed" in name and chunks == LAST}
    )
    shard = RankShard(layers=layers, has_embedding=0 in layers, has_head=7 in layers)
    with paddle.LazyGuard():
        model = CausalLM(config, shard)
    assert parameter_chunks(model, chunks)[name] == chunk


TRAIN = {"model_name_or_path": "m", "train_dataset_path": "a.jsonl", "output_dir": "o", "recompute": True}
DENSE = ModelConfig.from_dir(REPOSITORY / "examples/models/tiny-dense")
MOE = ModelConfig.from_dir(REPOSITORY / "examples/models/tiny-moe")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"no_recompute_layers": "1,4,9"}, r"no_recompute_layers: \[4, 9\]: the model has layers 0 to 3"),
        ({"recompute_granularity": "moe"}, "recompute_granularity: moe: this model has no experts"),
        (
            {"recompute_granularity": "selective", "recompute_modules": "mlp,experts"},
            "experts: this model has no experts",
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["vision"]},
            "this model has no vision transformer",
        ),
    ],
)
def test_what_cannot_be_recomputed_is_refused_with_the_layout(given, expected):
    with pytest.raises(ConfigError, match=expected):
        check_layout(load(None, TRAIN | given), ParallelDims(), DENSE)
    fine = load(None, TRAIN | {"no_recompute_layers": [0, 3], "recompute_granularity": "moe"})
    check_layout(fine, ParallelDims(), MOE)


@pytest.mark.parametrize("scaling", ["dynamic", "yarn"])
def test_pairs_and_replayed_experts_are_refused_from_config_json_alone(scaling):
    pairs = load(None, TRAIN | {"stage": "DPO", "max_seq_len": 128})
    scaled = dataclasses.replace(DENSE, rope_scaling=scaled_positions(scaling, 64, 128))
    if scaling == "dynamic":
        with pytest.raises(ConfigError, match=r"max_seq_len: 128: .* the answers of a pair share their prompt"):
            check_layout(pairs, ParallelDims(), scaled)
    else:
        check_layout(pairs, ParallelDims(), scaled)
    replayed = load(None, TRAIN | {"stage": "RL", "reward_funcs": "length", "router_replay": "r3"})
    check_layout(replayed, ParallelDims(), MOE)
    with pytest.raises(ConfigError, match="router_replay: r3: the model is dense"):
        check_layout(replayed, ParallelDims(), DENSE)


def test_keys_that_this_model_and_these_ranks_make_pointless_are_named():
    cfg = load(None, TRAIN | {"moe_aux_loss_lambda": 0.1, "sharding": "stage1"})
    alone = layout_lines(cfg, DENSE, ParallelDims())
    assert [line.partition(": no effect: ")[0] for line in alone] == ["moe_aux_loss_lambda", "sharding"]
    assert not any("no effect" in line for line in layout_lines(cfg, MOE, ParallelDims(data=2)))
