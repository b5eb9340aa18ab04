"""The resampler between vision transformer and decoder: neighbouring patches, and pairs of frames, become one token.

Legend: P patches, M merged tokens, N images and videos, C features of a patch, D model.
"""

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

from erniekit.models.vision_config import VisionConfig
from erniekit.nn.cpu_ops import gelu, gelu_backward
from erniekit.nn.linear import Linear
from erniekit.nn.narrow import concat, gather, rounded
from erniekit.nn.norm import LayerNorm, RMSNorm
from erniekit.nn.roles import Component, ComponentLayer


def frame_pairs(grid_N3: np.ndarray, merge_size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each merged token, the numbers of the two spatially merged tokens that it joins, int64 [M] each: those of an
    even frame and of the odd one behind it; of an image, twice the same.
    """
    even, odd, start = [], [], 0
    for frames, height, width in grid_N3.tolist():
        area = height * width // merge_size**2
        numbers = start + np.arange(frames * area).reshape(frames, area)
        even.append(numbers[0::2].reshape(-1))
        odd.append(numbers[1::2].reshape(-1) if frames > 1 else even[-1])
        start += frames * area
    empty = np.zeros(0, np.int64)
    return np.concatenate([empty, *even]), np.concatenate([empty, *odd])


class _GELU(PyLayer):
    """GELU on a CPU, as one node that keeps x."""

    @staticmethod
    def forward(ctx, x: paddle.Tensor) -> paddle.Tensor:
        ctx.save_for_backward(x)
        return gelu(x)

    @staticmethod
    def backward(ctx, dy: paddle.Tensor) -> paddle.Tensor:
        (x,) = ctx.saved_tensor()
        return gelu_backward(dy, x)


class GELU(nn.Layer):
    """x * P(X <= x) for a standard normal X (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[..., C] -> [..., C]."""
        if not x.place.is_cpu_place():
            return nn.functional.gelu(x)
        return rounded(_GELU.apply, x)


class Resampler(ComponentLayer):
    """Joins merge_size x merge_size patches, then two frames, and projects to the width of the decoder."""

    component = Component.RESAMPLER

    def __init__(self, config: VisionConfig, hidden_size: int, rms_norm_eps: float, init_std: float) -> None:
        super().__init__()
        self.config = config
        wide = config.merged_size

        def merge(in_features: int) -> nn.Sequential:
            return nn.Sequential(
                Linear(in_features, wide, bias=True, init_std=init_std),
                GELU(),
                Linear(wide, wide, bias=True, init_std=init_std),
                LayerNorm(wide, config.layer_norm_eps),
            )

        self.spatial_linear = merge(wide)
        self.temporal_linear = merge(wide * config.temporal_merge_size)
        self.mlp = Linear(wide, hidden_size, bias=True, init_std=init_std)
        self.after_norm = RMSNorm(hidden_size, rms_norm_eps)

    def forward(self, features_PC: paddle.Tensor, grid_N3: np.ndarray) -> paddle.Tensor:
        """Features of patches [P, C], in the order of vision.patch_positions -> tokens [M, D]."""
        area = self.config.spatial_merge_size**2
        spatial = self.spatial_linear(features_PC.reshape([-1, area * features_PC.shape[-1]]))
        even, odd = frame_pairs(grid_N3, self.config.spatial_merge_size)
        both = [gather(spatial, paddle.to_tensor(numbers)) for numbers in (even, odd)]
        return self.after_norm(self.mlp(self.temporal_linear(concat(both, axis=-1))))
