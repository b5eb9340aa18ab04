"""Tells whether two model directories hold the same weights, without reading all of them."""

import hashlib
import re
from pathlib import Path

import numpy as np

from erniekit.checkpoint import dtypes
from erniekit.checkpoint.safetensors_read import Reader


def fingerprint(model_dir: str | Path) -> str:
    """A digest of a model's weights: of the first and the last layer's attention output, rounded to bfloat16, so that
    layouts (-PT, -Paddle) and copies in fp32 or bf16 have the same one.
    """
    reader = Reader(model_dir, u16_is_bf16=True)
    pattern = re.compile(r"(model|ernie)\.layers\.([0-9]{1,6})\.self_attn\.o_proj\.weight")
    by_layer = sorted((int(m[2]), name) for name, m in ((n, pattern.fullmatch(n)) for n in reader.keys()) if m)  # noqa: SIM118
    state = hashlib.blake2b(digest_size=8)
    for _, name in by_layer[:1] + by_layer[-1:]:
        bits = dtypes.convert(reader.read(name), reader.info(name).dtype, "BF16")
        state.update(np.ascontiguousarray(bits if name.startswith("model.") else bits.T).data)
    return state.hexdigest()
