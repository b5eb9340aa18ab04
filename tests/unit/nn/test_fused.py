"""Where fused operators are asked for: what their kernels have no code for goes to the plain operations."""

from types import SimpleNamespace
from typing import Any

import paddle
import pytest

from erniekit.nn import fused


def on_gpu(dtype: paddle.dtype = paddle.bfloat16, width: int = 64, is_gpu: bool = True) -> Any:
    return SimpleNamespace(place=SimpleNamespace(is_gpu_place=lambda: is_gpu), dtype=dtype, shape=[5, width])


@pytest.mark.parametrize(
    ("head_dim", "capability", "applies"),
    [
        (128, (9, 0), True),
        (256, (8, 0), True),
        (72, None, True),
        (36, (9, 0), False),
        (264, (9, 0), False),
        (128, (7, 5), False),
    ],
)
def test_flash_mask(head_dim: int, capability: tuple[int, int] | None, applies: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "compute_capability", lambda: capability)
    assert fused.flash_mask_applies(on_gpu(), head_dim) is applies
    assert not fused.flash_mask_applies(on_gpu(paddle.float32), head_dim)
    assert not fused.flash_mask_applies(on_gpu(is_gpu=False), head_dim)


@pytest.mark.parametrize(
    ("width", "experts", "choices", "applies"),
    [(64, 64, 8, True), (2052, 64, 8, False), (64, 65, 8, False), (64, 64, 9, False)],
)
def test_permute(width: int, experts: int, choices: int, applies: bool):
    assert fused.permute_applies(on_gpu(width=width), experts, choices) is applies
    assert not fused.permute_applies(on_gpu(paddle.float16, width), experts, choices)
    fused.enable(False)
    try:
        assert not fused.permute_applies(on_gpu(width=width), experts, choices)
    finally:
        fused.enable(True)


def test_a_package_without_cuda_has_no_gpu_to_ask():
    assert fused.compute_capability() is None or paddle.is_compiled_with_cuda()
