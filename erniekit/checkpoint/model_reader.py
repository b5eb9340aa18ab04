"""Opens model directories for reading and checks their tensors against the table of weights. It uses numpy only."""

import dataclasses
from pathlib import Path

import numpy as np

from erniekit.checkpoint.dtypes import FLOATS, convert, to_fp32
from erniekit.checkpoint.mismatch import listed, mismatch_lines
from erniekit.checkpoint.quantised_codecs import Codec
from erniekit.checkpoint.quantised_read import QuantisedReader, open_weights
from erniekit.checkpoint.safetensors_header import Plan, TensorInfo
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.models.config import CONFIG_FILE, Format, ModelConfig
from erniekit.models.weights import (
    EMBEDDINGS,
    HEAD,
    Logical,
    Piece,
    detect_format,
    is_correction_bias,
    is_frequency,
    is_fused_experts,
    is_mtp,
    logical_tensors,
    match_names,
    may_be_turned,
    mtp_depth,
)
from erniekit.nn.frequencies import inverse_frequencies, scaled_frequencies
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError
from erniekit.utils.wording import count_of

# The last words of tensors that belong to quantised weights, of any method.
_QUANTISED_PARTS = ("weight_packed", "weight_scale", "weight_scale_inv", "quant_weight", "qweight")
# What readers of each layout expect in the header: transformers wants "pt", Paddle's loaders "np".
METADATA: dict[Format, dict[str, str]] = {"pt": {"format": "pt"}, "paddle": {"format": "np"}}


