"""The JSON files beside a vision-language model that say how pictures and videos are prepared.

Read: transformers' (`processor_config.json` with inner objects, or `preprocessor_config.json` and
`video_preprocessor_config.json`) and Baidu's (`preprocessor_config.json` alone). Written: transformers' three files,
the font, and in the first of them the keys that Baidu's code reads.
"""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.data.chat.tokenizer_files import read_optional
from erniekit.data.vision.frames import FONT, FrameOptions
from erniekit.data.vision.pixels import MEAN, STD
from erniekit.data.vision.positions import MERGED_FRAMES
from erniekit.data.vision.smart_resize import IMAGE_LIMITS, PUBLISHED, VIDEO_LIMITS, Patching, PixelLimits
from erniekit.utils import atomic, log
from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import JsonObject

IMAGE_FILE, VIDEO_FILE, PROCESSOR_FILE = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
FILES = (IMAGE_FILE, VIDEO_FILE, PROCESSOR_FILE, FONT.name)
_RATE_OF_FRAMES = 24.0  # what transformers assumes of frames that come without times
_MAX_SIDE = 1024
_EDGES = ("shortest_edge", "longest_edge")  # of transformers' `size`: areas in pixels, whatever the names say
_AREAS = ("min_pixels", "max_pixels")  # of the `size` that Baidu's own processor saves, beside the same two keys
_CHOICE = ("fps", "min_frames", "max_frames", "target_frames", "frames_sample")
_OF_BOTH = frozenset(
    "do_resize do_rescale do_normalize do_convert_rgb resample rescale_factor do_center_crop do_pad size "
    "do_sample_frames merge_size patch_size image_mean image_std draw_on_frames".split()
)
# Of the published files and of those that transformers saves: names of classes, and what changes no pixel here. A size
# to crop or to pad to has no effect beside do_center_crop and do_pad, which must be false.
_HARMLESS = frozenset(
    "image_processor_type video_processor_type feature_extractor_type processor_class auto_map transformers_version "
    "crop_size pad_size default_to_square data_format input_data_format device return_tensors disable_grouping "
    "return_metadata video_metadata image_seq_length font temporal_patch_size _valid_processor_keys".split()
)
_READ_OF_IMAGES = _OF_BOTH.union(
    _AREAS, (f"video_{key}" for key in (*_AREAS, *_CHOICE)), ("spatial_conv_size", "temporal_conv_size")
)
_READ_OF_VIDEOS = _OF_BOTH.union(_AREAS, _CHOICE)
_READ_OF_PROCESSOR = frozenset(("image_processor", "video_processor", "chat_template"))
SERVING_CHOICE = FrameOptions(max_frames=180, sample="leading", assumed_rate=_RATE_OF_FRAMES)


@dataclass(frozen=True)
class ProcessorSettings:
    """How pictures and videos are prepared for a model. `mean` and `std` float32 [3]."""

    patching: Patching = PUBLISHED
    images: PixelLimits = IMAGE_LIMITS
    videos: PixelLimits = VIDEO_LIMITS
    choice: FrameOptions = SERVING_CHOICE
    mean: np.ndarray = field(default_factory=MEAN.copy)
    std: np.ndarray = field(default_factory=STD.copy)


def read_settings(directory: Path, model: Patching | None = None) -> ProcessorSettings:
    """The settings of a model directory; the published ones where it has no such file.

    `model`: how the model that receives the pixels divides them; it also normalises them itself, by pixels.MEAN and
    STD. CheckpointError names the file and the key that cannot be, or that differs from the model.
    """
    outer, image, video = (read_optional(directory / name) for name in (PROCESSOR_FILE, IMAGE_FILE, VIDEO_FILE))
    image = outer.get_object("image_processor") if "image_processor" in outer else image
    video = outer.get_object("video_processor") if "video_processor" in outer else video
    for switch in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if not all(file.get_bool(switch, True) for file in (image, video)):
            raise CheckpointError(
                f"{directory}: {switch}: false is not supported. Remove it from the processor's files."
            )
    for file in (image, video):
        _require_own_way(file)
    for file, own in ((outer, _READ_OF_PROCESSOR), (image, _READ_OF_IMAGES), (video, _READ_OF_VIDEOS)):
        _name_ignored(file, own)
    settings = ProcessorSettings()
    merge = image.get_int("merge_size", image.get_int("spatial_conv_size", PUBLISHED.spatial_merge, 1, 8), 1, 8)
    patching = Patching(image.get_int("patch_size", PUBLISHED.patch, 1, _MAX_SIDE), merge)
    for file, key in ((image, "temporal_conv_size"), (video, "temporal_patch_size")):
        file.get_int(key, MERGED_FRAMES, MERGED_FRAMES, MERGED_FRAMES)
    settings = replace(
        settings,
        patching=patching,
        images=_limits(image, "", settings.images),
        videos=_limits(video, "", _limits(image, "video_", settings.videos)),
        choice=_choice(video, "", _choice(image, "video_", settings.choice)),
        mean=_channels(image, "image_mean", settings.mean),
        std=_channels(image, "image_std", settings.std),
    )
    _require_same(video, settings)
    if model is not None:
        _require_model(settings, ProcessorSettings(patching=model), directory)
    return settings


