import json
import math
import random
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.data_runs import PACKINGS, build, lines_of, numbered_conversations, rows_of, run, same, steps, write

from erniekit.data.chat.encode import Encoder
from erniekit.utils.errors import DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return numbered_conversations(tmp_path_factory.mktemp("data"))


# --- one global stream


@pytest.mark.parametrize("packing", PACKINGS)
def test_each_epoch_gives_every_sample_once_and_steps_span_epochs(data, packing):
    with build(data, num_train_epochs=3, **packing) as loader:
        planned, taken = math.ceil(loader.rows_left() / 4), steps(loader)
        report = loader.report()
    lines = lines_of(taken)
    for epoch in range(3):
        assert sorted(lines[60 * epoch : 60 * epoch + 60]) == list(range(1, 61)) or packing["packing"]
    assert Counter(lines) == dict.fromkeys(range(1, 61), 3)
    assert lines[:60] != lines[60:120]
    rows = [len(rows_of(step)) for step in taken]
    assert rows[:-1] == [4] * (len(taken) - 1) and 1 <= rows[-1] <= 4  # no gap where an epoch ends
    assert len(taken) == planned
    assert report["samples"] == 180 and report["rows"] == sum(rows) and report["epoch"] == 3.0
    assert all(len(row[0]) <= 64 for step in taken for row in rows_of(step))


def test_a_fraction_of_an_epoch(data):
    lines = lines_of(run(data, num_train_epochs=1.5, packing=False))
    assert sorted(lines[:60]) == list(range(1, 61)) and len(lines) == 90 == 60 + len(set(lines[60:]))


def test_max_steps_goes_on_over_epochs(data):
    with build(data, max_steps=100, num_train_epochs=1, packing=False) as loader:
        assert len(steps(loader, 40)) == 40
        assert loader.report()["epoch"] > 2


LAYOUTS = [(w, b, 12 // (w * b)) for w in (1, 2, 3, 4, 6, 12) for b in (1, 2, 3, 4, 6, 12) if 12 % (w * b) == 0]


@settings(max_examples=15)
@given(layout=st.sampled_from(LAYOUTS), packing=st.sampled_from(PACKINGS), workers=st.sampled_from([0, 0, 0, 0, 2]))
def test_ranks_batch_size_and_accumulation_do_not_change_a_step(data, layout, packing, workers):
    world, batch_size, accumulation = layout
    keys = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "num_train_epochs": 2, **packing}
    reference = run(data, batch_size=12, gradient_accumulation_steps=1, num_train_epochs=2, **packing)
    ranks = [run(data, rank=r, world=world, dataloader_num_workers=workers * (r == 0), **keys) for r in range(world)]
    assert len({len(rank) for rank in ranks}) == 1 and len(ranks[0]) == len(reference)
    for step, whole in enumerate(reference):
        counts = [len(rank[step]) for rank in ranks]
        assert counts == counts[:1] * world and (step == len(reference) - 1 or counts[0] == accumulation)
        assert (
            all(len(batch.row_lengths) == batch_size for rank in ranks for batch in rank[step])
            or step == len(reference) - 1
        )
        ordered = [rank[step][m] for m in range(counts[0]) for rank in ranks]
        assert rows_of(ordered) == rows_of(whole)


def test_a_rank_without_rows_in_the_last_step_gets_a_batch_without_tokens(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"src": "q", "tgt": "a"}] * 5)
    ranks = [run(path, rank=r, world=4, batch_size=1, gradient_accumulation_steps=1, packing=False) for r in range(4)]
    assert [len(rank) for rank in ranks] == [2] * 4
    assert [rank[1][0].num_samples for rank in ranks] == [1, 0, 0, 0]
    assert ranks[3][1][0].num_tokens == 0 and ranks[3][1][0].row_lengths == []


def test_seed_decides_the_order(data):
    assert same(run(data), run(data))
    assert not same(run(data), run(data, seed=43))
    assert lines_of(run(data, random_shuffle=False, packing=False)) == list(range(1, 61))


