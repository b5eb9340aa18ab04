"""A record with pictures -> documents of tokens, within max_seq_len. Nothing is decoded: sizes come from headers."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from erniekit.data.chat.encode import Encoded
from erniekit.data.chat.pairs import one_answer
from erniekit.data.packed_batch import IGNORE, Document, DocumentPictures
from erniekit.data.records.data_file import Raw
from erniekit.data.records.errors import SKIPPABLE, BadLine, BadRecord, reading
from erniekit.data.records.readers import load_record
from erniekit.data.records.sample import Sample
from erniekit.data.vision.documents import pair_document, text_sequences
from erniekit.data.vision.formats import parse_vision_record
from erniekit.data.vision.images import IMAGE_OPTIONS, ImageOptions
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.parts import media_of
from erniekit.data.vision.pixel_bounds import DrawnBounds
from erniekit.data.vision.plan import SMALLEST_AREA, MediaPlan, largest_bound, plan_media, shrink, tokens_of
from erniekit.data.vision.positions import PositionRule
from erniekit.data.vision.processor_files import ProcessorSettings
from erniekit.data.vision.sequence import MediaTokens, expand
from erniekit.data.vision.smart_resize import PixelLimits
from erniekit.data.vision.tags import FormatOptions
from erniekit.data.vision.template import VisionTemplate
from erniekit.data.vision.video import VideoOptions
from erniekit.utils.errors import DataError, UserError


@dataclass(frozen=True)
class VisionSpec:
    """How records with pictures are read, in a form that can be sent to a worker. `truncation`: what happens to a
    sample that does not fit, "drop", "shrink" or "error" (see VisionEncoder). `drawn_bounds`: each record has one of
    these bounds for its pictures; None: all have that of the settings.
    """

    settings: ProcessorSettings = field(default_factory=ProcessorSettings)
    truncation: str = "drop"
    boxes: str = "relative"
    missing_tags: str = "error"
    allow_urls: bool = False
    images: ImageOptions = IMAGE_OPTIONS
    video_seconds: float = 300.0
    position_rule: PositionRule = "training"
    drawn_bounds: DrawnBounds | None = None

    def settings_at(self, where: str) -> ProcessorSettings:
        """The settings for the record at "file:line"."""
        if self.drawn_bounds is None:
            return self.settings
        images = PixelLimits(self.settings.images.min_pixels, self.drawn_bounds.draw(where))
        return replace(self.settings, images=images)

    def formats(self, where: str) -> FormatOptions:
        """The options for a record at "file:line", whose media are relative to the file's directory."""
        reader = MediaReader(Path(where.rpartition(":")[0] or where).parent, self.allow_urls)
        return FormatOptions(reader, self.boxes, self.missing_tags, self.images)

    @property
    def video(self) -> VideoOptions:
        """The options for reading videos."""
        return VideoOptions(self.settings.choice, self.images, self.video_seconds)

    def __repr__(self) -> str:
        """All that decides what records become, as text."""
        settings = {key: np.asarray(value).tolist() if key in ("mean", "std") else value
                    for key, value in vars(self.settings).items()}  # fmt: skip
        others = {key: value for key, value in vars(self).items() if key not in ("settings", "drawn_bounds")}
        drawn = "" if self.drawn_bounds is None else f" {self.drawn_bounds}"
        return f"{settings} {list(others.values())}{drawn}"


class _Sequence(NamedTuple):
    """Ids with one placeholder for each of the first `media` media, and shifted labels."""

    ids: list[int]
    labels: list[int]
    media: int