def _require_own_way(file: JsonObject) -> None:
    """CheckpointError for a setting by which other pixels would come of a picture."""
    if file.values.get("resample") not in (None, 3):
        raise _not_supported(file, "resample", "pictures are resized by the bicubic filter, which is 3")
    if abs(file.get_number("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        raise _not_supported(file, "rescale_factor", "pixels are divided by 255")
    for switch in ("do_center_crop", "do_pad"):
        if file.get_bool(switch, False):
            raise _not_supported(file, switch, "pictures keep their shape, and are resized alone")
    unknown = sorted(
        key for key, value in file.get_object("size").values.items() if value and key not in (*_EDGES, *_AREAS)
    )
    if unknown:
        raise _not_supported(file, "size", f"it has {', '.join(unknown)}, and {' and '.join(_EDGES)} are the bounds")
    if not file.get_bool("do_sample_frames", True):
        log.once(f"{file.where}: do_sample_frames: false is not used: frames are chosen by the keys of the run")


def _name_ignored(file: JsonObject, own: frozenset[str]) -> None:
    """Say which keys that have a value are not read: an option of another model's processor, or a misspelt one."""
    known = own | _HARMLESS
    ignored = sorted(key for key, value in file.values.items() if value is not None and key not in known)
    if ignored:
        shown = ", ".join(ignored[:8]) + (f" and {len(ignored) - 8} more" if len(ignored) > 8 else "")
        log.once(f"{file.where}: not read, so without effect: {shown}. Compare it with the file of the model's source")


def _not_supported(file: JsonObject, key: str, reason: str) -> CheckpointError:
    value = repr(file.values[key])
    return CheckpointError(f"{file.where}: {key}: {value:.60} is not supported: {reason}. Copy the file again.")


def _require_same(video: JsonObject, settings: ProcessorSettings) -> None:
    """CheckpointError where frames would be divided or normalised in another way than pictures: the model has one."""
    for key, of_images in _shared(settings).items():
        value: int | list[float]
        if isinstance(of_images, int):
            value = video.get_int(key, of_images)
        else:
            value = _plain(_channels(video, key, np.array(of_images, np.float32)))
        if not np.allclose(value, of_images, rtol=1e-4, atol=0):
            raise CheckpointError(
                f"{video.where}: {key}: {value}, but {of_images} for pictures, and the model treats both alike. "
                "Copy these files again from the model's source."
            )


def _require_model(settings: ProcessorSettings, model: ProcessorSettings, directory: Path) -> None:
    ours = _shared(model)
    for key, theirs in _shared(settings).items():
        if not np.allclose(theirs, ours[key], rtol=1e-4, atol=0):
            raise CheckpointError(
                f"{directory}: {key}: {theirs} in the processor's files, but the model computes with {ours[key]}. Copy "
                "these files again from the model's source."
            )


def _shared(settings: ProcessorSettings) -> dict[str, int | list[float]]:
    """What holds for pictures and videos alike, by key."""
    patching = settings.patching
    return {
        "patch_size": patching.patch,
        "merge_size": patching.spatial_merge,
        "image_mean": _plain(settings.mean),
        "image_std": _plain(settings.std),
    }


def write_settings(directory: Path, settings: ProcessorSettings) -> None:
    """Write the processor's files, which transformers loads, and the font that draws the time on frames."""
    choice, patching = settings.choice, settings.patching
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": _plain(settings.mean),
        "image_std": _plain(settings.std),
        "merge_size": patching.spatial_merge,
        "patch_size": patching.patch,
        "processor_class": "Ernie4_5_VLMoeProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    image = common | {
        "image_processor_type": "Ernie4_5_VLMoeImageProcessor",
        "size": _size(settings.images),
        "min_pixels": settings.images.min_pixels,
        "max_pixels": settings.images.max_pixels,
        "spatial_conv_size": patching.spatial_merge,
        "temporal_conv_size": MERGED_FRAMES,
        "video_min_pixels": settings.videos.min_pixels,
        "video_max_pixels": settings.videos.max_pixels,
        "video_fps": choice.fps,
        "video_min_frames": choice.min_frames,
        "video_max_frames": choice.max_frames,
        "video_target_frames": choice.target_frames or -1,
        "video_frames_sample": choice.sample,
    }
    video = common | {
        "video_processor_type": "Ernie4_5_VLMoeVideoProcessor",
        "size": _size(settings.videos),
        "temporal_patch_size": MERGED_FRAMES,
        "min_frames": choice.min_frames,
        "max_frames": choice.max_frames,
        # no fps: with it transformers refuses frames that come as arrays; Baidu's keys above have it
        "do_sample_frames": True,
        "draw_on_frames": choice.draw_time,
        "font": FONT.name,
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, values in (
        (IMAGE_FILE, image),
        (VIDEO_FILE, video),
        (PROCESSOR_FILE, {"processor_class": "Ernie4_5_VLMoeProcessor"}),
    ):
        with atomic.new_file(directory / name) as temporary:
            Path(temporary).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")
    with atomic.new_file(directory / FONT.name) as temporary:
        shutil.copyfile(FONT, temporary)


def _limits(file: JsonObject, prefix: str, default: PixelLimits) -> PixelLimits:
    """min_pixels and max_pixels, or those of `size`."""
    size = file.get_object("size") if not prefix else JsonObject({}, file.where, file.error)
    bounds = default.min_pixels, default.max_pixels
    for pair in (_EDGES, _AREAS):
        bounds = size.get_int(pair[0], bounds[0], 1), size.get_int(pair[1], bounds[1], 1)
    low, high = (file.get_int(f"{prefix}{key}", bound, 1) for key, bound in zip(_AREAS, bounds, strict=True))
    if low > high:
        raise CheckpointError(f"{file.where}: {prefix}min_pixels {low} is larger than {prefix}max_pixels {high}.")
    return PixelLimits(low, high)


def _choice(file: JsonObject, prefix: str, default: FrameOptions) -> FrameOptions:
    target = file.get_int(f"{prefix}target_frames", None)
    choice = replace(
        default,
        fps=float(file.get_number(f"{prefix}fps", default.fps, 0.001, 1000)),
        min_frames=file.get_int(f"{prefix}min_frames", default.min_frames, 1),
        max_frames=file.get_int(f"{prefix}max_frames", default.max_frames, 1),
        target_frames=default.target_frames if target is None else target if target > 0 else None,
        sample=file.get_choice(f"{prefix}frames_sample", default.sample, ("leading", "middle")),
        draw_time=file.get_bool("draw_on_frames", default.draw_time),
    )
    if choice.min_frames > choice.max_frames:
        raise CheckpointError(
            f"{file.where}: {prefix}min_frames {choice.min_frames} is larger than {prefix}max_frames "
            f"{choice.max_frames}."
        )
    return choice


def _channels(file: JsonObject, key: str, default: np.ndarray) -> np.ndarray:
    values = file.get_list(key, default.tolist())
    if len(values) != 3 or not all(isinstance(value, int | float) and abs(value) < 1e6 for value in values):
        raise CheckpointError(f"{file.where}: {key}: must be three numbers.")
    result = np.array(values, np.float32)
    if key == "image_std" and (result <= 0).any():
        raise CheckpointError(f"{file.where}: {key}: must be positive.")
    return result


def _plain(values: np.ndarray) -> list[float]:
    """float32 values with the digits that make them."""
    return [float(str(value)) for value in values]


def _size(limits: PixelLimits) -> dict[str, Any]:
    return {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
