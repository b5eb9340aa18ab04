"""The normalisation of 8-bit pixels: in the model for training and serving, here for transformers' processor."""

import numpy as np

# CLIP's statistics (Radford et al. 2021, arXiv 2103.00020) of the channels red, green, blue, which the published models
# were trained with.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def normalise(patches: np.ndarray, mean: np.ndarray = MEAN, std: np.ndarray = STD) -> np.ndarray:
    """uint8 patches [P, 3 * patch * patch] as float32 values (x / 255 - mean) / std by channel.

    Bit-equal to transformers' processor with Pillow, which divides in fp64 and does the rest in fp32.
    """
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)
    table = (levels - mean.astype(np.float32)[:, None]) / std.astype(np.float32)[:, None]  # [channels, 256]
    by_channel = patches.reshape(len(patches), len(mean), -1)
    values = np.empty(by_channel.shape, np.float32)
    for channel, row in enumerate(table):
        values[:, channel] = row[by_channel[:, channel]]
    return values.reshape(patches.shape)
