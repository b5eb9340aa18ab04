"""The vision part of a model's configuration: vision transformer, resampler, and what the decoder needs to know of
images and videos.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from erniekit.data.vision.smart_resize import Patching


@dataclass(frozen=True)
class VisionConfig:
    """Sizes are numbers of features unless they say otherwise. The defaults are those of the published models.

    Sources: transformers' `Ernie4_5_VLMoeVisionConfig`, and the config.json of Baidu's checkpoints.
    """

    depth: int = 32
    hidden_size: int = 1280
    num_heads: int = 16
    intermediate_size: int = 5120
    in_channels: int = 3
    patch_size: int = 14  # pixels of a side
    spatial_merge_size: int = 2  # patches of a side that become one token
    temporal_merge_size: int = 2  # frames that become one
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    expert_size: int = 512  # width of one vision expert of the decoder
    time_frequencies: int = 20  # rotary frequencies of the decoder that follow time; the others height and width
    image_token_id: int = 100295  # the placeholders that image and video features replace
    video_token_id: int = 103367
    image_start_token_id: int = 101304
    image_end_token_id: int = 101305
    video_start_token_id: int = 101306
    video_end_token_id: int = 101307
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)  # keys of vision_config that are not fields

    @property
    def head_dim(self) -> int:
        """Features of one head of the vision transformer."""
        return self.hidden_size // self.num_heads

    @property
    def patch_features(self) -> int:
        """Numbers of one patch: channels * pixels."""
        return self.in_channels * self.patch_size**2

    @property
    def patching(self) -> Patching:
        """How a picture is divided."""
        return Patching(self.patch_size, self.spatial_merge_size)

    @property
    def merged_size(self) -> int:
        """Features of the patches that become one token in space."""
        return self.hidden_size * self.spatial_merge_size**2

    @property
    def placeholders(self) -> tuple[int, int]:
        """The token ids whose embeddings are replaced. Training data may use the image's for videos, too."""
        return self.image_token_id, self.video_token_id

    @property
    def around(self) -> tuple[int, ...]:
        """The token ids before and behind an image or a video; the vision experts compute them, too."""
        return (
            self.image_start_token_id,
            self.image_end_token_id,
            self.video_start_token_id,
            self.video_end_token_id,
        )
