import csv
import gzip
import json
import logging
import os
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest

from erniekit.config.methods import METHODS
from erniekit.config.schema_data import DATASET_TYPES
from erniekit.data.records.dataset import Dataset, Source, SourceSpec, read_specs
from erniekit.data.records.formats import ALIASES, FORMATS
from erniekit.data.records.preference_formats import PREFERENCE_FORMATS
from erniekit.data.records.readers import load_record, open_file
from erniekit.data.sampler import Sampler, permutation
from erniekit.utils.errors import DataError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
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
        ('{\n  "data": [{"src": "a", "tgt": "b"}]\n}', r"a.json: begins with a JSON object that spans .*as one list"),
        ("[]", "no record to read. Hint"),
        ("", "no record to read. Hint"),
        ('{"src": "a"}', r"no record to read \(skipped 1 bad line\)"),
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


def test_empty_rows_of_a_spreadsheet_are_skipped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('src,tgt\na,b\n,\nc,d\n,\n"",\n')
    source = open_source(path)
    assert contents(source) == [{"src": "a", "tgt": "b"}, {"src": "c", "tgt": "d"}]
    assert lines(source) == ["2", "4"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("src,tgt\na,b,c\n", "a.csv:2: 3 cells for 2 columns"),
        ("src,src\na,b\n", "a.csv:1: the header has an empty or repeated column"),
        ("src,tgt\na,b\nc,'d\n" + 'e,"f\n', "a.csv:4: not CSV"),
        ("messages\n[1\n", "a.csv:2: the cell of column 'messages' must hold JSON"),
        ("src,tgt\n", "no record"),
        ("src;tgt\na;b\n", "a.csv:1: the header is a single column, 'src;tgt'.*commas, not with ';'"),
        ("src\ttgt\na\tb\n", "a.csv:1: the header is a single column.*commas"),
        ("src,tgt,\na,b,\n", "a.csv:1: the header has an empty .*delete empty columns"),
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


def test_a_data_set_that_was_saved_to_disk_as_arrow_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("dataset_dict.json", "train/dataset_info.json", "train/state.json", "train/data-00000-of-00001.arrow"):
        (tmp_path / name).write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match=r"no data file .* save_to_disk of `datasets` .* to_parquet or to_json"):
        open_source(tmp_path)


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


def test_a_file_that_is_cut_while_it_is_open(tmp_path):
    """Its handle is kept open, so only a look at its size tells."""
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    source = open_source(path)
    source.record(0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"a.jsonl: changed since the run began"):
        source.record(1)


def test_a_file_that_grows_while_it_is_scanned(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)

    def check(raw, where):
        if where.endswith(":3"):
            with open(path, "a") as file:
                file.write(json.dumps(RECORDS[0]))

    with pytest.raises(DataError, match=r"a.jsonl: changed since the run began"):
        open_file(path, check, lambda error: None)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", gzip.compress(b'{"src": "a", "tgt": "b"}', mtime=0), "compressed with gzip"),
        ("a.json", b"PK\x03\x04...", "a zip archive"),
        ("a.txt", b"Call me Ishmael.\nSome years ago", "plain text, where one JSON object.*`erniekit tokenize`"),
        ("a.jsonl", POINTER, "a pointer of Git LFS in place of the file.*git lfs pull"),
        ("a.parquet", POINTER, "a pointer of Git LFS in place of the file.*git lfs pull"),
        ("a.csv", "src,tgt\na,b".encode("utf-16"), "UTF-16 text"),
        ("a.txt", b"PAR1....", "a parquet file. whatever its name says. Hint: name it .parquet"),
        ("a.xlsx", b"PK\x03\x04...", "a data file ends in .*Hint: save the table as .csv"),
        ("a.tsv", b"src\ttgt\na\tb", "a data file ends in .*Hint: save the table as .csv"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "a data file ends in .*Hint: unpack it first"),
        ("a.jsonl", b"\x00" * 100, "a.jsonl:1: not JSON"),
        ("a.jsonl", '{"src": "问", "tgt": "b"}'.encode("gbk"), "a.jsonl:1: not UTF-8 text"),
        ("a.jsonl", b"", "no record to read"),
    ],
)
def test_files_of_another_form_are_told_by_their_content(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        open_source(tmp_path / name)


def test_a_directory_of_spreadsheets(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"PK\x03\x04...")
    with pytest.raises(DataError, match=r"it has a.xlsx.*save the table as .csv"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["b.jsonl.gz", "sub/b.JSON.zst"])
def test_a_compressed_data_file_in_a_directory_is_not_left_out(tmp_path, name):
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "a.jsonl", RECORDS[:2])
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name}: compressed, .* Hint: unpack it first"):
        open_source(tmp_path)
    write_jsonl((tmp_path / name).with_suffix(""), RECORDS[:1])
    (tmp_path / "figures.tar.gz").write_bytes(b"")
    assert len(open_source(tmp_path)) == 3


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a.jsonl: not a regular file"):
        open_source(tmp_path / "a.jsonl")


