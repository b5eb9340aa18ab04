"""Rotations by Hadamard matrices (precision/hadamard.py) of tensors on any device."""

import paddle


def rotated_rows(weight: paddle.Tensor, block: int) -> paddle.Tensor:
    """H W for weights [..., in, out], in blocks of `block` inputs: fp32 of the same shape. See hadamard.rotate_rows."""
    *lead, num_in, num_out = weight.shape
    blocks, half = weight.astype("float32"), 1
    while half < block:
        pairs = blocks.reshape([*lead, num_in // (2 * half), 2, half, num_out])
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        blocks = paddle.stack([first + second, first - second], axis=-3)
        half *= 2
    return blocks.reshape(weight.shape)


def rotated_columns(x: paddle.Tensor, block: int) -> paddle.Tensor:
    """x H for rows [R, in], in blocks of `block` inputs: fp32 of the same shape."""
    return rotated_rows(x.unsqueeze(-1), block).squeeze(-1)
