"""Thousands of damaged inputs for every reader of data, tokenizers and token files: each is read, or refused by a
UserError that names the file; never another exception, a hang, or memory without bound. The seed is fixed; to try
others: `python tests/fuzz/test_data_readers.py 1 2 3`.
"""

import copy
import csv
import io
import json
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.token_files import write_token_files

from erniekit.data.chat.encode import Encoder
from erniekit.data.chat.template import load_template
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.prompts import PromptOptions, PromptSet
from erniekit.data.records.dataset import Dataset, Source, SourceSpec
from erniekit.data.records.formats import JUDGED_FORMATS, PROMPT_FORMATS
from erniekit.data.records.preference_formats import PREFERENCE_FORMATS
from erniekit.data.tokens.build import build_token_files
from erniekit.data.tokens.files import TokenFile
from erniekit.utils import log
from erniekit.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "models" / "tiny-tools"
SEED, SECONDS, MEGABYTES = 9, 5, 400

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": [1, "加"]}}}
ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "12加30?"}]
CALLED = [
    *ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
    {"role": "tool", "tool_call_id": "1", "content": [{"a": 1}]},
    {"role": "assistant", "content": "42", "reasoning_content": "sum"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
SHARED = [
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": '{"name": "f", "arguments": "{}"}'},
    {"from": "observation", "value": "r"},
    {"from": "gpt", "value": "a"},
]
RECORDS = {
    "erniekit": {"system": "s", "src": ["a", "b"], "tgt": ["x", "y"], "label": [0, 1], "is_system": 0, "id": 3},
    "alpaca": {"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]], "system": "s"},
    "messages": {"messages": CALLED, "tools": TOOLS, "label": [1, 1]},
    "sharegpt": {"system": "s", "conversations": SHARED, "tools": json.dumps(TOOLS)},
    "text": {"text": ["one", "two"], "meta": {"url": "u"}},
    "erniekit (DPO)": {"src": ["a", "b"], "tgt": ["x"], "response": [["g"], ["b", "c", "d"]], "sort": [1, 0.5]},
    "alpaca (DPO)": {"question": "q", "chosen": "good", "rejected": [{"role": "assistant", "content": "bad"}]},
    "messages (DPO)": {"chosen": CALLED, "rejected": [*ASKED, {"role": "assistant", "content": "no"}], "tools": TOOLS},
    "sharegpt (DPO)": {"conversations": SHARED[:1], "chosen": SHARED[-1], "rejected": {"from": "gpt", "value": "b"}},
    "erniekit (KTO)": {"src": ["a", "b"], "tgt": ["x", "y"], "label": True},
    "alpaca (KTO)": {"instruction": "q", "output": "a", "kto_tag": False},
    "messages (KTO)": {"prompt": "q", "completion": [{"role": "assistant", "content": "a"}], "label": 1},
    "sharegpt (KTO)": {"conversations": SHARED, "tools": TOOLS, "label": False},
    "erniekit (RL)": {"src": ["a", "b"], "tgt": ["x"], "answer": "y", "domain": "d", "reward_model": {"n": [1]}},
    "alpaca (RL)": {"instruction": "q", "input": "i", "history": [["q", "a"]], "solution": "a"},
    "messages (RL)": {"prompt": CALLED, "tools": TOOLS, "reward_model": {"ground_truth": "42"}, "ability": "m"},
    "sharegpt (RL)": {"conversations": SHARED[:3], "system": "s", "answer": [1, 2]},
}
ODD_VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    -0.0,
    1e308,
    10**400,
    "",
    " ",
    "\x00",
    "null",
    "[]",
    "{}",
    '{"a": 1, "a": 2}',
    "NaN",
    '{"x": "a\nb"}',
    "</s>",
    "<|begin_of_sentence|>",
    "</think>",
    "\u2581",
    "\ufdd0\ufeff",
    "a" * 500,
    [],
    {},
    [[]],
    [None],
    [{}],
    {"a": None},
    {"": ""},
    [1, "a"],
    [{"type": "text", "text": "t"}],
    {"name": "f", "arguments": "null"},
    "user",
    "tool",
    "function",
]
ODD_TEXT = [
    b"\xff",
    b"\x00",
    b"\xef\xbb\xbf",
    "中".encode("gbk"),
    b"\\ud800",
    b"7" * 5000,
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"[" * 3000,
    b'{"a":' * 150,
    b'"id": 1, "id": 2,',
    b",",
    b'"',
    b"\n",
    b"\r",
    b"{",
    b"}",
    b"]",
    b"\\",
    b"\x1f\x8b",
    b"null",
    b" ",
    b"\xe2\x80\xa8",
]


def places(value, found):
    """Every (container, key) within a JSON value."""
    keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
    for key in keys:
        found.append((value, key))
        places(value[key], found)
    return found


def change_values(rng, content):
    """A copy with one to three values replaced, removed, repeated, renamed, wrapped or written as text."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = places(content, [])
        if not found:
            break
        inside, key = rng.choice(found)
        other, other_key = rng.choice(found)
        how = rng.randrange(7)
        if how == 0:
            del inside[key]
        elif how == 1:
            inside[key] = copy.deepcopy(other[other_key])
        elif how == 2:
            inside[key] = [inside[key]] * rng.choice((1, 2))
        elif how == 3:
            inside[key] = json.dumps(inside[key])
        elif how == 4 and isinstance(inside, dict):
            name = str(key)
            at = rng.randrange(len(name) + 1)
            inside[name[:at] + rng.choice(("", "s", "_", "X")) + name[at + 1 :]] = inside.pop(key)
        else:
            inside[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return content


def change_bytes(rng, data):
    """`data` with one to three spans removed, repeated or replaced by something odd."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((0, 1, 1, 4, 20)))
        how = rng.randrange(6)
        if how == 0:
            data = data[:at] + data[end:]
        elif how == 1:
            data = data[:at]
        elif how == 2:
            data = data[:end] + data[at:]
        elif how == 3:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        else:
            data = data[:at] + rng.choice(ODD_TEXT) + data[end:]
    return data


def dumped(content):
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")


def damaged(rng, content):
    """JSON text of a damaged value."""
    data = dumped(change_values(rng, content))
    return change_bytes(rng, data) if rng.random() < 0.4 else data


@contextmanager
def bounded():
    """Fails after SECONDS: nothing here takes a tenth of that."""

    def stop(*_):
        raise TimeoutError(f"longer than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Tries:
    """Runs inputs through a reader and counts what came of them."""

    def __init__(self):
        self.counts = Counter()

    def run(self, name, kept, read, *arguments):
        """Call `read`. An error must name `name`; `kept` is what to show of an input that breaks the reader."""
        try:
            with bounded():
                read(*arguments)
            self.counts["read"] += 1
        except UserError as error:
            assert name in str(error), f"the message does not name {name}: {error}"
            assert "this record cannot be read" not in str(error), f"no check foresaw {kept!r}: {error}"
            self.counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}; for {kept!r}") from error


def fuzz_records(rng, folder, count, tries):
    """Records of every format, in every kind of file, up to tokens and labels."""
    tokenizer = load_tokenizer(MODEL)
    templates = [load_template(tokenizer, name) for name in ("text", "thinking")]
    for number in range(count):
        kind = rng.choice(list(RECORDS))
        good, bad = dumped(RECORDS[kind]), damaged(rng, RECORDS[kind])
        path = folder / f"d{number}.{rng.choice(('jsonl', 'jsonl', 'json', 'txt', 'csv'))}"
        if path.suffix == ".json":
            data = b"[" + good + b",\n" + bad + b"]"
            data = change_bytes(rng, data) if rng.random() < 0.2 else data
        elif path.suffix == ".csv":
            data = change_bytes(rng, as_csv(change_values(rng, RECORDS[kind])))
        else:
            data = good + b"\n" + bad + b"\n"
        path.write_bytes(data)
        truncation, skip = rng.choice(("drop", "cut", "error")), rng.choice(("skip", "error"))
        encoder = Encoder(tokenizer, rng.choice(templates), rng.choice((16, 64, 400)), truncation, skip, 64)
        tries.run(path.name, data, encode_all, path, kind, skip, encoder)
        path.unlink()


def encode_all(path, kind, skip, encoder):
    source = Source(SourceSpec(str(path), kind, 1.0), "train", skip)
    if kind in PROMPT_FORMATS:
        prompts = PromptSet(Dataset([source]), PromptOptions(encoder.template, 400, on_bad_line=skip))
        assert all(prompts[i].ids and prompts[i].messages[-1]["role"] in ("user", "tool") for i in range(len(prompts)))
        return
    for i in range(len(source)):
        encoded = encoder(kind, *source.record(i))
        assert bool(encoded.documents) != bool(encoded.dropped)
        for document in encoded.documents:
            assert len(document.ids) == len(document.labels)
            assert (document.pair is not None) == (kind in PREFERENCE_FORMATS)
            assert (document.is_good is not None) == (kind in JUDGED_FORMATS)


def as_csv(record):
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(record)
    cells = [value if isinstance(value, str) else json.dumps(value) for value in record.values()]
    writer.writerow(cells)
    return text.getvalue().encode("utf-8", "surrogatepass")


def fuzz_parquet(rng, folder, count, tries):
    """Columns of types that JSON does not have, also where text should be; files that break off."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    encoder = Encoder(load_tokenizer(MODEL), load_template(load_tokenizer(MODEL), "text"), 64, on_bad_line="skip")
    not_utf8 = pyarrow.Array.from_buffers(
        pyarrow.utf8(), 1, [None, pyarrow.py_buffer(np.array([0, 2], "<i4").tobytes()), pyarrow.py_buffer(b"\xff\xfe")]
    )
    odd = [
        pyarrow.array([10**14], pyarrow.timestamp("s")),
        pyarrow.array([1], pyarrow.date32()),
        pyarrow.array([b"\xff"]),
        pyarrow.array([[("a", 1), ("a", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int32())),
        pyarrow.array([float("nan")]),
        pyarrow.array([[("role", "user")]], pyarrow.map_(pyarrow.string(), pyarrow.string())),
        pyarrow.array([1.5], pyarrow.float16()),
        pyarrow.array(["1.5"]).cast(pyarrow.decimal128(5, 2)),
        pyarrow.array([None], pyarrow.null()),
        not_utf8,
        pyarrow.array(["a"]).dictionary_encode(),
        pyarrow.array([[["a"]]]),
        pyarrow.array([{"role": "user", "content": [b"a"]}]),
        pyarrow.array([1], pyarrow.duration("s")),
        pyarrow.array([[1.0, float("inf")]]),
        pyarrow.array([[{"role": "tool", "content": "x"}]]),
    ]
    while sum(tries.counts.values()) < count:
        kind = rng.choice(list(RECORDS))
        path = folder / f"p{sum(tries.counts.values())}.parquet"
        columns = {}
        for name, value in change_values(rng, RECORDS[kind]).items() if rng.random() < 0.5 else RECORDS[kind].items():
            try:
                columns[name] = pyarrow.array([value])
            except (pyarrow.ArrowException, TypeError, OverflowError):
                columns[name] = rng.choice(odd)
        for name in rng.sample(list(columns), rng.choice((0, 0, 1))) if columns else ():
            columns[name] = rng.choice(odd)
        columns["created"] = rng.choice(odd)
        names = [*columns, "id"] if rng.random() < 0.9 else [*columns, "created"]
        try:
            parquet.write_table(pyarrow.table([*columns.values(), pyarrow.array([7])], names=names), path)
        except pyarrow.ArrowException:
            continue  # nothing that could stand in a file
        data = path.read_bytes()
        if rng.random() < 0.2:
            path.write_bytes(data[: rng.randrange(len(data))])
        tries.run(path.name, columns, encode_all, path, kind, "error", encoder)
        path.unlink()


def fuzz_tokenizers(rng, folder, count, tries):
    """The five files of a tokenizer, one of them damaged."""
    contents = {path.name: path.read_bytes() for path in MODEL.glob("*token*")}
    config = json.loads(contents["tokenizer_config.json"])
    config.pop("chat_template", None)
    added = config["added_tokens_decoder"]
    config["added_tokens_decoder"] = {name: added[name] for name in list(added)[:6]}
    values = {
        "tokenizer_config.json": config,
        "special_tokens_map.json": json.loads(contents["special_tokens_map.json"]),
        "added_tokens.json": {
            "<|im_end|>": added and next(int(i) for i in added if added[i]["content"] == "<|im_end|>")
        },
    }
    numbers = [-1, 5, 10**9, 10**30, "5", 2.0, None, True, ["</s>"], {"content": "</s>"}, {"content": 3}, "a" * 3000]
    for number in range(count):
        directory = folder / f"t{number}"
        directory.mkdir()
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            (directory / name).write_bytes(contents[name])
        main = rng.choice(("tokenizer.model", "tokenizer.json"))
        (directory / main).write_bytes(contents[main])
        chosen = rng.choice((*values, main))
        if chosen == main:
            data = change_bytes(rng, contents[main])
        else:
            content = change_values(rng, values[chosen])
            if rng.random() < 0.5 and (found := places(content, [])):
                inside, key = rng.choice(found)
                inside[key] = rng.choice(numbers)
            data = dumped(content)
            data = change_bytes(rng, data) if rng.random() < 0.3 else data
        (directory / chosen).write_bytes(data)
        tries.run(directory.name, (chosen, data[:300]), use_tokenizer, directory)
        shutil.rmtree(directory)


def use_tokenizer(directory):
    tokenizer = load_tokenizer(directory)
    for text in ("三千 two\u2581 1\n", "</s><|im_end|>"):
        ids = tokenizer.encode(text) + tokenizer.encode_plain(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        tokenizer.decode([*ids, tokenizer.vocab_size + 3, tokenizer.eos_id])


def fuzz_token_files(rng, folder, count, tries):
    """prefix.idx and prefix.bin, damaged, and read to the end."""
    prefix = folder / "corpus"
    write_token_files(prefix, [np.array([5, 1, 2]), np.array([7]), np.array([], int), np.arange(40)], "<u2")
    contents = {suffix: prefix.with_suffix(suffix).read_bytes() for suffix in (".idx", ".bin")}
    for _ in range(count):
        suffix = rng.choice((".idx", ".idx", ".bin"))
        data = bytearray(contents[suffix])
        if rng.random() < 0.6:
            at = rng.randrange(len(data) - 8)
            value = rng.choice((0, 1, 3, 44, 2**16, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1))
            data[at : at + 8] = value.to_bytes(8, "little")
        else:
            data = change_bytes(rng, bytes(data))
        prefix.with_suffix(suffix).write_bytes(data)
        tries.run(prefix.name, bytes(data), read_tokens, prefix)
        prefix.with_suffix(suffix).write_bytes(contents[suffix])


def read_tokens(prefix):
    file = TokenFile(prefix, 100)
    for document in range(file.num_documents):
        file.read(document, 0, int(file.starts[document + 1] - file.starts[document]))
    file.without_end(2, 10)


def fuzz_token_builds(rng, folder, count, tries):
    """The text that becomes token files, and the note of an unfinished build."""
    tokenizer = load_tokenizer(MODEL)
    text, prefix = folder / "in.jsonl", folder / "built"
    note = folder / "built.progress.json"
    for _ in range(count):
        good = dumped(RECORDS["text"])
        text.write_bytes(good + b"\n" + (damaged(rng, RECORDS["text"]) if rng.random() < 0.7 else good) + b"\n")
        data = text.read_bytes()
        if rng.random() < 0.4:
            stat = text.stat()
            job = {"input files": [[str(text), stat.st_size, stat.st_mtime_ns]], "tokenizer": "x", "end tokens": True}
            progress = {"file": 0, "offset": 0, "line": 0, "read": 0, "documents": 0, "tokens": 0, "skipped": 0}
            data = damaged(rng, {"job": job, "progress": progress})
            note.write_bytes(data)
        skip = rng.choice(("skip", "error"))
        tries.run(str(folder), data, build_token_files, [text], prefix, tokenizer, 0, True, skip)
        for path in folder.glob("built*"):
            path.unlink()


READERS = {
    fuzz_records: 1500,
    fuzz_parquet: 250,
    fuzz_tokenizers: 500,
    fuzz_token_files: 400,
    fuzz_token_builds: 150,
}


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_every_damaged_input_is_read_or_refused_with_its_file(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(log, "info", lambda *_: None)
    monkeypatch.setattr(log, "warning", lambda *_: None)
    counts = fuzz(reader, SEED, tmp_path)
    print(f"{reader.__name__}: {dict(counts)}")
    assert sum(counts.values()) == READERS[reader]
    assert counts["refused"] > 0.2 * READERS[reader] and counts["read"] > 0.02 * READERS[reader]


def fuzz(reader, seed, folder):
    """How many inputs of a reader were read and refused."""
    before, tries = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Tries()
    reader(random.Random(f"{reader.__name__} {seed}"), folder, READERS[reader], tries)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES, f"{grown:.0f} MB more than before"
    return tries.counts


if __name__ == "__main__":
    import tempfile
    import time

    log.info = log.warning = lambda *_: None
    for seed in sys.argv[1:]:
        for reader in READERS:
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                print(
                    seed, reader.__name__, dict(fuzz(reader, seed, Path(folder))), f"{time.monotonic() - started:.1f} s"
                )