def test_a_record_of_a_json_list_with_a_number_too_long_is_skipped_alone(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"src": "a", "tgt": "b"},\n {"src": "a", "tgt": "b", "id": ' + "7" * 5000 + '},\n{"src": 1}]')
    with pytest.raises(DataError, match=r"a.json:2: an integer with more than 4300 digits"):
        open_source(path)
    source = open_source(path, on_bad_line="skip")
    assert (len(source), source.bad_lines) == (1, 2)


def test_json_cells_of_csv_are_read_as_strictly_as_records(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('src,tgt,label\na,b,"[1, {""a"": 1, ""a"": 2}]"\nc,d,[1]\n')
    with pytest.raises(DataError, match=r"a.csv:2: the cell of column 'label' .*'a' stands twice"):
        open_source(path)
    assert len(open_source(path, on_bad_line="skip")) == 1


def test_parquet_columns_of_other_types_matter_only_where_they_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "src": pyarrow.array(["a", "b"]),
        "tgt": pyarrow.array(["x", "y"]),
        "created": pyarrow.array([10**14, None], pyarrow.timestamp("s")),  # a year that Python does not have
        "tags": pyarrow.array([[("k", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.int32())),
        "digest": pyarrow.array([b"\xff", b""]),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert len(open_source(tmp_path / "a.parquet")) == 2
    columns["tgt"] = pyarrow.array([b"x", b"\xff"])
    parquet.write_table(pyarrow.table(columns), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet:1: 'tgt' must be .* not bytes"):
        open_source(tmp_path / "b.parquet")
    twice = pyarrow.table([columns["src"], columns["src"]], names=["src", "src"])
    parquet.write_table(twice, tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c.parquet: two columns are called 'src'"):
        open_source(tmp_path / "c.parquet")


def test_what_lies_beside_the_data_is_passed_over_and_named(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "data.txt", RECORDS[:2])
    for name in ("README.txt", "LICENSE-2.0.txt", "notes.txt", "requirements.txt"):
        (tmp_path / "sub" / name).write_text("This is about the data.\n\n{not} JSON\n")
    (tmp_path / "sub" / "readme.TXT").write_text(json.dumps(RECORDS[0]))
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with caplog.at_level("INFO", logger="erniekit"):
        assert len(open_source(tmp_path)) == 2
    (line,) = [record.getMessage() for record in caplog.records if "not read" in record.getMessage()]
    assert "7 other files are not data" in line and "gone.jsonl, pipe.jsonl, LICENSE-2.0.txt" in line
    with pytest.raises(DataError, match=r"README.txt: plain text"):
        open_source(tmp_path / "sub" / "README.txt")
    with pytest.raises(DataError, match=r"no data file in this directory.*`erniekit tokenize`"):
        open_source(tmp_path / "sub")


def test_fields_that_are_not_used_are_named_and_counted_once_a_file(tmp_path, caplog):
    for name, count in (("a.jsonl", 3), ("b.jsonl", 2)):
        write_jsonl(tmp_path / name, [record | {"id": 1} for record in RECORDS[:count]] + [RECORDS[0] | {"url": "u"}])
    with caplog.at_level("INFO", logger="erniekit"):
        assert len(open_source(tmp_path)) == 7
    assert [record.getMessage().rsplit("/", 1)[1] for record in caplog.records] == [
        "a.jsonl: fields that are not used, and in how many of 4 records: 'id' (3), 'url' (1)",
        "b.jsonl: fields that are not used, and in how many of 3 records: 'id' (2), 'url' (1)",
    ]


def test_fields_are_counted_among_the_records_that_are_looked_at(tmp_path, caplog):
    write_jsonl(tmp_path / "a.jsonl", [record | {"id": 1} for record in RECORDS])
    with caplog.at_level("INFO", logger="erniekit"):
        Source(SourceSpec(str(tmp_path), "erniekit", 1.0), "train", check_every=3)
    assert "in how many of 2 records: 'id' (2)" in caplog.text


def test_an_empty_file_beside_others_is_named(tmp_path, caplog):
    write_jsonl(tmp_path / "a.jsonl", RECORDS[:2])
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "c.json").write_text("[]")
    assert len(open_source(tmp_path)) == 2
    assert f"{tmp_path}: no record in 2 of 3 files (b.jsonl, c.json)" in caplog.text


def test_dataset_numbers_the_records_of_its_sources_through(tmp_path):
    first = open_source(write_jsonl(tmp_path / "a.jsonl", RECORDS[:3]))
    second = open_source(write_jsonl(tmp_path / "b.jsonl", [{"text": "t"}]), "text")
    dataset = Dataset([first, second])
    assert (len(dataset), dataset.sizes) == (4, [3, 1])
    type_name, raw, where = dataset.record(3)
    assert (type_name, load_record(raw, where), where) == ("text", {"text": "t"}, f"{tmp_path / 'b.jsonl'}:1")
    assert dataset.record(2)[0] == "erniekit"


def test_read_specs():
    specs = read_specs(("a.jsonl", "b.jsonl"), ("erniekit", "chatml"), (3.0, 1.0), "train")
    assert specs == [SourceSpec("a.jsonl", "erniekit", 0.75), SourceSpec("b.jsonl", "messages", 0.25)]
    assert read_specs(("a", "b"), (), (), "eval") == [
        SourceSpec("a", "erniekit", 0.5),
        SourceSpec("b", "erniekit", 0.5),
    ]
    assert read_specs(("a",), ("erniekit",), (1.0,), "train", METHODS["PT"]) == [SourceSpec("a", "text", 1.0)]


def test_a_split_without_data_says_which_key_is_missing():
    with pytest.raises(DataError, match="eval_dataset_path is not set"):
        read_specs((), (), (), "eval")


def test_the_types_of_data_are_those_that_the_configuration_knows():
    assert {*FORMATS, *ALIASES} == set(DATASET_TYPES)
    assert {f"{ALIASES.get(name, name)} (DPO)" for name in DATASET_TYPES if name != "text"} == set(PREFERENCE_FORMATS)


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
    order = Sampler(SIZES, PROBS, "concat", seed=1, shuffle=True)
    assert all(sorted(order.round(e)) == list(range(65)) for e in range(3))
    assert order.round(0).tolist() != order.round(1).tolist()
    assert Sampler(SIZES, PROBS, "concat", 1, shuffle=False).round(4).tolist() == list(range(65))


def test_interleave_under_ends_with_the_first_source():
    order = Sampler(SIZES, PROBS, "interleave_under", seed=3, shuffle=True)
    for epoch in range(5):
        ids = order.round(epoch)
        counts = Counter(source_of(ids).tolist())
        ended = source_of(ids[-1:])[0]
        assert counts[ended] == SIZES[ended] and all(counts[s] < SIZES[s] for s in range(3) if s != ended)
        assert len(set(ids.tolist())) == len(ids)


def test_interleave_over_ends_when_everything_was_seen():
    order = Sampler(SIZES, PROBS, "interleave_over", seed=3, shuffle=True)
    for epoch in range(5):
        ids = order.round(epoch)
        assert set(ids.tolist()) == set(range(65))
        assert ids[-1] not in ids[:-1]  # the draw that ends the epoch is the first sight of its record
        for s, size in enumerate(SIZES):
            mine = ids[source_of(ids) == s].tolist()
            for walk in range(len(mine) // size):
                assert len(set(mine[walk * size : (walk + 1) * size])) == size


def test_random_follows_the_shares_and_walks_each_source_whole_before_repeating():
    order = Sampler(SIZES, PROBS, "random", seed=3, shuffle=True)
    rounds = [order.round(r) for r in range(2)]
    ids = np.concatenate(rounds)
    shares = np.bincount(source_of(ids)) / len(ids)
    assert np.abs(shares - PROBS).max() < 0.01
    for s, size in enumerate(SIZES):
        mine = ids[source_of(ids) == s]
        walks = mine[: len(mine) // size * size].reshape(-1, size)
        assert (np.sort(walks, axis=1) == np.sort(walks[0])).all()
    again = Sampler(SIZES, PROBS, "random", seed=3, shuffle=True).round(1)
    assert (again == rounds[1]).all()


def test_without_shuffling_mixed_sources_keep_their_own_order():
    ids = Sampler(SIZES, PROBS, "interleave_over", seed=3, shuffle=False).round(0)
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


def test_a_directory_with_the_files_of_other_splits_is_warned_of(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("erniekit"), "propagate", True)
    for name in ("train-0", "train-1", "notes"):
        write_jsonl(tmp_path / f"{name}.jsonl", RECORDS)
    assert len(open_source(tmp_path)) == 3 * len(RECORDS) and "another split" not in caplog.text
    write_jsonl(tmp_path / "test-0.jsonl", RECORDS)
    assert len(open_source(tmp_path)) == 4 * len(RECORDS)
    assert "read for train, also those that are named after another split (test-0.jsonl)" in caplog.text
