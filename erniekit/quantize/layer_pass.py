"""Quantises one decoder layer with calibration tokens: statistics of the inputs, folds, codes.

Attention first; the feed-forward block then gets the outputs of quantised attention, and the next layer those of both,
as they will be when the model is used. Routed experts are treated one by one, each with the tokens that its router
sends to it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from erniekit.data.packed_batch import Modality, PackedBatch
from erniekit.models.inputs import head_layout
from erniekit.moe.layer import TEXT, VISION
from erniekit.precision.codes import CodeSpec, choose_scales, encode
from erniekit.precision.convolutional_feedback import BlockFactor, encode_with_feedback, factorise_blocks
from erniekit.quantize import awq, folds
from erniekit.quantize.algorithm import AlgorithmOptions
from erniekit.quantize.folds import Block, LayerMatrices, LayerWeight, layer_matrices
from erniekit.quantize.gptq import Factor, factorise, gptq
from erniekit.quantize.inputs import NUM_SAMPLED, InputStatistics, evenly_spaced
from erniekit.quantize.one_layer import OneLayer
from erniekit.quantize.schemes import Matrix
from erniekit.quantize.smoothquant import smoothing_scale
from erniekit.utils import log
from erniekit.utils.bfloat16 import bf16_to_fp32, fp32_to_bf16

FOLDING = ("awq", "smoothquant")


class Sink(Protocol):
    """What receives the results of a layer."""

    def matrices_of(self, weight: LayerWeight) -> list[Matrix]:
        """The matrices of the file that a weight becomes; none where it is not quantised."""
        ...

    def write(self, matrix: Matrix, codes: np.ndarray, scales: np.ndarray) -> None:
        """Keep codes and scales (see precision.codes). Weights come in the order of `quantised_weights`."""
        ...


@dataclass
class MatrixReport:
    """The error of one tensor: `rms` is |W' - W| / |W|, `output_error` |X (W' - W)^T| / |X W^T| on a sample of its
    inputs (None without any), both after folds. `tokens`: its calibration tokens. `input_range`: the largest magnitude
    of its inputs, rotated if the engine rotates them; None without any. `note`: where it was treated in another way
    than most.
    """

    name: str
    rms: float
    output_error: float | None
    tokens: int
    input_range: float | None
    note: str = ""


@dataclass
class LayerReport:
    """What was done to a layer: its matrices, the tokens of each routed expert by modality (0 text, 1 vision), and
    how long it took.
    """

    number: int
    matrices: list[MatrixReport]
    expert_tokens: dict[int, list[int]]
    notes: list[str]
    seconds: float = 0.0


def quantised_weights(matrices: LayerMatrices) -> Iterator[LayerWeight]:
    """The weights of a layer in the order in which they are quantised."""
    yield matrices.qkv
    yield matrices.output
    for block in matrices.blocks:
        yield block.up_gate
        yield block.down


class LayerPass:
    """The pass over one layer. `hidden_TD` [T, D], its input, is overwritten by its output."""

    def __init__(
        self,
        layer: OneLayer,
        batches: Sequence[PackedBatch],
        hidden_TD: np.ndarray,
        options: AlgorithmOptions,
        sink: Sink,
    ) -> None:
        self._layer, self._batches, self._hidden = layer, batches, hidden_TD
        self._options, self._sink = options, sink
        self._matrices = layer_matrices(layer.config, layer.sparse)
        self._with_hessian = options.algorithm == "gptq"
        self._tokens = _tokens_by_modality(batches, layer.config.vision is not None)
        self._routed: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._of_all: dict[int, InputStatistics] = {}

    def run(self, number: int) -> LayerReport:
        """Quantise the layer; its results go to the sink."""
        report, started = LayerReport(number, [], {}, []), time.monotonic()
        self._attention(report)
        self._layer.run_attention(self._batches, self._hidden)
        if self._options.algorithm in FOLDING:
            self._fold_into_feed_forward()
        if self._layer.sparse:
            self._route(report)
        for block in self._matrices.blocks:
            self._block(block, report)
        self._of_all.clear()
        self._layer.run_feed_forward(self._batches, self._hidden)
        if not np.isfinite(self._hidden).all():
            raise ValueError(f"layer {number}: its output is not finite once it is quantised")
        self._summarise(report)
        report.seconds = round(time.monotonic() - started, 2)
        return report

    # Attention ---------------------------------------------------------------------------------------------------

    def _attention(self, report: LayerReport) -> None:
        config, layer, total = self._layer.config, self._layer, len(self._hidden)
        heads = head_layout(config)
        entering = self._statistics(config.hidden_size, total)
        leaving = self._statistics(heads.num_heads * heads.dim, total)
        matrices = self._matrices
        for normed, context in layer.attention_inputs(self._batches, self._hidden):
            entering.add(self._as_multiplied(matrices.qkv, normed))
            leaving.add(self._as_multiplied(matrices.output, context))
        scale: np.ndarray | None = None
        if self._options.algorithm == "awq":
            scale = awq.search(lambda: self._weighed(matrices.qkv, entering), entering.mean_abs).scale
            sharing = awq.Sharing(
                lambda values: folds.mean_over_queries(values, heads), lambda s: folds.shared_by_queries(s, heads)
            )
            values = awq.search(lambda: self._weighed(matrices.output, leaving), leaving.mean_abs, sharing).scale
            folds.fold_values(layer, matrices, heads, values)
            leaving = leaving.divided_by(sharing.expand(values))
        elif self._options.algorithm == "smoothquant":
            scale = smoothing_scale(entering.max_abs, [layer.get(matrices.qkv).T], self._options.smoothing)
        if scale is not None:
            folded = folds.fold_norm(layer, folds.INPUT_NORM, [matrices.qkv], scale, to_bf16)
            entering = entering.divided_by(folded)
        self._quantise(matrices.qkv, entering, report)
        self._quantise(matrices.output, leaving, report)

    # Feed-forward ------------------------------------------------------------------------------------------------

    def _fold_into_feed_forward(self) -> None:
        """Scale the inputs of gate|up. SmoothQuant leaves sparse layers as they are: one scale for all experts makes
        them worse.
        """
        layer, matrices, smooth = self._layer, self._matrices, self._options.algorithm == "smoothquant"
        if smooth and layer.sparse:
            return
        entering = self._rows_statistics(np.arange(len(self._hidden)), matrices.blocks[0])
        if smooth:
            weights = (layer.get(block.up_gate).T for block in matrices.blocks)
            scale = smoothing_scale(entering.max_abs, weights, self._options.smoothing)
        else:
            if layer.sparse:
                self._route(None)
            scale = awq.search(self._weighed_feed_forward, entering.mean_abs).scale
        folds.fold_norm(layer, folds.FEED_FORWARD_NORM, matrices.norm_targets, scale, to_bf16)

    def _weighed_feed_forward(self) -> Iterator[awq.Weighed]:
        """gate|up of every block, each with a sample of its own tokens."""
        for block in self._matrices.blocks:
            tokens = self._tokens_of(block)
            chosen = tokens[evenly_spaced(len(tokens), NUM_SAMPLED)]
            rows = list(self._layer.normed_rows(self._hidden, chosen))
            inputs = np.concatenate(rows) if rows else np.empty((0, self._hidden.shape[1]), np.float32)
            weight = np.ascontiguousarray(self._layer.get(block.up_gate).T)
            spec, share = self._spec(block.up_gate), len(tokens) / max(len(inputs), 1)
            yield awq.Weighed(weight, inputs, share, spec, spec is not None and self._options.searches(spec))

    def _route(self, report: LayerReport | None) -> None:
        """Find the experts of every token."""
        for modality, tokens in self._tokens.items():
            chosen = self._layer.choices(self._hidden, tokens, modality)
            self._routed[modality] = tokens, chosen
            if report is not None:
                counts = np.bincount(chosen.reshape(-1), minlength=self._layer.config.moe_num_experts)
                report.expert_tokens[modality] = counts.tolist()

    def _tokens_of(self, block: Block) -> np.ndarray:
        """The numbers of the tokens that pass through a block."""
        if block.modality is None:
            return np.arange(len(self._hidden))
        tokens, chosen = self._routed[block.modality]
        return tokens[(chosen == block.up_gate.index).any(axis=1)]

    def _block(self, block: Block, report: LayerReport) -> None:
        """gate|up, then down with the outputs of quantised gate|up; AWQ's fold between them changes both."""
        own, everyone = self._tokens_of(block), self._tokens_of_modality(block)
        used = everyone if block.modality is not None and self._options.all_experts else own
        inner: tuple[InputStatistics, str] | None = None
        if self._options.algorithm == "awq":
            inner = self._inner(block, used, everyone)
            if inner[0].count:
                scale = awq.search(partial(self._weighed, block.down, inner[0]), inner[0].mean_abs).scale
                folds.fold_up(self._layer, block, scale)
                inner = inner[0].divided_by(scale), inner[1]
        entering, note = self._rows_statistics(used, block), ""
        if block.modality is not None:
            entering, note = _enough(entering, everyone, partial(self._statistics_of_all, block))
        self._quantise(block.up_gate, entering, report, note, len(own))
        del entering
        statistics, note = inner or self._inner(block, used, everyone)
        self._quantise(block.down, statistics, report, note, len(own))

    def _inner(self, block: Block, used: np.ndarray, everyone: np.ndarray) -> tuple[InputStatistics, str]:
        """Statistics of what down multiplies, and how they were made."""
        statistics = self._inner_statistics(block, used)
        if block.modality is None:
            return statistics, ""
        some = everyone[evenly_spaced(len(everyone), len(statistics.max_abs))]
        return _enough(statistics, everyone, partial(self._inner_statistics, block, some))

    def _tokens_of_modality(self, block: Block) -> np.ndarray:
        """The numbers of the tokens among which the router of a block chooses."""
        return np.arange(len(self._hidden)) if block.modality is None else self._tokens[block.modality]

    def _statistics_of_all(self, block: Block) -> InputStatistics:
        """The statistics of the inputs of gate|up, over all tokens of the block's modality."""
        assert block.modality is not None
        if block.modality not in self._of_all:
            self._of_all[block.modality] = self._rows_statistics(self._tokens[block.modality], block)
        return self._of_all[block.modality]

    # Statistics and codes ----------------------------------------------------------------------------------------

    def _statistics(self, num_in: int, expected: int) -> InputStatistics:
        return InputStatistics(num_in, expected, self._with_hessian)

    def _rows_statistics(self, tokens: np.ndarray, block: Block) -> InputStatistics:
        statistics = self._statistics(self._hidden.shape[1], len(tokens))
        for rows in self._layer.normed_rows(self._hidden, tokens):
            statistics.add(self._as_multiplied(block.up_gate, rows))
        return statistics

    def _inner_statistics(self, block: Block, tokens: np.ndarray) -> InputStatistics:
        statistics = self._statistics(self._layer.get(block.down).shape[0], len(tokens))
        for rows in self._layer.normed_rows(self._hidden, tokens):
            statistics.add(self._as_multiplied(block.down, self._layer.inner_rows(block, rows)))
        return statistics

    def _as_multiplied(self, weight: LayerWeight, inputs: np.ndarray) -> np.ndarray:
        """Inputs as the engine multiplies them by the quantised weight."""
        matrices = self._sink.matrices_of(weight)
        return matrices[0].codec.rotated_inputs(inputs) if matrices else inputs

    def _spec(self, weight: LayerWeight) -> CodeSpec | None:
        matrices = self._sink.matrices_of(weight)
        return matrices[0].codec.spec if matrices else None

    def _weighed(self, weight: LayerWeight, statistics: InputStatistics) -> list[awq.Weighed]:
        matrix = np.ascontiguousarray(self._layer.get(weight).T)
        spec = self._spec(weight)
        searches = spec is not None and self._options.searches(spec)
        return [awq.Weighed(matrix, statistics.sample, 1.0, spec, searches)]

    def _quantise(
        self,
        weight: LayerWeight,
        statistics: InputStatistics,
        report: LayerReport,
        note: str = "",
        tokens: int | None = None,
    ) -> None:
        """Codes of one matrix, and the weights that they stand for in its place."""
        matrices = self._sink.matrices_of(weight)
        if not matrices:
            return
        whole = self._layer.get(weight)
        factor, note = self._factor(statistics, matrices[0].codec.spec, note)
        for matrix in matrices:
            original = _out_in(matrix, matrix.piece.extract(whole))
            try:
                codes, scales = self._codes(matrix.codec.rotated(original), statistics, factor, matrix.codec.spec)
            except ValueError as error:
                raise ValueError(f"{matrix.name}: {error}") from None
            self._sink.write(matrix, codes, scales)
            restored = matrix.codec.restored(codes, scales)
            count = statistics.count if tokens is None else tokens
            measured = _error_of(matrix, original, restored, statistics, count, note)
            if not np.isfinite([measured.rms, measured.output_error or 0.0]).all():
                raise ValueError(f"{matrix.name}: its weights or its outputs are too large for fp32")
            report.matrices.append(measured)
            matrix.piece.insert(_out_in(matrix, restored), whole)
        self._layer.put(weight, whole)

    def _factor(
        self, statistics: InputStatistics, spec: CodeSpec, note: str
    ) -> tuple[Factor | BlockFactor | None, str]:
        """The factor of H for GPTQ, by blocks for the 2-bit code, and the note about the matrix."""
        if statistics.hessian is None or not statistics.count:
            return None, note
        damping, act_order = self._options.damping, self._options.act_order
        factor: Factor | BlockFactor | None
        if spec.kind == "convolutional":
            factor = factorise_blocks(statistics.pop_hessian(), damping)
        else:
            factor = factorise(statistics.pop_hessian(), damping, act_order)
        return factor, note if factor is not None else "rtn: the Hessian of its inputs is not positive definite"

    def _codes(
        self, weight: np.ndarray, statistics: InputStatistics, factor: Factor | BlockFactor | None, spec: CodeSpec
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of what is quantised of a matrix [out, in]."""
        if isinstance(factor, BlockFactor):
            codes, found = encode_with_feedback(weight, factor)
            return codes, found.to_array()
        importance = None
        if statistics.count:
            importance = statistics.mean_square.astype(np.float32)
        scales = choose_scales(weight, spec, self._options.searches(spec), importance)
        return encode(weight, scales, spec) if factor is None else gptq(weight, factor, scales, spec), scales

    def _summarise(self, report: LayerReport) -> None:
        """One line about the experts of the layer that had too few tokens."""
        for modality, counts in report.expert_tokens.items():
            kind = "" if len(report.expert_tokens) == 1 else (" text", " vision")[modality]
            few = sum(4 * count < self._hidden.shape[1] for count in counts)
            if not sum(counts):
                line = f"no calibration token reaches the{kind} experts: they are rounded to nearest"
            elif few:
                line = (
                    f"{few} of {len(counts)}{kind} experts with fewer than {self._hidden.shape[1] // 4} calibration "
                    f"tokens (expert {int(np.argmin(counts))} has {min(counts)}): such statistics are blended with "
                    "those of all tokens"
                )
            else:
                continue
            report.notes.append(line)
            log.warning(f"layer {report.number}: {line}")


def _enough(
    statistics: InputStatistics, everyone: np.ndarray, of_all: Callable[[], InputStatistics]
) -> tuple[InputStatistics, str]:
    """Statistics of enough inputs, and how they were made: an expert with fewer than in / 4 tokens is given those of
    the other tokens of its modality as well.
    """
    if 4 * statistics.count >= len(statistics.max_abs):
        return statistics, ""
    if not len(everyone):
        return statistics, "rtn: no calibration token"
    return statistics.blended_with(of_all()), "blended: few calibration tokens"


def _out_in(matrix: Matrix, array: np.ndarray) -> np.ndarray:
    """A tensor as it is in the file's layout -> [out, in], and back."""
    return array if matrix.piece.transposed else np.ascontiguousarray(array.T)


def _error_of(
    matrix: Matrix, original: np.ndarray, restored: np.ndarray, statistics: InputStatistics, tokens: int, note: str
) -> MatrixReport:
    codec, sample = matrix.codec, statistics.sample
    difference = codec.rotated(restored - original)
    measured = statistics.count > 0
    output_error = _ratio(sample @ difference.T, sample @ codec.rotated(original).T) if measured else None
    range_ = float(statistics.max_abs.max()) if measured else None
    return MatrixReport(matrix.name, _ratio(restored - original, original), output_error, tokens, range_, note)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """What a file keeps of weights without codes, fp32."""
    return bf16_to_fp32(fp32_to_bf16(values))


def _ratio(part: np.ndarray, whole: np.ndarray) -> float:
    with np.errstate(over="ignore"):  # the caller looks for infinity
        size, difference = float(np.linalg.norm(whole)), float(np.linalg.norm(part))
    return difference / size if size else 0.0


def _tokens_by_modality(batches: Sequence[PackedBatch], sees_pictures: bool) -> dict[int, np.ndarray]:
    """The numbers of the tokens of each modality that has experts, among those of all batches."""
    modality = np.concatenate([batch.modality for batch in batches])
    if not sees_pictures:
        return {TEXT: np.arange(len(modality))}
    return {TEXT: np.flatnonzero(modality == Modality.TEXT), VISION: np.flatnonzero(modality != Modality.TEXT)}
