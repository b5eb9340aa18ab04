"""Making token files: what comes out, the same however it is made, broken off and gone on with."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.tokens import build as token_build
from erniekit.data.tokens.build import build_token_files, find_inputs
from erniekit.data.tokens.files import TokenFile
from erniekit.utils.errors import DataError

ROOT = Path(__file__).parents[4]
TOKENIZER = ROOT / "examples" / "models" / "tiny-moe"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A directory of two .jsonl files and two .txt files, and its documents in order."""
    root, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    texts = ["t" + "".join(rng.choices("abc 三十 </s>\n", k=rng.choice((1, 30, 300)))) for _ in range(120)]
    lines = [json.dumps({"text": text} if i % 3 else {"tgt": [text, text]}) for i, text in enumerate(texts)]
    texts = [text if i % 3 else f"{text}\n{text}" for i, text in enumerate(texts)]
    (root / "a.jsonl").write_text("\ufeff" + "\n\n".join(lines[:70]) + "\n", encoding="utf-8")
    (root / "b").mkdir()
    (root / "b" / "c.jsonl").write_text("\n".join(lines[70:]), encoding="utf-8")  # no newline at the end
    (root / "b" / "d.txt").write_text("a whole\nfile", encoding="utf-8")
    (root / "e.txt").write_text("\ufeffanother", encoding="utf-8")
    (root / "e.png").write_bytes(b"")
    return root, [*texts, "a whole\nfile", "another"]


def build(corpus, prefix, tokenizer, **keys):
    return build_token_files(find_inputs([str(corpus)]), prefix, tokenizer, **{"num_workers": 0, **keys})


