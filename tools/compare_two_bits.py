"""Quality against size: the routed experts of a trained model in 2 bits and more, everything else the same.

    python tools/compare_two_bits.py examples/configs/tiny/sft/run_sft_moe.yaml --steps 400 --out demo_output/two_bits

With --steps the model is trained first; otherwise the newest checkpoint of output_dir is compared.

Each row gives the routed experts of all layers other codes; attention, dense blocks and shared experts have 8 bits
throughout, or, with --everything, the same codes as the experts. Every variant is written as the weights that its codes
stand for and evaluated like any model (`erniekit eval`). Calibration tokens are training data. Of what has the row's
codes the table states: bits a weight with all scales, |W' - W| / |W|, and the mean of |X (W' - W)^T| / |X W^T| over the
matrices, X a sample of the calibration inputs of each.
"""

import argparse
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

from erniekit import config as configuration
from erniekit.checkpoint.model_dir import copy_companions, find_checkpoint
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.checkpoint.quantised_codecs import Codec, Unpacked
from erniekit.checkpoint.wint2_codec import CODEC as WINT2
from erniekit.config import Config
from erniekit.evaluate import evaluate
from erniekit.export.convert import rewrite
from erniekit.models.weights import Logical
from erniekit.precision.codes import full_range, symmetric
from erniekit.quantize.algorithm import Algorithm, AlgorithmOptions
from erniekit.quantize.calibration import CalibrationSource, read_calibration
from erniekit.quantize.run import CalibratedModel, calibrate
from erniekit.quantize.schemes import Scheme

# name -> codes of the experts, algorithm, search of scales. Unpacked, since no file of codes is written.
PLAIN_2, PLAIN_4 = Unpacked(full_range(2, 64)), Unpacked(full_range(4, 64))
VARIANTS: dict[str, tuple[Codec, Algorithm, bool]] = {
    "2 bits, round to nearest": (PLAIN_2, "rtn", False),
    "2 bits, scales searched": (PLAIN_2, "rtn", True),
    "2 bits, GPTQ": (PLAIN_2, "gptq", True),
    "wint2 without data": (WINT2, "rtn", False),
    "wint2, calibrated": (WINT2, "gptq", False),
    "4 bits, round to nearest": (PLAIN_4, "rtn", True),
    "4 bits, GPTQ": (PLAIN_4, "gptq", True),
    "8 bits, round to nearest": (Unpacked(symmetric(8)), "rtn", False),
}
OTHERS = Unpacked(symmetric(8))


class Restored:
    """The weights that the codes of a quantised model stand for (export.convert.Edit), and the error of those that have
    `codec`.
    """

    def __init__(self, scheme: Scheme, codec: Codec, result: CalibratedModel) -> None:
        self.scheme, self.codec, self.result = scheme, codec, result
        self.names: set[str] = set()
        self.squared = self.total = self.bits = self.count = 0.0

    def touches(self, logical: Logical) -> bool:
        return bool(self.scheme.matrices(logical))

    def apply(self, logical: Logical, weight: np.ndarray) -> np.ndarray:
        (matrix,) = self.scheme.matrices(logical)
        restored_out_in = matrix.codec.restored(*self.result.codes(matrix))
        restored = np.ascontiguousarray(logical.from_file([np.ascontiguousarray(restored_out_in.T)], "paddle"))
        if matrix.codec is self.codec:
            self.names.add(matrix.name)
            self.squared += float(((restored - weight) ** 2).sum())
            self.total += float((weight**2).sum())
            self.bits += bits_of(matrix.codec, matrix.shape)
            self.count += weight.size
        return restored

    def output_error(self) -> float:
        """The mean over the matrices that have inputs."""
        reports = [matrix for layer in self.result.reports for matrix in layer.matrices if matrix.name in self.names]
        return float(np.mean([report.output_error for report in reports if report.output_error is not None]))


def bits_of(codec: Codec, shape: tuple[int, int]) -> float:
    """The bits of a matrix [out, in] with its scales."""
    if codec is WINT2:
        sizes = {"U8": 8, "BF16": 16, "F32": 32}
        return sum(sizes[dtype] * math.prod(part) for _, dtype, part in codec.plan("", shape))
    return codec.spec.bits * math.prod(shape) + 16 * math.prod(codec.spec.scale_shape(shape))


def scheme_of(name: str, codec: Codec, everything: bool) -> Scheme:
    """The experts, or `everything`, with `codec`, and the others in 8 bits."""
    return Scheme(
        name, "paddle", lambda logical, _: codec if everything or logical.index is not None else OTHERS, {}, name, ""
    )


def scores(cfg: Config, config: str, keys: list[str], model: Path, generate: bool) -> dict[str, float]:
    """What `erniekit eval` reports of a model directory."""
    words = [f"output_dir={model}", f"eval_output={model}", f"predict_with_generate={generate}"]
    return evaluate(configuration.load(config, [*keys, *words], "eval"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="the YAML of the training")
    parser.add_argument("keys", nargs="*", help="such as output_dir=...")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=0, help="train so many steps first")
    parser.add_argument("--samples", type=int, default=128, help="rows of calibration tokens")
    parser.add_argument("--everything", action="store_true", help="not only the experts")
    parser.add_argument("--generate", action="store_true", help="also answer the questions: exact match")
    args = parser.parse_intermixed_args()
    cfg = configuration.load(args.config, args.keys, "eval")
    assert cfg.output_dir is not None
    if args.steps:
        words = [*args.keys, f"max_steps={args.steps}", "overwrite_output_dir=true", "evaluation_strategy=no"]
        subprocess.run([sys.executable, "-m", "erniekit", "train", args.config, *words], check=True)
    model, source_data = find_checkpoint(Path(cfg.output_dir)), cfg.train_dataset_path[0]
    source = ModelReader(model, keep_mtp=True)
    calibration = read_calibration(
        cfg, CalibrationSource(source_data, samples=args.samples, length=256), model, source.config
    )
    print(f"{calibration.num_tokens} calibration tokens")
    rows = [("fp32", 32.0, 0.0, 0.0, scores(cfg, args.config, args.keys, model, args.generate))]
    for number, (name, (codec, algorithm, search)) in enumerate(VARIANTS.items()):
        scheme, work = scheme_of(name, codec, args.everything), args.out / f"work{number}"
        options = AlgorithmOptions(algorithm, clip_search=search)
        result = calibrate(source.config, source, calibration.batches, scheme, options, work, {"variant": name})
        restored = Restored(scheme, codec, result)
        directory = args.out / f"variant{number}"
        directory.mkdir(parents=True, exist_ok=True)
        rewrite(model, directory, "pt", "5GB", "float32", lambda _, restored=restored: restored)
        copy_companions(model, directory)
        output_error = restored.output_error()
        result.finish()
        error = math.sqrt(restored.squared / restored.total)
        found = scores(cfg, args.config, args.keys, directory, args.generate)
        rows.append((name, restored.bits / restored.count, error, output_error, found))
    print("| codes | bits a weight | error of weights | of outputs | loss | perplexity | exact match |")
    print("|---|---|---|---|---|---|---|")
    for name, bits, error, output_error, found in rows:
        match = f"{found['exact_match']:.1%}" if "exact_match" in found else ""
        print(
            f"| {name} | {bits:.2f} | {error:.1%} | {output_error:.1%} | {found['loss']:.4f} "
            f"| {found['perplexity']:.3f} | {match} |"
        )


if __name__ == "__main__":
    main()
