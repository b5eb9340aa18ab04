"""The tokens with which a model is calibrated: records of the project's formats through the tokenizer and the chat
template, as in training, or a plain text file.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.checkpoint.model_dir import TOKENIZER_FILES
from erniekit.checkpoint.processor import settings_of
from erniekit.config import Config
from erniekit.data.chat.template import load_template
from erniekit.data.chat.tokenizer import Tokenizer, check_fits, load_tokenizer
from erniekit.data.loader import build_loader
from erniekit.data.packed_batch import IGNORE, Document, PackedBatch, make_row
from erniekit.data.records.dataset import length_key, path_key
from erniekit.data.records.find_files import is_prose
from erniekit.data.vision.options import inference_spec
from erniekit.data.vision.template import load_vision_template
from erniekit.hub import resolve_dataset, resolve_tokenizer
from erniekit.models.config import ModelConfig
from erniekit.utils import log
from erniekit.utils.errors import DataError
from erniekit.utils.wording import count_of

_KEY = path_key("calibration")


@dataclass(frozen=True)
class CalibrationSource:
    """The keys quantization_calibration_*: the file, directory or Hub name and the format of its records, and how many
    rows of how many tokens are used.
    """

    path: str
    type: str = "erniekit"
    samples: int = 128
    length: int = 1024


@dataclass(frozen=True)
class Calibration:
    """Rows of calibration tokens, and what they follow from, as JSON values under names that a user knows."""

    batches: list[PackedBatch]
    identity: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        """The tokens of all rows."""
        return sum(batch.num_tokens for batch in self.batches)


def find_data(path: str, hub: str | None) -> Path:
    """The file or directory that the key quantization_calibration_path names; an error where there is none."""
    return resolve_dataset(path, hub, _KEY)


def read_calibration(
    cfg: Config, source: CalibrationSource, model_dir: Path, config: ModelConfig, adapter_dir: Path | None = None
) -> Calibration:
    """Read the rows: documents in the order that `seed` shuffles them, packed into rows of `source.length` tokens.

    `cfg` has the other keys that data depends on (seed, on_bad_line, chat_template, those of pictures). The tokenizer
    is that of tokenizer_name_or_path, else of the model; the template also that of the adapter, if any. Raises
    DataError for data that cannot be read or is too short, CheckpointError where the tokenizer is not the model's.
    """
    path = find_data(source.path, cfg.download_hub)
    own = cfg.tokenizer_name_or_path
    tokenizer = load_tokenizer(model_dir if own is None else resolve_tokenizer(own, cfg.download_hub))
    check_fits(tokenizer, config.vocab_size, str(model_dir))
    if own is not None:
        _warn_of_another_tokenizer(tokenizer, model_dir)
    if path.is_file() and is_prose(path):
        found = _prose(path, source, tokenizer)
    else:
        found = _records(cfg, path, source, tokenizer, config, [*([adapter_dir] if adapter_dir else []), model_dir])
    least = -(-config.hidden_size // 4)
    if found.num_tokens < least:
        raise DataError(
            f"{_KEY}: {source.path} has {count_of(found.num_tokens, 'token')}; a model of width {config.hidden_size} "
            f"needs at least {least}, and some 100,000 for good statistics. Hint: name more data."
        )
    if len(found.batches) < source.samples:
        log.warning(
            f"{_KEY}: {source.path} fills {count_of(len(found.batches), 'row')} of {source.length} tokens, and "
            f"quantization_calibration_samples asks for {source.samples}: all {found.num_tokens:,} tokens are used"
        )
    return found


def _warn_of_another_tokenizer(tokenizer: Tokenizer, model_dir: Path) -> None:
    """Log a warning if the model's directory has another tokenizer: its ids would be other words to the model."""
    if not any((model_dir / name).is_file() for name in TOKENIZER_FILES):
        return
    if load_tokenizer(model_dir).fingerprint != tokenizer.fingerprint:
        log.warning(
            f"tokenizer_name_or_path: the tokenizer in {tokenizer.directory} is another one than that of {model_dir}: "
            "calibration with texts that the model reads otherwise makes it worse. Remove the key"
        )


def _records(
    cfg: Config,
    path: Path,
    source: CalibrationSource,
    tokenizer: Tokenizer,
    config: ModelConfig,
    directories: list[Path],
) -> Calibration:
    """Rows of a data set in one of the project's formats."""
    sees_pictures = config.vision is not None
    keys = replace(
        cfg,
        stage="VL-SFT" if sees_pictures else "SFT",
        dataset_type="iterable",
        train_dataset_path=(str(path),),
        train_dataset_type=(source.type,),
        train_dataset_prob=(),
        text_dataset_path=(),
        max_seq_len=source.length,
        truncation="cut",
        mix_strategy="concat",
        random_shuffle=True,
        packing=True,
        batch_size=1,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        max_steps=-1,
    )
    template = None
    if source.type != "text" or cfg.chat_template is not None:
        load = load_vision_template if sees_pictures else load_template
        template = load(tokenizer, cfg.chat_template, directories[0])
    vision = None
    if config.vision is not None:
        vision = inference_spec(keys, settings_of(*directories, model=config.vision.patching))
    batches: list[PackedBatch] = []
    try:
        with build_loader(keys, tokenizer, "calibration", template=template, vision=vision) as loader:
            while len(batches) < source.samples:
                try:
                    batches += loader.next_step()
                except StopIteration:
                    break
            identity = loader.identity
    except DataError as error:  # what is read speaks of the key of training
        raise DataError(str(error).replace("max_seq_len", length_key("calibration"))) from None
    return Calibration(batches[: source.samples], identity | {"quantization_calibration_samples": source.samples})


def _prose(path: Path, source: CalibrationSource, tokenizer: Tokenizer) -> Calibration:
    """Rows of a plain text file: consecutive parts of it, from its beginning."""
    wanted = source.samples * source.length
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(16 * wanted)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}). Hint: save the file as UTF-8.") from None
    ids = np.array(tokenizer.encode_plain(text)[:wanted], np.int64)
    batches = [
        make_row([Document(part, np.full(len(part), IGNORE))], [f"{path}: tokens from {begin}"])
        for begin in range(0, len(ids), source.length)
        if len(part := ids[begin : begin + source.length])
    ]
    log.info(f"{path}: plain text, {len(ids):,} tokens in {count_of(len(batches), 'row')}")
    digest = hashlib.blake2b(ids.tobytes(), digest_size=8).hexdigest()
    return Calibration(batches, {"calibration tokens": digest, "quantization_calibration_length": source.length})
