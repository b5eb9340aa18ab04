"""Writes a model directory again with weight files of another size; names, layout and bits stay the same."""

import shutil
from pathlib import Path

from erniekit.checkpoint.model_dir import copy_companions, is_adapter
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.config import Config
from erniekit.export.convert import Report, digest, require_apart, tell_not_copied
from erniekit.export.export import OVERWRITE, checkpoint_of, output_of
from erniekit.export.target import model_target
from erniekit.models.config import CONFIG_FILE
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError


def split(cfg: Config) -> Report:
    """Write the checkpoint that `cfg` names to `output_dir`/split_export, in files of at most `max_shard_size` GB."""
    target = output_of(cfg) / "split_export"
    return split_checkpoint(
        checkpoint_of(cfg), target, f"{cfg.max_shard_size}GB", cfg.copy_tokenizer, cfg.overwrite_output_dir
    )


def split_checkpoint(
    source_dir: str | Path,
    target_dir: str | Path,
    max_shard_size: int | str = "5GB",
    copy_tokenizer: bool = True,
    overwrite: bool = False,
) -> Report:
    """Copy every tensor of `source_dir` unchanged, one at a time, and verify the files. Another model in
    `target_dir` is replaced only with `overwrite`.

    Raises CheckpointError: a damaged source, a full disk.
    """
    source_dir = Path(source_dir)
    require_apart(source_dir, target_dir)
    if is_adapter(source_dir):
        raise CheckpointError(f"{source_dir} is an adapter: `erniekit export` merges it, and writes shards as well.")
    reader = Reader(source_dir)
    plan = [(name, *reader.info(name)) for name in reader.keys()]  # noqa: SIM118 - a Reader is not iterable
    with model_target(target_dir, "split", [source_dir], overwrite, OVERWRITE) as staging:
        with Writer(staging, plan, max_shard_size, reader.metadata) as writer:
            for name, _, _ in plan:
                writer.write(name, reader.read(name))
        if (source_dir / CONFIG_FILE).is_file():
            shutil.copyfile(source_dir / CONFIG_FILE, staging / CONFIG_FILE)
        copy_companions(source_dir, staging, copy_tokenizer)
        written = Reader(staging)
        for name, _, _ in plan:
            if digest(reader.read(name)) != digest(written.read(name)):
                raise CheckpointError(f"{name} read again from {target_dir} differs: nothing was kept; try again.")
    report = Report(len(plan), writer.num_bytes, len(writer.files))
    tell_not_copied(source_dir)
    log.info(f"{target_dir}: {report}; read again and equal to {source_dir}")
    return report
