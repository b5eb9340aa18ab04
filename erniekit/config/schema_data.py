"""Keys about the data: sources, lengths, packing, loading."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key, list_of
from erniekit.config.values import split_shares, split_words

# The formats of a source's records (data/records/formats.py reads them), and other names of the formats.
DATASET_TYPES = ("erniekit", "messages", "sharegpt", "alpaca", "text", "chatml")


@dataclass(frozen=True, kw_only=True)
class DataArgs:
    """The data sources, and how their records are mixed, truncated, packed and loaded."""

    group: ClassVar[str] = "data"

    train_dataset_type: tuple[str, ...] = list_of(
        str, "Format of each training source; empty: erniekit.", choices=DATASET_TYPES
    )
    train_dataset_path: tuple[str, ...] = list_of(str, "Training sources: files, directories or Hub names.", path=True)
    train_dataset_prob: tuple[float, ...] = list_of(
        float, "Share of each training source, summing to 1; empty: equal shares.", gt=0
    )
    eval_dataset_type: tuple[str, ...] = list_of(
        str, "Format of each evaluation source; empty: erniekit.", choices=DATASET_TYPES
    )
    eval_dataset_path: tuple[str, ...] = list_of(str, "Evaluation sources: files, directories or Hub names.", path=True)
    eval_dataset_prob: tuple[float, ...] = list_of(
        float, "Accepted, but not used: evaluation reads every source once.", gt=0
    )
    dataset_type: str = key(
        "iterable",
        "iterable or map (the same here: order is fixed by the seed), or pretrain: token files (input_dir).",
        choices=("iterable", "map", "pretrain"),
    )
    input_dir: tuple[str, ...] = list_of(
        str,
        'Token files (.bin and .idx) of dataset_type: pretrain: "weight prefix weight prefix ...", or prefixes alone.',
        split=split_words,
        path=True,
    )
    split: tuple[float, ...] = list_of(
        float,
        "dataset_type: pretrain: shares of the documents for training, evaluation and test, in the files' order.",
        (998.0, 1.0, 1.0),
        split=split_shares,
        ge=0,
    )
    isolate_documents: bool = key(
        True,
        "dataset_type: pretrain: documents in a row do not attend to one another; False: they do, as in Megatron-LM.",
    )
    long_document_min_tokens: int | None = key(
        None,
        "dataset_type: pretrain: documents with at least this many tokens count as long; not given: none do.",
        ge=1,
    )
    long_document_weight: int = key(
        1,
        "dataset_type: pretrain: how often each long document is repeated per epoch, for long-context training.",
        ge=1,
    )
    max_seq_len: int = key(4096, "Length of a row in tokens.", ge=2)
    truncation: str = key(
        "drop",
        "A sample longer than max_seq_len loses its earliest turns (with pictures its last rounds); one that is still "
        "too long is dropped (drop), cut at its end (cut), gets smaller pictures (shrink), or stops the run (error).",
        choices=("drop", "cut", "shrink", "error"),
    )
    on_bad_line: str = key(
        "error", "A bad line stops the run (error), or is skipped and counted (skip).", choices=("error", "skip")
    )
    mix_strategy: str = key(
        "concat",
        "How sources are mixed: concat (each once, shares unused), random (drawn by share, needs max_steps), "
        "interleave_under (until the first source ends), interleave_over (until every source has ended).",
        choices=("concat", "random", "interleave_under", "interleave_over"),
    )
    num_samples_each_epoch: int = key(6_000_000, "mix_strategy random: samples drawn in an epoch.", ge=1)
    random_shuffle: bool = key(True, "Shuffle the training samples, by the seed; evaluation keeps the file's order.")
    packing: bool = key(False, "Put several samples into one row; they do not attend to one another.")
    greedy_intokens: bool = key(
        True, "Packing chooses samples from a buffer to fill rows well; False: it takes them in the order of the data."
    )
    buffer_size: int = key(500, "Samples that greedy packing chooses from.", ge=1)
    max_estimate_samples: int = key(
        100_000, "The largest number of samples that is measured to estimate how many rows an epoch has.", ge=1
    )
    dataloader_num_workers: int = key(
        0, "Worker processes that encode samples; 0: a thread of the training process does it.", ge=0
    )
    prefetch_factor: int = key(
        2,
        "Steps prepared ahead of the trainer, each with all its microbatches: 1 takes less memory where "
        "gradient_accumulation_steps is large.",
        ge=1,
    )
    chat_template: str | None = key(
        None,
        "A built-in template's name or a .jinja file; not given: the model's own, else text; saved with the weights.",
        path=True,
    )
