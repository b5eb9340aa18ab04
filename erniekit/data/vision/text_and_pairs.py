"""Records with pictures that are no conversation: pretraining text ({"text": "... <image> ...", "images": [...]}), and
pairs of answers about pictures (the types of records.preference_formats with `images`, `videos` and tags in the
prompt, or OpenAI's content lists).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes
from erniekit.data.records.formats import FORMATS
from erniekit.data.records.preference_formats import (
    PREFERENCE_FORMATS,
    TurnsReader,
    pair_of_messages,
    pair_of_sharegpt,
)
from erniekit.data.records.sample import Sample
from erniekit.data.vision.tags import MEDIA, FormatOptions, RecordMedia, fill_tags
from erniekit.data.vision.turns import read_turn

Reader = Callable[[dict[str, Any], FormatOptions, Notes], Sample]


def read_text(record: dict[str, Any], options: FormatOptions, notes: Notes) -> Sample:
    """A sample of kind "text" whose only message has the document's parts."""
    text = FORMATS["text"].read(record, notes).text
    turn = {"role": "user", "content": text}
    return Sample(fill_tags([turn], RecordMedia.of(record, notes), options, notes), kind="text")


def pair_reader(name: str) -> Reader:
    """The reader of a type of pairs. Pictures belong to the prompt: both answers are about the same ones. In `messages`
    and `sharegpt` the content of a message may be a list of parts.
    """

    def of_record(record: dict[str, Any], options: FormatOptions, notes: Notes) -> Sample:
        media = RecordMedia.of(record, notes)
        fields = {key: value for key, value in record.items() if key not in MEDIA}

        def finish(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return fill_tags(turns, media, options, notes)

        if name in _OF_TURNS:
            return _without_pictures_in_answers(_OF_TURNS[name](fields, notes, TurnsReader(read_turn, finish)))
        sample = PREFERENCE_FORMATS[name].read(fields, notes)
        return replace(sample, messages=finish(sample.messages))

    return of_record


_OF_TURNS = {"messages (DPO)": pair_of_messages, "sharegpt (DPO)": pair_of_sharegpt}


def _without_pictures_in_answers(sample: Sample) -> Sample:
    for side, answer in zip(("chosen", "rejected"), sample.answers or (), strict=True):
        if any(isinstance(turn["content"], list) for turn in answer):
            raise BadRecord(f"the {side} answer has pictures", "put them into the prompt, which both answers share")
    return sample


READERS: dict[str, tuple[Reader, tuple[str, ...]]] = {
    "text": (read_text, (*FORMATS["text"].fields, *MEDIA)),
    **{name: (pair_reader(name), (*format.fields, *MEDIA)) for name, format in PREFERENCE_FORMATS.items()},
}
