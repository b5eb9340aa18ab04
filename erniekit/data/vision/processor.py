"""Conversations with pictures and videos -> what a vision-language model takes, under transformers' names."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.packed_batch import IGNORE, Modality
from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes
from erniekit.data.records.values import kind_of
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.parts import content_parts, media_of
from erniekit.data.vision.pixels import normalise
from erniekit.data.vision.plan import MediaPlan, plan_media
from erniekit.data.vision.positions import POSITION_RULES, PositionRule
from erniekit.data.vision.processor_files import ProcessorSettings, read_settings, write_settings
from erniekit.data.vision.sequence import Expanded, MediaTokens, expand
from erniekit.data.vision.template import VisionTemplate, load_vision_template
from erniekit.data.vision.video import VideoOptions
from erniekit.utils import log
from erniekit.utils.errors import ConfigError, DataError


class Processor:
    """Prepares conversations for a vision-language model. Made by load_processor.

    `tokenizer`, `template` and `settings` are those of the model's directory.
    """

    def __init__(self, template: VisionTemplate, settings: ProcessorSettings, allow_urls: bool = False):
        self.template, self.settings = template, settings
        self.tokenizer = template.tokenizer
        self._tokens = MediaTokens.of(template.tokenizer)
        self._allow_urls = allow_urls

    def __call__(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = False,
        position_rule: PositionRule = "training",
        *,
        tools: Sequence[Any] | None = None,
        enable_thinking: bool | None = None,
        directory: str | Path = ".",
    ) -> dict[str, np.ndarray]:
        """One conversation as arrays, batch size 1.

        Args:
            messages: [{"role", "content"}], the content text or a list of parts: {"type": "text", "text"},
                {"type": "image", "image"} and {"type": "video", "video"} (also OpenAI's image_url and video_url). An
                image is a path, a data URI, bytes, a PIL image or an array uint8 [height, width, 3]; a video is a
                path, a directory or list of frames, or an array uint8 [frames, height, width, 3].
            add_generation_prompt: end with what an answer begins after.
            position_rule: where text continues after a video; "training" is what the published models were trained
                with, "transformers" what that library computes (they differ for long videos).
            tools: function descriptions for the template. enable_thinking: reaches the template.
            directory: what relative paths are relative to.

        Returns:
            input_ids, attention_mask, mm_token_type_ids, moe_mm_token_type_ids int64 [1, S]; position_ids int64
            [3, 1, S]; with pictures pixel_values float32 [patches, 588] and image_grid_thw int64 [pictures, 3]; with
            videos pixel_values_videos and video_grid_thw.

        Raises:
            DataError: a picture cannot be read, or the template refuses the conversation.
            ConfigError: there is no such position_rule.
        """
        if position_rule not in POSITION_RULES:
            raise ConfigError(f"position_rule: expected one of {', '.join(POSITION_RULES)}; got {position_rule!r:.40}")
        messages, notes = _with_parts(messages), Notes()
        ids = self.template.prompt_ids(messages, tools, enable_thinking, add_generation_prompt)
        reader = MediaReader(Path(directory), self._allow_urls)
        try:
            plans = self.plan(messages, reader, notes)
            patches = [plan.patches(notes) for plan in plans]
        except BadRecord as error:
            raise DataError(error.message) from None
        for doubt in sorted(notes.doubts):
            log.warning(doubt)
        sequence = expand(ids, [IGNORE] * len(ids), [plan.geometry.tokens for plan in plans], self._tokens)
        result = self._sequence(sequence, plans, position_rule)
        for kind, pixels, grid in (
            (Modality.IMAGE, "pixel_values", "image_grid_thw"),
            (Modality.VIDEO, "pixel_values_videos", "video_grid_thw"),
        ):
            which = [i for i, plan in enumerate(plans) if plan.modality == kind]
            if which:
                joined = np.concatenate([patches[i] for i in which])
                result[pixels] = normalise(joined, self.settings.mean, self.settings.std)
                result[grid] = np.array([plans[i].geometry.grid for i in which], np.int64)
        return result

    def plan(self, messages: Sequence[dict[str, Any]], reader: MediaReader, notes: Notes) -> list[MediaPlan]:
        """The pictures and videos of messages in order, measured but not decoded."""
        settings = self.settings
        options = VideoOptions(choice=settings.choice)
        return plan_media(list(media_of(messages)), reader, settings, options, notes)

    def save(self, directory: str | Path) -> None:
        """Write the processor's files and the chat template into a model directory."""
        directory = Path(directory)
        write_settings(directory, self.settings)
        (directory / "chat_template.jinja").write_text(self.template.source, "utf-8")

    def _sequence(self, sequence: Expanded, plans: Sequence[MediaPlan], rule: PositionRule) -> dict[str, np.ndarray]:
        """The arrays of one sequence of S tokens."""
        grid = np.array([plan.geometry.grid for plan in plans], np.int64).reshape(-1, 3)
        places = sequence.positions(grid, self._tokens, rule, self.settings.patching)
        return {
            "input_ids": sequence.ids.astype(np.int64)[None],
            "attention_mask": np.ones((1, len(sequence.ids)), np.int64),
            "mm_token_type_ids": sequence.kinds(self._tokens).astype(np.int64)[None],
            "moe_mm_token_type_ids": sequence.modality.astype(np.int64)[None],
            "position_ids": places.T.astype(np.int64)[:, None],
        }


def load_processor(
    directory: str | Path,
    chat_template: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    allow_urls: bool = False,
) -> Processor:
    """The processor of a vision-language model's directory: its tokenizer, chat template and processor files.

    `min_pixels` and `max_pixels` replace those for pictures. Raises CheckpointError or ConfigError for a directory that
    has no tokenizer, or one of a text model.
    """
    directory = Path(directory)
    template = load_vision_template(load_tokenizer(directory), chat_template)
    settings = read_settings(directory)
    given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    limits = settings.images._replace(**{key: value for key, value in given.items() if value is not None})
    if not 0 < limits.min_pixels <= limits.max_pixels:
        raise ConfigError(
            f"min_pixels: {limits.min_pixels} and max_pixels: {limits.max_pixels}: must be more than 0, and the first "
            "not larger than the second; what is not given is the model's own"
        )
    return Processor(template, replace(settings, images=limits), allow_urls)


def _with_parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with their content lists in this package's form."""
    result = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(
                f"messages[{number}] is {kind_of(message)}, not a message: give one conversation, a list of "
                '{"role": ..., "content": ...}'
            )
        content = message.get("content")
        if isinstance(content, list | tuple):
            try:
                parts = content_parts(content, f"messages[{number}].content")
            except BadRecord as error:
                raise DataError(error.message) from None
            for part in parts:
                if part["type"] != "text" and part[part["type"]] is None:
                    raise DataError(f"messages[{number}]: a part of type {part['type']} names no source")
            content = parts
        elif content is None:
            content = ""
        result.append({**message, "content": content})
    return result
