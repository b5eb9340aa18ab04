"""The cache gives the scores that the whole sequence gives, however the tokens arrive."""

import numpy as np
import pytest
from support.tiny_models import tiny_model

from erniekit.models.decoder import CausalLM
from erniekit.nn import kv_cache
from erniekit.nn.attention import HeadLayout
from erniekit.nn.rotary import Rotary


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return tiny_model(request.param)


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(3, 61, shape)


def last_scores(model: CausalLM, row: np.ndarray) -> np.ndarray:
    """Scores after the last token of one sequence [V], from the whole of it."""
    return model(row[None]).numpy()[0, -1]


def feed(model: CausalLM, cache: kv_cache.KVCache, rows: list[np.ndarray]) -> np.ndarray:
    """One step that appends a stretch to each row, padded on the right with a token that must not matter."""
    lengths = [len(row) for row in rows]
    padded = np.full((len(rows), max(lengths)), 9)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return model.extend(padded, lengths, cache).numpy()


@pytest.mark.parametrize("cuts", [[1] * 9, [9], [4, 1, 1, 3]])
def test_pieces_of_any_size(model: CausalLM, cuts: list[int]):
    ids = tokens(2, 9)
    cache = model.new_cache(2)
    start = 0
    for size in cuts:
        found = feed(model, cache, list(ids[:, start : start + size]))
        start += size
        expected = np.stack([last_scores(model, row[:start]) for row in ids])
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert cache.lengths.tolist() == [9, 9]


def test_rows_of_different_lengths_with_several_tokens_a_step(model: CausalLM):
    ids = tokens(3, 20)
    cache = model.new_cache(3)
    ends = np.zeros(3, dtype=int)
    for step in ([5, 1, 3], [1, 1, 1], [2, 7, 4], [1, 1, 1]):
        found = feed(model, cache, [row[end : end + new] for row, end, new in zip(ids, ends, step, strict=True)])
        ends += step
        expected = np.stack([last_scores(model, row[:end]) for row, end in zip(ids, ends, strict=True)])
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_growth_beyond_the_first_capacity_and_blocks_of_queries(model: CausalLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv_cache, "_QUERY_BLOCK", 16)
    ids = tokens(2, 300)
    cache = model.new_cache(2)
    feed(model, cache, [ids[0, :100], ids[1, :30]])
    found = feed(model, cache, [ids[0, 100:200], ids[1, 30:300]])
    assert cache.capacity >= 300
    expected = np.stack([last_scores(model, ids[0, :200]), last_scores(model, ids[1])])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_rows_leave_and_change_places(model: CausalLM):
    ids = tokens(4, 12)
    cache = model.new_cache(4)
    feed(model, cache, [row[: 6 + number] for number, row in enumerate(ids)])
    cache.keep([3, 1])
    found = feed(model, cache, [ids[3, 9:11], ids[1, 7:12]])
    expected = np.stack([last_scores(model, ids[3, :11]), last_scores(model, ids[1])])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert cache.lengths.tolist() == [11, 12]


