"""Time a full training step of a vision-language model against torch + transformers, in one run on this machine.

    python tools/bench_vl.py                       # presets tiny and tower
    python tools/bench_vl.py tiny --rounds 15
    python tools/bench_vl.py tiny --only ours --profile

Both sides do the same work: one causal-LM step in fp32 on the same rows of text, images and a video, AdamW, gradients
clipped to a global norm of 1, the head on every position. Rows have one length, so that transformers, which pads rows,
pads nothing; positions are given to both. Opening and resizing pictures is in neither step: data workers do that.
erniekit gets 8-bit pixels and normalises them in the step, as in training; transformers gets what its processor makes
of them, and runs with its defaults: sdpa attention, grouped_mm experts, a fused AdamW, nothing recomputed. The router
losses are off on both sides. Processes, turns and threads are those of bench_step.py.

The size of a packed batch on the host is printed with the peak memory of each process, which includes its libraries.
Needs the extra `parity` for the torch side; without it, only erniekit is timed.
"""

import argparse
import importlib.util
import sys
from typing import Any

import numpy as np
from bench_step import bench
from bench_worker import ROOT, OurStep, TorchStep, serve, serve_steps

SPECIAL = 4088  # ids from here on are those of pictures: placeholders, start and end of images and videos
PATCH = 14
# Rows: numbers of text tokens, and grids (frames, rows and columns of patches).
Parts = list[int | tuple[int, int, int]]
MIXED: list[Parts] = [
    [20, (1, 32, 32), 60, (1, 16, 24)],
    [10, (8, 12, 16)],
    [40, (1, 20, 28), 30, (1, 12, 12), 25, (1, 28, 12)],
    [],
]


def _config(vision: dict[str, int]) -> dict[str, Any]:
    return {
        "model_type": "ernie4_5_vl_moe",
        "image_token_id": SPECIAL,
        "video_token_id": SPECIAL + 1,
        "image_start_token_id": SPECIAL + 2,
        "image_end_token_id": SPECIAL + 3,
        "video_start_token_id": SPECIAL + 4,
        "video_end_token_id": SPECIAL + 5,
        "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": 4096,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 4096,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": [256, 128],
            "moe_num_shared_experts": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [12, 12, 8]},
        },
        "vision_config": {"patch_size": PATCH, **vision},
    }


# name -> config.json
PRESETS = {
    "tiny": _config({"depth": 2, "hidden_size": 128, "num_heads": 4, "intermediate_size": 256}),
    "tower": _config({"depth": 8, "hidden_size": 256, "num_heads": 8, "intermediate_size": 1024}),
}


def make_rows(rows: list[Parts], seq: int, seed: int) -> dict[str, np.ndarray]:
    """Rows [B, seq] filled up with text, and the 8-bit patches of their images and videos."""
    random = np.random.default_rng(seed)
    ids = random.integers(3, SPECIAL, (len(rows), seq))
    kinds = np.zeros_like(ids)
    grid: list[tuple[int, int, int]] = []
    for row, parts in enumerate(rows):
        at = 0
        for part in parts:
            if isinstance(part, int):
                at += part
                continue
            kind = 1 if part[0] == 1 else 2
            count = part[0] * part[1] * part[2] // (4 * kind)
            ids[row, at], ids[row, at + count + 1] = SPECIAL + 2 * kind, SPECIAL + 2 * kind + 1
            ids[row, at + 1 : at + count + 1] = SPECIAL + kind - 1
            kinds[row, at + 1 : at + count + 1] = kind
            grid.append(part)
            at += count + 2
        assert at <= seq, f"row {row} has {at} tokens of pictures and text, more than {seq}"
    sizes = np.array(grid, np.int64).reshape(-1, 3)
    pixels = random.integers(0, 256, (int(sizes.prod(axis=1).sum()), 3 * PATCH**2)).astype(np.uint8)
    labels = np.roll(ids, -1, axis=1)
    return {"ids": ids, "labels": np.minimum(labels, SPECIAL - 1), "kinds": kinds, "grid": sizes, "pixels": pixels}


class _Ours(OurStep):
    def prepare(self, rows: dict[str, np.ndarray]) -> Any:
        """A packed batch as the data workers make it, and its size in bytes."""
        from erniekit.data.packed_batch import PackedBatch, PictureTable
        from erniekit.data.vision.positions import num_tokens, token_positions

        ids, kinds = rows["ids"].reshape(-1), rows["kinds"].reshape(-1)
        segments = np.repeat(np.arange(len(rows["ids"])), rows["ids"].shape[1])
        counts = num_tokens(rows["grid"])
        first = np.flatnonzero(kinds)[np.cumsum(counts) - counts]
        return PackedBatch(
            input_ids=ids,
            labels=rows["labels"].reshape(-1),
            position_ids=token_positions(kinds, rows["grid"], segments + 1),
            segment_ids=segments,
            modality=np.where(ids >= SPECIAL, np.maximum(kinds, 1), 0).astype(np.int8),
            row_lengths=[rows["ids"].shape[1]] * len(rows["ids"]),
            sources=[f"row {row}" for row in range(len(rows["ids"]))],
            pictures=PictureTable(rows["pixels"], rows["grid"], first),
        )

    def num_bytes(self, batch: Any) -> int:
        """The columns of a packed batch on the host."""
        columns = (batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids, batch.modality)
        return sum(column.nbytes for column in (*columns, batch.pictures.patches, batch.pictures.grid))

    def loss(self, batch: Any) -> Any:
        from erniekit.models.inputs import batch_inputs

        return self.head_loss(batch_inputs(self.model, batch), batch.labels)


