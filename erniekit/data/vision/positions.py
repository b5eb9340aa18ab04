"""How many tokens images and videos become, and the positions (time, height, width) of a sequence that holds them.

Sizes are a grid: frames, rows and columns of patches of each image and video, int [N, 3]. One frame is an image; the
resampler joins merge_size x merge_size patches of a frame, and two frames of a video, to one token.
"""

from typing import Literal

import numpy as np

# "training": text behind a picture starts at 1 + the largest position on any axis, as the published models were
# trained. "transformers": that library looks at height and width alone, which differs for videos with more pairs of
# frames than merged rows or columns.
PositionRule = Literal["training", "transformers"]
POSITION_RULES: tuple[PositionRule, ...] = ("training", "transformers")
MERGED_FRAMES = 2


def merged_grid(grid_N3: np.ndarray, merge_size: int = 2) -> np.ndarray:
    """Time steps, rows and columns of tokens of each image and video [N, 3].

    Raises ValueError for sizes that do not merge: rows or columns that merge_size does not divide, an odd number of
    frames other than one.
    """
    grid = np.asarray(grid_N3, dtype=np.int64).reshape(-1, 3)
    wrong = (grid < 1).any(axis=1) | (grid[:, 1:] % merge_size).any(axis=1) | ((grid[:, 0] % 2 > 0) & (grid[:, 0] > 1))
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        frames, height, width = grid[place].tolist()
        raise ValueError(
            f"picture {place}: {frames} frames of {height} x {width} patches: rows and columns must be multiples of "
            f"{merge_size}, and frames one (an image) or an even number (a video; its last frame is repeated)"
        )
    return np.stack([np.maximum(grid[:, 0] // MERGED_FRAMES, 1), *(grid[:, 1:].T // merge_size)], axis=1)


def num_tokens(grid_N3: np.ndarray, merge_size: int = 2) -> np.ndarray:
    """The number of tokens of each image and video: int64 [N]. Raises ValueError as merged_grid does."""
    return merged_grid(grid_N3, merge_size).prod(axis=1)


def token_positions(
    kinds_T: np.ndarray,
    grid_N3: np.ndarray,
    segment_ids_T: np.ndarray | None = None,
    rule: PositionRule = "training",
    merge_size: int = 2,
) -> np.ndarray:
    """Positions (time, height, width) of T tokens: int64 [T, 3].

    Text counts on, the same on all axes. The tokens of a picture that starts at s have s + (time step, row, column).
    Each document starts at 0.

    Args:
        kinds_T: 0 for text and for the tokens around a picture, 1 for an image's placeholders, 2 for a video's.
        grid_N3: the images and videos in the order of their placeholders.
        segment_ids_T: the document of each token, 0 for padding, whose positions are 0; default: one document.
        rule: where text continues behind a picture, see POSITION_RULES.
        merge_size: patches of a side that become one token.

    Raises:
        ValueError: the placeholders are not those of the grid.
    """
    steps_N3 = merged_grid(grid_N3, merge_size)
    segments = np.ones(len(kinds_T), np.int64) if segment_ids_T is None else np.asarray(segment_ids_T)
    places = _starts(np.asarray(kinds_T), segments, steps_N3.prod(axis=1))
    # Without pictures a token's position is its place in its document. A picture of n tokens moves all behind it by
    # its extent - n.
    advance = np.ones(len(kinds_T), np.int64)
    extents = steps_N3.max(axis=1) if rule == "training" else steps_N3[:, 1:].max(axis=1)
    for start, count, extent in zip(places.tolist(), steps_N3.prod(axis=1).tolist(), extents.tolist(), strict=True):
        advance[start : start + count] = 0
        advance[start + count - 1] = extent
    before = np.cumsum(advance) - advance
    first = np.flatnonzero(np.diff(segments, prepend=segments[:1] - 1))
    document = np.searchsorted(first, np.arange(len(segments)), side="right") - 1
    positions = (
        np.repeat((before - before[first][document])[:, None], 3, axis=1) if len(first) else np.zeros((0, 3), int)
    )
    for start, steps in zip(places.tolist(), steps_N3.tolist(), strict=True):
        cells = np.stack(np.meshgrid(*map(np.arange, steps), indexing="ij"), axis=-1).reshape(-1, 3)
        positions[start : start + len(cells)] += cells
    return positions * (segments != 0)[:, None]


def _starts(kinds_T: np.ndarray, segments_T: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    """The token number at which each picture begins [N]."""
    tokens = np.flatnonzero(kinds_T > 0)
    if len(tokens) != counts_N.sum():
        raise ValueError(
            f"{len(tokens)} placeholders for {len(counts_N)} images and videos of {counts_N.sum()} tokens: the "
            "sequence and the sizes do not belong together, or a picture was cut"
        )
    ends = np.cumsum(counts_N)
    starts = tokens[ends - counts_N]
    whole = (tokens[ends - 1] - starts + 1 == counts_N) & (segments_T[tokens[ends - 1]] == segments_T[starts])
    if not whole.all():
        place = int(np.flatnonzero(~whole)[0])
        raise ValueError(
            f"picture {place}: its {counts_N[place]} placeholders do not stand together, from token {starts[place]} on"
        )
    return starts


def in_order(kinds_T: np.ndarray, images_N3: np.ndarray, videos_N3: np.ndarray, merge_size: int = 2) -> np.ndarray:
    """Images and videos that stand in two tables, in the order of their placeholders: numbers into the images followed
    by the videos, int64 [N]. Raises ValueError where placeholders and sizes do not belong together.
    """
    grid = np.concatenate([images_N3, videos_N3]).reshape(-1, 3)
    counts = num_tokens(grid, merge_size)
    starts = []
    for kind, own in ((1, counts[: len(images_N3)]), (2, counts[len(images_N3) :])):
        tokens = np.flatnonzero(kinds_T == kind)
        if len(tokens) != own.sum():
            name = "images" if kind == 1 else "videos"
            raise ValueError(f"{len(tokens)} placeholders of {name}, but the {len(own)} {name} have {own.sum()} tokens")
        starts.append(tokens[np.cumsum(own) - own])
    return np.argsort(np.concatenate(starts), kind="stable")
