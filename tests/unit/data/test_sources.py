import csv
import json
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest

from erniekit.data.files import load_record
from erniekit.data.order import Order, permutation
from erniekit.data.sources import Dataset, Source, SourceSpec, read_specs
from erniekit.utils.errors import DataError

RECORDS = [{"src": f"question {i} 问", "tgt": f"answer {i}"} for i in range(7)]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def open_source(path, type_name="erniekit", on_bad_line="error"):
    return Source(SourceSpec(str(path), type_name, 1.0), "train", on_bad_line)


def contents(source):
    return [load_record(*source.record(i)) for i in range(len(source))]


def lines(source):
    return [source.record(i)[1].rsplit(":", 1)[1] for i in range(len(source))]


def test_jsonl_is_indexed_past_blank_lines_bom_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    body = "\n\r\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
    path.write_bytes(b"\xef\xbb\xbf" + body.encode())
    source = open_source(path)
    assert contents(source) == RECORDS
    assert lines(source) == [str(1 + 2 * i) for i in range(7)]
    assert source.record(3)[1] == f"{path}:7"


@pytest.mark.parametrize("indent", [None, 2])
def test_json_list(tmp_path, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORDS, ensure_ascii=False, indent=indent), encoding="utf-8")
    source = open_source(path)
    assert contents(source) == RECORDS
    assert lines(source) == (["1"] * 7 if indent is None else [str(2 + 4 * i) for i in range(7)])


def test_json_file_that_is_really_json_lines(tmp_path):
    assert contents(open_source(write_jsonl(tmp_path / "a.json", RECORDS))) == RECORDS


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"src": "a", "tgt": "b"},\n {"src": "a" "tgt": "b"}]', r"a.json:2: the list cannot be read as JSON"),
        ('[{"src": "a", "tgt": "b"}\n', r"expected ',' or '\]' after a record, found 'the end of the file'"),
        ('[{"src": "a", "tgt": "b"}] x', "text after the end"),
        ("[]", "no record to read"),
        ("", "no record to read"),
    ],
)
def test_broken_json_list(tmp_path, text, reason):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        open_source(path, on_bad_line="skip")


def test_csv_with_quotes_line_breaks_and_json_cells(tmp_path):
    path = tmp_path / "a.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "input", "output", "history"])
        writer.writerow(["a, b\nc", "", 'say "x"', ""])
        writer.writerow(["q", "问", "a", '[["h", "i"]]'])
    source = open_source(path, "alpaca")
    assert contents(source) == [
        {"instruction": "a, b\nc", "output": 'say "x"'},
        {"instruction": "q", "input": "问", "output": "a", "history": [["h", "i"]]},
    ]
    assert lines(source) == ["2", "4"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("src,tgt\na,b,c\n", "a.csv:2: 3 cells for 2 columns"),
        ("src,src\na,b\n", "a.csv:1: the header has an empty or repeated column"),
        ("src,tgt\na,b\nc,'d\n" + 'e,"f\n', "a.csv:4: not CSV"),
        ("messages\n[1\n", "a.csv:2: the cell of column 'messages' must hold JSON"),
        ("src,tgt\n", "no record"),
    ],
)
def test_broken_csv(tmp_path, text, reason):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        open_source(path)


def test_parquet_loses_no_field_and_invents_none(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}], "label": [0]},
    ]
    parquet.write_table(
        pyarrow.Table.from_pylist(records, pyarrow.Table.from_pylist(records[1:]).schema), tmp_path / "a.parquet"
    )
    source = open_source(tmp_path / "a.parquet", "messages")
    assert contents(source) == records
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        open_source(tmp_path / "b.parquet", "messages")


def test_a_directory_is_read_in_sorted_order_and_names_what_it_passes_over(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "b.jsonl", RECORDS[:2])
    write_jsonl(tmp_path / "a.txt", RECORDS[2:3])
    write_jsonl(tmp_path / "sub" / "c.jsonl", RECORDS[3:])
    write_jsonl(tmp_path / ".hidden.jsonl", RECORDS)
    (tmp_path / "README.md").write_text("about")
    source = open_source(tmp_path)
    assert contents(source) == [RECORDS[2], *RECORDS[:2], *RECORDS[3:]]
    assert source.record(0)[1] == f"{tmp_path / 'a.txt'}:1"