class _Torch(TorchStep):
    def build(self, config: dict[str, Any]) -> Any:
        from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

        fields = {name: value for name, value in config.items() if name != "model_type"}
        return Ernie4_5_VLMoeForConditionalGeneration(Ernie4_5_VLMoeConfig(**fields))

    def prepare(self, rows: dict[str, np.ndarray]) -> dict[str, Any]:
        """What transformers' processor gives for the rows, with the positions that erniekit's data has."""
        sys.path.insert(0, str(ROOT))
        from erniekit.data.vision.pixels import normalise
        from erniekit.data.vision.positions import token_positions

        ids, grid = rows["ids"], rows["grid"]
        segments = np.repeat(np.arange(len(ids)), ids.shape[1])
        positions = token_positions(rows["kinds"].reshape(-1), grid, segments + 1).reshape(*ids.shape, 3)
        is_video = grid[:, 0] > 1
        of_video = np.repeat(is_video, grid.prod(axis=1))
        values = normalise(rows["pixels"])
        item = {
            "input_ids": ids,
            "mm_token_type_ids": rows["kinds"],
            "moe_mm_token_type_ids": (ids >= SPECIAL).astype(np.int64),
            "position_ids": np.ascontiguousarray(positions.transpose(2, 0, 1)),
        }
        if not is_video.all():
            item |= {"pixel_values": values[~of_video], "image_grid_thw": grid[~is_video]}
        if is_video.any():
            item |= {"pixel_values_videos": values[of_video], "video_grid_thw": grid[is_video]}
        tensors = {name: self.torch.from_numpy(value) for name, value in item.items()}
        return tensors | {"labels": self.torch.from_numpy(rows["labels"])}

    def num_bytes(self, batch: dict[str, Any]) -> int:
        """The tensors of a batch."""
        return sum(tensor.numel() * tensor.element_size() for tensor in batch.values())

    def loss(self, batch: dict[str, Any]) -> Any:
        labels = batch["labels"].reshape(-1)
        output = self.model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
        return self.torch.nn.functional.cross_entropy(output.logits.reshape(len(labels), -1), labels)


SIDES = {"ours": _Ours, "torch": _Torch}


def serve_side(side: str) -> None:
    """The worker: a job, then numbers of steps to run."""
    commands, answer = serve()
    job = next(commands)
    worker = SIDES[side](job)
    batch = worker.prepare(make_rows(job["rows"], job["seq"], seed=2))
    about = {"batch_bytes": worker.num_bytes(batch)}
    serve_steps(commands, answer, worker, lambda: (batch,), job["warmup"], about)


def main() -> None:
    """Parse the command line and run every preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", choices=[*PRESETS, []], help=f"default: {' '.join(PRESETS)}")
    parser.add_argument(
        "--rows", type=int, default=len(MIXED), help="the first N of the rows, the last being text alone"
    )
    parser.add_argument("--seq", type=int, default=512, help="tokens of a row, at least 436")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of each side (default: what erniekit takes by itself)")
    parser.add_argument("--only", choices=list(SIDES), help="one side alone")
    parser.add_argument("--profile", action="store_true", help="afterwards, time by operator (stderr)")
    parser.add_argument("--serve", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_side(args.serve)
        return
    sides = [args.only] if args.only else list(SIDES)
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if "torch" in sides and absent:
        print(f'not installed: {", ".join(absent)}; only erniekit is timed (pip install "erniekit[parity]")')
        sides.remove("torch")
    rows = MIXED[: args.rows]
    grid = make_rows(rows, args.seq, seed=2)["grid"]
    patches, videos = int(grid.prod(axis=1).sum()), int((grid[:, 0] > 1).sum())
    contents = f"{len(grid) - videos} images and {videos} videos of {patches} patches"
    for name in args.presets or PRESETS:
        job = {"config": PRESETS[name], "rows": rows, "batch": len(rows), "seq": args.seq, "contents": contents}
        job |= {"warmup": args.warmup, "threads": args.threads}
        for side, about in bench(name, job, sides, args.rounds, args.profile, script=__file__)["about"].items():
            megabytes = about["batch_bytes"] / 1e6
            print(f"{side}: a batch has {megabytes:.2f} MB, the process at most {about['peak_mb']:.0f} MB")


if __name__ == "__main__":
    main()
