"""Rotations by a Hadamard matrix, in blocks along the inputs of a product: x W = (x H) (H W / n), because H H = n I.

H is Sylvester's matrix of order n = 2^k: entries of 1 and -1, symmetric. A rotation spreads large values of a few
inputs over their block, which makes a coarse scale less harmful (QuaRot: Ashkboos et al. 2024, arXiv 2404.00456).
precision/rotation.py adds and subtracts in the same order on a device, so that fp32 results are equal bit for bit.
"""

import numpy as np


def rotate_rows(weight: np.ndarray, block: int) -> np.ndarray:
    """H W for a weight [..., in, out] fp32, in blocks of `block` inputs: the same shape."""
    *lead, num_in, num_out = weight.shape
    blocks = weight.astype(np.float32).reshape(*lead, num_in // block, block, num_out)
    half = 1
    while half < block:
        pairs = blocks.reshape(*lead, num_in // (2 * half), 2, half, num_out)
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        blocks = np.stack([first + second, first - second], axis=-3)
        half *= 2
    return blocks.reshape(weight.shape)
