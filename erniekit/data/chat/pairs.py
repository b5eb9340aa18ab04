"""Joins a pair of answers into one document: the prompt once, then both answers (packed_batch.PairLayout)."""

from dataclasses import replace
from typing import Any

import numpy as np

from erniekit.data.packed_batch import IGNORE, Document, PairLayout
from erniekit.data.records.sample import Sample
from erniekit.utils.errors import DataError


def one_answer(sample: Sample, answer: list[dict[str, Any]]) -> Sample:
    """The conversation with one answer of a pair; its prompt carries no loss."""
    counts = [sum(message["role"] == "assistant" for message in turns) for turns in (sample.messages, answer)]
    label = [0] * counts[0] + [1] * counts[1]
    return replace(sample, kind="chat", messages=sample.messages + answer, label=label, answers=None)


def join_pair(chosen: Document, rejected: Document, score_delta: float | None) -> Document:
    """Joins two sequences with the same prompt into one document. The first label of each sequence is that of the
    prompt's last token. `score_delta`: 1 where it is None. Raises DataError if the prompts differ, an answer has no
    label, or the answers are the same.
    """
    ends = [np.flatnonzero(side.labels != IGNORE)[:1].tolist() for side in (chosen, rejected)]
    if not all(ends):
        raise DataError("an answer of the pair has nothing to learn: it is empty in this chat template")
    prompt = ends[0][0]
    if ends[0] != ends[1] or not np.array_equal(chosen.ids[: prompt + 1], rejected.ids[: prompt + 1]):
        raise DataError("the chat template shows the two answers behind different prompts, so they cannot be compared")
    delta = 1.0 if score_delta is None else score_delta
    layout = PairLayout(prompt, len(chosen.ids) - prompt, len(rejected.ids) - prompt, delta)
    columns = zip(chosen[:2], rejected[:2], strict=True)
    ids, labels = (np.concatenate([first, second[prompt:]]) for first, second in columns)
    document = Document(ids, labels, layout)
    if answers_are_equal(document):
        raise DataError(
            "the chat template shows both answers alike, as it leaves out or strips what they differ in. "
            "Hint: remove the record, or choose another template"
        )
    return document


def answers_are_equal(document: Document) -> bool:
    """Whether a document is a pair whose answers have the same tokens."""
    if document.pair is None:
        return False
    prompt, chosen, rejected, _ = document.pair
    return np.array_equal(document.ids[prompt : prompt + chosen], document.ids[prompt + chosen :][:rejected])


def truncate_document(document: Document, max_tokens: int) -> Document:
    """Shortens a document to at most `max_tokens` tokens at its end. In a pair the longer answer is shortened first; a
    pair whose prompt leaves no room for answers is returned without labels.
    """
    if document.pair is None:
        return Document(document.ids[:max_tokens], document.labels[:max_tokens])
    prompt, chosen, rejected, score_delta = document.pair
    num_left = max_tokens - prompt
    if num_left < 2:
        return Document(document.ids, np.full_like(document.labels, IGNORE))
    shorter = min(chosen, rejected, num_left // 2)
    longer = min(max(chosen, rejected), num_left - shorter)
    lengths = (longer, shorter) if chosen >= rejected else (shorter, longer)
    ids, labels = (
        np.concatenate([array[: prompt + lengths[0]], array[prompt + chosen :][: lengths[1]]]) for array in document[:2]
    )
    return Document(ids, labels, PairLayout(prompt, *lengths, score_delta))
