"""Reference log-probabilities computed once and kept in a file (`ref_logps_cache`).

Each pair is found by a hash of its tokens and labels, so order, packing, mixing and the layout of the run do not
matter, and data that changed brings only its new pairs. The file says which model the numbers are of.
"""

import hashlib
import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from erniekit.checkpoint.fingerprint import adapter_digest, files_digest, weights_digest
from erniekit.config.schema import Config
from erniekit.data.chat.template import Template
from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.data.loader import build_loader
from erniekit.data.packed_batch import NO_SEGMENT, PackedBatch
from erniekit.models.config import CONFIG_FILE, ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.nn.frequencies import RopeScaling
from erniekit.parallel import comm
from erniekit.parallel.agree import on_first
from erniekit.parallel.mesh import Mesh
from erniekit.training.forward_pass import forward_groups
from erniekit.utils import atomic, log
from erniekit.utils.errors import CheckpointError, UserError
from erniekit.utils.user_files import open_regular, parse_json
from erniekit.utils.wording import count_of

_VERSION = 1
_KEY_BYTES = 16
Table = dict[str, tuple[float, float]]  # a pair's hash -> log-probabilities of chosen and rejected
LogProbs = Callable[[Sequence[PackedBatch]], list[paddle.Tensor]]  # see reference.Reference


class CachedReference:
    """A reference whose log-probabilities are all known."""

    def __init__(self, table: Table, path: Path) -> None:
        self._table, self._path = table, path

    def log_probs(self, microbatches: Sequence[PackedBatch]) -> list[paddle.Tensor]:
        """See reference.Reference. Raises CheckpointError for a pair that the file does not know."""
        return [self._of(batch) for batch in microbatches]

    def _of(self, batch: PackedBatch) -> paddle.Tensor:
        keys = pair_keys(batch)
        unknown = [i for i, key in enumerate(keys) if key not in self._table]
        if unknown:
            where = batch.sources[unknown[0]] if unknown[0] < len(batch.sources) else "a pair"
            raise CheckpointError(
                f"ref_logps_cache: {self._path} has no entry for {where}: the data changed during the run. "
                "Start the run again: it resumes from the newest checkpoint and computes what is missing."
            )
        return paddle.to_tensor(np.array([self._table[key] for key in keys], np.float32).reshape(-1, 2).T)


def pair_keys(batch: PackedBatch) -> list[str]:
    """A hash of each pair: tokens and labels of its prompt, chosen and rejected answer."""
    pairs = batch.pairs
    content = np.stack([batch.input_ids, batch.labels], axis=1)
    bounds = np.concatenate([[0], np.cumsum(batch.segment_lengths)])
    keys = []
    for segments in zip(pairs.prompts.tolist(), pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True):
        state = hashlib.blake2b(digest_size=_KEY_BYTES)
        for segment in segments:
            part = content[:0] if segment == NO_SEGMENT else content[bounds[segment] : bounds[segment + 1]]
            state.update(len(part).to_bytes(8, "little") + np.ascontiguousarray(part).tobytes())
        keys.append(state.hexdigest())
    return keys


# What a configuration may change in a model's config.json without changing a log-probability.
_WITHOUT_EFFECT = frozenset(
    "rope_theta max_position_embeddings moe_capacity_factor num_nextn_predict_layers dtype extra".split()
)


def describe_reference(cfg: Config, model_dir: Path, config: ModelConfig, dtype: paddle.dtype) -> dict[str, str]:
    """The identity of the reference: its weights and config.json, or its random start, what the configuration changes
    in them, and its precision. `dtype`: of its activations, which compute_type alone does not tell.
    """
    file, used = model_dir / CONFIG_FILE, vars(config)
    stored = vars(ModelConfig.from_dir(model_dir)) if file.exists() else {}  # the YAML may give the whole shape
    changed = [
        name for name in used if name not in _WITHOUT_EFFECT and (name not in stored or used[name] != stored[name])
    ]
    return {
        "weights": weights_digest(model_dir) if cfg.continue_training else f"random start, seed {cfg.seed}",
        CONFIG_FILE: files_digest([file]) if stored else "none",
        **({"lora_path": adapter_digest(cfg.lora_path)} if cfg.lora_path and cfg.fine_tuning == "LoRA" else {}),
        "rope_theta": f"{config.rope_theta:g}",
        "compute_type": _arithmetic(cfg, dtype),
        **{name: _in_words(used[name]) for name in changed},
        **({} if cfg.fp8 == "none" else {"fp8": _fp8_of_forward(cfg)}),
        **({} if cfg.qat == "none" else {"qat": f"{cfg.qat}, Hadamard {cfg.apply_hadamard} {cfg.hadamard_block_size}"}),
    }


def _arithmetic(cfg: Config, dtype: paddle.dtype) -> str:
    """In what the reference is computed; see describe_reference."""
    text = cfg.compute_type + " emulated" * cfg.emulate_precision
    if cfg.compute_type != "fp32" and dtype == paddle.float32:
        text += ", computed in float32"
    return text if cfg.matmul_precision == "fp32" else f"{text}, products in {cfg.matmul_precision}"


def _in_words(value: Any) -> str:
    """A value of a model's configuration for the file and for messages; of scaled positions as config.json has them."""
    return f"{dict(value.given)} from {value.length}" if isinstance(value, RopeScaling) else str(value)