def contents(prefix):
    return [(prefix.parent / f"{prefix.name}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def left_in(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def whole(corpus, tokenizer, tmp_path_factory):
    prefix = tmp_path_factory.mktemp("whole") / "out"
    return build(corpus[0], prefix, tokenizer), prefix


def test_each_document_is_its_tokens_and_the_end_token(corpus, tokenizer, whole):
    counts, prefix = whole
    file = TokenFile(prefix, tokenizer.vocab_size)
    documents = [file.read(i, 0, int(n)).tolist() for i, n in enumerate(np.diff(file.starts))]
    assert documents == [tokenizer.encode_plain(text) + [tokenizer.eos_id] for text in corpus[1]]
    assert file.dtype == np.dtype("<u2")  # 2 bytes hold this vocabulary
    assert (counts.documents, counts.tokens, counts.skipped) == (122, file.num_tokens, 0)
    assert counts.read == sum(path.stat().st_size for path in corpus[0].rglob("*") if path.is_file())
    assert left_in(prefix.parent) == ["out.bin", "out.idx"]


def test_without_end_tokens(corpus, tokenizer, tmp_path):
    build(corpus[0], tmp_path / "x", tokenizer, append_eos=False)
    file = TokenFile(tmp_path / "x", tokenizer.vocab_size)
    assert file.read(121, 0, 100).tolist() == tokenizer.encode_plain("another")


@pytest.mark.parametrize(("workers", "chunk"), [(0, 1), (1, 100), (3, 500), (2, 10**6)])
def test_workers_and_chunks_do_not_change_the_files(corpus, tokenizer, whole, tmp_path, monkeypatch, workers, chunk):
    monkeypatch.setattr(token_build, "_CHUNK_BYTES", chunk)
    assert build(corpus[0], tmp_path / "x", tokenizer, num_workers=workers) == whole[0]
    assert contents(tmp_path / "x") == contents(whole[1])


class _Stop(Exception):
    pass


def stopping_after(count):
    """In the place of progress.track: the build is interrupted after so many chunks."""

    def track(items, total, what, done):
        for number, item in enumerate(items, 1):
            yield item
            if number == count:
                raise _Stop

    return track


def noted_documents(prefix):
    note = prefix.with_name(prefix.name + ".progress.json")
    return json.loads(note.read_text())["progress"]["documents"] if note.exists() else 0


@settings(max_examples=25)
@given(stops=st.lists(st.integers(1, 25), max_size=4), noted=st.sampled_from([0.0, 1e9]))
def test_a_build_broken_off_anywhere_comes_out_the_same(corpus, tokenizer, whole, tmp_path_factory, stops, noted):
    """With notes after each chunk it resumes; without any it starts from scratch."""
    prefix = tmp_path_factory.mktemp("broken") / "x"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_build, "_CHUNK_BYTES", 500)
        reached = 0
        for stop in [*stops, 10**9]:
            patch.setattr(token_build, "track", stopping_after(stop))
            try:
                done = build(corpus[0], prefix, tokenizer, note_every=noted)
                break
            except _Stop:
                assert noted_documents(prefix) > reached if noted == 0 else noted_documents(prefix) == 0
                reached = noted_documents(prefix)
    assert done == whole[0] and contents(prefix) == contents(whole[1])
    assert left_in(prefix.parent) == ["x.bin", "x.idx"]


def dying_at(name, original):
    """In the place of Path.rename or Path.unlink: the build is interrupted at the existing file of this name."""

    def act(path, *more, **keys):
        if path.name == name and path.exists():
            raise _Stop
        return original(path, *more, **keys)

    return act


@pytest.mark.parametrize("after", ["x.bin.part", "x.idx.part", "x.sizes.part", "x.progress.json"])
def test_a_build_broken_off_while_the_files_get_their_names(corpus, tokenizer, whole, tmp_path, monkeypatch, after):
    """`after` is the file at whose renaming or removal it dies."""
    with monkeypatch.context() as patch, pytest.raises(_Stop):
        patch.setattr(Path, "rename", dying_at(after, Path.rename))
        patch.setattr(Path, "unlink", dying_at(after, Path.unlink))
        build(corpus[0], tmp_path / "x", tokenizer)
    assert build(corpus[0], tmp_path / "x", tokenizer) == whole[0]
    assert contents(tmp_path / "x") == contents(whole[1]) and left_in(tmp_path) == ["x.bin", "x.idx"]


@pytest.mark.parametrize("after", [None, "x.idx", "x.bin.part", "x.idx.part", "x.sizes.part", "x.progress.json"])
def test_files_are_replaced_only_when_the_new_ones_are_complete(corpus, tokenizer, whole, tmp_path, monkeypatch, after):
    """`after` is the file at whose renaming or removal the build dies; None: it dies while it reads its input."""
    build(corpus[0] / "b", tmp_path / "x", tokenizer)
    before = contents(tmp_path / "x")
    with monkeypatch.context() as patch, pytest.raises(_Stop):
        if after is None:
            patch.setattr(token_build, "track", stopping_after(1))
        else:
            patch.setattr(Path, "rename", dying_at(after, Path.rename))
            patch.setattr(Path, "unlink", dying_at(after, Path.unlink))
        build(corpus[0], tmp_path / "x", tokenizer, overwrite=True, note_every=0.0)
    if after in (None, "x.idx"):
        assert contents(tmp_path / "x") == before
    elif after in ("x.bin.part", "x.idx.part"):
        assert not (tmp_path / "x.idx").exists()  # an old index beside new ids could be read as if they matched
    assert build(corpus[0], tmp_path / "x", tokenizer) == whole[0]
    assert contents(tmp_path / "x") == contents(whole[1]) and left_in(tmp_path) == ["x.bin", "x.idx"]


def test_a_bad_line_leaves_the_files_that_were_to_be_replaced(corpus, tokenizer, tmp_path):
    build(corpus[0], tmp_path / "x", tokenizer)
    before = contents(tmp_path / "x")
    (tmp_path / "in.jsonl").write_text("{nonsense")
    with pytest.raises(DataError, match="not JSON"):
        build_token_files([tmp_path / "in.jsonl"], tmp_path / "x", tokenizer, 0, overwrite=True)
    assert contents(tmp_path / "x") == before


def test_a_killed_command_goes_on_and_leaves_no_worker(tokenizer, tmp_path):
    rng = random.Random(1)
    texts = ["".join(rng.choices("abcdefgh ij", k=20_000)) for _ in range(150)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, "-m", "erniekit", "tokenize", f"tokenizer={TOKENIZER}", "note_every=0", "workers=2"]
    command += [f"output={tmp_path}/x", str(tmp_path / "in.jsonl")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    note = tmp_path / "x.progress.json"
    deadline = time.monotonic() + 60
    while not note.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    children = _children(first.pid)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert 0 < json.loads(note.read_text())["progress"]["documents"] < 150 and len(children) == 2
    while any(map(_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(_alive, children))
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "resuming after" in second.stderr and "150 documents" in second.stdout
    build_token_files([tmp_path / "in.jsonl"], tmp_path / "y", tokenizer, 0)
    assert contents(tmp_path / "x") == contents(tmp_path / "y")


def _children(pid):
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- refusals


def broken(corpus, prefix, tokenizer):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Stop):
        patch.setattr(token_build, "track", stopping_after(1))
        build(corpus, prefix, tokenizer, note_every=0.0)


def test_an_unfinished_build_of_something_else_is_not_gone_on_with(corpus, tokenizer, tmp_path):
    broken(corpus[0], tmp_path / "x", tokenizer)
    with pytest.raises(DataError, match=r"x.progress.json: an unfinished build .* different end tokens"):
        build(corpus[0], tmp_path / "x", tokenizer, append_eos=False)
    inputs = find_inputs([str(corpus[0] / "a.jsonl")])
    with pytest.raises(DataError, match="different input files"):
        build_token_files(inputs, tmp_path / "x", tokenizer, 0)
    build_token_files(inputs, tmp_path / "x", tokenizer, 0, overwrite=True)
    assert TokenFile(tmp_path / "x", tokenizer.vocab_size).num_documents == 70
    assert left_in(tmp_path) == ["x.bin", "x.idx"]


def test_a_note_that_is_no_note_and_lost_parts_say_so(corpus, tokenizer, tmp_path):
    broken(corpus[0], tmp_path / "x", tokenizer)
    (tmp_path / "x.bin.part").write_bytes(b"")
    with pytest.raises(DataError, match=r"x.bin.part: 0 bytes, but \d+ had been written.*overwrite=true"):
        build(corpus[0], tmp_path / "x", tokenizer)
    (tmp_path / "x.progress.json").write_text("{}")
    with pytest.raises(DataError, match=r"x.progress.json: does not describe a build"):
        build(corpus[0], tmp_path / "x", tokenizer)


def test_finished_files_are_not_replaced_unasked(corpus, tokenizer, tmp_path):
    build(corpus[0], tmp_path / "x", tokenizer)
    with pytest.raises(DataError, match=r"x.bin: already there. Hint: .*overwrite=true"):
        build(corpus[0], tmp_path / "x", tokenizer)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_line_stops_with_its_place_or_is_counted(tokenizer, tmp_path, workers, caplog):
    lines = ['{"text": "one"}', "{nonsense", '{"text": ""}', '{"src": ["q"], "tgt": ["a"]}', '{"text": "two"}']
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"in.jsonl:2: not JSON"):
        build_token_files([path], tmp_path / "x", tokenizer, workers)
    counts = build_token_files([path], tmp_path / "x", tokenizer, workers, on_bad_line="skip")
    assert (counts.documents, counts.skipped) == (2, 3)
    for number in (2, 3, 4):
        assert f"skipped: {path}:{number}: " in caplog.text


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.json", b'[{"text": "x"}]', "a.json: a JSON list. Hint: write one object per line"),
        ("a.txt", b"\xff\xfe", "a.txt: UTF-16 text"),
        ("a.txt", b"\xef\xbb\xbfone\n\xca\xfd\xbe\xdd\n", r"a.txt:2: not UTF-8 text \(byte 1 of the line\)"),
        ("a.txt", b'\xef\xbb\xbf\n{"text": "x"}\n{"text": "y"}\n', "a.txt: it has records.* rename it to .jsonl"),
        ("a.jsonl", b"\n\n", "no document in 1 file "),
        ("a.csv", b"text\nx", "a.csv: a data file ends in .jsonl"),
    ],
)
def test_what_is_no_input_is_refused(tokenizer, tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=expected):
        build_token_files(find_inputs([str(tmp_path / name)]), tmp_path / "x", tokenizer, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_fields_that_are_not_used_and_empty_files_are_named(tokenizer, tmp_path, workers, caplog):
    records = [{"text": "a", "id": 1}, {"text": "b", "id": 2, "url": "u"}, {"tgt": ["c"], "src": []}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "none.jsonl").write_text("")
    with caplog.at_level("INFO", logger="erniekit"):
        build_token_files(find_inputs([str(tmp_path)]), tmp_path / "x", tokenizer, workers)
    assert "fields that are not used, and in how many of 3 records: 'id' (2), 'url' (1)" in caplog.text
    assert f"1 empty file without a document ({tmp_path / 'none.jsonl'})" in caplog.text


def test_a_compressed_file_in_a_directory_is_not_left_out(tmp_path):
    for name in ("a.jsonl", "b.jsonl.zst"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"b.jsonl.zst: compressed"):
        find_inputs([str(tmp_path)])


@pytest.mark.parametrize("text", ['{"text": "x"', '{"a": 1}\n', "{text}\n\n", "{", '"text"\n', "\n\n"])
def test_text_that_begins_like_a_record_is_a_document(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert find_inputs([str(tmp_path)]) == [tmp_path / "a.txt"]


def test_inputs_are_found_and_others_named(corpus, tmp_path, caplog):
    names = [path.name for path in find_inputs([str(corpus[0])])]
    assert names == ["a.jsonl", "c.jsonl", "d.txt", "e.txt"] and "1 other file not read (e.png)" in caplog.text
    with pytest.raises(DataError, match="no such file or directory"):
        find_inputs([str(tmp_path / "none")])
    with pytest.raises(DataError, match=r"no data file in this directory"):
        find_inputs([str(tmp_path)])