class VisionEncoder:
    """Encodes records with pictures; what it does depends on nothing but the record, its place (with drawn bounds) and
    the sizes of its pictures, so that any process may do it.

    A conversation longer than `max_seq_len` tokens loses its last whole rounds (a round is a user's message and all
    that answers it) and the pictures in them, never a part of a picture: later rounds speak of earlier pictures, not
    the other way round. With the truncation "shrink" pictures are made smaller before rounds are left out. If the
    first round alone does not fit, it is dropped, or with "error" raises DataError.
    """

    def __init__(self, template: VisionTemplate, spec: VisionSpec, max_seq_len: int, on_bad_line: str = "error"):
        self.template = template
        self._spec, self._max_seq_len, self._skip_bad = spec, max_seq_len, on_bad_line == "skip"
        self._tokens = MediaTokens.of(template.tokenizer)

    def __call__(self, type_name: str, raw: Raw, where: str) -> Encoded:
        """Encode one record of a file; DataError "file:line: ..." if it is wrong, or a dropped record where such lines
        are skipped.
        """
        try:
            with reading(where):
                options = self._spec.formats(where)
                sample = parse_vision_record(load_record(raw, where), type_name, where, options)
                settings = self._spec.settings_at(where)
                plans = plan_media(list(media_of(sample.messages)), options.reader, settings, self._spec.video)
                if sample.kind == "text":
                    return self._text(sample, plans, where)
                return (
                    self._fitted(sample, plans, where) if sample.answers is None else self._pair(sample, plans, where)
                )
        except BadLine as error:
            if not self._skip_bad:
                raise BadLine(f"{error} {SKIPPABLE}") from error
            return Encoded(where, dropped=str(error).removeprefix(f"{where}: "), bad=True)

    def _text(self, sample: Sample, plans: list[MediaPlan], where: str) -> Encoded:
        """A pretraining text in as many documents as it needs. With the truncation "shrink" a picture that alone is too
        long is made smaller.
        """
        room = self._max_seq_len - 2  # for a picture between its tags
        fitted = self._fit_each(plans, room)
        if any(plan.geometry.tokens > room for plan in fitted):
            return self._too_large(where, fitted, room)
        tokens = [plan.geometry.tokens for plan in fitted]
        [message] = sample.messages
        sequences = text_sequences(message["content"], tokens, self._tokens, self.template.tokenizer, self._max_seq_len)
        documents, used = [], 0
        inside = (self._tokens.image, self._tokens.video)
        for ids, labels in sequences:
            count = sum(i in inside for i in ids)
            documents.append(self._document(_Sequence(ids, labels, count), fitted[used : used + count]))
            used += count
        documents = [document for document in documents if (document.labels != IGNORE).any()]
        if not documents:
            return Encoded(where, dropped="there is no text to learn")
        return Encoded(where, documents, shrunk=fitted is not plans)

    def _fit_each(self, plans: list[MediaPlan], room: int) -> list[MediaPlan]:
        """The plans of a text with at most `room` tokens each, if they may be made smaller and can be."""
        if self._spec.truncation != "shrink" or all(plan.geometry.tokens <= room for plan in plans):
            return plans
        return [plan if plan.geometry.tokens <= room else (shrink([plan], room) or [plan])[0] for plan in plans]

    def _too_large(self, where: str, plans: list[MediaPlan], room: int) -> Encoded:
        """A dropped text, of whose pictures some have more than `room` tokens."""
        largest = max(plans, key=lambda plan: plan.geometry.tokens)
        alike = [plan for plan in plans if plan.modality == largest.modality and plan.geometry.tokens > room]
        length = largest.geometry.tokens + 2
        reason = f"a picture has {length} tokens, more than max_seq_len {self._max_seq_len}"
        bound = min(largest_bound([plan], room) or 0 for plan in alike)
        return self._too_long(where, length, reason, self._hint(length, [largest], bound))

    def _too_long(self, where: str, length: int, reason: str, hint: str) -> Encoded:
        """A dropped record, which would need `length` tokens; DataError with the truncation "error"."""
        if self._spec.truncation == "error":
            raise DataError(f"{where}: {reason}. Hint: {hint}.")
        return Encoded(where, dropped=f"{reason} ({hint})", needed=length)

    def _pair(self, sample: Sample, plans: list[MediaPlan], where: str) -> Encoded:
        """A pair of answers in one document; it is dropped if it does not fit, with the truncation "shrink" also with
        smaller pictures.
        """
        assert sample.answers is not None
        sides = [self._sequences(one_answer(sample, answer)) for answer in sample.answers]
        if any(len(side) > 1 for side in sides):
            raise BadRecord("the chat template rewrites earlier turns", "give answers of one turn, or another template")
        sequences = [side[0] for side in sides]
        texts = [len(sequence.ids) - sequence.media for sequence in sequences]
        prompt = next((t for t, label in enumerate(sequences[0].labels) if label != IGNORE), 0)
        room = self._max_seq_len - (sum(texts) - prompt + sequences[0].media)
        fitted: list[MediaPlan] | None = plans
        if tokens_of(plans) > room:
            fitted = shrink(plans, room) if self._spec.truncation == "shrink" and room > 0 else None
        if fitted is None:
            length = self._max_seq_len - room + tokens_of(plans)
            reason = (
                f"the pair has {length} tokens, {tokens_of(plans)} of them of pictures, more than max_seq_len "
                f"{self._max_seq_len}"
            )
            return self._too_long(where, length, reason, self._hint(length, plans, largest_bound(plans, room)))
        chosen, rejected = (self._document(sequence, fitted) for sequence in sequences)
        try:
            document = pair_document(chosen, rejected, sample.score_delta)
        except DataError as error:
            raise BadRecord(str(error).removesuffix("."), "change the pair, or remove it") from None
        return Encoded(where, [document], shrunk=fitted is not plans)

    def _fitted(self, sample: Sample, plans: list[MediaPlan], where: str) -> Encoded:
        """The documents of the most rounds that fit."""
        ends = _round_ends(sample.messages)
        whole = self._sequences(sample, ends[-1])
        sequences, fitted = whole, self._fit(whole, plans)
        if fitted is None:
            sequences, fitted = self._first_rounds(sample, plans, ends)
        if fitted is None:
            return self._too_long(where, *self._excess(sequences, plans))
        documents = [self._document(sequence, fitted) for sequence in sequences]
        documents = [document for document in documents if (document.labels != IGNORE).any()]
        if not documents:
            return Encoded(where, dropped="no answer to learn is left: its label says 0")
        return Encoded(where, documents, cut=sequences is not whole, shrunk=fitted is not plans)

    def _first_rounds(
        self, sample: Sample, plans: list[MediaPlan], ends: Sequence[int]
    ) -> tuple[list[_Sequence], list[MediaPlan] | None]:
        """The sequences of the most first rounds that fit, by bisection; those of the first round and None if none
        does.
        """
        fits, too_many = 0, len(ends)
        best: tuple[list[_Sequence], list[MediaPlan]] | None = None
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            sequences = self._sequences(sample, ends[middle - 1])
            fitted = self._fit(sequences, plans)
            if fitted is None:
                too_many = middle
            else:
                fits, best = middle, (sequences, fitted)
        return best or (self._sequences(sample, ends[0]), None)

    def _sequences(self, sample: Sample, end: int | None = None) -> list[_Sequence]:
        """The training sequences of a conversation's messages before `end`."""
        messages = sample.messages[:end]
        label = sample.label
        if label is not None:
            label = label[: sum(message["role"] == "assistant" for message in messages)]
        try:
            pairs = [self.template.labels(s) for s in self.template.encode_all(messages, sample.tools, label)]
        except UserError as error:
            raise BadRecord(str(error).removesuffix("."), "fix the row, or choose another chat_template") from None
        inside = (self._tokens.image, self._tokens.video)
        return [_Sequence(ids, labels, sum(i in inside for i in ids)) for ids, labels in pairs]

    def _fit(self, sequences: Sequence[_Sequence], plans: list[MediaPlan]) -> list[MediaPlan] | None:
        """The plans with which all sequences fit: the given ones if possible, smaller ones if that is allowed."""
        if all(self._length(sequence, plans) <= self._max_seq_len for sequence in sequences):
            return plans
        if self._spec.truncation != "shrink":
            return None
        count = max(sequence.media for sequence in sequences)
        budget = self._max_seq_len - max(len(sequence.ids) - sequence.media for sequence in sequences)
        smaller = shrink(plans[:count], budget) if count and budget > 0 else None
        return None if smaller is None else smaller + plans[count:]

    @staticmethod
    def _length(sequence: _Sequence, plans: Sequence[MediaPlan]) -> int:
        return len(sequence.ids) - sequence.media + tokens_of(plans[: sequence.media])

    def _excess(self, sequences: Sequence[_Sequence], plans: Sequence[MediaPlan]) -> tuple[int, str, str]:
        """The length that does not fit, the share of pictures in it, and the smallest change that would make it fit."""
        longest = max(sequences, key=lambda sequence: self._length(sequence, plans))
        length, media = self._length(longest, plans), plans[: longest.media]
        text = length - tokens_of(media)
        limit = self._max_seq_len
        reason = f"its first round alone has {length} tokens"
        if text >= limit or not media:
            return length, f"{reason}, {text} of them text: max_seq_len is {limit}", self._hint(length, media, None)
        kinds = [f"{n} {name}" for n, name in _counts(media) if n]
        reason += f", {length - text} of them of {' and '.join(kinds)}: max_seq_len is {limit}"
        return length, reason, self._hint(length, media, largest_bound(media, limit - text))

    def _hint(self, length: int, media: Sequence[MediaPlan], bound: int | None) -> str:
        """What would make a sample of `length` tokens fit. `bound`: the largest area of its media in pixels with which
        it does; 0 or None if there is none.
        """
        hint = f"set max_seq_len to {length}"
        if not bound:
            shortest = length - tokens_of(media) + tokens_of([plan.at_most(SMALLEST_AREA, 2) for plan in media])
            return hint if shortest == length else f"{hint}, or to {shortest} with truncation: shrink"
        if any(plan.at_most(bound).limits.max_pixels > bound for plan in media):  # one bound does not do for all
            return f"{hint}, or truncation to shrink"
        pictures = f"max_pixels to {bound}"
        if self._spec.drawn_bounds is not None:
            pictures = f"adaptive_max_imgtoken_option to at most {bound // self._spec.settings.patching.factor**2}"
        changes = (pictures, f"video_max_pixels to {bound}")
        needed = [change for (n, _), change in zip(_counts(media), changes, strict=True) if n]
        return f"{hint}, or {' and '.join(needed)}, or truncation to shrink"

    def _document(self, sequence: _Sequence, plans: Sequence[MediaPlan]) -> Document:
        used = plans[: sequence.media]
        ids, labels = sequence.ids, sequence.labels
        if not used:
            return Document(np.array(ids, np.int32), np.array(labels, np.int32))
        expanded = expand(ids, labels, [plan.geometry.tokens for plan in used], self._tokens)
        grid = np.array([plan.geometry.grid for plan in used], np.int64)
        places = expanded.positions(grid, self._tokens, self._spec.position_rule, self._spec.settings.patching)
        pictures = DocumentPictures(expanded.modality, places, grid, expanded.first_tokens, tuple(used))
        return Document(expanded.ids, expanded.labels, pictures=pictures)


def _counts(media: Sequence[MediaPlan]) -> list[tuple[int, str]]:
    """How many pictures and how many videos there are."""
    videos = sum(plan.frames is not None for plan in media)
    pictures = len(media) - videos
    return [(pictures, "picture" if pictures == 1 else "pictures"), (videos, "video" if videos == 1 else "videos")]


def _round_ends(messages: Sequence[dict[str, Any]]) -> list[int]:
    """Where each round ends: before a user's message that follows an answer, and at the end."""
    inner = [
        i for i in range(1, len(messages)) if messages[i]["role"] == "user" and messages[i - 1]["role"] == "assistant"
    ]
    return [*inner, len(messages)]
