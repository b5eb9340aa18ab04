"""Joins a process to the ranks of its job, and checks that all ranks were started alike.

Ranks and hosts may be started by hand, each with a separate command line. Before any weight is read, they compare their
configuration, code and data; if there is a difference, all ranks end with the same message.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import paddle

from erniekit.checkpoint.fingerprint import adapter_digest
from erniekit.checkpoint.safetensors_header import WEIGHT_FILE
from erniekit.config.per_host import compared
from erniekit.config.schema import Config, fields
from erniekit.models.config import CONFIG_FILE
from erniekit.parallel import backend, comm
from erniekit.parallel.mesh import Mesh, ParallelDims, build_mesh
from erniekit.parallel.process_group import Group
from erniekit.utils import heartbeat
from erniekit.utils.errors import ConfigError
from erniekit.utils.version import __version__


def join(cfg: Config, degrees: ParallelDims | None = None, command: str = "train") -> Mesh:
    """The mesh of the ranks that a launcher started, with this process's place in it; without a launcher, one rank.

    Args:
        degrees: the parallel degrees, by default those of `cfg`.
        command: which the ranks run; it decides which keys they compare.
    """
    heartbeat.waiting("the gathering of all ranks")
    world = backend.init(cfg.rendezvous_timeout, on_wait=heartbeat.waiting)
    heartbeat.waiting(None)
    require_same_configuration(cfg, backend.world_group(), command)
    return build_mesh(ParallelDims.from_config(cfg, world.size) if degrees is None else degrees)


def require_same_configuration(cfg: Config, group: Group, command: str = "train") -> None:
    """Raises ConfigError on every rank if the ranks of `group` have different keys, code or Paddle."""
    if group.size == 1:
        return
    values = asdict(cfg)
    local_values = {key: values[key] for key in compared(command, list(fields()))}
    local_values |= {"erniekit": f"{__version__} ({_code()})", "paddle": paddle.__version__}
    require_same(local_values, group, "Start all ranks with the same configuration and the same code.")


def require_same_files(
    model_dir: Path,
    adapter_dir: Path | None,
    data: Mapping[str, Any],
    group: Group,
    key: str = "model_name_or_path",
) -> None:
    """Raises ConfigError on every rank if the ranks of `group` read another model, adapter or other data. `key`: the
    one that names the model.
    """
    if group.size == 1:
        return
    local_values = {f"{key}: {name}": value for name, value in _model_files(model_dir).items()}
    if adapter_dir is not None:
        local_values["content of the adapter's files"] = adapter_digest(adapter_dir)
    require_same(local_values | dict(data), group, "Give all hosts the same files.")


def require_same(local_values: Mapping[str, Any], group: Group, cure: str) -> None:
    """Raises the same ConfigError on every rank, with each differing key, its values and their ranks."""
    everywhere = comm.gather_objects({key: json.dumps(value) for key, value in local_values.items()}, group)
    lines = []
    for key in dict.fromkeys(key for values in everywhere for key in values):
        ranks: dict[str, list[int]] = {}
        for rank, values in zip(group.ranks, everywhere, strict=True):
            ranks.setdefault(values.get(key, "nothing"), []).append(rank)
        if len(ranks) > 1:
            differences = (f"{value} on rank {_ranges(numbers)}" for value, numbers in ranks.items())
            lines.append(f"  {key}: " + ", ".join(differences))
    if lines:
        raise ConfigError("the ranks were not started alike:\n" + "\n".join(lines) + f"\n{cure}")


def _ranges(ranks: list[int]) -> str:
    """Rank numbers as text: [0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _code() -> str:
    """A hash of this package's source."""
    root, state = Path(__file__).parent, hashlib.blake2b(digest_size=6)
    for file in sorted(root.rglob("*.py")):
        state.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return state.hexdigest()


def _model_files(model_dir: Path) -> dict[str, Any]:
    """The facts by which two model directories are compared without reading their weights."""
    config = hashlib.blake2b((model_dir / CONFIG_FILE).read_bytes(), digest_size=8).hexdigest()
    sizes = {file.name: file.stat().st_size for file in sorted(model_dir.iterdir()) if WEIGHT_FILE.fullmatch(file.name)}
    return {CONFIG_FILE: config, "weight files and their bytes": sizes}