def test_sources_are_mixed_by_share(data, tmp_path):
    other = write(tmp_path / "b.jsonl", [{"instruction": "q", "output": "a"}] * 5)
    keys = {"train_dataset_type": "erniekit,alpaca", "train_dataset_prob": "0.75,0.25", "packing": False}
    paths = f"{data},{other}"
    taken = run(paths, 100, mix_strategy="random", max_steps=100, **keys)
    files = [Path(where.rsplit(":", 1)[0]).name for step in taken for batch in step for where in batch.sources]
    assert 0.7 < files.count("train.jsonl") / 400 < 0.8
    assert len(lines_of(run(paths, mix_strategy="concat", **keys))) == 65
    over = run(paths, mix_strategy="interleave_over", **keys)
    assert len({where for step in over for batch in step for where in batch.sources}) == 65


# --- the place in the data


@settings(max_examples=20)
@given(
    packing=st.sampled_from(PACKINGS),
    stop=st.integers(0, 60),
    workers=st.sampled_from([0, 0, 0, 0, 0, 1]),
    more=st.sampled_from(
        [{}, {"stage": "PT", "max_seq_len": 24, "buffer_size": 3}, {"max_steps": 1000, "mix_strategy": "random"}]
    ),
)
def test_resume_at_any_step_gives_what_an_unbroken_run_gives(data, packing, stop, workers, more):
    path = data
    if more.get("stage") == "PT":
        path = data.parent / "text.jsonl"
        if not path.exists():
            write(path, [{"text": chr(0x4E00 + i) * (1 + i * 7 % 90)} for i in range(30)])
    keys = {"num_train_epochs": 2, "batch_size": 1, **packing, **more}
    with build(path, **keys) as loader:
        whole = []
        for _ in range(70):
            try:
                whole.append((loader.next_step(), loader.report(), loader.state_dict()))
            except StopIteration:
                break
    stop = min(stop, len(whole) - 1)
    with build(path, **keys) as first:
        steps(first, stop)
        time.sleep(0.005 * (stop % 3))  # let it prefetch, or not
        state = json.loads(json.dumps(first.state_dict()))
    with build(path, dataloader_num_workers=workers, **keys) as second:
        second.load_state_dict(state)
        assert second.report() == first.report()
        for batches, report, later in whole[stop:]:
            assert rows_of(second.next_step()) == rows_of(batches)
            assert second.report() == report
            assert second.state_dict() == later


def test_a_state_can_be_loaded_into_a_running_loader_and_under_another_layout(data):
    reference = run(data, batch_size=4, gradient_accumulation_steps=1)
    with build(data) as loader:
        steps(loader, 2)
        state = loader.state_dict()
        steps(loader, 3)
        loader.load_state_dict(state)
        assert same([loader.next_step()], reference[2:3])
    with build(data, batch_size=1, gradient_accumulation_steps=4) as other:
        other.load_state_dict(state)
        assert same(steps(other), reference[2:])


def test_a_state_of_other_data_is_refused(data, tmp_path):
    with build(data) as loader:
        state = loader.state_dict()
    longer = write(tmp_path / "b.jsonl", [json.loads(line) for line in data.read_text().splitlines()] * 2)
    for keys, what in [
        ({"seed": 1}, "seed was 42 and is now 1"),
        ({"max_seq_len": 80}, "max_seq_len was 64 and is now 80"),
    ]:
        with build(data, **keys) as other, pytest.raises(DataError, match=what):
            other.load_state_dict(state)
    with build(longer) as other, pytest.raises(DataError, match=r"number of samples was \[60\] and is now \[120\]"):
        other.load_state_dict(state)
    with build(data) as other, pytest.raises(DataError, match="version"):
        other.load_state_dict({**state, "version": 0})


