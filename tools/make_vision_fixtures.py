"""Rebuild the vision-language fixtures of tests/parity/fixtures from Hugging Face transformers (needs the `parity`
extra: torch and transformers).

    python tools/make_vision_fixtures.py [--out DIR]

`vl_moe` is a tiny seeded checkpoint as `save_pretrained` writes it, and `reference.npz` with what transformers computes
from it in float32. Keys of the archive, for each input NAME (image, video, mixed, padded, long_video):

    NAME/input_ids, NAME/attention_mask, NAME/mm_token_type_ids, NAME/moe_mm_token_type_ids [B, S]
    NAME/pixel_values, NAME/image_grid_thw, NAME/pixel_values_videos, NAME/video_grid_thw    where there are any
    NAME/position_ids [3, B, S]      transformers' rule; padding means nothing
    NAME/image_features, NAME/video_features   behind the vision transformer [P, C]
    NAME/image_tokens, NAME/video_tokens       behind the resampler [M, D]
    NAME/labels [B, S]               already shifted; -100 = no loss
    NAME/logits [B, S, V], NAME/loss
    NAME/generated [B, N]            greedy continuation (image, video and padded only)
    NAME/grad/<checkpoint name>      gradient of the loss (mixed only)
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import make_parity_fixtures as text
import numpy as np
import torch
import transformers
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration
from transformers.core_model_loading import revert_weight_conversion

Arrays = dict[str, np.ndarray]
NUM_GENERATED = 8
GREEDY_MARGIN = 1e-3  # between the two best logits of every generated token
TOKENS = {
    "image_token_id": 70,
    "video_token_id": 71,
    "image_start_token_id": 72,
    "image_end_token_id": 73,
    "video_start_token_id": 74,
    "video_end_token_id": 75,
}
FIRST_SPECIAL = 70
TEXT: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "moe_intermediate_size": [12, 4],
    "moe_k": 2,
    "moe_num_experts": 4,
    "moe_num_shared_experts": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [2, 2, 2]},
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 24,
    "patch_size": 4,
    "initializer_range": 0.2,
}
# Parts of a row: a number of text tokens, or the grid (frames, rows, columns of patches) of an image or a video.
Parts = list[int | tuple[int, int, int]]
INPUTS: dict[str, list[Parts]] = {
    "image": [[3, (1, 4, 6), 4]],
    "video": [[2, (6, 4, 4), 3]],
    "mixed": [[2, (1, 2, 4), 3, (4, 4, 2), (1, 6, 2), 4], [1, (2, 2, 6), 2, (1, 4, 4), 6]],
    "padded": [[3, (1, 2, 2), 2], [2, (1, 4, 6), 3, (4, 2, 4), 2], [9]],
    "long_video": [[2, (12, 2, 4), 5]],
}
WITH_GRADIENTS = ("mixed",)
GENERATED = ("image", "video", "padded")


def build_model(seed: int, config: dict[str, Any] | None = None) -> Ernie4_5_VLMoeForConditionalGeneration:
    """A seeded model in eval mode where every parameter matters. `config`: changes to the text and vision part."""
    torch.manual_seed(seed)
    changes = config or {}
    values = Ernie4_5_VLMoeConfig(
        text_config=TEXT | changes.get("text", {}), vision_config=VISION | changes.get("vision", {}), **TOKENS
    )
    model = Ernie4_5_VLMoeForConditionalGeneration(values)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith("e_score_correction_bias"):
                parameter.copy_(0.3 * torch.rand_like(parameter))
            elif name.endswith(".bias"):
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1.0 + 0.3 * noise)
            elif name.endswith("embed_tokens.weight"):
                parameter.copy_(0.5 * noise)
    return model.eval()


def make_input(rows: list[Parts], seed: int, patch_features: int, pad_left: bool = False) -> Arrays:
    """Rows of text, images and videos as transformers' processor would give them."""
    rng = np.random.default_rng(seed)
    ids, kinds, grids = [], [], {1: [], 2: []}
    for row in rows:
        row_ids, row_kinds = [], []
        for part in row:
            if isinstance(part, int):
                row_ids += rng.integers(3, FIRST_SPECIAL, part).tolist()
                row_kinds += [0] * part
                continue
            kind = 1 if part[0] == 1 else 2
            name = "image" if kind == 1 else "video"
            count = part[0] * part[1] * part[2] // 4 // kind
            start, end = TOKENS[f"{name}_start_token_id"], TOKENS[f"{name}_end_token_id"]
            row_ids += [start, *[TOKENS[f"{name}_token_id"]] * count, end]
            row_kinds += [0, *[kind] * count, 0]
            grids[kind].append(part)
        ids.append(row_ids)
        kinds.append(row_kinds)
    width = max(map(len, ids))

    def padded(values: list[list[int]]) -> np.ndarray:
        fill = [[0] * (width - len(row)) for row in values]
        return np.array([[*f, *row] if pad_left else [*row, *f] for f, row in zip(fill, values, strict=True)])

    item = {
        "input_ids": padded(ids),
        "attention_mask": padded([[1] * len(row) for row in ids]),
        "mm_token_type_ids": padded(kinds),
    }
    item["moe_mm_token_type_ids"] = (item["input_ids"] >= FIRST_SPECIAL).astype(np.int64)
    following = np.concatenate([item["input_ids"][:, 1:], np.zeros((len(rows), 1), np.int64)], axis=1)
    item["labels"] = np.where((following > 0) & (following < FIRST_SPECIAL), following, text.IGNORE)
    item["labels"][item["attention_mask"] == 0] = text.IGNORE
    for kind, pixels, sizes in ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw")):
        if grids[kind]:
            item[sizes] = np.array(grids[kind])
            patches = int(item[sizes].prod(axis=1).sum())
            item[pixels] = rng.normal(size=(patches, patch_features)).astype(np.float32)
    return item


