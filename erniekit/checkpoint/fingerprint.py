"""Tells whether two model directories hold the same weights: `fingerprint` without reading all of them, and
`weights_digest` where numbers were computed from every weight.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from erniekit.checkpoint import dtypes
from erniekit.checkpoint.model_dir import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from erniekit.checkpoint.quantised_read import open_weights
from erniekit.checkpoint.safetensors_header import WEIGHT_FILE

_BLOCK = 1 << 24  # bytes that are read at a time


def fingerprint(model_dir: str | Path) -> str:
    """A digest of a model's weights: of the first and the last layer's attention output, rounded to bfloat16, so that
    layouts (-PT, -Paddle) and copies in fp32 or bf16 have the same one. Of a quantised model it is that of the weights
    that its codes stand for.
    """
    reader = open_weights(Path(model_dir), say=False)
    pattern = re.compile(r"(model|ernie)\.layers\.([0-9]{1,6})\.self_attn\.o_proj\.weight")
    by_layer = sorted((int(m[2]), name) for name, m in ((n, pattern.fullmatch(n)) for n in reader.keys()) if m)  # noqa: SIM118
    state = hashlib.blake2b(digest_size=8)
    for _, name in by_layer[:1] + by_layer[-1:]:
        bits = dtypes.convert(reader.read(name), reader.info(name).dtype, "BF16")
        state.update(np.ascontiguousarray(bits if name.startswith("model.") else bits.T).data)
    return state.hexdigest()


def weights_digest(model_dir: Path) -> str:
    """A digest of every byte of a model's weight files. Unlike its fingerprint, it also changes with an adapter that
    was merged into other projections, or with the dtype.
    """
    names = sorted(file.name for file in model_dir.iterdir() if WEIGHT_FILE.fullmatch(file.name))
    return files_digest(model_dir / name for name in names if not name.endswith(".json"))


def adapter_digest(directory: str | Path) -> str:
    """A digest of every byte of an adapter's two files."""
    return files_digest(Path(directory) / name for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE))


def files_digest(paths: Iterable[Path]) -> str:
    """A digest of the content of several files."""
    state = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                state.update(block)
    return state.hexdigest()[:32]