def test_resume_encodes_only_the_current_window(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"src": "q", "tgt": "a" * (i % 20 + 1)} for i in range(400)])
    with build(path, max_estimate_samples=1) as loader:
        taken = steps(loader)
    with build(path, max_estimate_samples=1) as loader:
        steps(loader, len(taken) - 2)
        state = loader.state_dict()
    encoded = []
    original = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, *record: encoded.append(record[2]) or original(self, *record))
    with build(path, max_estimate_samples=1) as loader:
        loader.load_state_dict(state)
        assert same(steps(loader), taken[-2:])
    assert len(encoded) < 60


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=12)
@given(
    epochs=st.tuples(st.sampled_from([0.3, 1, 1.5, 1.9]), st.sampled_from([2, 2.5])),
    stop=st.integers(1, 60),
    batch=st.integers(1, 5),
)
def test_with_more_epochs_and_another_batch_every_sample_comes_as_often_as_it_should(
    data, packing, epochs, stop, batch
):
    keys = {"gradient_accumulation_steps": 1, **packing}
    with build(data, num_train_epochs=epochs[0], batch_size=1, **keys) as first:
        taken = steps(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
    with build(data, num_train_epochs=epochs[1], batch_size=batch, **keys) as second:
        second.load_state_dict(state)
        left = second.rows_left()
        rest = steps(second)
    assert sum(len(rows_of(step)) for step in rest) == left
    seen = Counter(lines_of(taken + rest))
    assert Counter(seen.values()) == ({2: 60} if epochs[1] == 2 else {2: 30, 3: 30})


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("stop", [3, 8, 14, 1000])
def test_with_fewer_epochs_nothing_is_left_behind_their_end(data, packing, stop):
    keys = {"gradient_accumulation_steps": 1, "batch_size": 1, **packing}
    with build(data, num_train_epochs=1, **keys) as first:
        taken = steps(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
    with build(data, num_train_epochs=0.5, **keys) as second:
        second.load_state_dict(state)
        left, rest = second.rows_left(), steps(second)
    assert len(rest) == left
    assert max(Counter(lines_of(taken + rest)).values()) == 1


def test_a_file_is_known_by_its_records_and_not_by_its_name(data, tmp_path):
    def content(path, text):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        with build(path) as loader:
            return loader.identity["content of train_dataset_path"]

    text = data.read_text()
    same = content(tmp_path / "b.jsonl", text)
    assert content(tmp_path / "other" / "c.jsonl", text.replace("\n", "\n\n").rstrip("\n")) == same
    assert content(tmp_path / "b.jsonl", text.replace('"src": "17"', '"src": "71"')) != same
    lines = text.splitlines(keepends=True)
    assert content(tmp_path / "b.jsonl", "".join([*lines[1:], lines[0]])) != same


# --- how many steps


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    "more", [{}, {"stage": "PT", "max_seq_len": 24}, {"mix_strategy": "interleave_over", "train_dataset_prob": "1,3"}]
)
def test_measured_steps_are_exact(data, tmp_path, packing, more):
    path = data
    if "stage" in more:
        path = write(tmp_path / "t.jsonl", [{"text": chr(0x4E00 + i) * (1 + i * 7 % 90)} for i in range(40)])
    if "mix_strategy" in more:
        other = write(tmp_path / "t.jsonl", [{"src": "q", "tgt": "a" * 20}] * 5)
        path, more = f"{data},{other}", {**more, "train_dataset_type": "erniekit,erniekit"}
    with build(path, num_train_epochs=3, batch_size=1, **packing, **more) as loader:
        assert loader.exact
        planned = loader.rows_left()
        taken = []
        while len(rows := [row for step in taken for row in rows_of(step)]) < planned:
            assert loader.rows_left() == planned - len(rows)
            taken += steps(loader, 1)
        assert loader.rows_left() == 0 and loader.epochs_done == 3 and steps(loader) == []


def test_measuring_encodes_every_sample_only_once(data, monkeypatch):
    encoded = Counter()
    original = Encoder.__call__
    monkeypatch.setattr(
        Encoder, "__call__", lambda self, *record: encoded.update([record[2]]) or original(self, *record)
    )
    with build(data, num_train_epochs=3) as loader:
        assert loader.rows_left()
        steps(loader)
    assert len(encoded) == 60 and set(encoded.values()) == {1}


def test_a_large_set_is_estimated_and_says_so(tmp_path, caplog):
    rng = random.Random(1)
    path = write(tmp_path / "a.jsonl", [{"src": "q", "tgt": "a" * rng.randint(1, 40)} for _ in range(2000)])
    with build(path, max_estimate_samples=300, batch_size=1, gradient_accumulation_steps=1) as loader:
        assert not loader.exact
        estimate = loader.rows_left()
        assert "(estimated from 300 samples)" in caplog.text
        assert abs(len(steps(loader)) / estimate - 1) < 0.15


def test_an_epoch_without_end_is_refused(tmp_path):
    paths = [str(write(tmp_path / f"{name}.jsonl", [{"src": "q", "tgt": "a"}] * 100)) for name in "ab"]
    shares = {"train_dataset_type": "erniekit,erniekit", "mix_strategy": "interleave_over"}
    with pytest.raises(DataError, match="share of 1e-09 make an epoch of about 100,000,000,000 samples"):
        build(",".join(paths), train_dataset_prob=f"{1 - 1e-9},1e-9", **shares)
    with build(",".join(paths), train_dataset_prob="0.99,0.01", packing=False, **shares) as loader:
        assert loader.rows_left() > 1000


# --- evaluation


@pytest.mark.parametrize("packing", PACKINGS)
def test_evaluation_reads_everything_once_in_order_as_often_as_asked(data, packing):
    keys = {"eval_dataset_path": str(data), "mix_strategy": "random", "max_steps": 7, **packing}
    with build(None, split="eval", **keys) as loader:
        passes = [list(loader.batches()) for _ in range(2)]
        assert loader.report()["samples"] == 60
    assert rows_of(passes[0]) == rows_of(passes[1])
    lines = lines_of([passes[0]])
    assert sorted(lines) == list(range(1, 61)) and (lines == sorted(lines) or packing["packing"])
    assert len(passes[0]) == math.ceil(len(rows_of(passes[0])) / 2)
    ranks = []
    for rank in range(3):
        with build(None, rank=rank, world=3, split="eval", **keys) as loader:
            ranks.append(list(loader.batches()))
    assert len({len(rank) for rank in ranks}) == 1
    assert rows_of([batch for together in zip(*ranks, strict=True) for batch in together]) == rows_of(passes[0])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_limited_evaluation_reads_the_same_rows_whatever_the_ranks(data, world):
    """The first 5 * batch_size rows; the ranks make the same number of batches of them."""
    keys = {"eval_dataset_path": str(data), "packing": False, "batch_size": 2}
    with build(None, split="eval", **keys) as loader:
        expected = rows_of(list(loader.batches()))[:10]
    ranks = []
    for rank in range(world):
        with build(None, rank=rank, world=world, split="eval", **keys) as loader:
            ranks.append(list(loader.batches(5)))
    assert {len(batches) for batches in ranks} == {math.ceil(5 / world)}
    assert rows_of([batch for together in zip(*ranks, strict=True) for batch in together]) == expected


def test_segments_never_mix_documents(data):
    for step in run(data):
        for batch in step:
            assert batch.num_segments == batch.num_samples >= len(batch.row_lengths)
            tokens = zip(batch.position_ids.tolist(), batch.segment_ids.tolist(), strict=True)
            for (p, s), (q, t) in pairwise(tokens):
                assert (t == s and q == p + 1) or (t == s + 1 and q == 0)


def test_epochs_of_less_than_a_sample_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"src": "q", "tgt": "a"}] * 40)
    with (
        build(path, num_train_epochs=0.01) as loader,
        pytest.raises(DataError, match=r"num_train_epochs: 0.01: less than one sample, since an epoch has 40"),
    ):
        loader.rows_left()
