"""Layers fall into consecutive pieces, evenly, as told, or by cost."""

import math
import re
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_sizes import DENSE, MOE
from support.tiny_vision import CONFIG

from erniekit.models.config import ModelConfig
from erniekit.models.weights import our_shapes
from erniekit.parallel.pipeline_split import PICTURE_SHARE, Costs, layer_costs, split_layers, vision_cost
from erniekit.utils.errors import ConfigError

MOE_MTP = MOE | {"num_nextn_predict_layers": 1}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 20), st.sampled_from(["", "uniform", "layer:DecoderLayer", "balanced"]))
def test_chunks_hold_every_layer_once_in_order(pieces: int, more: int, method: str):
    layers = pieces + more
    found = split_layers(layers, pieces, method, Costs((1.0,) * layers))
    assert [layer for piece in found for layer in piece] == list(range(layers))
    assert len(found) == pieces and all(found)
    if method != "balanced":
        lengths = [len(piece) for piece in found]
        assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)


def lengths(pieces: list[tuple[int, ...]]) -> list[int]:
    return [len(piece) for piece in pieces]


def test_uniform_split():
    assert split_layers(4, 2) == [(0, 1), (2, 3)]
    assert lengths(split_layers(7, 3)) == [3, 2, 2]
    assert lengths(split_layers(3, 3)) == [1, 1, 1]


@pytest.mark.parametrize("method", [(0, 1, 4), (0, 2, 7)])
def test_a_list_counts_layers_or_also_embedding_norm_and_head(method):
    # [0, 2, 7] of 4 layers: embedding and layer 0 | layers 1 to 3, norm, head.
    assert split_layers(4, 2, method) == [(0,), (1, 2, 3)]


def test_lists_of_published_configurations():
    assert lengths(split_layers(54, 2, (0, 29, 57))) == [28, 26]
    fourteen = (0, 7, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 53, 57)
    assert lengths(split_layers(54, 14, fourteen)) == [6, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 2]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_balanced_has_the_smallest_maximum_of_all_cuts(data):
    prices = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    pieces = data.draw(st.integers(1, len(prices)))
    costs = Costs(tuple(map(float, prices)), data.draw(st.integers(0, 9)), data.draw(st.integers(0, 30)))

    def price(bounds: tuple[int, ...]) -> float:
        edges = [0, *bounds, len(prices)]
        sums = [float(sum(prices[a:b])) for a, b in pairwise(edges)]
        sums[0] += costs.first
        sums[-1] += costs.last
        return max(sums)

    found = split_layers(len(prices), pieces, "balanced", costs)
    assert max(costs.of(piece) for piece in found) == min(
        price(bounds) for bounds in combinations(range(1, len(prices)), pieces - 1)
    )


def test_balanced_prefers_the_smallest_maximum_then_evenness():
    assert split_layers(4, 3, "balanced", Costs((5.0, 3.0, 9.0, 1.0))) == [
        (0, 1),
        (2,),
        (3,),
    ]  # 8 | 9 | 1, not 5 | 3 | 10
    assert sorted(lengths(split_layers(9, 4, "balanced", Costs((1.0,) * 9)))) == [2, 2, 2, 3]


def test_a_large_head_takes_layers_off_the_last_stage():
    assert lengths(split_layers(9, 3, "balanced", Costs((1.0,) * 9, last=3.0))) == [4, 4, 1]


@pytest.mark.parametrize("sizes", [DENSE, MOE_MTP], ids=["dense", "moe with mtp"])
def test_costs_are_the_weights_that_a_token_meets_plus_attention(sizes):
    config = ModelConfig.from_dict(sizes)
    costs = layer_costs(config, mean_context=100)
    hidden, queries, keys, expert = 32, 32, 16, 16
    attention = hidden * (queries + 2 * keys) + queries * hidden + 2 * queries * 100
    dense = attention + 3 * hidden * 48
    sparse = attention + 3 * hidden * expert * (2 + 1) + hidden * 4
    head, ahead = hidden * 61, 0
    if config.num_nextn_predict_layers:
        ahead = dense + 2 * hidden * hidden + head
    assert costs == Costs((dense, sparse if config.moe_num_experts else dense), hidden, head + ahead)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 4), "3 layers cannot be split into 4 chunks"),
        ((4, 2, (0, 1, 2, 4)), "names 3 chunks, but pipeline_parallel_degree x virtual_pp_degree is 2"),
        ((4, 2, (0, 2, 5)), "must run from 0 to 4 (the layers), or to 7 (embedding, 4 layers, norm and head)"),
        ((4, 2, (1, 2, 4)), "must run from 0"),
        ((4, 2, (0, 4, 4)), "leaves chunk 1 without a layer"),
        ((4, 2, (0, 1, 7)), "leaves chunk 0 without a layer"),
        ((4, 3, (0, 3, 2, 4)), "leaves chunk 1 without a layer"),
    ],
)
def test_refusals(arguments, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        split_layers(*arguments)


def test_the_vision_transformer_and_the_resampler_are_costs_of_the_first_chunk() -> None:
    """As many multiply-adds as their projections have weights, four patches to a token."""
    config = ModelConfig.from_dict(CONFIG)
    projections = {"tower": 0, "resampler": 0}
    for name, shape in our_shapes(config).items():
        if len(shape) == 2 and name.startswith("model.vision_model"):
            projections["tower"] += math.prod(shape)
        elif len(shape) == 2 and name.startswith("model.resampler_model"):
            projections["resampler"] += math.prod(shape)
    assert config.vision is not None
    cost = vision_cost(config.vision, config.hidden_size)
    assert cost == 4 * projections["tower"] + projections["resampler"]
    with_vision, text = layer_costs(config, 100), layer_costs(replace(config, vision=None), 100)
    assert with_vision == replace(text, first=text.first + PICTURE_SHARE * cost)


def test_a_large_tower_leaves_the_first_stage_fewer_layers() -> None:
    config = ModelConfig.from_dict(CONFIG)
    assert config.vision is not None
    tower = replace(config.vision, depth=20)
    costs = [layer_costs(replace(config, num_hidden_layers=8, vision=vision), 100) for vision in (None, tower)]
    first_stages = [split_layers(8, 2, "balanced", each)[0] for each in costs]
    assert len(first_stages[1]) < len(first_stages[0])
