"""How a process joins the ranks of its job. All of them must have been started as one: what they compute together
depends on every one of them.

Ranks (and hosts) may be started by hand, each with a command line of its own. Before any weight is read they compare
their configuration, code and data, and on a difference all of them end with the same message.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import paddle

from erniekit.checkpoint.safetensors_header import WEIGHT_FILE
from erniekit.config.methods import option_names
from erniekit.config.schema import Config, fields
from erniekit.config.schema_use import EvalArgs, ExportArgs, GenerateArgs
from erniekit.models.config import CONFIG_FILE
from erniekit.parallel import backend, comm
from erniekit.parallel.mesh import Mesh, ParallelDims, build_mesh
from erniekit.parallel.process_group import Group
from erniekit.utils import heartbeat
from erniekit.utils.errors import ConfigError
from erniekit.utils.version import __version__

# Keys whose values may differ between hosts. Files may have another path on each: their content is compared instead.
PER_HOST = {
    *("model_name_or_path", "download_hub", "lora_path", "train_dataset_path", "eval_dataset_path", "input_dir"),
    *("chat_template", "ref_logps_cache", "logging_dir"),
    *("dataloader_num_workers", "prefetch_factor", "logging_steps", "report_to", "disable_tqdm"),
    *("distributed_timeout", "rendezvous_timeout", "max_restarts"),
    *(name for group in (GenerateArgs, EvalArgs, ExportArgs) for name in option_names(group)),
}


# Of these, what decides how many steps the ranks of an evaluation or a conversation run together.
GENERATION = frozenset(option_names(GenerateArgs)) | {"predict_with_generate"}


def join(cfg: Config, degrees: ParallelDims | None = None, also_compared: Iterable[str] = ()) -> Mesh:
    """This process's place among those that a launcher started; alone without one.

    Args:
        degrees: by default those that `cfg` asks for.
        also_compared: keys of PER_HOST that must be the same on all ranks for what they are going to do.
    """
    heartbeat.waiting("the gathering of all ranks")
    world = backend.init(cfg.rendezvous_timeout, on_wait=heartbeat.waiting)
    heartbeat.waiting(None)
    require_same_configuration(cfg, backend.world_group(), also_compared)
    return build_mesh(ParallelDims.from_config(cfg, world.size) if degrees is None else degrees)


def require_same_configuration(cfg: Config, group: Group, also_compared: Iterable[str] = ()) -> None:
    """Raises ConfigError on every rank if the ranks of `group` have different keys, code or Paddle."""
    if group.size == 1:
        return
    values, per_host = asdict(cfg), PER_HOST.difference(also_compared)
    mine = {key: values[key] for key in fields() if key not in per_host}
    mine |= {"erniekit": f"{__version__} ({_code()})", "paddle": paddle.__version__}
    require_same(mine, group, "Start all ranks with the same configuration and the same code.")


def require_same_files(model_dir: Path, data: Mapping[str, Any], group: Group) -> None:
    """Raises ConfigError on every rank if the ranks of `group` read another model or other data."""
    if group.size == 1:
        return
    mine = {f"model_name_or_path: {name}": value for name, value in _model_files(model_dir).items()}
    require_same(mine | dict(data), group, "Give all hosts the same files.")


def require_same(mine: Mapping[str, Any], group: Group, cure: str) -> None:
    """Raises ConfigError on every rank, with the same words, that names each differing key, its values and ranks."""
    everywhere = comm.gather_objects({key: json.dumps(value) for key, value in mine.items()}, group)
    lines = []
    for key in dict.fromkeys(key for values in everywhere for key in values):
        ranks: dict[str, list[int]] = {}
        for rank, values in zip(group.ranks, everywhere, strict=True):
            ranks.setdefault(values.get(key, "nothing"), []).append(rank)
        if len(ranks) > 1:
            lines.append(f"  {key}: " + ", ".join(f"{value} on rank {_ranges(of)}" for value, of in ranks.items()))
    if lines:
        raise ConfigError("the ranks were not started alike:\n" + "\n".join(lines) + f"\n{cure}")


def _ranges(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
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
    """What can be told of a model without reading its weights."""
    config = hashlib.blake2b((model_dir / CONFIG_FILE).read_bytes(), digest_size=8).hexdigest()
    sizes = {file.name: file.stat().st_size for file in sorted(model_dir.iterdir()) if WEIGHT_FILE.fullmatch(file.name)}
    return {CONFIG_FILE: config, "weight files and their bytes": sizes}
