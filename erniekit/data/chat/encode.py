"""Encodes samples to token ids and labels of at most max_seq_len tokens."""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from erniekit.data.chat.pairs import answers_are_equal, join_pair, one_answer, truncate_document
from erniekit.data.packed_batch import IGNORE, Document
from erniekit.data.records.data_file import Raw
from erniekit.data.records.errors import SKIPPABLE, BadLine, reading
from erniekit.data.records.formats import parse_record
from erniekit.data.records.readers import load_record
from erniekit.data.records.sample import Sample
from erniekit.utils.errors import DataError, UserError


class Tokenizer(Protocol):
    """The methods of a tokenizer that this layer calls. Tokenizers with equal ids have equal fingerprints."""

    eos_id: int
    vocab_size: int

    @property
    def fingerprint(self) -> str: ...

    def encode_plain(self, text: str) -> list[int]: ...


class Template(Protocol):
    """The methods of a chat template (chat.template.Template) that this layer calls: the training sequences of a
    conversation as segments, and a sequence's ids and shifted labels. `source` is its text.
    """

    source: str

    def encode_all(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, label: list[int] | None
    ) -> list[Any]: ...

    def labels(self, segments: Any) -> tuple[list[int], list[int]]: ...


def template_hash(template: Template | None) -> str | None:
    """A hash of a template's text, by which a resumed run knows it; None without a template."""
    return None if template is None else hashlib.blake2b(template.source.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Encoded:
    """The documents made from a record: one for a conversation (one per answer if the chat template rewrites earlier
    turns) or for a pair of answers, one or more for a pretraining text, none if the record was dropped.

    `cut` says that part of it was left out, `shrunk` that its pictures were made smaller to fit; `dropped` says why
    there is nothing of it, `bad` whether that is because the record is wrong, and `needed` the max_seq_len that a
    record with pictures needs if it is too long.
    """

    where: str
    documents: list[Document] = field(default_factory=list)
    cut: bool = False
    dropped: str = ""
    shrunk: bool = False
    bad: bool = False
    needed: int = 0


class _Refused(Exception):
    """The chat template raised an error for a sample."""


class Encoder:
    """Encodes records. The result depends only on the record, so any process can encode any record.

    A conversation longer than `max_seq_len` tokens loses its earliest turns (a turn is a user message and everything
    that answers it), never its system text. If its last turn alone is too long, `truncation` decides: "drop" the
    sample, "cut" it at its end, or raise an "error". In a pair of answers, the prompt loses turns until it has at most
    `max_prompt_len` tokens and the prompt and both answers together have at most max_seq_len; "cut" shortens the longer
    answer, and drops a pair whose last question is too long. A pretraining text is followed by eos and split into
    documents of at most max_seq_len tokens. The last token of each document predicts the first token of the next one,
    so no target is lost. Special tokens in a pretraining text are encoded as plain text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template | None,
        max_seq_len: int,
        truncation: str = "drop",
        on_bad_line: str = "error",
        max_prompt_len: int | None = None,
    ):
        self.template = template
        self._tokenizer, self._max_prompt_len = tokenizer, max_prompt_len
        self._max_seq_len, self._truncation, self._skip_bad = max_seq_len, truncation, on_bad_line == "skip"

    def __call__(self, type_name: str, raw: Raw, where: str) -> Encoded:
        """Encode one record of a file. A wrong record raises DataError "file:line: ...", or is dropped if on_bad_line
        says skip.
        """
        try:
            with reading(where):
                sample = parse_record(load_record(raw, where), type_name, where)
                return self._text(sample.text, where) if sample.kind == "text" else self._chat(sample, where)
        except _Refused as error:
            if not self._skip_bad:
                raise DataError(f"{where}: {error} {SKIPPABLE}") from error
            return Encoded(where, dropped=str(error))
        except BadLine as error:
            if not self._skip_bad:
                raise
            return Encoded(where, dropped=str(error).removeprefix(f"{where}: "), bad=True)

    def _text(self, text: str, where: str) -> Encoded:
        tokens = np.array([*self._tokenizer.encode_plain(text), self._tokenizer.eos_id], np.int32)
        labels = np.append(tokens[1:], np.int32(IGNORE))
        starts = range(0, len(tokens), self._max_seq_len)
        documents = [
            Document(tokens[at : at + self._max_seq_len], labels[at : at + self._max_seq_len]) for at in starts
        ]
        if len(documents) > 1 and len(documents[-1].ids) == 1:
            documents.pop()  # a document of eos alone has no target: the document before it already predicts this eos
        return Encoded(where, documents)

    def _chat(self, sample: Sample, where: str) -> Encoded:
        documents = self._documents(sample)
        cut = not self._fits(documents)
        if cut:
            documents = self._last_turns(sample)
        if not self._fits(documents):
            excess, key = self._excess(documents)
            if self._truncation == "error":
                raise DataError(f"{where}: {excess}. Hint: raise {key}, or set truncation: cut or drop.")
            if self._truncation == "drop" or key == "max_prompt_len":
                return Encoded(where, dropped=excess)
            documents = [truncate_document(document, self._max_seq_len) for document in documents]
            if any(answers_are_equal(document) for document in documents):
                return Encoded(where, dropped=f"cut to {key} {self._max_seq_len}, both answers are the same")
        documents = [document for document in documents if (document.labels != IGNORE).any()]
        if not documents:
            return Encoded(
                where, dropped="no answer to learn is left: its label says 0, or the prompt alone fills max_seq_len"
            )
        if sample.is_good is not None:
            if len(documents) > 1:
                raise _Refused(
                    "the chat template rewrites earlier turns, so that a judged answer of several turns is not one "
                    "sequence. Hint: give answers of one turn, or choose another template."
                )
            documents = [documents[0]._replace(is_good=sample.is_good)]
        return Encoded(where, documents, cut)

    def _fits(self, documents: list[Document]) -> bool:
        return not self._prompt_too_long(documents) and all(len(d.ids) <= self._max_seq_len for d in documents)

    def _prompt_too_long(self, documents: list[Document]) -> bool:
        limit = self._max_prompt_len
        return limit is not None and any(d.pair is not None and d.pair.prompt + 1 > limit for d in documents)

    def _excess(self, documents: list[Document]) -> tuple[str, str]:
        """(a description of what is too long in the last turn, the key that limits it)."""
        if self._prompt_too_long(documents):
            prompt = max(document.pair.prompt + 1 for document in documents if document.pair is not None)
            return (
                f"its last question alone has {prompt} tokens, more than max_prompt_len {self._max_prompt_len}",
                "max_prompt_len",
            )
        longest = max(len(document.ids) for document in documents)
        return f"its last turn alone has {longest} tokens, more than max_seq_len {self._max_seq_len}", "max_seq_len"

    def _last_turns(self, sample: Sample) -> list[Document]:
        """The documents of the largest number of last turns that fits, or of the last turn alone if none fits. It is
        found by bisection, since fewer turns never have more tokens. Of a pair only turns of the prompt are left out.
        """
        turns = [i for i, message in enumerate(sample.messages) if message["role"] == "user"]
        # invariant: without the first `fewest` turns it fits (once `best` is set); leaving out fewer than `low` does
        # not fit
        low, fewest, best = 1, len(turns), None
        while low < fewest:
            middle = (low + fewest) // 2
            tried = self._documents(_from_message(sample, turns[0], turns[middle]))
            if self._fits(tried):
                fewest, best = middle, tried
            else:
                low = middle + 1
        return best or self._documents(_from_message(sample, turns[0], turns[-1]))

    def _documents(self, sample: Sample) -> list[Document]:
        if sample.answers is None:
            return self._render(sample)
        sides = [self._render(one_answer(sample, answer)) for answer in sample.answers]
        if any(len(documents) > 1 for documents in sides):
            raise _Refused(
                "the chat template rewrites earlier turns, so that an answer of several turns is not one sequence. "
                "Hint: give answers of one turn, or choose another template."
            )
        try:
            return [join_pair(sides[0][0], sides[1][0], sample.score_delta)]
        except DataError as error:
            raise _Refused(str(error)) from error

    def _render(self, sample: Sample) -> list[Document]:
        assert self.template is not None, "EncoderSpec loads a template if there are conversations"
        try:
            sequences = self.template.encode_all(sample.messages, sample.tools, sample.label)
            pairs = [self.template.labels(segments) for segments in sequences]
        except UserError as error:
            raise _Refused(str(error)) from error
        # a template is a program of the model's author; any error that it raises is reported for this sample
        except Exception as error:
            raise _Refused(
                f"the chat template cannot render this sample: {error!r}. "
                "Hint: check the order of its roles and its tools."
            ) from error
        return [Document(np.array(ids, np.int32), np.array(labels, np.int32)) for ids, labels in pairs]


def _from_message(sample: Sample, first: int, start: int) -> Sample:
    """The sample without the messages between its `first` user message and message `start`; its label keeps the entries
    of the remaining answers.
    """
    label = sample.label
    if label is not None:
        label = label[sum(message["role"] == "assistant" for message in sample.messages[:start]) :]
    return replace(sample, messages=sample.messages[:first] + sample.messages[start:], label=label)
