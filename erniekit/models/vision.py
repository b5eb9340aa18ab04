"""The vision transformer of ERNIE 4.5's vision-language models: packed images and video frames of any resolution.

All patches of a batch are one sequence [P, C]. Attention is full within a frame and nowhere else. Legend: P patches, N
images and videos, C features of a patch, H heads, d head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

from erniekit.data.vision.pixels import MEAN, STD
from erniekit.models.vision_config import VisionConfig
from erniekit.nn.cpu_ops import standardise_, swish, swish_backward
from erniekit.nn.frame_attention import FrameAttention, frame_runs
from erniekit.nn.frequencies import inverse_frequencies
from erniekit.nn.linear import Linear
from erniekit.nn.narrow import add, rounded
from erniekit.nn.norm import LayerNorm
from erniekit.nn.roles import Component, ComponentLayer

_LEVELS = np.array([255.0], np.float32)  # what 8-bit pixels are divided by


def patch_positions(grid_N3: np.ndarray, merge_size: int) -> np.ndarray:
    """(row, column) of each patch in its frame: int64 [P, 2]. The patches of a frame are ordered by blocks of
    merge_size x merge_size neighbours, which the resampler joins. grid [N, 3]: frames, rows and columns of patches.
    """
    parts = []
    for frames, height, width in grid_N3.tolist():
        blocks = (height // merge_size, merge_size, width // merge_size, merge_size)
        rows = np.arange(height).reshape(blocks[0], merge_size, 1, 1)
        columns = np.arange(width).reshape(1, 1, blocks[2], merge_size)
        one = np.stack([np.broadcast_to(axis, blocks).swapaxes(1, 2).reshape(-1) for axis in (rows, columns)], axis=1)
        parts.append(np.tile(one, (frames, 1)))
    return np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)


@dataclass(frozen=True)
class Frames:
    """The geometry of a batch's images and videos, computed once for all blocks: `grid` int [N, 3] frames, rows and
    columns of patches, `merge_size` as in patch_positions.
    """

    grid: np.ndarray
    merge_size: int

    @cached_property
    def runs(self) -> Sequence[tuple[int, int]]:
        """See nn.frame_attention.frame_runs."""
        return frame_runs(self.grid)

    def rotation(self, head_dim: int, theta: float) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Cosine and sine of the angles that a head's first half is rotated by: fp32 [P, 1, d/2] each. The first half
        of the angles follows the row, the second the column.
        """
        positions = patch_positions(self.grid, self.merge_size).astype(np.float32)
        angles = positions[:, :, None] * inverse_frequencies(head_dim // 2, theta)
        angles = angles.reshape(len(positions), 1, head_dim // 2)
        return paddle.to_tensor(np.cos(angles)), paddle.to_tensor(np.sin(angles))


class PatchEmbedding(nn.Layer):
    """Pixels of a patch [P, channels * size * size] -> [P, C], as one product without bias."""

    def __init__(self, config: VisionConfig, init_std: float) -> None:
        super().__init__()
        self.proj = Linear(config.patch_features, config.hidden_size, init_std=init_std)
        area = config.patch_size**2
        # Of each number of a patch.
        self._mean, self._std = np.repeat(MEAN, area), np.repeat(STD, area)

    def forward(self, patches: paddle.Tensor, dtype: paddle.dtype) -> paddle.Tensor:
        """Patches as uint8 pixels, which are normalised here in fp32, or as normalised floats -> [P, C] in `dtype`."""
        if patches.dtype == paddle.uint8:
            tables = (paddle.to_tensor(table) for table in (_LEVELS, self._mean, self._std))
            patches = standardise_(patches.astype("float32"), *tables)
        return self.proj(patches.astype(dtype))


class VisionAttention(nn.Layer):
    """Fused q|k|v projection, attention within frames, output projection."""

    def __init__(self, config: VisionConfig, init_std: float) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = Linear(size, 3 * size, bias=True, init_std=init_std, head_dim=config.head_dim)
        self.proj = Linear(size, size, bias=True, init_std=init_std)

    def forward(self, x_PC: paddle.Tensor, attention: FrameAttention) -> paddle.Tensor:
        """[P, C] -> [P, C]."""
        return self.proj(attention.attend(self.qkv(x_PC)))


class _QuickGELU(PyLayer):
    """QuickGELU on a CPU, as one node that keeps x."""

    @staticmethod
    def forward(ctx, x: paddle.Tensor) -> paddle.Tensor:
        ctx.save_for_backward(x)
        return swish(x, 1.702)

    @staticmethod
    def backward(ctx, dy: paddle.Tensor) -> paddle.Tensor:
        (x,) = ctx.saved_tensor()
        return swish_backward(dy, x, 1.702)


class QuickGELU(nn.Layer):
    """x * sigmoid(1.702 x) (Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2)."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[..., C] -> [..., C]."""
        if not x.place.is_cpu_place():
            return x * nn.functional.sigmoid(1.702 * x)
        return rounded(_QuickGELU.apply, x)


class VisionMLP(nn.Layer):
    """fc2(quick_gelu(fc1(x)))."""

    def __init__(self, config: VisionConfig, init_std: float) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True, init_std=init_std)
        self.act = QuickGELU()
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True, init_std=init_std)

    def forward(self, x_PC: paddle.Tensor) -> paddle.Tensor:
        """[P, C] -> [P, C]."""
        return self.fc2(self.act(self.fc1(x_PC)))


class VisionBlock(nn.Layer):
    """Pre-norm block: x += attention(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, config: VisionConfig, init_std: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = VisionAttention(config, init_std)
        self.mlp = VisionMLP(config, init_std)

    def forward(self, x_PC: paddle.Tensor, attention: FrameAttention) -> paddle.Tensor:
        """[P, C] -> [P, C]."""
        x_PC = add(x_PC, self.attn(self.norm1(x_PC), attention))
        return add(x_PC, self.mlp(self.norm2(x_PC)))


class VisionTransformer(ComponentLayer):
    """Patches of images and video frames -> their features."""

    component = Component.VISION_TRANSFORMER

    def __init__(self, config: VisionConfig, init_std: float) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config, init_std)
        self.blocks = nn.LayerList([VisionBlock(config, init_std) for _ in range(config.depth)])
        self.ln = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def parameter_depths(self) -> dict[str, int]:
        """Depth of each parameter: the patch embedding and the first block 0, block i at i, the final norm at the
        number of blocks.
        """
        depths = {id(p): i for i, block in enumerate(self.blocks) for p in block.parameters()}
        depths |= {id(p): 0 for p in self.patch_embed.parameters()}
        return {name: depths.get(id(p), len(self.blocks)) for name, p in self.named_parameters()}

    def forward(self, patches: paddle.Tensor, grid_N3: np.ndarray) -> paddle.Tensor:
        """Patches [P, channels * size * size], uint8 pixels or normalised floats, in the order of patch_positions, and
        the frames, rows and columns of patches of each image and video, int [N, 3] -> features [P, C].
        """
        config = self.config
        frames = Frames(grid_N3, config.spatial_merge_size)
        head_dim = config.head_dim
        cos, sin = frames.rotation(head_dim, config.rope_theta)
        attention = FrameAttention(frames.runs, cos, sin, config.num_heads)
        x_PC = self.patch_embed(patches, self.ln.weight.dtype)
        for block in self.blocks:
            x_PC = block(x_PC, attention)
        return self.ln(x_PC)