def test_a_directory_without_data_and_a_file_of_another_kind(tmp_path):
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(DataError, match="no data file in this directory"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="a data file ends in"):
        open_source(tmp_path / "README.md")


BAD_LINES = [
    '{"src": "a"',
    '{"src": "a"}',
    '{"src": "a", "tgt": "b", "tgts": 1}',
    '{"src": ["a"], "tgt": ["b"], "tgt": ["c"]}',
    '{"src": ["a"], "tgt": ["b"], "metadata": {"n": 1, "n": 2}}',
    '{"src": ["a"], "tgt": ["b"], "metadata": {"n": ' + "7" * 5000 + "}}",
    '{"src": ["a"], "tgt": ["b"], "metadata": {"n": [NaN]}}',
    '{"src": ["a"], "tgt": ["b"], "metadata": {"n": -1e999}}',
    '{"src": ["a"], "tgt": ["b"], "metadata": ' + "[" * 10000 + "]" * 10000 + "}",
    '{"src": ["a"], "tgt": ["\\ud83d"]}',
    '["a"]',
    '{"src": "\udcff", "tgt": "b"}',
]


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_stops_with_file_line_reason_and_hint(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    good = json.dumps(RECORDS[0])
    path.write_bytes(f"{good}\n{bad}\n{good}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"a.jsonl:2: .*Hint: .*on_bad_line: skip"):
        open_source(path)


def test_bad_lines_are_skipped_and_counted_when_asked(tmp_path):
    path = tmp_path / "a.jsonl"
    good = [json.dumps(record) for record in RECORDS]
    bad = [*BAD_LINES, "1", "2"]
    mixed = [line for pair in zip_longest(good, bad) for line in pair if line is not None]
    path.write_bytes("\n".join(mixed).encode("utf-8", "surrogateescape"))
    source = open_source(path, on_bad_line="skip")
    assert (len(source), source.bad_lines) == (7, len(bad))
    assert contents(source) == RECORDS and lines(source) == ["1", "3", "5", "7", "9", "11", "13"]
    assert Dataset([source, source]).bad_lines == 2 * len(bad)


def test_a_file_that_is_missing_or_changes_under_the_run(tmp_path):
    with pytest.raises(DataError, match=r"train_dataset_path: there is no file or directory '.*nothing.jsonl'"):
        open_source(tmp_path / "nothing.jsonl")
    source = open_source(write_jsonl(tmp_path / "a.jsonl", RECORDS))
    write_jsonl(tmp_path / "a.jsonl", RECORDS + RECORDS)
    with pytest.raises(DataError, match="changed since the run began"):
        source.record(0)


def test_dataset_numbers_the_records_of_its_sources_through(tmp_path):
    first = open_source(write_jsonl(tmp_path / "a.jsonl", RECORDS[:3]))
    second = open_source(write_jsonl(tmp_path / "b.jsonl", [{"text": "t"}]), "text")
    dataset = Dataset([first, second])
    assert (len(dataset), dataset.sizes) == (4, [3, 1])
    type_name, raw, where = dataset.record(3)
    assert (type_name, load_record(raw, where), where) == ("text", {"text": "t"}, f"{tmp_path / 'b.jsonl'}:1")
    assert dataset.record(2)[0] == "erniekit"


def test_read_specs():
    specs = read_specs("a.jsonl, b.jsonl", "erniekit,chatml", "3,1", "train")
    assert specs == [SourceSpec("a.jsonl", "erniekit", 0.75), SourceSpec("b.jsonl", "messages", 0.25)]
    assert read_specs(["a", "b"], None, None, "eval") == [
        SourceSpec("a", "erniekit", 0.5),
        SourceSpec("b", "erniekit", 0.5),
    ]
    assert read_specs("a", "erniekit", "1.0", "train", "PT") == [SourceSpec("a", "text", 1.0)]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((None, None, None, "eval"), "eval_dataset_path is not set"),
        (
            ("a,b", "erniekit", "1,1", "train"),
            "train_dataset_path has 2 entries, train_dataset_type 1 and train_dataset_prob 2",
        ),
        (("a", "ernikit", "1", "train"), "unknown type 'ernikit'. Hint: the types are erniekit"),
        (("a,b", None, "1,0", "train"), "'0' is not a positive number"),
        (("a", None, "x", "train"), "'x' is not a positive number"),
        (("a", "alpaca", None, "train", "PT"), "stage PT reads pretraining text"),
    ],
)
def test_read_specs_errors(arguments, reason):
    with pytest.raises(DataError, match=reason):
        read_specs(*arguments)


