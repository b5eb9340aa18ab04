"""Quantises a model with calibration tokens, one decoder layer in memory at a time, and gives the results by tensor.

Peak memory on the host, without that of Python, Paddle and the file's header, is the largest over the decoder layers of

  4 (P + T D + C (D + 2 W) + 4 M) + 8 k I^2

P weights of the layer (fp32), T calibration tokens, D the width of the model, C tokens of a chunk, W the widest product
and M the weights of the largest matrix of the layer, I the most inputs of one. k, only for GPTQ, counts matrices in
fp64: the damped H, its factor and LAPACK's copy are 3; a sparse layer also keeps the H of all tokens, and with codes of
2 bits that of the expert, 5. `peak_bytes` computes it.
"""

from collections.abc import Sequence
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.checkpoint.model_io import WeightSource
from erniekit.checkpoint.safetensors_header import Plan
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.data.packed_batch import PackedBatch
from erniekit.models.config import ModelConfig
from erniekit.models.weights import EMBEDDINGS, Logical, logical_tensors
from erniekit.quantize.algorithm import AlgorithmOptions
from erniekit.quantize.folds import LayerWeight, layer_matrices
from erniekit.quantize.layer_pass import FOLDING, LayerPass, LayerReport, quantised_weights
from erniekit.quantize.one_layer import CHUNK, OneLayer, embedded
from erniekit.quantize.schemes import Matrix, Scheme
from erniekit.quantize.store import LayerStore, code_entries, read_codes, stored_codes
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError
from erniekit.utils.progress import track
from erniekit.utils.wording import count_of