class ModelReader:
    """A model directory opened for reading: its tensors, and the configuration that they really have.

    `config` is config.json's, corrected where the weights differ, each time with a log line: a tied model whose file
    has another head is not tied (as in transformers), a file without multi-token prediction is a model without.
    Quantised weights are read as what their codes stand for, in fp32; `quantised` is then their method. `logicals` are
    the model's units; with `keep_mtp`, also the multi-token prediction that `config` does not mention. Raises
    CheckpointError with every missing, unexpected and misshapen tensor.
    """

    def __init__(
        self, path: str | Path, config: ModelConfig | None = None, keep_mtp: bool = False, quiet: bool = False
    ) -> None:
        """`config`: what the caller expects in the directory, instead of its config.json. `quiet`: see
        ModelConfig.from_dir.
        """
        self.path = Path(path)
        self.reader = open_weights(self.path)
        names = self.reader.keys()
        self.format: Format = detect_format(names, str(self.path))
        read = ModelConfig.from_dir(self.path, quiet) if config is None else config
        self.left_out: set[str] = set()
        self._said_mixed = False
        self._leave_out_frequencies(names, read)
        self.config = self._with_stored_head(read, adapt=config is None)
        depths = self._mtp_depths(adapt=config is None, keep=keep_mtp)
        self.logicals = logical_tensors(dataclasses.replace(self.config, num_nextn_predict_layers=depths))
        match = match_names(self.logicals, [name for name in names if name not in self.left_out], self.format)
        self._stored = match.stored
        self._turned = self._find_turned()
        misshapen = [
            f"{piece.name} {list(self.info(piece.name).shape)}, expected {list(piece.shape)}"
            for piece in (piece for logical in self.logicals for piece in logical.pieces(self.format))
            if piece.name in self._stored and self.info(piece.name).shape != piece.shape
        ]
        not_floating = [
            f"{piece.name} {self.info(piece.name).dtype}"
            for logical in self.logicals
            for piece in logical.pieces(self.format)
            if piece.name in self._stored and self.info(piece.name).dtype not in FLOATS
        ]
        self._complain(match.missing, match.unexpected, misshapen, not_floating)

    @property
    def quantised(self) -> str:
        """The method by which the weights are quantised; empty if they are not."""
        return self.reader.description if isinstance(self.reader, QuantisedReader) else ""

    def info(self, name: str) -> TensorInfo:
        """(header dtype, shape) of the tensor that the table of weights calls `name`."""
        info = self.reader.info(self._stored[name])
        return info._replace(shape=info.shape[::-1]) if name in self._turned else info

    def is_turned(self, logical: Logical) -> bool:
        """Whether a matrix lies in the file as the transpose of what the layout has."""
        return any(piece.name in self._turned for piece in logical.pieces(self.format))

    def stored_name(self, name: str) -> str:
        """The name in the file of the tensor that the table of weights calls `name`."""
        return self._stored[name]

    def read(self, logical: Logical, as_fp32: bool = False) -> np.ndarray:
        """Read one unit of the model in our layout: as stored (bfloat16 as uint16 bits), or widened to float32, as
        pieces of different types always are.
        """
        pieces = logical.pieces(self.format)
        stored = {self.info(piece.name).dtype for piece in pieces}
        if len(stored) > 1:
            return logical.from_file((self.read_piece(piece, as_fp32=True) for piece in pieces), self.format)
        whole = logical.from_file((self.read_piece(piece) for piece in pieces), self.format)
        return to_fp32(whole, stored.pop()) if as_fp32 else whole  # last: half as many bytes are transposed

    def read_piece(self, piece: Piece, as_fp32: bool = False) -> np.ndarray:
        """Read one tensor as it lies in a file of this directory's layout: as stored, or widened to float32."""
        array = self.reader.read(self._stored[piece.name], as_fp32)
        return np.ascontiguousarray(array.T) if piece.name in self._turned else array

    @property
    def stored(self) -> Reader:
        """The tensors as they are stored, by their names in the files; also codes and scales of quantised weights."""
        return self.reader.stored if isinstance(self.reader, QuantisedReader) else self.reader

    def codec_of(self, piece: Piece) -> Codec | None:
        """How a matrix is quantised; None if it is not."""
        reader = self.reader
        return reader.codec_of(self._stored[piece.name]) if isinstance(reader, QuantisedReader) else None

    def dtype_of(self, logical: Logical) -> str:
        """The header dtype of a unit as `read` gives it: F32 where its pieces differ, with a log line."""
        found = {self.info(piece.name).dtype for piece in logical.pieces(self.format)}
        if len(found) == 1:
            return found.pop()
        if not self._said_mixed:
            names = ", ".join(piece.name for piece in logical.pieces(self.format))
            log.warning(
                f"{self.path}: {names} are one weight here and of different types ({', '.join(sorted(found))}): such "
                "weights become F32"
            )
        self._said_mixed = True
        return "F32"

    def _leave_out_frequencies(self, names: list[str], config: ModelConfig) -> None:
        """Do not read tensors of rotary frequencies: those of the configuration are used, as in transformers."""
        found = [name for name in names if is_frequency(name)]
        self.left_out.update(found)
        others = [name for name in found if not self._follows_from(config, name)]
        if others:
            log.warning(
                f"{self.path}: {count_of(len(others), 'tensor')} of rotary frequencies left out, although not those of "
                f"{CONFIG_FILE}, which are used, as in transformers: {listed(others)}. If the model was trained with "
                "the stored ones, its answers will be wrong: compare rope_theta, rope_scaling and head_dim in "
                f"{CONFIG_FILE} with the source"
            )
        elif found:
            log.info(
                f"{self.path}: {count_of(len(found), 'tensor')} of rotary frequencies left out, which follow from "
                f"{CONFIG_FILE}: {listed(found)}"
            )

    def _follows_from(self, config: ModelConfig, name: str) -> bool:
        """Whether stored rotary frequencies are those of the configuration, as far as their type can tell."""
        if "vision_model." not in name:
            expected = scaled_frequencies(
                config.head_dim, config.rope_theta, config.rope_scaling, np.zeros(1, np.int64)
            )
        elif config.vision is not None:
            expected = inverse_frequencies(config.vision.head_dim // 2, config.vision.rope_theta)
        else:
            return False
        dtype, shape = self.reader.info(name)
        expected = expected.reshape(-1)
        if dtype not in FLOATS or shape != expected.shape:
            return False
        rounded = to_fp32(convert(expected, "F32", dtype), dtype)
        # Within what computing them in that type, and not only storing them in it, may lose: a few units of 8 bits.
        coarse = dtype in ("F16", "BF16")
        return np.allclose(self.reader.read(name, as_fp32=True), rounded, rtol=1e-2 if coarse else 1e-4, atol=1e-7)

    def _with_stored_head(self, config: ModelConfig, adapt: bool) -> ModelConfig:
        if not config.tie_word_embeddings or HEAD not in self.reader:
            return config
        if self._head_repeats_embeddings():
            log.info(f"{self.path}: {HEAD} repeats the embeddings, to which the head is tied; left out")
            self.left_out.add(HEAD)
        elif adapt:
            log.warning(f"{self.path}: config.json ties the head to the embeddings but {HEAD} differs: not tied")
            return dataclasses.replace(config, tie_word_embeddings=False)
        return config

    def _mtp_depths(self, adapt: bool, keep: bool) -> int:
        """The number of multi-token-prediction depths to read; `self.config` is adapted to the file if `adapt`."""
        expected = self.config.num_nextn_predict_layers
        depth_of = {name: mtp_depth(name) for name in self.reader.keys()}  # noqa: SIM118 - a Reader is not iterable
        stored = {name: depth for name, depth in depth_of.items() if depth is not None}
        if stored and not expected:
            if keep:
                return 1 + max(stored.values())
            count = len(stored)
            log.info(
                f"{self.path}: {count_of(count, 'multi-token-prediction tensor')} left out (num_nextn_predict_layers "
                "is 0)"
            )
            self.left_out.update(stored)
        elif expected and not stored and adapt:
            log.info(
                f"{self.path}: config.json has num_nextn_predict_layers {expected}, the weights have none: taken as 0"
            )
            self.config = dataclasses.replace(self.config, num_nextn_predict_layers=0)
            return 0
        return expected

    def _find_turned(self) -> set[str]:
        """The tensors of the table that the file has transposed."""
        turned = set()
        for logical in self.logicals if any(is_mtp(name) for name in self._stored) else ():
            [piece, *others] = logical.pieces(self.format)
            if others or piece.name not in self._stored or not may_be_turned(logical.param):
                continue
            if self.reader.info(self._stored[piece.name]).shape == piece.shape[::-1]:
                log.once(f"{self.path}: {piece.name} is transposed in the file, and read so")
                turned.add(piece.name)
        return turned

    def _head_repeats_embeddings(self) -> bool:
        embeddings = EMBEDDINGS[self.format]
        if embeddings not in self.reader:
            return False
        same_type = self.reader.info(HEAD).dtype == self.reader.info(embeddings).dtype
        head, table = (self.reader.read(name, as_fp32=not same_type) for name in (HEAD, embeddings))
        # A tied head of a -Paddle file has the layout of the embeddings; an untied one is transposed. Accept both.
        return np.array_equal(head, table) or (self.format == "paddle" and np.array_equal(head.T, table))

    def _complain(
        self, missing: list[str], unexpected: list[str], misshapen: list[str], not_floating: list[str]
    ) -> None:
        lines = mismatch_lines(
            {
                "missing": missing,
                "unexpected": unexpected,
                "of another shape": misshapen,
                "of a type that is not floating": not_floating,
            }
        )
        if not lines:
            return
        advice = _advice(missing, unexpected)
        if not_floating and not unexpected:
            advice = "Weights are F32, F16, BF16 or F64: copy the model again, or save these tensors in such a type."
        raise CheckpointError("\n".join([f"{self.path}: the tensors do not fit the model.", *lines, advice]))


def _advice(missing: list[str], unexpected: list[str]) -> str:
    """What to do about tensors that do not fit the model."""
    if missing and all(is_mtp(name) for name in missing):
        return "These weights have no multi-token prediction: set num_nextn_predict_layers to 0."
    if missing == [HEAD]:
        return "If the head of this model is tied to its embeddings, config.json needs tie_word_embeddings true."
    if unexpected == [HEAD]:
        return "The head of these weights is not tied to the embeddings: set tie_word_embeddings to false."
    if missing and not unexpected and all(is_correction_bias(name) for name in missing):
        return (
            "These weights lack the correction biases of the routers, which every mixture of experts has: copy them "
            "again from their source, or save the model with its buffers."
        )
    if any(name.rpartition(".")[2] in _QUANTISED_PARTS for name in unexpected):
        return (
            "Some are parts of quantised weights, which quantization_config in config.json has to describe: copy "
            "config.json again from where the model was quantised."
        )
    if any(is_fused_experts(name) for name in unexpected):
        return (
            "The experts of a layer are fused into one tensor, as transformers has them in memory: save the model "
            "again with one tensor for each expert (save_pretrained with save_original_format=True, the default)."
        )
    return "The weights and the configuration are of different models: compare config.json with its source."


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of a model directory as its weights really are (see `ModelReader`). No weight is read."""
    return ModelReader(path).config


def plan_for(logicals: list[Logical], format: Format, dtype: str) -> Plan:
    """The contents of a file of `format` whose tensors have header dtype `dtype`, or float32 if they must stay so."""
    return [
        (piece.name, "F32" if logical.keep_fp32 else dtype, piece.shape)
        for logical in logicals
        for piece in logical.pieces(format)
    ]
