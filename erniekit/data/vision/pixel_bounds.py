"""A bound of a picture's tokens that differs from record to record, so that a model sees pictures in many sizes.

ERNIE's training code draws it again whenever it reads a sample (adaptive_max_imgtoken_option). Here it follows from the
seed and the record's place: lengths are exact before training, and a resumed run has the same pictures.
"""

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import PurePath


@dataclass(frozen=True)
class DrawnBounds:
    """The largest areas of a picture in pixels, and how probable each is (the probabilities sum to about 1)."""

    max_pixels: tuple[int, ...]
    shares: tuple[float, ...]
    seed: int

    def draw(self, where: str) -> int:
        """The bound for all pictures of the record at "file:line"; the file's directory does not matter."""
        text = f"{self.seed} {PurePath(where).name}"
        number = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
        ends = list(accumulate(self.shares))
        return self.max_pixels[min(bisect_right(ends, number / 2**64 * ends[-1]), len(ends) - 1)]