def test_rows_join_and_leave_without_disturbing_the_others(model: CausalLM):
    ids = tokens(5, 200)
    whole, other = model.new_cache(2), model.new_cache(2)
    feed(model, whole, [ids[0, :6], ids[1, :140]])  # more than the other has room for
    feed(model, other, [ids[2, :3], ids[3, :9]])
    whole.add_rows(other, 8)
    assert whole.num_places == 8
    feed(model, whole, [ids[0, 6:7], ids[1, 140:141], ids[2, 3:4], ids[3, 9:10]])
    buffers = list(whole.keys)
    kept = whole.copy([3, 1])
    whole.keep([0, 3])  # the last row takes the place of one that leaves
    assert [buffer.data_ptr() for buffer in buffers] == [buffer.data_ptr() for buffer in whole.keys]
    late = model.new_cache(1)
    feed(model, late, [ids[4, :2]])
    whole.add_rows(late)
    found = feed(model, whole, [ids[0, 7:8], ids[3, 10:11], ids[4, 2:3]])
    expected = np.stack([last_scores(model, row) for row in (ids[0, :8], ids[3, :11], ids[4, :3])])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert whole.lengths.tolist() == [8, 11, 3] and whole.next_position.tolist() == [8, 11, 3]
    found = feed(model, kept, [ids[3, 10:12], ids[1, 141:142]])
    expected = np.stack([last_scores(model, ids[3, :12]), last_scores(model, ids[1, :142])])
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("which", [(0, None, 1, 0), (0, 0), (1,), (0, 1)])
def test_rows_begin_with_those_of_other_caches(model: CausalLM, which: tuple[int | None, ...]):
    ids = tokens(2, 200)
    others = [model.new_cache(1), model.new_cache(2)]
    feed(model, others[0], [ids[0, :150]])
    feed(model, others[1], [ids[1, :20], ids[0, :3]])
    counts = [140, 7]
    cache = model.new_cache(len(which))
    cache.begin_with([None if other is None else (others[other], counts[other]) for other in which], 143)
    starts = [0 if other is None else counts[other] for other in which]
    assert cache.lengths.tolist() == cache.next_position.tolist() == starts
    sources = [ids[0] if other is None else ids[other] for other in which]
    ends = [start + 2 + row for row, start in enumerate(starts)]
    found = feed(model, cache, [row[start:end] for row, start, end in zip(sources, starts, ends, strict=True)])
    expected = np.stack([last_scores(model, row[:end]) for row, end in zip(sources, ends, strict=True)])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    found = feed(model, others[0], [ids[0, 150:151]])
    np.testing.assert_allclose(found[0], last_scores(model, ids[0, :151]), atol=1e-4, err_msg="it is as it was")


@pytest.mark.parametrize("length", [4, 0])
def test_forgetting_the_end(model: CausalLM, length: int):
    old, new = tokens(1, 150)[0], tokens(1, 151)[0]
    cache = model.new_cache(1)
    feed(model, cache, [old])
    cache.truncate(length)
    found = feed(model, cache, [new[:140]])
    np.testing.assert_allclose(found[0], last_scores(model, np.append(old[:length], new[:140])), atol=1e-4)


def image_positions(before: int, shared: int, after: int) -> np.ndarray:
    """Text, then tokens that share one position and end on a larger one, then text that goes on behind it."""
    start = np.arange(before)
    image = np.repeat(before, shared)
    image[-1] = before + 2
    return np.concatenate([start, image, before + 3 + np.arange(after)])


def test_positions_need_not_be_places(model: CausalLM):
    ids = tokens(2, 16)
    positions = np.stack([image_positions(4, 6, 6), image_positions(2, 6, 8)])
    expected = model(ids, position_ids=positions).numpy()
    cache = model.new_cache(2)
    model.extend(ids[:, :12], np.array([10, 12]), cache, position_ids=positions[:, :12])
    assert cache.lengths.tolist() == [10, 12]
    assert cache.next_position.tolist() == [7, 9]  # padding of the first row does not count
    found = model.extend(ids[[0, 1], [[10, 12], [11, 13]]].T, np.array([2, 2]), cache).numpy()
    np.testing.assert_allclose(found, expected[[0, 1], [11, 13]], atol=1e-4)
    assert cache.next_position.tolist() == [9, 11]

    cache.keep([1])
    assert cache.next_position.tolist() == [11]
    for length, position in ((12, 9), (7, 3), (2, 2)):  # behind the image, within it, before it
        cache.truncate(length)
        assert cache.next_position.tolist() == [position]
    model.extend(ids[1:, 2:8], np.array([6]), cache, position_ids=positions[1:, 2:8])
    found = model.extend(ids[1:, 8:15], np.array([7]), cache).numpy()
    np.testing.assert_allclose(found, expected[1:, 14], atol=1e-4)
    cache.truncate(0)
    assert cache.next_position.tolist() == [0]


def test_the_next_position_follows_the_largest_on_any_axis():
    heads = HeadLayout(2, 1, 8)
    cache = kv_cache.KVCache(1, 1, heads, Rotary(8, 10000.0, time_frequencies=2))
    image = np.array([[[0, 0, 0], [1, 1, 1], [1, 2, 1], [1, 1, 3], [1, 2, 3]]])
    cache.begin_step(5, image)
    cache.end_step([5])
    assert cache.next_position.tolist() == [4]
