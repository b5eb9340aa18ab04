"""Token files against the format's definition: every file here is laid out by hand with `struct`."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.token_files import write_token_files

from erniekit.data.tokens.files import TokenFile, TokenWriter, dtype_for, strip_suffix
from erniekit.utils.errors import DataError

CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H", 9: "I", 10: "Q"}
DOCUMENTS = [[5, 1, 2], [7], [9, 3, 100, 4, 2]]


def lay_out(prefix, sequences, firsts=None, code=4, version=1, magic=b"MMIDIDX\x00\x00", pointers=None, tail=b""):
    """prefix.bin and prefix.idx; `firsts` are the sequences with which documents begin, and the number of sequences."""
    letter = CODES.get(code, "d")
    size = struct.calcsize("<" + letter)
    flat = [i for ids in sequences for i in ids]
    (prefix.parent / f"{prefix.name}.bin").write_bytes(struct.pack(f"<{len(flat)}{letter}", *flat))
    lengths = [len(ids) for ids in sequences]
    pointers = pointers or [size * sum(lengths[:i]) for i in range(len(lengths))]
    firsts = list(range(len(sequences) + 1)) if firsts is None else firsts
    (prefix.parent / f"{prefix.name}.idx").write_bytes(
        magic
        + struct.pack("<QBQQ", version, code, len(lengths), len(firsts))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(firsts)}q", *firsts)
        + tail
    )
    return prefix


def documents_of(file):
    lengths = np.diff(file.starts)
    return [file.read(i, 0, int(n)).tolist() for i, n in enumerate(lengths)]


@pytest.mark.parametrize("code", CODES)
def test_every_type_of_id_is_read(tmp_path, code):
    file = TokenFile(lay_out(tmp_path / "a", DOCUMENTS, code=code), 101)
    assert documents_of(file) == DOCUMENTS
    assert (file.num_documents, file.num_tokens) == (3, 9)
    assert file.read(2, 1, 3).tolist() == [3, 100] and file.read(2, 1, 3).dtype == np.int64


def test_documents_of_several_sequences_and_empty_ones(tmp_path):
    sequences = [[1, 2], [], [3], [4, 5, 6], []]
    file = TokenFile(lay_out(tmp_path / "a", sequences, firsts=[0, 2, 2, 4, 5]), 10)
    assert documents_of(file) == [[1, 2], [], [3, 4, 5, 6], []]
    assert TokenFile(lay_out(tmp_path / "b", [[], []], code=8), 10).num_tokens == 0


def test_a_large_id_in_each_type(tmp_path):
    for code, largest in [(1, 255), (3, 2**15 - 1), (8, 2**16 - 1), (4, 103423), (9, 103423)]:
        file = TokenFile(lay_out(tmp_path / "a", [[0, largest]], code=code), 103424)
        assert documents_of(file) == [[0, largest]]


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 65535), max_size=20), min_size=1, max_size=30), st.sampled_from(["<u2", "<i4"]))
def test_what_is_written_is_what_the_definition_says(tmp_path_factory, documents, dtype):
    path = tmp_path_factory.mktemp("files")
    write_token_files(path / "a", [np.array(ids, np.int64) for ids in documents], dtype)
    lay_out(path / "b", documents, code={"<u2": 8, "<i4": 4}[dtype])
    for suffix in ("bin", "idx"):
        assert (path / f"a.{suffix}").read_bytes() == (path / f"b.{suffix}").read_bytes()
    assert documents_of(TokenFile(path / "a", 65536)) == documents
    assert sorted(file.name for file in path.iterdir()) == ["a.bin", "a.idx", "b.bin", "b.idx"]


def test_the_type_follows_the_vocabulary():
    assert [dtype_for(n) for n in (512, 65536, 65537, 103424)] == ["<u2", "<u2", "<i4", "<i4"]


def test_a_prefix_may_have_either_ending(tmp_path):
    assert {strip_suffix(f"data/a.b{end}").name for end in ("", ".bin", ".idx")} == {"a.b"}
    prefix = lay_out(tmp_path / "v1.5-part", DOCUMENTS)  # a point in the name is no ending
    assert documents_of(TokenFile(strip_suffix(f"{prefix}.idx"), 101)) == DOCUMENTS


def test_a_loss_mask_beside_the_files_is_named(tmp_path, caplog):
    prefix = lay_out(tmp_path / "a", DOCUMENTS)
    TokenFile(prefix, 101)
    assert caplog.text == ""
    (tmp_path / "a.lsm").write_bytes(b"\x01" * 9)
    TokenFile(prefix, 101)
    assert "a.lsm: a loss mask of PaddleFormers, which is not read" in caplog.text


# --- refusals


def refusal(prefix, vocab_size=101):
    with pytest.raises(DataError) as caught:
        documents_of(TokenFile(prefix, vocab_size))
    assert "Hint: " in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"magic": b"TNTIDX\x00\x00\x00"}, "the older form TNTIDX"),
        ({"magic": b"PK\x03\x04zipzi"}, "no index of token files: it begins with b'PK"),
        ({"version": 2}, "version 2 of the format"),
        ({"code": 6}, "code 6: floating-point numbers"),
        ({"code": 7}, "code 7: floating-point numbers"),
        ({"code": 77}, "code 77: unknown"),
        ({"pointers": [0, 8, 16]}, "sequence 1 begins at byte 8, but those before it end at byte 12"),
        ({"firsts": [0, 1, 2]}, "its documents span the sequences 0 to 2 of 3"),
        ({"firsts": [1, 2, 3]}, "its documents span the sequences 1 to 3 of 3"),
        ({"firsts": [0, 2, 1, 3]}, "not in rising order"),
        ({"firsts": [0, 7, 3]}, "not in rising order"),
        ({"tail": b"\x00\x00\x00"}, "a mode is recorded for each sequence"),
        ({"tail": b"\x00" * 8}, "8 bytes too many for 3 sequences and 3 documents"),
    ],
)
def test_an_index_that_is_foreign_or_damaged_is_refused(tmp_path, how, expected):
    message = refusal(lay_out(tmp_path / "a", DOCUMENTS, **how))
    assert expected in message and message.startswith(f"{tmp_path / 'a.idx'}: ")


def test_negative_lengths_and_no_documents_are_refused(tmp_path):
    prefix = lay_out(tmp_path / "a", DOCUMENTS)
    data = bytearray((tmp_path / "a.idx").read_bytes())
    data[34 + 4 : 34 + 8] = struct.pack("<i", -1)
    (tmp_path / "a.idx").write_bytes(data)
    assert "sequence 1 has a negative length" in refusal(prefix)
    assert "it holds no document" in refusal(lay_out(tmp_path / "b", []))


def test_truncated_files_are_refused_wherever_they_end(tmp_path):
    prefix = lay_out(tmp_path / "a", DOCUMENTS)
    whole = (tmp_path / "a.idx").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "a.idx").write_bytes(whole[:size])
        message = refusal(prefix)
        assert ("truncated" if size >= 9 else "no index of token files") in message
    (tmp_path / "a.idx").write_bytes(whole)
    ids = (tmp_path / "a.bin").read_bytes()
    for size in range(len(ids)):
        (tmp_path / "a.bin").write_bytes(ids[:size])
        assert f"a.bin: truncated: {size} of the {len(ids)} bytes" in refusal(prefix)
    (tmp_path / "a.bin").write_bytes(ids + b"\x00")
    assert f"a.bin: {len(ids) + 1} bytes, but a.idx describes {len(ids)}" in refusal(prefix)


def test_ids_outside_the_vocabulary_are_refused_with_their_place(tmp_path):
    prefix = lay_out(tmp_path / "a", DOCUMENTS)
    assert "a.bin: document 2, token 2: id 100 is not in the tokenizer's vocabulary of 100" in refusal(prefix, 100)
    assert "document 1, token 0: id -4" in refusal(lay_out(tmp_path / "b", [[1], [-4]], code=3))


def test_an_id_that_the_first_look_misses_is_refused_when_it_is_read(tmp_path):
    ids = np.ones(3_000_000, np.int64)
    ids[150_001] = 50
    write_token_files(tmp_path / "a", [ids[:1000], ids[1000:]], "<u2")
    file = TokenFile(tmp_path / "a", 50)
    assert file.read(1, 0, 149_001).max() == 1
    with pytest.raises(DataError, match=r"document 1, token 149001: id 50"):
        file.read(1, 149_000, 149_002)


def test_missing_files_say_what_is_there(tmp_path):
    lay_out(tmp_path / "corpus", DOCUMENTS)
    message = refusal(tmp_path / "corpse")
    assert "corpse.idx: no such file" in message and f"there are {tmp_path / 'corpus'}" in message
    assert f"there are {tmp_path / 'corpus'}" in refusal(tmp_path)  # a directory of them
    (tmp_path / "corpus.bin").unlink()
    assert "corpus.bin: no such file" in refusal(tmp_path / "corpus")
    (tmp_path / "old_ids.npy").write_bytes(b"")
    assert "old_ids.npy is PaddleNLP's older form" in refusal(tmp_path / "old")
    assert "`erniekit tokenize` makes them" in refusal(tmp_path / "none" / "x")


def test_documents_without_an_end_token_are_counted(tmp_path):
    file = TokenFile(lay_out(tmp_path / "a", [[1, 2], [], [3], [2]]), 10)
    assert file.without_end(2, 100) == (1, 3)
    assert file.without_end(2, 2) == (0, 2)


# --- writing


def test_a_build_goes_on_behind_what_was_kept(tmp_path):
    documents = [np.arange(n) for n in (3, 0, 5, 2)]
    write_token_files(tmp_path / "whole", documents, "<u2")
    first = TokenWriter(tmp_path / "a", "<u2")
    for ids in documents[:3]:
        first.add(ids)
    first.close()  # as if it had been killed before it noted the third document
    second = TokenWriter(tmp_path / "a", "<u2", documents=2, tokens=3)
    for ids in documents[2:]:
        second.add(ids)
    second.finish()
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()


def test_a_build_broken_off_between_its_two_renames_can_be_finished(tmp_path):
    writer = TokenWriter(tmp_path / "a", "<i4")
    writer.add(np.arange(4))
    writer.sync()
    writer.close()
    (tmp_path / "a.bin.part").rename(tmp_path / "a.bin")
    again = TokenWriter(tmp_path / "a", "<i4", documents=1, tokens=4)
    again.finish()
    assert documents_of(TokenFile(tmp_path / "a", 10)) == [[0, 1, 2, 3]]


def test_a_build_of_which_less_is_left_than_was_noted_is_refused(tmp_path):
    TokenWriter(tmp_path / "a", "<i4").close()
    with pytest.raises(DataError, match=r"a.bin.part: 0 bytes, but 40 had been written"):
        TokenWriter(tmp_path / "a", "<i4", documents=2, tokens=10)


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    """Touching the pages behind its end would end the process with a signal."""
    file = TokenFile(lay_out(tmp_path / "a", [list(range(9000))], code=4), 10_000)
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"a.bin: truncated: 0 of the 36000 bytes"):
        file.read(0, 0, 9000)
