"""How many tokens each record has: measured by workers, estimated beyond a number of bytes, kept for the next start."""

import errno
import math
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.data_runs import build, steps, write

from erniekit.data import lengths
from erniekit.data.chat.encode import Encoder
from erniekit.utils import runtime


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(lengths, "cache_directory", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "lengths"


@pytest.fixture
def encoded(monkeypatch):
    """Places of the records that were encoded in this process."""
    places = []
    original = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, *record: places.append(record[2]) or original(self, *record))
    return places


def records(count, longest, seed=1):
    rng = random.Random(seed)
    return [{"src": "q", "tgt": "a" * rng.randint(1, longest)} for _ in range(count)]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("epochs", [1, 2.5])
def test_a_large_set_is_estimated_by_bytes_and_still_read_to_its_end(tmp_path, monkeypatch, packing, epochs):
    """Records of two kinds in two halves: a sample of the beginning alone would be far off."""
    data = write(tmp_path / "a.jsonl", records(1500, 8) + records(1500, 60))
    monkeypatch.setattr(lengths, "MEASURED_BYTES", 40_000)
    keys = {"batch_size": 1, "gradient_accumulation_steps": 1, "num_train_epochs": epochs, "packing": packing}
    with build(data, **keys) as loader:
        assert not loader.exact
        planned, given = math.ceil(loader.rows_left()), len(steps(loader))
        assert given <= planned <= 1.03 * given  # the run ends with the data, not before
        assert loader.report()["epoch"] == epochs


def test_records_that_are_dropped_or_split_are_estimated_with_the_rest(tmp_path, monkeypatch):
    data = write(tmp_path / "a.jsonl", [{"text": "z" * (1 + i * 7 % 200)} for i in range(2000)])
    monkeypatch.setattr(lengths, "MEASURED_BYTES", 60_000)
    with build(data, stage="PT", max_seq_len=24, batch_size=1, packing=False) as loader:
        planned, given = math.ceil(loader.rows_left() / 2), len(steps(loader))
    assert given <= planned <= 1.03 * given


def test_workers_measure_what_takes_long_and_the_counts_are_the_same(tmp_path, monkeypatch, encoded):
    data = write(tmp_path / "a.jsonl", records(300, 40))
    with build(data) as loader:
        alone = loader.rows_left()
    assert len(encoded) == 300
    encoded.clear()
    monkeypatch.setattr(lengths, "_FEW_BYTES", 0)
    monkeypatch.setattr(lengths, "num_cores", lambda: 2)
    with build(data) as loader:
        assert loader.rows_left() == alone
    assert not encoded  # not in this process


def test_lengths_are_kept_until_file_tokenizer_or_a_length_changes(tmp_path, monkeypatch, encoded, cache, caplog):
    data = write(tmp_path / "a.jsonl", records(100, 40))
    monkeypatch.setattr(lengths, "_SLOW_SECONDS", -1.0)

    def measure(**keys):
        encoded.clear()
        with build(data, **keys) as loader:
            return loader.rows_left(), len(encoded)

    first = measure()
    assert first[1] == 100
    assert measure() == (first[0], 0) and "measured earlier" in caplog.text
    assert measure(max_seq_len=25)[1] == 100
    write(tmp_path / "a.jsonl", records(100, 40, seed=2))
    assert measure()[1] == 100
    for file in cache.iterdir():
        file.write_bytes(b"broken")
    assert measure()[1] == 100 and "cannot be read" in caplog.text


def test_kept_lengths_are_not_those_of_another_content_of_the_same_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(lengths, "_SLOW_SECONDS", -1.0)
    rows = []
    for text in ("a" * 30, "\u1234" * 5):  # 30 bytes of JSON each
        data = write(tmp_path / "a.jsonl", [{"src": "q", "tgt": text}] * 100)
        os.utime(data, (10**9, 10**9))
        with build(data, batch_size=1, gradient_accumulation_steps=1) as loader:
            rows.append((loader.rows_left(), len(steps(loader)), data.stat().st_size))
    assert rows[0][0] == rows[0][1] != rows[1][0] == rows[1][1] and rows[0][2] == rows[1][2]


def test_ranks_of_a_host_measure_large_data_once(tmp_path, monkeypatch, encoded, cache):
    """All of them ask at the same time; one measures, the others wait for it."""
    data = write(tmp_path / "a.jsonl", records(300, 40))
    monkeypatch.setattr(lengths, "_FEW_BYTES", 0)
    monkeypatch.setattr(lengths, "num_cores", lambda: 0)  # in this process, so that it can be counted
    together = threading.Barrier(3)

    def rows_left(rank):
        with build(data, rank=rank, world=3) as loader:
            together.wait()
            return loader.rows_left()

    with ThreadPoolExecutor(3) as ranks:
        found = list(ranks.map(rows_left, range(3)))
    assert len(set(found)) == 1 and len(encoded) == 300
    assert [file.suffix for file in cache.iterdir()] == [".npz"], "no lock is left behind"


