"""Rows with pictures and rows of text, by turns: the rows of two feeds as one stream, for a Loader (see loader.Feed).

Turn k of a cycle of p + t turns takes pictures if k < p, else text. A turn is `block` rows: those of a microbatch of
all ranks, of a whole step, or one row. Which feed row n comes from follows from n alone, so the order does not depend
on workers and can be continued at any row. The text has no end; the stream ends with the pictures.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from erniekit.data.packed_batch import PackedBatch
from erniekit.data.record_feed import RecordFeed
from erniekit.data.records.dataset import Dataset

_TEXT = "text: "


@dataclass(frozen=True)
class MixedPosition:
    """A position between two rows: that of each feed, the turns that are over, and the rows of the turn that is not."""

    pictures: Any
    text: Any
    turns: int = 0
    rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The position as plain JSON values."""
        return {
            "pictures": self.pictures.to_dict(),
            "text": self.text.to_dict(),
            "turns": self.turns,
            "rows": self.rows,
        }


class MixedFeed:
    """See the module's docstring. `ratio`: turns of pictures, and turns of text. `block` does not belong to the
    identity: another number of ranks has other microbatches, and the run continues with the next turn.
    """

    def __init__(self, pictures: RecordFeed, text: RecordFeed, ratio: tuple[int, int], block: int, interleave: str):
        self.pictures, self.text, self._ratio, self._block = pictures, text, ratio, block
        self.dataset: Dataset = pictures.dataset
        self.identity: dict[str, Any] = (
            pictures.identity
            | {_TEXT + name: value for name, value in text.identity.items()}
            | {"modality_ratio": list(ratio), "modality_interleave": interleave}
        )

    @property
    def exact(self) -> bool:
        """Whether rows_left() counts rows."""
        return self.pictures.exact

    def begin(self) -> MixedPosition:
        """The position before the first row."""
        return MixedPosition(self.pictures.begin(), self.text.begin())

    def read_position(self, state: dict[str, Any]) -> MixedPosition:
        """The position that to_dict() described."""
        pictures, text = (
            feed.read_position(state[name]) for feed, name in ((self.pictures, "pictures"), (self.text, "text"))
        )
        return MixedPosition(pictures, text, int(state["turns"]), int(state["rows"]))

    def rows(self, position: MixedPosition) -> Generator[tuple[PackedBatch, MixedPosition], None, None]:
        """The rows after a position, each with the position behind it."""
        pictures, text, turns, done = position.pictures, position.text, position.turns, position.rows
        with closing(self.pictures.rows(pictures)) as with_pictures, closing(self.text.rows(text)) as of_text:
            ahead = next(with_pictures, None)  # no text comes after the last picture
            while ahead is not None:
                if self._has_pictures(turns):
                    row, pictures = ahead
                    ahead = next(with_pictures, None)
                else:
                    row, text = next(of_text)
                done += 1
                if done >= self._block:
                    turns, done = turns + 1, 0
                yield row, MixedPosition(pictures, text, turns, done)

    def _has_pictures(self, turn: int) -> bool:
        return turn % sum(self._ratio) < self._ratio[0]

    def rows_left(self, position: MixedPosition) -> float:
        """Rows to the end of the pictures: theirs, and those of the text whose turn comes before."""
        left = self.pictures.rows_left(position.pictures)
        if not left:
            return 0.0
        total, turn, done = 0.0, position.turns, float(position.rows)
        of_cycle, cycle = self._ratio[0] * self._block, sum(self._ratio)
        whole = max(0, math.ceil(left / of_cycle) - 2)  # cycles that need no look at their turns
        left, total = left - whole * of_cycle, total + whole * cycle * self._block
        while left > 0:
            rows: float = self._block - done
            if self._has_pictures(turn):
                rows = min(rows, left)
                left -= rows
            total, turn, done = total + rows, turn + 1, 0.0
        return total

    def announce(self) -> None:
        """See RecordFeed.announce."""
        self.pictures.announce()

    def require_samples(self) -> None:
        """See RecordFeed.require_samples."""
        self.pictures.require_samples()
        self.text.require_samples()

    def epochs_done(self, position: MixedPosition) -> int:
        """Epochs of the data with pictures."""
        return self.pictures.epochs_done(position.pictures)

    def report(self, position: MixedPosition) -> dict[str, Any]:
        """The counts of both (RecordFeed.report), those of the text under "text_" and the name; `epoch` is that of the
        data with pictures.
        """
        of_text = self.text.report(position.text)
        return self.pictures.report(position.pictures) | {f"text_{name}": value for name, value in of_text.items()}

    def decode_media(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The batches with the pixels of their pictures."""
        return self.pictures.decode_media(batches)

    def interrupt(self) -> None:
        """Wake a thread that waits inside rows()."""
        self.pictures.interrupt()
        self.text.interrupt()
