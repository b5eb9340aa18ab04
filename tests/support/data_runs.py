"""Running the data loader in tests: a configuration, data files, and what came out of it."""

import json
import random

import numpy as np

from erniekit.config import Config, schema
from erniekit.config.fields import coerce
from erniekit.data.loader import build_loader
from support.fake_text import FakeTemplate, FakeTokenizer

# What tests of data need to be small; everything else is as the schema has it.
SMALL = {
    "train_dataset_type": "erniekit",
    "max_seq_len": 64,
    "packing": True,
    "buffer_size": 10,
    "num_samples_each_epoch": 100,
    "max_estimate_samples": 1000,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
}
PACKINGS = [{"packing": False}, {"packing": True, "greedy_intokens": False}, {"packing": True, "greedy_intokens": True}]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def numbered_conversations(directory):
    """60 conversations whose question is their number, with answers of 1 to 40 characters."""
    rng = random.Random(0)
    records = [{"src": f"{i:02d}", "tgt": chr(200 + i) * rng.randint(1, 40)} for i in range(60)]
    return write(directory / "train.jsonl", records)


def config(path, **keys):
    values = {**SMALL, "train_dataset_path": str(path), **keys}
    for name, field in schema.fields().items():
        if name in values and "item" in field.metadata:
            values[name] = () if values[name] is None else coerce(field, values[name])
    return Config(**values)


def build(path, rank=0, world=1, split="train", **keys):
    return build_loader(config(path, **keys), FakeTokenizer(), split, rank, world, FakeTemplate())


def steps(loader, count=10**9):
    """Up to `count` steps of a loader, as lists of batches."""
    result = []
    while len(result) < count:
        try:
            result.append(loader.next_step())
        except StopIteration:
            break
    return result


def run(path, count=10**9, **keys):
    with build(path, **keys) as loader:
        return steps(loader, count)


def rows_of(batches):
    """The rows of batches as tuples (ids, labels, positions, segments), a row's segments numbered from 1."""
    rows = []
    for batch in batches:
        ends = np.cumsum(batch.row_lengths)
        assert batch.num_tokens == sum(batch.row_lengths)
        for begin, end in zip(ends - batch.row_lengths, ends, strict=True):
            arrays = (batch.input_ids, batch.labels, batch.position_ids)
            segments = batch.segment_ids[begin:end] - batch.segment_ids[begin] + 1
            rows.append(tuple(tuple(array.tolist()) for array in (*(a[begin:end] for a in arrays), segments)))
    return rows


def same(first, second):
    return [rows_of(step) for step in first] == [rows_of(step) for step in second]


def lines_of(all_steps):
    return [int(where.rsplit(":", 1)[1]) for step in all_steps for batch in step for where in batch.sources]