def test_large_data_is_measured_without_locks_too(tmp_path, monkeypatch, encoded):
    data = write(tmp_path / "a.jsonl", records(20, 40))
    monkeypatch.setattr(lengths, "_FEW_BYTES", 0)
    monkeypatch.setattr(lengths, "num_cores", lambda: 0)

    def no_lock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lengths.fcntl, "flock", no_lock)
    with build(data) as loader:
        assert loader.rows_left() and len(encoded) == 20


def test_a_cache_that_cannot_be_written_is_said_and_does_no_harm(tmp_path, monkeypatch, caplog):
    data = write(tmp_path / "a.jsonl", records(10, 40))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(lengths, "_SLOW_SECONDS", -1.0)
    monkeypatch.setattr(lengths, "cache_directory", lambda: tmp_path / "file")
    with build(data) as loader:
        assert loader.rows_left()
    assert "cannot be cached" in caplog.text


def test_few_files_are_kept(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(lengths, "_SLOW_SECONDS", -1.0)
    monkeypatch.setattr(lengths, "_KEPT_FILES", 2)
    for seed in range(4):
        with build(write(tmp_path / f"{seed}.jsonl", records(5, 10, seed))) as loader:
            assert loader.rows_left()
    assert len(list(cache.iterdir())) == 2


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for invalid in ("", "relative", "~/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", invalid)
        assert runtime.cache_directory() == tmp_path / "home" / ".cache" / "erniekit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime.cache_directory() == tmp_path / "erniekit"


def test_lengths_of_records_are_those_of_their_documents_in_the_order_asked_for():
    counts, tokens = np.array([2, 0, 1, 3], np.int32), np.arange(10, 16, dtype=np.int32)
    starts = np.array([0, 2, 2, 3], np.int64)
    known = lengths.Lengths(starts, counts, tokens, tokens * 2, 4, 1, 0, 0)
    assert known.of(np.array([3, 1, 0])) == [13, 14, 15, 10, 11]
    assert known.patches_of(np.array([2, 3])) == [24, 26, 28, 30]
    assert known.of(np.array([], np.int64)) == []


def test_the_nearest_record_in_size_stands_for_another_and_equal_ones_take_turns():
    known, wanted = np.array([30, 10, 10, 20]), np.array([10, 10, 10, 14, 16, 99, 1])
    assert lengths._nearest(known, wanted).tolist()[:3] == [1, 2, 1]
    assert known[lengths._nearest(known, wanted)].tolist() == [10, 10, 10, 10, 20, 30, 10]


def test_records_beyond_a_sample_that_was_dropped_whole_are_trained(tmp_path):
    """One record of 100 can be used, and it is not in the sample of 10."""
    data = write(tmp_path / "a.jsonl", [{"src": "q", "tgt": "a" * (1 if i == 50 else 400)} for i in range(100)])
    with build(data, max_estimate_samples=10, batch_size=1, gradient_accumulation_steps=1) as loader:
        assert loader.rows_left() == 1
        assert len(steps(loader)) == 1


WRONG_KEPT = {
    "negative": lambda kept: kept | {"tokens": -kept["tokens"]},
    "zero": lambda kept: kept | {"tokens": kept["tokens"] * 0},
    "fractions": lambda kept: kept | {"tokens": kept["tokens"] * 1.5},
    "not numbers": lambda kept: kept | {"tokens": kept["tokens"].astype(str)},
    "another shape": lambda kept: kept | {"counts": kept["counts"].reshape(-1, 1)},
    "negative counts": lambda kept: kept | {"counts": kept["counts"] + np.array([-2, 2] + [0] * 298, np.int32)},
    "too few": lambda kept: kept | {"counts": kept["counts"][:-1], "tokens": kept["tokens"][:-1]},
    "more dropped than there are": lambda kept: kept | {"totals": np.array([10**9, 0, 0])},
}


@pytest.mark.parametrize("wrong", WRONG_KEPT)
def test_kept_lengths_that_cannot_be_are_measured_again(tmp_path, monkeypatch, cache, wrong):
    data = write(tmp_path / "a.jsonl", records(300, 40))
    monkeypatch.setattr(lengths, "_SLOW_SECONDS", -1.0)
    with build(data) as loader:
        right = loader.rows_left()
    (file,) = cache.iterdir()
    with np.load(file) as archive:
        np.savez(file, **WRONG_KEPT[wrong](dict(archive)))
    with build(data) as loader:
        assert loader.rows_left() == right


def test_a_pipe_in_the_place_of_kept_lengths_is_not_waited_for(tmp_path, monkeypatch, cache):
    data = write(tmp_path / "a.jsonl", records(300, 40))
    monkeypatch.setattr(lengths, "_SLOW_SECONDS", -1.0)
    with build(data) as loader:
        right = loader.rows_left()
    (file,) = cache.iterdir()
    file.unlink()
    os.mkfifo(file)
    with build(data) as loader:
        assert loader.rows_left() == right
