"""Which tokens may see one another: documents packed into rows, as an attention plan made once a batch on the host."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length side by side: `tokens` [num_documents, length] token numbers, short documents padded
    at their end with token 0; `real` [num_documents, length] is False on that padding. `prefix` and `prefix_real`
    [num_documents, width]: the tokens that a document also sees before its own, padded at their beginning; width 0 for
    documents that stand alone.
    """

    tokens: np.ndarray
    real: np.ndarray
    prefix: np.ndarray
    prefix_real: np.ndarray


@dataclass(frozen=True)
class AttentionPlan:
    """Causal attention inside documents, all on the host. `buckets` hold every token once. Padding stands after a
    document's last token, so a plain causal mask hides it from every real token. `last_reader` [num_documents] is the
    last document that sees a document's tokens: itself, or the last branch of a shared prefix. A branch's positions
    continue its prefix's.
    """

    num_tokens: int
    buckets: tuple[Bucket, ...]
    document_of_token: np.ndarray
    position_in_document: np.ndarray
    last_reader: np.ndarray


def next_in_document(document_of_token: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of T tokens, given the document that each is in, the number of the token `step` places on [T], and
    whether that one is in the same document [T].
    """
    places = np.arange(len(document_of_token)) + step
    target = np.minimum(places, len(places) - 1)
    return target, (document_of_token[target] == document_of_token) & (places < len(places))


def document_starts(segment_ids_BS: np.ndarray) -> np.ndarray:
    """Token numbers (row-major) at which a document begins: a row's start, and each change of segment id within a
    row.
    """
    change = np.ones(segment_ids_BS.shape, dtype=bool)
    change[:, 1:] = segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1]
    starts = np.flatnonzero(change)
    rows = starts // segment_ids_BS.shape[1]
    ids = segment_ids_BS.reshape(-1)[starts]
    real = ids != 0
    pairs = np.stack([rows[real], ids[real]], axis=1)
    if len(np.unique(pairs, axis=0)) != len(pairs):
        raise ValueError(
            "segment_ids: a document's tokens must stand together in a row, but one id comes back after another"
        )
    return starts


def _bucket_key(length: int) -> int:
    """Round a length up by at most a quarter, so that few products serve many documents at little waste."""
    step = max(8, 1 << max(int(length).bit_length() - 3, 0))
    return -(-length // step) * step


def make_plan(segment_ids_BS: np.ndarray, prefixes: np.ndarray | None = None) -> AttentionPlan:
    """The plan of a batch of rows. segment_ids [B, S] integers; equal neighbours in a row are one document, 0 is
    padding. `prefixes` [first documents]: for each document in the order of place, the number of the one whose tokens
    it sees before its own, or -1 (also for those not listed). The branches of a prefix follow it directly.

    Raises ValueError if a document's tokens do not stand together.
    """
    num_tokens = segment_ids_BS.size
    starts = document_starts(segment_ids_BS)
    lengths = np.diff(np.append(starts, num_tokens))
    prefix_of = np.full(len(starts), -1)
    if prefixes is not None:
        prefix_of[: len(prefixes)] = prefixes
    widths = np.where(prefix_of < 0, 0, lengths[prefix_of])
    document_of_token = np.repeat(np.arange(len(starts)), lengths)
    position = np.arange(num_tokens) - starts[document_of_token] + widths[document_of_token]
    groups: dict[tuple[int, int], list[int]] = {}
    for document, (length, width) in enumerate(zip(lengths.tolist(), widths.tolist(), strict=True)):
        groups.setdefault((_bucket_key(length), _bucket_key(width) if width else 0), []).append(document)
    buckets = []
    for _, documents in sorted(groups.items()):
        steps = np.arange(lengths[documents].max())
        real = steps < lengths[documents][:, None]
        back = np.arange(-widths[documents].max(), 0) + widths[documents][:, None]
        prefix = np.where(back >= 0, starts[prefix_of[documents]][:, None] + back, 0)
        buckets.append(Bucket(np.where(real, starts[documents][:, None] + steps, 0), real, prefix, back >= 0))
    return AttentionPlan(num_tokens, tuple(buckets), document_of_token, position, _last_readers(prefix_of))


def _last_readers(prefix_of: np.ndarray) -> np.ndarray:
    """For each document the last one that sees it. Branches must stand behind their prefix, one after another."""
    last = np.arange(len(prefix_of))
    for branch in np.flatnonzero(prefix_of >= 0).tolist():
        prefix = prefix_of[branch]
        assert prefix_of[prefix] < 0 and last[prefix] == branch - 1, "a prefix's branches follow it directly"
        last[prefix] = branch
    return last
