"""Rebuild tests/parity/fixtures/rotary.npz from Hugging Face transformers (needs the extra `parity`).

    python tools/make_rotary_fixture.py [--out FILE]

What transformers' ERNIE 4.5 computes in float32 where rounding shows: at long inputs and far positions. Keys:

    frequencies/HEAD_DIM/THETA     [HEAD_DIM / 2] its inverse frequencies
    positions [N]; cos, sin        [N, 64] for head_dim 128, theta 500000
    logits/START/places            positions in an input of 5,000 tokens whose first position is START
    logits/START/values            [places, V] logits of the fixture dense_tied there

The input is `np.random.default_rng(START).integers(3, V, 5000)`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import Ernie4_5Config, Ernie4_5ForCausalLM
from transformers.models.ernie4_5.modeling_ernie4_5 import Ernie4_5RotaryEmbedding

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "parity" / "fixtures"
SIZES = ((128, 500000.0), (128, 10000.0), (64, 500000.0), (64, 1000000.0), (16, 500000.0))
POSITIONS = (1, 4999, 5000, 65537, 131064, 131070, 131071)
LENGTH, STARTS = 5000, (0, 126072)  # the second ends at position 131071
PLACES = (0, 1, 2500, 4990, 4996, 4997, 4998, 4999)


def rotary(head_dim: int, theta: float) -> Ernie4_5RotaryEmbedding:
    """transformers' layer for these sizes."""
    parameters = {"rope_type": "default", "rope_theta": theta}
    return Ernie4_5RotaryEmbedding(Ernie4_5Config(head_dim=head_dim, rope_parameters=parameters))


def main() -> None:
    """Write the archive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FIXTURES / "rotary.npz")
    out = parser.parse_args().out
    arrays = {f"frequencies/{dim}/{theta:g}": rotary(dim, theta).inv_freq.numpy() for dim, theta in SIZES}
    positions = torch.tensor([POSITIONS])
    cos, sin = rotary(*SIZES[0])(torch.zeros(1), positions)
    arrays |= {"positions": np.array(POSITIONS), "cos": cos[0, :, :64].numpy(), "sin": sin[0, :, :64].numpy()}
    model = Ernie4_5ForCausalLM.from_pretrained(FIXTURES / "dense_tied", dtype=torch.float32).eval()
    for start in STARTS:
        ids = np.random.default_rng(start).integers(3, model.config.vocab_size, LENGTH)
        with torch.no_grad():
            logits = model(torch.tensor(ids)[None], position_ids=torch.arange(start, start + LENGTH)[None]).logits
        arrays[f"logits/{start}/places"] = np.array(PLACES)
        arrays[f"logits/{start}/values"] = logits[0, list(PLACES)].numpy()
    np.savez_compressed(out, **arrays)
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
