"""The stream of rows over token files, against a plain reading of its definition."""

import json
import math
import random
import shutil
import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.data_runs import config, rows_of, same, steps
from support.fake_text import EOS, FakeTokenizer
from support.token_files import write_token_files

from erniekit.data.loader import build_loader
from erniekit.data.packed_batch import IGNORE
from erniekit.data.tokens import rows
from erniekit.data.tokens.files import TokenFile
from erniekit.utils.errors import DataError

KEYS = {"dataset_type": "pretrain", "stage": "PT", "max_seq_len": 16, "split": "1"}


def make(path, count, base, longest=40, seed=0):
    """`count` documents; every token but the end one occurs once in all documents: base, base + 1, ..."""
    rng, documents, at = random.Random(seed), [], base
    for _ in range(count):
        n = rng.choice((0, 1, 2, rng.randint(3, longest)))
        documents.append(np.array([*range(at, at + n), EOS]))
        at += n
    write_token_files(path, documents, "<i4")
    return [document.tolist() for document in documents]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Prefixes and documents of two files whose tokens are all different."""
    root = tmp_path_factory.mktemp("tokens")
    return {str(root / "a"): make(root / "a", 30, 1000), str(root / "b"): make(root / "b", 9, 100_000, seed=1)}


@pytest.fixture
def one(files):
    prefix = next(iter(files))
    return prefix, files[prefix]


def loader(input_dir, **keys):
    rank, world, part = keys.pop("rank", 0), keys.pop("world", 1), keys.pop("part", "train")
    cfg = config(None, **{**KEYS, "train_dataset_path": None, "input_dir": input_dir, **keys})
    return build_loader(cfg, FakeTokenizer(), part, rank, world)


def run(input_dir, count=10**9, **keys):
    with loader(input_dir, **keys) as opened:
        return steps(opened, count)


def flat(taken):
    return [row for step in taken for row in rows_of(step)]


def tokens_of(rows):
    return [token for row in rows for token in row[0]]


def expected_rows(stream, length, isolate):
    """The rows of a run of documents, by the definition: (ids, labels, positions, segments) each."""
    flow = [(token, n, i) for n, document in enumerate(stream) for i, token in enumerate(document)]
    rows = []
    for start in range(0, len(flow) - 1, length):
        part = flow[start : min(start + length, len(flow) - 1)]
        after = flow[start + 1 : start + 1 + len(part)]
        labels, positions, segments = [], [], []
        for (_, document, _), (token, next_document, _) in zip(part, after, strict=True):
            labels.append(token if document == next_document or not isolate else IGNORE)
        numbers = [document for _, document, _ in part]
        for place, document in enumerate(numbers):
            first = numbers.index(document) if isolate else 0
            positions.append(place - first)
            segments.append(1 + (sorted(set(numbers)).index(document) if isolate else 0))
        rows.append((tuple(token for token, _, _ in part), tuple(labels), tuple(positions), tuple(segments)))
    return rows


# --- one file


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("length", [2, 7, 16, 64, 5000])
def test_rows_are_cut_from_the_documents_in_a_row(one, length, isolate):
    prefix, documents = one
    keys = {"max_seq_len": length, "isolate_documents": isolate, "random_shuffle": False}
    assert flat(run(prefix, **keys)) == expected_rows(documents, length, isolate)
    assert flat(run(prefix, **keys, num_train_epochs=2)) == expected_rows(documents * 2, length, isolate)


def test_no_row_is_empty_where_the_tokens_just_fill_the_rows(one):
    prefix, documents = one
    size = sum(map(len, documents))
    for length in (size - 1, size, next(n for n in range(2, size) if (size - 1) % n == 0)):
        rows = flat(run(prefix, max_seq_len=length, random_shuffle=False))
        assert rows == expected_rows(documents, length, True) and len(tokens_of(rows)) == size - 1


@pytest.fixture
def rows_in_place(monkeypatch):
    """Rows as they follow one another in the source, documents shuffled all the same."""
    monkeypatch.setattr(rows.RowOrder, "start", lambda self, n: n * self._length)


def test_an_epoch_is_every_document_once_in_an_order_of_its_own(one, rows_in_place):
    prefix, documents = one
    rows = flat(run(prefix, num_train_epochs=3, isolate_documents=False))
    stream = [*tokens_of(rows), rows[-1][1][-1]]
    size = sum(map(len, documents))
    assert len(stream) == 3 * size and all(len(row[0]) == 16 for row in rows[:-1])
    orders = []
    for epoch in range(3):
        part, found = stream[epoch * size : (epoch + 1) * size], []
        while part:
            end = part.index(EOS) + 1
            found.append(tuple(part[:end]))
            part = part[end:]
        assert Counter(found) == Counter(map(tuple, documents))
        orders.append(found)
    assert orders[0] != orders[1] != orders[2] != [tuple(document) for document in documents]
    assert rows == flat(run(prefix, num_train_epochs=3, isolate_documents=False))
    assert stream[:size] != tokens_of(flat(run(prefix, seed=7, isolate_documents=False)))[:size]


def test_rows_come_shuffled_within_their_epoch(one, monkeypatch):
    prefix, documents = one
    size, keys = sum(map(len, documents)), {"num_train_epochs": 4, "isolate_documents": False}
    shuffled = flat(run(prefix, **keys))
    with monkeypatch.context() as patch:
        patch.setattr(rows.RowOrder, "start", lambda self, n: n * self._length)
        in_place = flat(run(prefix, **keys))
    assert Counter(shuffled) == Counter(in_place) and shuffled != in_place
    ends = [math.ceil(epoch * size / 16) for epoch in range(5)]
    orders = []
    for first, end in pairwise(ends):
        assert Counter(shuffled[first:end]) == Counter(in_place[first:end])
        assert shuffled[end - 1] == in_place[end - 1]  # the one that leads into the next epoch
        orders.append([in_place[first:end].index(row) for row in shuffled[first:end]])
    assert len({tuple(order[:14]) for order in orders}) == 4


def test_every_target_of_a_document_is_learnt_exactly_once(one):
    prefix, documents = one
    pairs = Counter()
    for ids, labels, positions, _ in flat(run(prefix)):
        pairs.update((a, b) for a, b in zip(ids, labels, strict=True) if b != IGNORE)
        assert positions[0] == 0
    assert pairs == Counter((a, b) for document in documents for a, b in pairwise(document))


def test_the_end_of_a_document_has_no_target_unless_documents_are_joined(one):
    prefix, _ = one
    for ids, labels, *_ in flat(run(prefix)):
        assert all(label == IGNORE for token, label in zip(ids, labels, strict=True) if token == EOS)
    joined = flat(run(prefix, isolate_documents=False))
    assert all(label != IGNORE for _, labels, _, _ in joined for label in labels)
    assert all(set(segments) == {1} for _, _, _, segments in joined)


def test_each_part_of_a_row_names_its_document(one):
    prefix, documents = one
    for step in run(prefix):
        for batch in step:
            assert batch.num_samples == batch.num_segments
            for number, where in enumerate(batch.sources):
                file, document = where.split(":document ")
                ids = batch.input_ids[batch.segment_ids == number]
                assert file == prefix and set(ids.tolist()) <= set(documents[int(document)])


# --- one global stream


LAYOUTS = [(w, b, 12 // (w * b)) for w in (1, 2, 3, 4, 6, 12) for b in (1, 2, 3, 4, 6, 12) if 12 % (w * b) == 0]


@settings(max_examples=25)
@given(layout=st.sampled_from(LAYOUTS), isolate=st.booleans(), mixed=st.booleans())
def test_ranks_batch_size_and_accumulation_do_not_change_a_step(files, layout, isolate, mixed):
    world, batch_size, accumulation = layout
    a, b = files
    keys = {"input_dir": f"3 {a} 1 {b}" if mixed else a, "isolate_documents": isolate, "num_train_epochs": 1.7}
    reference = run(**keys, batch_size=12, gradient_accumulation_steps=1)
    split = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    ranks = [run(**keys, **split, rank=rank, world=world) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1 and len(ranks[0]) == len(reference)
    for number, whole in enumerate(reference):
        microbatches = len(ranks[0][number])
        ordered = [rank[number][m] for m in range(microbatches) for rank in ranks]
        assert rows_of(ordered) == rows_of(whole)


@settings(max_examples=25)
@given(stop=st.integers(0, 40), epochs=st.sampled_from([1.0, 1.5, 4.0]), mixed=st.booleans(), isolate=st.booleans())
def test_a_resumed_loader_goes_on_exactly(files, stop, epochs, mixed, isolate):
    a, b = files
    keys = {"input_dir": f"3 {a} 1 {b}" if mixed else a, "isolate_documents": isolate, "num_train_epochs": epochs}
    keys |= {"long_document_min_tokens": 20, "long_document_weight": 2, "batch_size": 1}
    with loader(**keys) as opened:
        whole = [(opened.next_step(), opened.report()) for _ in range(math.ceil(opened.rows_left() / 2))]
        assert steps(opened) == []
    stop = min(stop, len(whole) - 1)
    with loader(**keys) as first:
        steps(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
    assert state["position"]["row"] == 2 * stop
    with loader(**keys) as second:
        second.load_state_dict(state)
        for step, report in whole[stop:]:
            assert same([second.next_step()], [step]) and second.report() == report


@pytest.mark.parametrize("epochs", [(1, 2), (0.4, 2), (1.3, 2.2), (2, 1)])
@pytest.mark.parametrize("isolate", [True, False])
def test_with_more_epochs_no_token_is_left_out_or_comes_twice(one, epochs, isolate):
    prefix, _ = one
    keys = {"batch_size": 1, "gradient_accumulation_steps": 1, "isolate_documents": isolate}
    with loader(prefix, num_train_epochs=epochs[0], **keys) as opened:
        taken = steps(opened)
        state = json.loads(json.dumps(opened.state_dict()))
    with loader(prefix, num_train_epochs=epochs[1], **(keys | {"batch_size": 3})) as opened:
        opened.load_state_dict(state)
        left, rest = opened.rows_left(), steps(opened)
        assert sum(len(rows_of(step)) for step in rest) == left
        tokens = opened.report()["tokens"]
    with loader(prefix, num_train_epochs=max(epochs), **keys) as opened:
        whole = steps(opened)
    assert sorted(tokens_of(flat(taken + rest))) == sorted(tokens_of(flat(whole)))
    assert tokens == len(tokens_of(flat(whole)))


def test_edited_token_files_are_noticed(one, tmp_path):
    prefix, _ = one
    with loader(prefix) as opened:
        before = opened.identity
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"b{suffix}")
    with loader(str(tmp_path / "b")) as opened:
        assert opened.identity == before
    file = tmp_path / "b.bin"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    with loader(str(tmp_path / "b")) as opened:
        assert {key for key in before if before[key] != opened.identity[key]} == {"content of each file"}


def test_resuming_reads_nothing_again(one, monkeypatch):
    prefix, _ = one
    keys = {"num_train_epochs": 50, "batch_size": 1, "gradient_accumulation_steps": 1, "prefetch_factor": 1}
    with loader(prefix, **keys) as opened:
        total = int(opened.rows_left())
    read = Counter()
    original = TokenFile.read
    monkeypatch.setattr(
        TokenFile, "read", lambda self, *what: read.update(tokens=what[2] - what[1]) or original(self, *what)
    )
    with loader(prefix, **keys) as opened:
        state = opened.state_dict() | {"position": {"row": total - 1, "counts": {}}}
        opened.load_state_dict(state)
        assert len(steps(opened)) == 1
    assert read["tokens"] <= 17


def test_a_state_of_other_data_is_refused(files):
    a, b = files
    with loader(a) as opened:
        state = opened.state_dict()
    for keys, expected in [
        ({"input_dir": b}, r"documents of each file was \[30\] and is now \[9\]"),
        ({"input_dir": f"1 {a} 1 {b}"}, "weights of input_dir was"),
        ({"input_dir": a, "split": "1,1"}, "split was '1' and is now '1,1'"),
        ({"input_dir": a, "isolate_documents": False}, "isolate_documents was True"),
        ({"input_dir": a, "long_document_min_tokens": 5}, "long_document_min_tokens was None"),
        ({"input_dir": a, "max_seq_len": 17}, "max_seq_len was 16"),
    ]:
        with loader(**keys) as other, pytest.raises(DataError, match=expected):
            other.load_state_dict(state)
    with loader(a, batch_size=1, num_train_epochs=9) as other:
        other.load_state_dict(state)


# --- how long it is


@pytest.mark.parametrize("epochs", [0.01, 0.5, 1.0, 2.25])
def test_the_number_of_steps_is_known_from_the_lengths(files, epochs, caplog):
    a, b = files
    total = sum(len(document) for documents in files.values() for document in documents)
    with loader(f"1 {a} 1 {b}", num_train_epochs=epochs, batch_size=1, gradient_accumulation_steps=1) as opened:
        planned, taken = opened.rows_left(), steps(opened)
        assert opened.exact and len(taken) == planned and opened.rows_left() == 0
        assert opened.epochs_done == int(epochs)
        report = opened.report()
    wanted = max(2, round(epochs * total)) - 1
    assert report["tokens"] == wanted == len(tokens_of(flat(taken)))
    assert report["rows"] == planned == sum(report["rows_by_source"].values())
    assert f"an epoch is {total} tokens in {math.ceil((total - 1) / 16)} rows of 16" in caplog.text
    assert abs(report["epoch"] - wanted / total) < 1e-4 and report["cut"] == report["dropped"] == 0


def test_max_steps_goes_on_over_epochs(one):
    prefix, _ = one
    with loader(prefix, max_steps=60) as opened:
        rows = flat(steps(opened, 60))
        assert opened.report()["epoch"] > 2
    assert len(rows) == 240 and all(len(row[0]) == 16 for row in rows)


# --- mixing


def test_files_are_mixed_by_weight_and_each_read_in_its_own_order(files, rows_in_place):
    a, b = files
    with loader(f"1 {a} 3 {b}", max_steps=400, batch_size=1, isolate_documents=False) as opened:
        rows = flat(steps(opened, 400))
        report = opened.report()["rows_by_source"]
    of_b = [row for row in rows if any(token >= 100_000 for token in row[0])]
    assert report[b] + report[a] == len(rows) == 800 and abs(report[b] / 800 - 0.75) < 0.06
    size = sum(map(len, files[b]))
    stream = [token for token in tokens_of(of_b) if token != EOS]
    first = [token for token in tokens_of(of_b)[:size] if token != EOS]
    assert Counter(first) == Counter(range(100_000, 100_000 + len(first)))  # a whole epoch before any token again
    assert len(stream) > 3 * len(first)


def test_weights_may_be_anything_and_without_them_files_weigh_what_they_hold(files):
    a, b = files
    assert same(run(f"0.4 {a} 0.6 {b}", 20), run(f"4 {a}.bin 6 {b}.idx", 20))
    with loader(f"{a} {b}", max_steps=10**6, batch_size=50) as opened:
        steps(opened, 40)
        report = opened.report()["rows_by_source"]
    sizes = {prefix: sum(map(len, documents)) for prefix, documents in files.items()}
    assert abs(report[a] / 4000 - sizes[a] / sum(sizes.values())) < 0.03


def test_a_file_named_twice_is_two_sources(one):
    prefix, _ = one
    with loader(f"0.4 {prefix} 0.6 {prefix}", max_steps=30) as opened:
        first = flat(steps(opened, 30))
        assert opened.report()["rows_by_source"] == {prefix: 120}
    assert len({row[0] for row in first}) > 100  # in orders of their own


# --- the split


def test_training_and_evaluation_share_no_document(files):
    a, b = files
    keys = {"input_dir": f"0.4 {a} 0.6 {b}", "split": "6,3,1", "isolate_documents": False}
    trained = set(tokens_of(flat(run(**keys, num_train_epochs=5)))) - {EOS}
    with loader(**keys, part="eval") as opened:
        passes = [list(opened.batches()) for _ in range(2)]
        assert opened.report()["epoch"] > 0.9
    held_out = [documents[round(len(documents) * 0.6) : round(len(documents) * 0.9)] for documents in files.values()]
    expected = [row for documents in held_out for row in expected_rows(documents, 16, False)]
    assert rows_of(passes[0]) == rows_of(passes[1]) == expected
    assert not trained & set(tokens_of(rows_of(passes[0])))


def test_evaluation_reads_a_file_named_twice_once_on_every_rank(one):
    prefix, documents = one
    keys = {"input_dir": f"1 {prefix} 1 {prefix}", "split": "1,1", "part": "eval"}
    with loader(**keys) as opened:
        whole = list(opened.batches())
    assert rows_of(whole) == expected_rows(documents[15:], 16, True)
    ranks = []
    for rank in range(3):
        with loader(**keys, rank=rank, world=3) as opened:
            ranks.append(list(opened.batches()))
    assert len({len(rank) for rank in ranks}) == 1
    assert rows_of([batch for together in zip(*ranks, strict=True) for batch in together]) == rows_of(whole)


def test_text_can_be_evaluated_beside_token_files(one, tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_text('{"text": "hello"}\n')
    with loader(one[0], part="eval", eval_dataset_path=str(path)) as opened:
        assert sum(batch.num_samples for batch in opened.batches()) == 1


def test_a_split_that_leaves_nothing_says_so(one, tmp_path):
    with pytest.raises(DataError, match=r"split: 998,1,1 leaves no text for eval of its 30 documents"):
        loader(one[0], split="998,1,1", part="eval")
    with pytest.raises(DataError, match=r"leaves no text for train"):
        loader(one[0], split="0,1")


@pytest.mark.parametrize("documents", [[[5]], [[], []]])
def test_documents_without_a_token_to_predict_are_not_called_a_matter_of_the_split(documents, tmp_path):
    write_token_files(tmp_path / "x", [np.array(document, np.int64) for document in documents], "<u2")
    with pytest.raises(DataError, match=f"{len(documents)} documents? for train with fewer than two tokens"):
        loader(str(tmp_path / "x"), split="1,0,0")


# --- long documents


@pytest.mark.parametrize("weight", [1, 2, 5])
def test_long_documents_come_so_often_in_every_epoch(one, rows_in_place, weight, caplog):
    prefix, documents = one
    long = [document for document in documents if len(document) >= 20]
    keys = {"long_document_min_tokens": 20, "long_document_weight": weight, "isolate_documents": False}
    rows = flat(run(prefix, **keys, num_train_epochs=2, batch_size=1))
    stream = Counter([*tokens_of(rows), rows[-1][1][-1]])
    for document in documents:
        for token in set(document) - {EOS}:
            assert stream[token] == 2 * (weight if document in long else 1)
    with loader(prefix, **keys, batch_size=1) as opened:
        steps(opened)
        report = opened.report()
    assert report["long_documents"] == weight * len(long)
    begun = len(documents) + (weight - 1) * len(long)
    assert report["samples"] in (begun - 1, begun)  # a last document of one token is only the last target
    assert f"{len(long)} of 30 documents with 20 tokens or more; each comes {weight} time" in caplog.text
    in_order = flat(run(prefix, **keys, random_shuffle=False))
    repeated = [document for document in documents for _ in range(weight if document in long else 1)]
    assert in_order == expected_rows(repeated, 16, False)


def test_evaluation_does_not_repeat_long_documents(one):
    prefix, documents = one
    keys = {"split": "1,1", "long_document_min_tokens": 20, "long_document_weight": 3, "part": "eval"}
    with loader(prefix, **keys) as opened:
        assert rows_of(opened.batches()) == expected_rows(documents[15:], 16, True)


# --- what is said, and what is refused


def test_what_is_read_is_said(one, tmp_path, caplog):
    documents = [np.array([20, 21]), np.array([], np.int64), np.array([22, EOS])]
    write_token_files(tmp_path / "x", documents, "<u2")
    run(str(tmp_path / "x"))
    assert "x: 3 of its 3 documents, 1 of them empty and ignored; 4 tokens" in caplog.text
    assert f"x: no end token (id {EOS}) after 1 of 2 documents that were checked" in caplog.text
    caplog.clear()
    run(one[0])
    assert "end token" not in caplog.text


def test_an_id_of_another_vocabulary_stops_the_run_with_its_place(tmp_path, monkeypatch):
    ids = np.full(3_000_000, 20)
    ids[150_001] = 60_000
    write_token_files(tmp_path / "x", [ids], "<u2")
    monkeypatch.setattr("support.fake_text.FakeTokenizer.vocab_size", 60_000)
    expected = pytest.raises(DataError, match=r"x.bin: document 0, token 150001: id 60000 is not in the tokenizer's")
    with loader(str(tmp_path / "x"), max_seq_len=50_000, batch_size=1) as opened, expected:
        steps(opened)


def test_nothing_as_large_as_the_corpus_is_held(tmp_path):
    document = np.arange(1000, 5000)
    write_token_files(tmp_path / "x", (document for _ in range(1500)), "<u2")  # 12 MB of ids
    tracemalloc.start()
    try:
        with loader(str(tmp_path / "x"), max_steps=300, max_seq_len=1024) as opened:
            for _ in range(300):
                opened.next_step()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3e6
