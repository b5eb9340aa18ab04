"""The images and videos of the public call, under transformers' names, as tables that models.inputs takes.

Legend: B batch, S sequence, T tokens, P patches, N images and videos, M tokens that they become.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import paddle

from erniekit.data.vision.positions import POSITION_RULES, PositionRule, in_order, num_tokens, token_positions
from erniekit.models.config import ModelConfig
from erniekit.models.inputs import Pictures
from erniekit.models.vision_config import VisionConfig

# Numbers as callers have them.
HostArray: TypeAlias = paddle.Tensor | np.ndarray | Sequence[Any]
IMAGE, VIDEO = 1, 2


@dataclass(frozen=True)
class PictureArguments:
    """What the public call takes beside tokens, with transformers' names and meanings.

    pixel_values, pixel_values_videos: patches [P, channels * size * size] of all images, and of all videos, normalised
    floats or uint8 pixels. image_grid_thw, video_grid_thw: frames, rows and columns of patches [N, 3].
    mm_token_type_ids [B, S]: 1 on placeholders of images, 2 of videos, 0 elsewhere (default: from the token ids).
    moe_mm_token_type_ids [B, S]: the same with start and end tokens, it decides about experts (default: from the token
    ids). position_rule: see data.vision.positions.POSITION_RULES.
    """

    pixel_values: HostArray | None = None
    image_grid_thw: HostArray | None = None
    pixel_values_videos: HostArray | None = None
    video_grid_thw: HostArray | None = None
    mm_token_type_ids: HostArray | None = None
    moe_mm_token_type_ids: HostArray | None = None
    position_rule: PositionRule = "training"


@dataclass(frozen=True)
class PictureTables:
    """The images and videos among the tokens [B, S] of some rows, on the host: `patches` [P, channels * size * size],
    `grid` int64 [N, 3], `places` int64 [M] token numbers (row-major), `modality` int64 [B, S], `positions` int64
    [B, S, 3].
    """

    patches: np.ndarray
    grid: np.ndarray
    places: np.ndarray
    modality: np.ndarray
    positions: np.ndarray

    def on_device(self) -> Pictures | None:
        """The tables as tensors on the device, for models.inputs; None without any picture."""
        return Pictures(paddle.to_tensor(self.patches), self.grid, self.places) if len(self.grid) else None


def picture_tables(
    config: ModelConfig, input_ids_BS: np.ndarray, segment_ids_BS: np.ndarray, arguments: PictureArguments
) -> PictureTables | None:
    """The tables of the public call; None for a call with text alone.

    Raises ValueError: sizes, patches and placeholders do not belong together, token types leave pictures to the text
    experts, or the model is one of text alone.
    """
    rule = arguments.position_rule
    if rule not in POSITION_RULES:
        raise ValueError(f"position_rule: expected one of {', '.join(POSITION_RULES)}; got {rule!r:.40}")
    given = [name for name, value in vars(arguments).items() if value is not None and name != "position_rule"]
    if not given:
        return None
    if config.vision is None:
        raise ValueError(f"{given[0]}: this is a model of text alone ({config.model_type})")
    vision = config.vision
    images = _media(vision, "pixel_values", arguments.pixel_values, "image_grid_thw", arguments.image_grid_thw)
    videos = _media(
        vision, "pixel_values_videos", arguments.pixel_values_videos, "video_grid_thw", arguments.video_grid_thw
    )
    kinds = _types("mm_token_type_ids", arguments.mm_token_type_ids, input_ids_BS.shape)
    if kinds is None:
        kinds = _kinds(vision, input_ids_BS, len(images[1]) > 0, len(videos[1]) > 0)
    modality = _types("moe_mm_token_type_ids", arguments.moe_mm_token_type_ids, input_ids_BS.shape)
    if modality is None:
        modality = np.where(np.isin(input_ids_BS, vision.around), IMAGE, kinds)
    if len(images[1]) + len(videos[1]) and not modality.any():
        raise ValueError(
            "moe_mm_token_type_ids: all zero, so the text experts would compute the pictures; 1 or 2 marks the tokens "
            "of pictures, their start and end tokens included"
        )
    flat = kinds.reshape(-1)
    grid = np.concatenate([images[1], videos[1]])
    order = in_order(flat, images[1], videos[1], vision.spatial_merge_size)
    rows = np.arange(len(segment_ids_BS))[:, None] * (segment_ids_BS.max(initial=0) + 1)
    documents = np.where(segment_ids_BS == 0, 0, segment_ids_BS + rows).reshape(-1)
    positions = token_positions(flat, grid[order], documents, rule, vision.spatial_merge_size)
    return PictureTables(
        patches=_joined(images[0], videos[0]),
        grid=grid,
        places=np.concatenate([np.flatnonzero(flat == kind) for kind in (IMAGE, VIDEO)]),
        modality=modality,
        positions=positions.reshape(*input_ids_BS.shape, 3),
    )


def _kinds(vision: VisionConfig, input_ids_BS: np.ndarray, has_images: bool, has_videos: bool) -> np.ndarray:
    """mm_token_type_ids from the token ids. Some tokenizers have one placeholder for both kinds."""
    if vision.image_token_id != vision.video_token_id:
        kinds = np.where(input_ids_BS == vision.image_token_id, IMAGE, 0)
        return np.where(input_ids_BS == vision.video_token_id, VIDEO, kinds)
    if has_images and has_videos:
        raise ValueError(
            f"mm_token_type_ids: needed beside images and videos, as token {vision.image_token_id} stands for both "
            "in this model"
        )
    return np.where(input_ids_BS == vision.image_token_id, VIDEO if has_videos else IMAGE, 0)


def _joined(images: np.ndarray, videos: np.ndarray) -> np.ndarray:
    """The patches of images followed by those of videos."""
    if not len(images) or not len(videos):
        return images if len(images) else videos
    if images.dtype != videos.dtype:
        raise ValueError(
            f"pixel_values is {images.dtype} and pixel_values_videos {videos.dtype}: give both as uint8 pixels, or "
            "both as normalised float32"
        )
    return np.concatenate([images, videos])


def _media(
    vision: VisionConfig, pixels: str, given_patches: HostArray | None, sizes: str, given_grid: HostArray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(patches, grid) of the images or of the videos, from arguments called `pixels` and `sizes`."""
    patches, grid = _host(given_patches), _host(given_grid)
    if patches is None and grid is None:
        return np.zeros((0, vision.patch_features), np.float32), np.zeros((0, 3), np.int64)
    if patches is None or grid is None:
        raise ValueError(f"{pixels} and {sizes} belong together: {pixels if patches is None else sizes} is missing")
    if grid.ndim != 2 or grid.shape[1] != 3 or not np.issubdtype(grid.dtype, np.integer):
        raise ValueError(f"{sizes}: expected integers of shape [N, 3], got {grid.dtype} of shape {list(grid.shape)}")
    if patches.ndim != 2 or patches.shape[1] != vision.patch_features:
        raise ValueError(
            f"{pixels}: expected [patches, {vision.patch_features}] ({vision.in_channels} channels of patches of "
            f"{vision.patch_size} x {vision.patch_size} pixels), got {list(patches.shape)}"
        )
    num_tokens(grid, vision.spatial_merge_size)
    if len(patches) != grid.prod(axis=1).sum():
        raise ValueError(f"{pixels}: {len(patches)} patches, but {sizes} says {grid.prod(axis=1).sum()}")
    if patches.dtype != np.uint8:
        patches = patches.astype(np.float32)
    return patches, grid.astype(np.int64)


