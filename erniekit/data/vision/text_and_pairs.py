"""Records with pictures that are no conversation: pretraining text ({"text": "... <image> ...", "images": [...]}), and
pairs of answers about pictures (the types of records.preference_formats with `images`, `videos` and tags in the
prompt).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from erniekit.data.records.fields import Notes
from erniekit.data.records.formats import FORMATS
from erniekit.data.records.preference_formats import PREFERENCE_FORMATS
from erniekit.data.records.sample import Sample
from erniekit.data.vision.tags import FormatOptions, RecordMedia, fill_tags

MEDIA = ("images", "image", "videos", "video")
Reader = Callable[[dict[str, Any], FormatOptions, Notes], Sample]


def read_text(record: dict[str, Any], options: FormatOptions, notes: Notes) -> Sample:
    """A sample of kind "text" whose only message has the document's parts."""
    text = FORMATS["text"].read(record, notes).text
    turn = {"role": "user", "content": text}
    return Sample(fill_tags([turn], RecordMedia.of(record, notes), options, notes), kind="text")


def pair_reader(name: str) -> Reader:
    """The reader of a type of pairs. Pictures belong to the prompt: both answers are about the same ones."""
    read = PREFERENCE_FORMATS[name].read

    def of_record(record: dict[str, Any], options: FormatOptions, notes: Notes) -> Sample:
        sample = read({key: value for key, value in record.items() if key not in MEDIA}, notes)
        return replace(sample, messages=fill_tags(sample.messages, RecordMedia.of(record, notes), options, notes))

    return of_record


READERS: dict[str, tuple[Reader, tuple[str, ...]]] = {
    "text": (read_text, (*FORMATS["text"].fields, *MEDIA)),
    **{name: (pair_reader(name), (*format.fields, *MEDIA)) for name, format in PREFERENCE_FORMATS.items()},
}
