"""Loss-free load balancing: once an optimizer step, the correction biases of overloaded experts are lowered."""

from collections.abc import Mapping

import numpy as np
import paddle

from erniekit.moe.layer import MoELayer


@paddle.no_grad()
def update_biases(
    layers: Mapping[int, MoELayer], usages: Mapping[tuple[int, int], np.ndarray], step_size: float
) -> dict[int, np.ndarray]:
    """bias_e += step_size * sign(mean usage - usage_e) (Wang et al. 2024, arXiv 2408.15664, algorithm 1), for the
    routers of all layers with one upload.

    Args:
        layers: sparse layers by number.
        usages: by (layer, modality) the tokens that chose each expert [E], over all microbatches and data ranks of the
            step. The bias of a frozen router does not change.

    Returns:
        The change of the bias [modalities, E] of each layer, fp32.
    """
    changes = {number: np.zeros(layer.correction_bias.shape, np.float32) for number, layer in layers.items()}
    for (number, modality), usage_E in usages.items():
        if not layers[number].router_of(modality).stop_gradient:
            direction = np.sign(usage_E.mean() - usage_E).astype(np.float32)
            changes[number][modality] = direction * np.float32(step_size)
    if any(change.any() for change in changes.values()):
        uploaded = paddle.to_tensor(np.concatenate([change.reshape(-1) for change in changes.values()]))
        layer_changes = paddle.split(uploaded, [change.size for change in changes.values()])
        for layer, change in zip(layers.values(), layer_changes, strict=True):
            layer.correction_bias.add_(change.reshape(layer.correction_bias.shape))
    return changes
