"""The whole state of an optimizer at once."""

import numpy as np

from erniekit.training.adamw import AdamW


def state_arrays(optimizer: AdamW) -> dict[str, np.ndarray]:
    """ "parameter name/field" -> fp32 array; the ranks that share a parameter's state have to call it together."""
    return {key: optimizer.state_array(key) for key in optimizer.state_shapes()}