class CalibratedModel:
    """The results of `calibrate`, by tensor. Reads one tensor at a time from the store."""

    def __init__(self, store: LayerStore, config: ModelConfig) -> None:
        self._store = store
        self._reader: tuple[int, Reader] | None = None
        self.reports: list[LayerReport] = store.reports(config.num_hidden_layers)

    def codes(self, matrix: Matrix) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of a matrix (see precision.codes)."""
        reader = self._of_layer(matrix.logical)
        assert reader is not None, matrix.name
        codes = read_codes(reader.read(f"{matrix.name}.codes"), matrix.codec.spec, matrix.shape[1])
        return codes, reader.read(f"{matrix.name}.scales")

    def folded(self, logical: Logical) -> np.ndarray | None:
        """The weight after all folds, fp32 in our layout, of a tensor without codes; None where no fold changed it."""
        reader = self._of_layer(logical)
        if reader is None or _stored_name(logical) not in reader:
            return None
        return reader.read(_stored_name(logical))

    def finish(self) -> None:
        """Remove the store."""
        self._reader = None
        self._store.remove()

    def _of_layer(self, logical: Logical) -> Reader | None:
        number = layer_number(logical)
        if number is None:
            return None
        if self._reader is None or self._reader[0] != number:
            self._reader = number, self._store.reader(number)
        return self._reader[1]


def calibrate(
    config: ModelConfig,
    source: WeightSource,
    batches: Sequence[PackedBatch],
    scheme: Scheme,
    options: AlgorithmOptions,
    directory: Path,
    identity: dict[str, Any],
) -> CalibratedModel:
    """Quantise the decoder layers of the model whose weights `source` has, with the tokens of `batches`.

    `directory`: where results are kept until `CalibratedModel.finish`; layers that an interrupted run has finished
    there are not quantised again. `identity`: what weights and tokens are, for that comparison. The result follows from
    the arguments alone. Raises CheckpointError where a layer cannot be quantised.
    """
    store = LayerStore(directory, identity | _identity(config, source, scheme, options))
    count, begin = config.num_hidden_layers, store.num_finished
    if begin:
        log.info(f"{directory}: {begin} of {count_of(count, 'layer')} quantised already")
    tokens = sum(batch.num_tokens for batch in batches)
    log.info(
        f"quantising with {options.algorithm}: {count_of(count, 'layer')}, {tokens:,} calibration tokens, up to "
        f"{peak_bytes(config, options, tokens) / 1e9:.2f} GB of memory"
    )
    widest = max(matrix.shape[1] for matrix in scheme.every_matrix(config))
    if options.algorithm == "gptq" and tokens < widest:
        log.warning(
            f"quantization_calibration_path: {tokens:,} tokens for matrices of up to {widest:,} inputs: there are "
            "fewer equations than unknowns, so that gptq compensates errors on these texts alone. Name more data"
        )
    hidden_TD = np.empty((0, 0), np.float32)
    if begin < count:
        hidden_TD = store.hidden(begin - 1) if begin else embedded(config, source, batches)
        if not np.isfinite(hidden_TD).all():
            raise CheckpointError(
                f"{EMBEDDINGS[scheme.format]}: the embeddings of the calibration tokens are not finite. Export another "
                "checkpoint."
            )
    for number in track(range(begin, count), count, "quantising: layer", lambda number: number + 1):
        layer = OneLayer(config, number, _OfLayer(source, number))
        sink = _LayerSink(store, source, layer, number, scheme, options.algorithm in FOLDING)
        with sink.writer:
            run = LayerPass(layer, batches, hidden_TD, options, sink)
            try:
                report = run.run(number)
            except ValueError as error:
                raise CheckpointError(
                    f"layer {number} cannot be quantised: {error}. Export another checkpoint."
                ) from None
            sink.write_folded(layer)
        store.finish(report, hidden_TD)
        del layer, run
    return CalibratedModel(store, config)


class _OfLayer:
    """The weights of one layer of a source (WeightSource)."""

    def __init__(self, source: WeightSource, number: int) -> None:
        self._source = source
        self.logicals = [logical for logical in source.logicals if layer_number(logical) == number]

    def read(self, logical: Logical, as_fp32: bool = False) -> np.ndarray:
        """See WeightSource."""
        return self._source.read(logical, as_fp32)


class _LayerSink:
    """Writes the results of a layer into the store (layer_pass.Sink)."""

    def __init__(
        self, store: LayerStore, source: WeightSource, layer: OneLayer, number: int, scheme: Scheme, folds: bool
    ) -> None:
        prefix = f"model.layers.{number}."
        self._scheme = scheme
        self._logicals = {
            LayerWeight(logical.param.removeprefix(prefix), logical.index): logical
            for logical in source.logicals
            if layer_number(logical) == number
        }
        plan: Plan = []
        for weight in quantised_weights(layer_matrices(layer.config, layer.sparse)):
            for matrix in self.matrices_of(weight):
                plan += code_entries(matrix.name, matrix.codec.spec, matrix.shape)
        # Weights without codes, which folds may change.
        self._plain = [
            place
            for place, logical in self._logicals.items()
            if folds and not logical.is_state and not self.matrices_of(place)
        ]
        plan += [(_stored_name(self._logicals[place]), "F32", self._logicals[place].shape) for place in self._plain]
        self.writer: Writer = store.writer(number, plan)

    def matrices_of(self, weight: LayerWeight) -> list[Matrix]:
        """See Sink."""
        return self._scheme.matrices(self._logicals[weight])

    def write(self, matrix: Matrix, codes: np.ndarray, scales: np.ndarray) -> None:
        """See Sink."""
        self.writer.write(f"{matrix.name}.codes", stored_codes(codes, matrix.codec.spec))
        self.writer.write(f"{matrix.name}.scales", scales)

    def write_folded(self, layer: OneLayer) -> None:
        """Write the weights without codes, if the algorithm folds."""
        for place in self._plain:
            self.writer.write(_stored_name(self._logicals[place]), layer.get(place))


def layer_number(logical: Logical) -> int | None:
    """The decoder layer that a weight belongs to; None for all others."""
    words = logical.param.split(".")
    return int(words[2]) if words[:2] == ["model", "layers"] else None


def _stored_name(logical: Logical) -> str:
    return logical.param if logical.index is None else f"{logical.param}.{logical.index}"


def _identity(config: ModelConfig, source: WeightSource, scheme: Scheme, options: AlgorithmOptions) -> dict[str, Any]:
    """What the results follow from besides weights and tokens, under names that a user knows."""
    matrices = [matrix for logical in source.logicals for matrix in scheme.matrices(logical)]
    text = repr([(matrix.name, matrix.codec) for matrix in matrices])
    return {
        "quantization": scheme.name,
        "format": scheme.format,
        "codes of the tensors": blake2b(text.encode(), digest_size=8).hexdigest(),
        "config.json": config.to_dict(),
    } | {f"option {name}": value for name, value in vars(options).items()}


def peak_bytes(config: ModelConfig, options: AlgorithmOptions, num_tokens: int) -> int:
    """The peak of memory by the formula at the top of this file."""
    layers: dict[int, list[Logical]] = {}
    for logical in logical_tensors(config):
        if (number := layer_number(logical)) is not None:
            layers.setdefault(number, []).append(logical)
    peak = 0
    for logicals in layers.values():
        matrices = [each.shape for each in logicals if len(each.shape) == 2 and not each.keep_fp32]
        most_in, widest = (max(shape[axis] for shape in matrices) for axis in (0, 1))
        chunk = min(CHUNK, num_tokens) * (config.hidden_size + 2 * widest)
        elements = sum(prod(each.shape) for each in logicals) + num_tokens * config.hidden_size + chunk
        elements += 4 * max(prod(shape) for shape in matrices)
        squares = (5 if any(each.index is not None for each in logicals) else 3) if options.algorithm == "gptq" else 0
        peak = max(peak, 4 * elements + 8 * squares * most_in**2)
    return peak
