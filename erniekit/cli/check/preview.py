"""Records as the model gets them: what is trained, and which pictures in which size."""

import re
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from typing import Any

import numpy as np

from erniekit.cli.check.contact_sheet import Tile
from erniekit.cli.check.records_file import document_json, record_json
from erniekit.cli.check.report import Finding, Report, Section
from erniekit.data.chat.encode import Encoded
from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.data.packed_batch import IGNORE, Document
from erniekit.data.record_feed import RecordFeed
from erniekit.data.vision.boxes import boxes_in
from erniekit.data.vision.plan import MediaPlan
from erniekit.data.vision.template import PLACEHOLDERS
from erniekit.utils.wording import count_of

_SHOWN_CHARACTERS = 600  # characters shown of each span of text
_RUN = re.compile("|".join(f"(?:{re.escape(token)}){{2,}}" for token in PLACEHOLDERS.values()))


Written = list[dict[str, Any]]  # records as JSON values


def inspect(
    report: Report,
    feed: RecordFeed,
    tokenizer: Tokenizer,
    split: str,
    count: int,
    first: int = 1,
    written: Written | None = None,
) -> list[Tile]:
    """Add a section for each of `count` records from number `first` on; their pictures, to be drawn. The records are
    also added to `written`, if it is there.
    """
    tiles: list[Tile] = []
    numbers = range(first - 1, min(first - 1 + count, len(feed.dataset)))
    if not numbers and first > 1:
        report.section(f"{split} record {first}").add("note", f"the data has {count_of(len(feed.dataset), 'record')}")
    with closing(feed.encode(numbers)) as records:
        for number in numbers:
            which = f"the first {split} record" if number == 0 else f"{split} record {number + 1}"
            section = report.section(f"{which} as the model gets it")
            with section.collecting():
                tiles += show(section, next(records), tokenizer, count > 1 or written is not None, split, written)
    return tiles


def show(
    section: Section, record: Encoded, tokenizer: Tokenizer, is_preview: bool, split: str, written: Written | None
) -> list[Tile]:
    """Add one record, also to `written`, and return its pictures. `is_preview`: all of its documents, not one."""
    if record.dropped:
        section.add("note", f"{record.where}: dropped: {record.dropped}")
    shown = record.documents if is_preview else record.documents[:1]
    tiles = [_document(section, record, number, tokenizer) for number in range(len(shown))]
    if written is not None:
        documents = [
            document_json(document, _sizes(record, document, number), tiles[number], tokenizer)
            for number, document in enumerate(shown)
        ]
        written.append(record_json(split, record.where, record.dropped, documents))
    return tiles[0] if tiles else []


def _document(section: Section, record: Encoded, number: int, tokenizer: Tokenizer) -> list[Tile]:
    """Add a document of a record: its text, and its pictures, which are returned."""
    document = record.documents[number]
    lines = [_sizes(record, document, number)]
    media = document.pictures.sources if document.pictures is not None else ()
    boxes: list[list[list[float]]] = [[] for _ in media]
    for is_trained, text, start in _spans(document, tokenizer):
        shown = _RUN.sub(_shortened, text)
        shown = shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}..."
        lines.append(f"{'trained:     ' if is_trained else 'not trained: '}{shown!r}")
        before = _num_before(document, start)
        if is_trained and before and '"img_idx"' not in text:
            boxes[before - 1] += boxes_in(text)
    lines += [f"{place}: {describe(plan)}" for place, plan in enumerate(media, 1)]
    section.findings += [Finding("ok", line) for line in lines]  # equal lines are all shown
    return [Tile(record.where, plan, found) for plan, found in zip(media, boxes, strict=True)]


def _sizes(record: Encoded, document: Document, number: int) -> str:
    """The place of a record, and how much of it is what."""
    trained = int((document.labels != IGNORE).sum())
    parts = [count_of(len(document.ids), "token"), f"{trained} of them trained"]
    if document.pictures is not None:
        parts.append(f"{int((document.pictures.modality > 0).sum())} of pictures and videos")
    if document.pair is not None:
        parts.append("first the chosen answer, then the rejected one")
    if document.is_good is not None:
        parts.append(f"the answer is judged {'good' if document.is_good else 'bad'}")
    if record.cut:
        parts.append("too long: rounds are left out")
    if record.shrunk:
        parts.append("pictures are made smaller to fit")
    which = f", sequence {number + 1} of {len(record.documents)}" if len(record.documents) > 1 else ""
    return f"{record.where}{which}: {', '.join(parts)}"


def describe(plan: MediaPlan) -> str:
    """A picture or video: its name, its size in the file and for the model, and its tokens."""
    size = plan.geometry
    frames = ""
    if plan.frames is not None:
        repeated = " and the last one again" if size.grid[0] > plan.frames else ""
        frames = f"{count_of(plan.frames, 'frame')}{repeated}, "
    return (
        f"{plan.name}: {frames}{plan.width} x {plan.height} pixels -> {size.width} x {size.height}, "
        f"{count_of(size.tokens, 'token')}"
    )


def _shortened(run: re.Match[str]) -> str:
    token = next(token for token in PLACEHOLDERS.values() if run[0].startswith(token))
    return f"{token} x {len(run[0]) // len(token)}"


def _num_before(document: Document, start: int) -> int:
    """The number of pictures and videos that begin before a token."""
    return 0 if document.pictures is None else int((document.pictures.first_tokens < start).sum())


def _spans(document: Document, tokenizer: Tokenizer) -> Iterator[tuple[bool, str, int]]:
    """The text of a document in spans that are trained or not trained as a whole: (is_trained, text, number of the
    first token). A token is trained if the position before it has a label. The label is shown instead of the token,
    since after an answer the trained token differs from the next token of the conversation.
    """
    trained = np.concatenate([[False], document.labels[:-1] != IGNORE])
    shown = np.where(trained, np.concatenate([document.ids[:1], document.labels[:-1]]), document.ids)
    start = 0
    for is_trained, group in groupby(zip(shown.tolist(), trained.tolist(), strict=True), key=lambda pair: pair[1]):
        ids = [number for number, _ in group]
        yield is_trained, tokenizer.decode(ids), start
        start += len(ids)
