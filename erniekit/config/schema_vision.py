"""Keys about pictures and videos: which are read, how they are prepared, and which parts of the model are trained."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key, list_of

# What the numbers of boxes in the data may be (data/vision/boxes.py converts them).
BOX_COORDINATES = ("relative", "pixels", "fraction")


@dataclass(frozen=True, kw_only=True)
class VisionArgs:
    """How pictures and videos are read and prepared (docs/vision-data.md). `chat` and `server` read them for every
    model that sees pictures.

    Sizes and frames that are not given come from the files beside the model (preprocessor_config.json), but for the
    choice of frames in training, which is the training code's.
    """

    group: ClassVar[str] = "vision"

    vision_config_path: str | None = key(
        None,
        "config.json of a vision-language model, or its directory: the text model with experts at model_name_or_path "
        "becomes one; its vision transformer, resampler and vision routers start at random.",
        path=True,
    )
    vision_experts_from_text: bool = key(
        True,
        "With vision_config_path: make each vision expert of the first channels of the text expert with its number; "
        "False: start vision experts at random.",
    )
    vision_experts_down_scale: float = key(
        1.0, "With vision_experts_from_text: factor of the second projection (down_proj) of vision experts.", gt=0
    )
    min_pixels: int | None = key(
        None, "Smallest area of a picture after resizing, in pixels; not given: the model's own files.", ge=1
    )
    max_pixels: int | None = key(
        None,
        "Largest area of a picture after resizing, in pixels, of which 784 become a token; not given: the model's own "
        "files.",
        ge=1,
    )
    adaptive_max_imgtoken_option: tuple[int, ...] = list_of(
        int,
        "Largest numbers of tokens of a picture, of which each record of the training data has one in place of "
        "max_pixels, drawn from the seed and the record's file and line (ERNIEKit draws at each reading); empty: "
        "max_pixels for all.",
        ge=1,
    )
    adaptive_max_imgtoken_rate: tuple[float, ...] = list_of(
        float, "How probable each number of adaptive_max_imgtoken_option is, summing to 1.", gt=0
    )
    video_min_pixels: int | None = key(
        None, "Smallest area of a video's frame after resizing, in pixels; not given: the model's own files.", ge=1
    )
    video_max_pixels: int | None = key(
        None, "Largest area of a video's frame after resizing, in pixels; not given: the model's own files.", ge=1
    )
    video_fps: float | None = key(
        None,
        "Frames that are used of each second of a video; not given: 2 in training, else the model's own files.",
        gt=0,
        le=1000,
    )
    video_min_frames: int | None = key(
        None,
        "The smallest number of frames, if a video has as many; not given: 16 in training, else the model's own files.",
        ge=1,
    )
    video_max_frames: int | None = key(
        None,
        "The largest number of frames of a video; not given: 480 in training, else the model's own files.",
        ge=1,
    )
    video_target_frames: int | None = key(
        None,
        "This number of frames of every video, however long it is; -1, or in training not given: video_fps decides.",
        ge=1,
        off=-1,
    )
    video_frames_sample: str | None = key(
        None,
        "Which frame of each interval of a video is used, its first (leading) or its middle one; not given: middle in "
        "training, else the model's own files.",
        choices=("middle", "leading"),
    )
    render_timestamp: bool | None = key(
        None,
        "Draw the time on each frame of a video; not given: True in training, as the published models were trained "
        "(ERNIEKit's default is False, its files say True), else the model's own files.",
    )
    apply_exif: bool = key(
        False, "Turn a picture as its orientation tag says; False: ignore the tag, as ERNIE's training code does."
    )
    allow_urls: bool = key(False, "Download pictures and videos that records name by an http or https address.")
    missing_media_tags: str = key(
        "error",
        "A record with pictures and no tag for them in its text stops the run (error), or gets the tags in front of "
        "its first question (front).",
        choices=("error", "front"),
    )
    box_coordinates: str = key(
        "relative",
        "What the numbers of boxes in the data are: relative (0 to 1000, as the model writes them), or pixels or "
        "fraction (0 to 1), which are converted.",
        choices=BOX_COORDINATES,
    )
    max_decoded_pixels: int = key(
        89_478_485, "A picture with more pixels than this is refused before it is decoded (89478485 are 256 MB).", ge=1
    )
    video_decode_seconds: float = key(300.0, "How long decoding one video may take, in seconds.", gt=0)
    position_rule: str = key(
        "training",
        "Where text continues after a video: behind its largest position on any axis (training, as the published "
        "weights were trained), or regardless of its length in time (transformers).",
        choices=("training", "transformers"),
    )