def _types(name: str, given: HostArray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    types = _host(given)
    if types is not None and types.shape != shape:
        raise ValueError(f"{name}: shape {list(types.shape)} differs from input_ids' {list(shape)}")
    return None if types is None else types.astype(np.int64)


def _host(values: Any) -> np.ndarray | None:
    if values is None:
        return None
    if isinstance(values, paddle.Tensor):
        return values.astype("float32").numpy() if values.dtype == paddle.bfloat16 else values.numpy()
    return np.asarray(values)


def rows_of(tables: PictureTables, real_BS: np.ndarray, merge_size: int) -> list[PictureTables]:
    """The tables of each row by itself, without its padding: `places` then count the row's real tokens."""
    width = real_BS.shape[1]
    counts = num_tokens(tables.grid, merge_size)
    patch_ends, token_ends = np.cumsum(tables.grid.prod(axis=1)), np.cumsum(counts)
    patches_of = np.split(tables.patches, patch_ends[:-1])
    places_of = np.split(tables.places, token_ends[:-1])
    row_of = tables.places[token_ends - counts] // width
    rows = []
    for row, real in enumerate(real_BS):
        own = np.flatnonzero(row_of == row)
        number_of = np.cumsum(real) - 1  # of each column among the real tokens
        rows.append(
            PictureTables(
                patches=np.concatenate([tables.patches[:0], *(patches_of[i] for i in own)]),
                grid=tables.grid[own],
                places=number_of[np.concatenate([tables.places[:0], *(places_of[i] for i in own)]) - row * width],
                modality=tables.modality[row, real],
                positions=tables.positions[row, real],
            )
        )
    return rows
