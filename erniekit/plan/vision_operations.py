"""What the vision transformer and the resampler keep and take, as plan/operations.py does it for the decoder.

Legend: P patches, C features of a patch, I intermediate size, H heads, L patches of a frame, M tokens of pictures, W
features of the patches that one token joins. e: bytes of an element.
"""

from erniekit.models.decoder import CausalLM
from erniekit.models.vision_config import VisionConfig
from erniekit.plan.operations import FP32, Device, Operation, Saved, recomputed

# A picture has this many patches where nothing else is known; weights of the attention are kept up to 256 (a CPU).
FRAME_PATCHES = 1024
_KEEP_WEIGHTS = 256


def vision_operations(
    device: Device,
    model: CausalLM,
    tokens: float,
    recompute: bool,
    offloads: bool = False,
    frame_patches: int = FRAME_PATCHES,
) -> list[Operation]:
    """The operations in front of the first layer for `tokens` tokens of pictures; frozen blocks keep nothing."""
    config, transformer, resampler = model.config.vision, model.model.vision_model, model.model.resampler_model
    if not tokens or config is None or transformer is None or resampler is None:
        return []
    e, width = device.element, config.merged_size
    patches = tokens * config.spatial_merge_size**2
    trained = any(not parameter.stop_gradient for parameter in transformer.parameters())
    result: list[Operation] = []
    if trained:
        pixels = e * patches * config.patch_features
        row = e * patches * config.hidden_size
        result.append(Operation("vision transformer", pixels + row, 2 * pixels + row, 2 * row))
        block = _block(device, config, patches, min(frame_patches, int(patches)))
        if recompute:
            saved = Saved(row, 0.0, offloads)
            block = [
                recomputed(block, saved, row, "vision transformer"),
                Operation("vision transformer", row, row, row),
            ]
        result += block * config.depth
    else:
        inside = _block(device, config, patches, min(frame_patches, int(patches)))
        result.append(Operation("vision transformer", 0.0, max(operation.forward for operation in inside)))
    size = e * tokens * width
    hidden = e * tokens * model.config.hidden_size
    kept = 10 * size + 2 * hidden + FP32 * tokens
    if all(parameter.stop_gradient for parameter in resampler.parameters()) and not trained:
        kept = 0.0
    weights = sum(e * float(parameter.size) for parameter in resampler.parameters() if not parameter.stop_gradient)
    return [*result, Operation("resampler", kept, kept + size, 6 * size + 2 * hidden + weights / 2)]


def _block(device: Device, config: VisionConfig, patches: float, frame: int) -> list[Operation]:
    """One block of the vision transformer: attention within frames, and the feed-forward part."""
    e, kind = device.element, "vision transformer"
    row, inner = e * patches * config.hidden_size, e * patches * config.intermediate_size
    scores = FP32 * config.num_heads * patches * frame if device.on_cpu else FP32 * config.num_heads * patches
    weights = scores if not device.on_cpu or frame <= _KEEP_WEIGHTS else 0.0
    at_once = scores if device.on_cpu else 0.0
    return [
        Operation(kind, row, 2 * row, 4 * row),
        Operation(kind, 6 * row + weights, 10 * row + weights + 2 * at_once, 12 * row + 2 * at_once),
        Operation(kind, 2 * row, 3 * row, 3 * row),  # output projection and the sum
        Operation(kind, row, 2 * row, 4 * row),
        Operation(kind, 3 * inner, 4 * inner, 4 * inner + row),
        Operation(kind, row, 2 * row, 2 * row + inner),
    ]
