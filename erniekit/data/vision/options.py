"""The keys of the configuration that concern pictures and videos, as the data pipeline takes them."""

from dataclasses import replace
from typing import Any

from erniekit.config import Config
from erniekit.data.vision.encode import VisionSpec
from erniekit.data.vision.frames import TRAINING_CHOICE, FrameOptions
from erniekit.data.vision.images import IMAGE_OPTIONS, ImageOptions
from erniekit.data.vision.pixel_bounds import DrawnBounds
from erniekit.data.vision.processor_files import ProcessorSettings
from erniekit.data.vision.smart_resize import PixelLimits
from erniekit.utils.errors import ConfigError
from erniekit.utils.wording import count_of


def vision_spec(cfg: Config, settings: ProcessorSettings) -> VisionSpec:
    """How the records of a training run with pictures are read. `settings`: what the model's directory says
    (`read_settings`). What the configuration leaves open about frames is as in ERNIE's training code.
    """
    spec = inference_spec(cfg, replace(settings, choice=TRAINING_CHOICE))
    return replace(spec, drawn_bounds=_drawn_bounds(cfg, spec.settings))


def _drawn_bounds(cfg: Config, settings: ProcessorSettings) -> DrawnBounds | None:
    """The bounds of pictures that the configuration lets each record draw from; None without."""
    tokens = cfg.adaptive_max_imgtoken_option
    if not tokens:
        return None
    area, smallest = settings.patching.factor**2, settings.images.min_pixels
    if min(tokens) * area < smallest:
        raise ConfigError(
            f"adaptive_max_imgtoken_option: {count_of(min(tokens), 'token is', 'tokens are')} {min(tokens) * area} "
            f"pixels, fewer than min_pixels: {smallest}. Give at least {-(-smallest // area)}, or a smaller min_pixels"
        )
    return DrawnBounds(tuple(number * area for number in tokens), cfg.adaptive_max_imgtoken_rate, cfg.seed)


def inference_spec(cfg: Config, settings: ProcessorSettings) -> VisionSpec:
    """How evaluation and chat read pictures: what the configuration leaves open is as the model's directory says.
    Extracted frames without times count as `fps` of a second, as in training, so that both get the same inputs;
    `load_processor` keeps transformers' assumption.
    """
    settings = replace(settings, choice=replace(settings.choice, assumed_rate=None))
    return replace(unsized_spec(cfg), settings=processor_settings(cfg, settings))


def unsized_spec(cfg: Config) -> VisionSpec:
    """How records with pictures are read where the sizes that a model sees do not matter, or are not known."""
    return VisionSpec(
        truncation=cfg.truncation,
        boxes=cfg.box_coordinates,
        missing_tags=cfg.missing_media_tags,
        allow_urls=cfg.allow_urls,
        images=image_options(cfg),
        video_seconds=cfg.video_decode_seconds,
        position_rule="transformers" if cfg.position_rule == "transformers" else "training",
    )


def processor_settings(cfg: Config, settings: ProcessorSettings) -> ProcessorSettings:
    """The settings of a model's directory with what the configuration gives in their place. ConfigError where a bound
    that is given contradicts the one of the directory.
    """
    return replace(
        settings,
        images=_limits(settings, settings.images, {"min_pixels": cfg.min_pixels, "max_pixels": cfg.max_pixels}),
        videos=_limits(
            settings,
            settings.videos,
            {"video_min_pixels": cfg.video_min_pixels, "video_max_pixels": cfg.video_max_pixels},
        ),
        choice=_choice(cfg, settings.choice),
    )


def image_options(cfg: Config) -> ImageOptions:
    """The options for decoding pictures."""
    return replace(IMAGE_OPTIONS, apply_exif=cfg.apply_exif, max_pixels_decoded=cfg.max_decoded_pixels)


def _limits(settings: ProcessorSettings, base: PixelLimits, given: dict[str, int | None]) -> PixelLimits:
    """`base` with the bounds that are given, (least, greatest), by key."""
    (least, low), (most, high) = given.items()
    limits = PixelLimits(low or base.min_pixels, high or base.max_pixels)
    smallest = settings.patching.factor**2
    if high is not None and high < smallest:
        raise ConfigError(f"{most}: {high} is too small: a picture has at least {smallest} pixels, which are one token")
    if limits.min_pixels > limits.max_pixels:  # one of them is the directory's: load() compared what was given
        name, value, other = (least, low, most) if high is None else (most, high, least)
        theirs = limits.max_pixels if high is None else limits.min_pixels
        raise ConfigError(f"{name}: {value} contradicts the model's own {other}: {theirs}. Give {other}, too")
    return limits


def _choice(cfg: Config, base: FrameOptions) -> FrameOptions:
    given: dict[str, Any] = {
        "fps": cfg.video_fps,
        "min_frames": cfg.video_min_frames,
        "max_frames": cfg.video_max_frames,
        "target_frames": cfg.video_target_frames,
        "sample": cfg.video_frames_sample,
        "draw_time": cfg.render_timestamp,
    }
    choice = replace(base, **{name: value for name, value in given.items() if value is not None})
    if cfg.video_target_frames == -1:
        choice = replace(choice, target_frames=None)
    if choice.min_frames > choice.max_frames:  # one of them is not given: load() compared what was
        names = ("video_min_frames", "video_max_frames")
        name, other = names if cfg.video_max_frames is None else names[::-1]
        value, theirs = (vars(choice)[key.removeprefix("video_")] for key in (name, other))
        raise ConfigError(f"{name}: {value} contradicts {other}, which is {theirs} where it is not given. Give it, too")
    return choice