def make_inputs(seed: int, patch_features: int) -> dict[str, Arrays]:
    """All inputs."""
    return {
        name: make_input(rows, seed + number, patch_features, pad_left=name == "padded")
        for number, (name, rows) in enumerate(INPUTS.items())
    }


def arguments(item: Arrays) -> dict[str, torch.Tensor]:
    """What transformers' model takes."""
    return {key: torch.from_numpy(value) for key, value in item.items() if key != "labels"}


def run_logits(model: Ernie4_5_VLMoeForConditionalGeneration, item: Arrays) -> torch.Tensor:
    """Logits [B, S, V]."""
    model.model.rope_deltas = None
    return model(**arguments(item), use_cache=False).logits


def named_gradients(model: Ernie4_5_VLMoeForConditionalGeneration, item: Arrays) -> Arrays:
    """Gradients of the mean loss under the names and in the shapes of a saved file."""
    model.zero_grad(set_to_none=True)
    text.mean_loss(run_logits(model, item), item["labels"]).backward()
    found = {
        name: parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in model.named_parameters()
    }
    files = revert_weight_conversion(model, found)
    return {
        name: tensor.detach().contiguous().numpy().copy()
        for name, tensor in files.items()
        if not name.endswith("e_score_correction_bias")
    }


def routing_is_decided(
    model: Ernie4_5_VLMoeForConditionalGeneration, inputs: dict[str, Arrays], least_changed: float = 0.2
) -> bool:
    """Every selection of both routers is clear by more than rounding, and the bias changes at least that share."""
    records: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(router: torch.nn.Module, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        records.append((output[0].softmax(-1), router.moe_statics.e_score_correction_bias.squeeze(0)))

    routers = [module for module in model.modules() if type(module).__name__ == "Ernie4_5_VLMoeMoeTopKRouter"]
    handles = [router.register_forward_hook(hook) for router in routers]
    with torch.no_grad():
        for item in inputs.values():
            run_logits(model, item)
    for handle in handles:
        handle.remove()
    k, changed, total = model.config.text_config.moe_k, 0, 0
    for probabilities, bias in records:
        scores = (probabilities + bias).sort(-1, descending=True).values
        if len(scores) and (scores[:, k - 1] - scores[:, k]).min() < text.ROUTING_MARGIN:
            return False
        chosen, plain = ((x.topk(k).indices.sort(-1).values) for x in (probabilities + bias, probabilities))
        changed, total = changed + int((chosen != plain).any(-1).sum()), total + len(chosen)
    return changed >= least_changed * total


def generate(model: Ernie4_5_VLMoeForConditionalGeneration, item: Arrays) -> tuple[np.ndarray, float]:
    """Greedy continuation [B, N], and the smallest distance between the two best logits."""
    model.model.rope_deltas = None
    out = model.generate(
        **arguments(item),
        max_new_tokens=NUM_GENERATED,
        do_sample=False,
        eos_token_id=None,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.scores).topk(2, dim=-1).values
    return out.sequences[:, item["input_ids"].shape[1] :].numpy(), float((best[..., 0] - best[..., 1]).min())


def reference(model: Ernie4_5_VLMoeForConditionalGeneration, inputs: dict[str, Arrays]) -> tuple[Arrays, float]:
    """Everything that the archive holds, and the smallest margin of a generated token."""
    arrays: Arrays = {"made_with": np.array(f"transformers {transformers.__version__}, torch {torch.__version__}")}
    margin = 1.0
    for name, item in inputs.items():
        with torch.no_grad():
            given = arguments(item)
            logits = run_logits(model, item)
            found = {"logits": logits, "loss": text.mean_loss(logits, item["labels"])}
            found["position_ids"] = model.model.get_rope_index(
                given["input_ids"],
                given["mm_token_type_ids"],
                given.get("image_grid_thw"),
                given.get("video_grid_thw"),
                given["attention_mask"],
            )[0]
            for kind, pixels, sizes in (
                ("image", "pixel_values", "image_grid_thw"),
                ("video", "pixel_values_videos", "video_grid_thw"),
            ):
                if pixels in given:
                    features = model.model.vision_tower(given[pixels], given[sizes]).last_hidden_state
                    found[f"{kind}_features"] = features
                    found[f"{kind}_tokens"] = model.model.resampler_model(features, given[sizes])
        stored = dict(item) | {key: value.numpy() for key, value in found.items()}
        if name in GENERATED:
            stored["generated"], smallest = generate(model, item)
            margin = min(margin, smallest)
        if name in WITH_GRADIENTS:
            stored |= {f"grad/{key}": value for key, value in named_gradients(model, item).items()}
        arrays |= {f"{name}/{key}": value for key, value in stored.items()}
    return arrays, margin


def make_case(out: Path, seed: int = 41) -> None:
    """Write the fixture, then load it back with transformers and require bit-equal logits."""
    for attempt in range(100):
        model = build_model(seed + 1000 * attempt)
        inputs = make_inputs(seed, VISION["patch_size"] ** 2 * 3)
        if routing_is_decided(model, inputs):
            arrays, margin = reference(model, inputs)
            tokens = [arrays[f"{name}/generated"] for name in GENERATED]
            if margin > GREEDY_MARGIN and min(len(np.unique(each)) for each in tokens) > 2:
                break
    else:
        raise SystemExit("no seed gives decided routing and decided tokens")
    directory = out / "vl_moe"
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(directory / "reference.npz", **arrays)
    again = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, item in inputs.items():
            if not np.array_equal(run_logits(again, item).numpy(), arrays[f"{name}/logits"]):
                raise SystemExit(f"{name}: the saved checkpoint does not give the stored logits")
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"vl_moe: {size / 1e3:.0f} kB, logits std {arrays['mixed/logits'].std():.2f}, token margin {margin:.4f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=text.DEFAULT_OUT)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    make_case(options.out)


if __name__ == "__main__":
    main()