def test_permutation_is_one_and_depends_on_every_part_of_its_key():
    orders = [tuple(permutation(50, key)) for key in [(1, 0), (1, 1), (2, 0), (0, 1)]]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == 4
    assert orders[0] == tuple(permutation(50, (1, 0)))


def test_the_order_is_the_same_on_every_machine_and_release():
    assert permutation(10, (42, 0)).tolist() == [6, 2, 5, 7, 0, 9, 4, 3, 8, 1]


SIZES, PROBS = [5, 40, 20], [0.2, 0.5, 0.3]


def source_of(ids):
    return np.searchsorted(np.cumsum(SIZES), ids, side="right")


def test_concat_reads_everything_once_in_a_new_order_each_epoch():
    order = Order(SIZES, PROBS, "concat", seed=1, shuffle=True)
    assert all(sorted(order.round(e)) == list(range(65)) for e in range(3))
    assert order.round(0).tolist() != order.round(1).tolist()
    assert Order(SIZES, PROBS, "concat", 1, shuffle=False).round(4).tolist() == list(range(65))


def test_interleave_under_ends_with_the_first_source():
    order = Order(SIZES, PROBS, "interleave_under", seed=3, shuffle=True)
    for epoch in range(5):
        ids = order.round(epoch)
        counts = Counter(source_of(ids).tolist())
        ended = source_of(ids[-1:])[0]
        assert counts[ended] == SIZES[ended] and all(counts[s] < SIZES[s] for s in range(3) if s != ended)
        assert len(set(ids.tolist())) == len(ids)


def test_interleave_over_ends_when_everything_was_seen():
    order = Order(SIZES, PROBS, "interleave_over", seed=3, shuffle=True)
    for epoch in range(5):
        ids = order.round(epoch)
        assert set(ids.tolist()) == set(range(65))
        assert ids[-1] not in ids[:-1]  # the draw that ends the epoch is the first sight of its record
        for s, size in enumerate(SIZES):
            mine = ids[source_of(ids) == s].tolist()
            for walk in range(len(mine) // size):
                assert len(set(mine[walk * size : (walk + 1) * size])) == size


def test_random_follows_the_shares_and_walks_each_source_whole_before_repeating():
    order = Order(SIZES, PROBS, "random", seed=3, shuffle=True)
    rounds = [order.round(r) for r in range(2)]
    ids = np.concatenate(rounds)
    shares = np.bincount(source_of(ids)) / len(ids)
    assert np.abs(shares - PROBS).max() < 0.01
    for s, size in enumerate(SIZES):
        mine = ids[source_of(ids) == s]
        walks = mine[: len(mine) // size * size].reshape(-1, size)
        assert (np.sort(walks, axis=1) == np.sort(walks[0])).all()
    again = Order(SIZES, PROBS, "random", seed=3, shuffle=True).round(1)
    assert (again == rounds[1]).all()


def test_without_shuffling_mixed_sources_keep_their_own_order():
    ids = Order(SIZES, PROBS, "interleave_over", seed=3, shuffle=False).round(0)
    mine = ids[source_of(ids) == 1]
    assert mine.tolist() == [5 + i % 40 for i in range(len(mine))]


def test_of_a_hub_data_set_only_the_files_of_the_split_are_read(tmp_path, monkeypatch):
    for name in ("train-0.jsonl", "test-0.jsonl"):
        write_jsonl(tmp_path / name, RECORDS[: 2 if "test" in name else 5])
    monkeypatch.setattr("erniekit.hub.resolve_dataset", lambda *_: Path(tmp_path))
    assert len(Source(SourceSpec("owner/set", "erniekit", 1.0), "train")) == 5
    assert len(Source(SourceSpec("owner/set", "erniekit", 1.0), "eval")) == 2
    (tmp_path / "train-0.jsonl").unlink()
    with pytest.raises(DataError, match="no file there is for train"):
        Source(SourceSpec("owner/set", "erniekit", 1.0), "train")
