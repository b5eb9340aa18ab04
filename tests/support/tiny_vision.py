"""Tiny vision-language models, and microbatches of text, images and videos for them: numpy alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from erniekit.data.packed_batch import PackedBatch, PictureTable
from erniekit.data.vision.positions import num_tokens, token_positions

IMAGE, VIDEO, START, END = 52, 53, 54, 55
CONFIG: dict[str, Any] = {
    "model_type": "ernie4_5_vl_moe",
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": 56,
    "video_end_token_id": 57,
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": [16, 8],
        "moe_num_shared_experts": 2,
        "rope_parameters": {"rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
    },
    "vision_config": {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 2},
}
PATCH = 3 * 2 * 2

# A document: a number of text tokens, or the grid (frames, rows, columns of patches) of an image or a video.
Document = Sequence[int | tuple[int, int, int]]


def packed_row(documents: Sequence[Document], seed: int = 0) -> PackedBatch:
    """Documents one behind the other; text has random tokens and labels, the patches are random pixels."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    kinds: list[int] = []
    segments: list[int] = []
    grid: list[tuple[int, int, int]] = []
    for number, document in enumerate(documents):
        for part in document:
            if isinstance(part, int):
                new, kind = rng.integers(3, 50, part).tolist(), [0] * part
            else:
                count = int(num_tokens(np.array([part]))[0])
                video = part[0] > 1
                new = [START, *[VIDEO if video else IMAGE] * count, END]
                kind = [0, *[2 if video else 1] * count, 0]
                grid.append(part)
            ids += new
            kinds += kind
            segments += [number] * len(new)
    input_ids, grid_N3 = np.array(ids), np.array(grid, np.int64).reshape(-1, 3)
    same = np.append(np.diff(segments) == 0, False)
    labels = np.where(same & (np.append(input_ids[1:], 0) < 50), np.append(input_ids[1:], 0), -100)
    places = np.flatnonzero(np.isin(input_ids, (IMAGE, VIDEO)))
    counts = num_tokens(grid_N3)
    patches = rng.integers(0, 256, (int(grid_N3.prod(axis=1).sum()), PATCH)).astype(np.uint8)
    return PackedBatch(
        input_ids=input_ids,
        labels=labels,
        position_ids=token_positions(np.array(kinds), grid_N3, np.array(segments) + 1),
        segment_ids=np.array(segments),
        modality=np.where(input_ids >= 50, np.maximum(kinds, 1), 0).astype(np.int8),
        row_lengths=[len(input_ids)],
        sources=[f"test:{number}" for number in range(len(documents))],
        pictures=PictureTable(patches, grid_N3, places[np.cumsum(counts) - counts]),
    )