def _fp8_of_forward(cfg: Config) -> str:
    """The keys of FP8 that log-probabilities depend on; the others are of the backward pass."""
    return f"{cfg.fp8}, {cfg.fp8_scale} scales, {','.join(sorted(cfg.fp8_modules))}, weighed {cfg.fp8_routing_weight}"


def prepare_cache(
    cfg: Config,
    model_dir: Path,
    model: CausalLM,
    tokenizer: Tokenizer,
    template: Template | None,
    log_probs: LogProbs,
) -> CachedReference:
    """Read the file of `ref_logps_cache`, compute with `log_probs` what it lacks of the training and evaluation data,
    and write it. Raises CheckpointError if the file is of another model or cannot be read or written.
    """
    assert cfg.ref_logps_cache is not None
    mesh = model.mesh
    path = Path(cfg.ref_logps_cache)
    now = on_first(mesh.world_group, lambda: describe_reference(cfg, model_dir, model.config, model.residual_dtype))
    table = on_first(mesh.world_group, lambda: read_cache(path, now))
    known = len(table)
    for microbatches in _all_pairs(cfg, tokenizer, template, mesh):
        missing = sum(key not in table for batch in microbatches for key in pair_keys(batch))
        if comm.sum_floats(np.array([float(missing)]), mesh.world_group).item():
            _compute(microbatches, log_probs, mesh, table)
    if len(table) > known:
        on_first(mesh.world_group, lambda: write_cache(path, now, table))
    log.info(f"ref_logps_cache: {path}: {count_of(known, 'pair')} known, {len(table) - known} computed")
    return CachedReference(table, path)


def _compute(microbatches: list[PackedBatch], log_probs: LogProbs, mesh: Mesh, table: Table) -> None:
    """Add the pairs of these microbatches, of every data rank, to each rank's table."""
    own: Table = {}
    found = log_probs(microbatches)
    if mesh.holds_results:
        for batch, numbers in zip(microbatches, found, strict=True):
            for key, chosen, rejected in zip(pair_keys(batch), *numbers.tolist(), strict=True):
                own[key] = (chosen, rejected)
    for part in comm.gather_objects(own, mesh.world_group):
        table.update({key: (chosen, rejected) for key, (chosen, rejected) in part.items()})


def _all_pairs(cfg: Config, tokenizer: Tokenizer, template: Template | None, mesh: Mesh) -> Iterator[list[PackedBatch]]:
    """Every record of the training data once, then of the evaluation data: this data rank's share, a few microbatches
    at a time, the same number on every rank.
    """
    once = replace(cfg, max_steps=-1, num_train_epochs=1.0, mix_strategy="concat", random_shuffle=False)
    once = replace(once, train_dataset_prob=())
    for split in ("train", "eval"):
        if split == "eval" and not (cfg.do_eval or cfg.evaluation_strategy != "no"):
            continue
        with build_loader(once, tokenizer, split, mesh.batch, mesh.degrees.batch, template) as loader:
            yield from forward_groups(mesh, loader.batches())


def read_cache(path: Path, now: dict[str, str]) -> Table:
    """The file's numbers; none if there is no file. CheckpointError if it is of another model or damaged."""
    if not path.exists():
        return {}
    try:
        with open_regular(path, CheckpointError) as file, zipfile.ZipFile(file) as archive:
            model, keys, log_probs = (_read_array(archive, f"{name}.npy") for name in ("model", "keys", "log_probs"))
        then = parse_json(str(model), f"{path}: model", CheckpointError)
        if not isinstance(then, dict):
            raise ValueError("it does not say of which model it is")
        if keys.dtype != np.uint8 or keys.shape != (len(log_probs), _KEY_BYTES):
            raise ValueError(f"keys of shape {keys.shape}")
        if log_probs.dtype != np.float32 or log_probs.shape != (len(keys), 2) or not np.isfinite(log_probs).all():
            raise ValueError("log-probabilities that are not pairs of numbers")
    except UserError as error:
        raise CheckpointError(f"ref_logps_cache: {error} Remove it to compute it again.") from None
    # All that zipfile and numpy raise for an archive that is damaged.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, RuntimeError, struct.error) as error:
        raise CheckpointError(
            f"ref_logps_cache: {path} cannot be read: {error}. Remove it to compute it again."
        ) from None
    wanted = now | {"version": str(_VERSION)}
    changed = [
        f"{name} was {then.get(name)}, is {wanted.get(name)}"
        for name in wanted | then
        if then.get(name) != wanted.get(name)
    ]
    if changed:
        raise CheckpointError(
            f"ref_logps_cache: {path} holds the log-probabilities of another reference: {'; '.join(changed)}. "
            "Name another file, or remove this one to compute it again."
        )
    return {bytes(key).hex(): (float(c), float(r)) for key, (c, r) in zip(keys, log_probs, strict=True)}


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array as `np.savez` writes it. `np.load` would make room for whatever its header claims."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    with archive.open(member) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is of another version")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        content = file.read()
    if fortran_order or dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"{name}: {len(content)} bytes for {dtype} of shape {shape}")
    return np.frombuffer(content, dtype).reshape(shape)


def write_cache(path: Path, now: dict[str, str], table: Table) -> None:
    """Write the file, whole or not at all."""
    keys = np.array([list(bytes.fromhex(key)) for key in table], np.uint8)
    model = json.dumps(now | {"version": str(_VERSION)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.new_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, model=np.array(model), keys=keys, log_probs=np.array(list(table.values()), np.float32))
    except OSError as error:
        raise CheckpointError(
            f"ref_logps_cache: {path} cannot be written: {error.strerror}. Name another file."
        ) from None
