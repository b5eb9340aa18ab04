"""Quality against size: the routed experts of a trained model in 2 bits and more, everything else the same.

    python tools/compare_two_bits.py examples/configs/tiny/sft/run_sft_moe.yaml --steps 400 --out demo_output/two_bits

With --steps the model is trained first; otherwise the newest checkpoint of output_dir is compared.

Each row gives the experts of all sparse layers other codes; attention, dense and shared experts have 8 bits throughout.
Every variant is written as the weights that its codes stand for and evaluated like any model (`erniekit eval`).
Calibration tokens are training data. Bits a weight include all scales.
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from erniekit import config as configuration
from erniekit.checkpoint.model_dir import copy_companions, find_checkpoint
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.checkpoint.wint2_codec import Wint2
from erniekit.config import Config
from erniekit.evaluate import evaluate
from erniekit.export.convert import rewrite
from erniekit.models.weights import Logical, Piece
from erniekit.precision.codes import WINT2, CodeSpec, decode, full_range, symmetric
from erniekit.quantize.calibration import CalibrationSource, read_calibration
from erniekit.quantize.options import Algorithm, Options
from erniekit.quantize.run import CalibratedModel, Target, calibrate, layer_number

# name -> codes of the experts, algorithm, search of scales
VARIANTS: dict[str, tuple[CodeSpec, Algorithm, bool]] = {
    "2 bits, round to nearest": (full_range(2, 64), "rtn", False),
    "2 bits, scales searched": (full_range(2, 64), "rtn", True),
    "2 bits, GPTQ": (full_range(2, 64), "gptq", True),
    "wint2 without data": (WINT2, "rtn", False),
    "wint2, calibrated": (WINT2, "gptq", False),
    "4 bits, round to nearest": (full_range(4, 64), "rtn", True),
    "4 bits, GPTQ": (full_range(4, 64), "gptq", True),
    "8 bits, round to nearest": (symmetric(8), "rtn", False),
}
OTHERS = symmetric(8)


class Restored:
    """The weights that the codes of a quantised model stand for (export.convert.Edit), and the error of the experts."""

    def __init__(self, source: ModelReader, result: CalibratedModel, spec_of: Callable[..., CodeSpec | None]) -> None:
        self.source, self.result, self.spec_of = source, result, spec_of
        self.squared = self.total = self.bits = self.count = 0.0

    def touches(self, logical: Logical) -> bool:
        return self.spec_of(logical, logical.paddle[0]) is not None

    def apply(self, logical: Logical, weight: np.ndarray) -> np.ndarray:
        spec = self.spec_of(logical, logical.paddle[0])
        assert spec is not None
        codes, scales = self.result.codes(logical, logical.paddle[0])
        restored = np.ascontiguousarray(logical.from_file([decode(codes, scales, spec).T], "paddle"))
        if logical.index is not None:
            self.squared += float(((restored - weight) ** 2).sum())
            self.total += float((weight**2).sum())
            self.bits += bits_of(spec, weight.shape[::-1])
            self.count += weight.size
        return restored


def bits_of(spec: CodeSpec, shape: tuple[int, ...]) -> float:
    """The bits of a matrix [out, in] with its scales."""
    if spec.kind == "convolutional":
        plan = Wint2(spec).plan("", (shape[0], shape[1]))
        return 8 * sum({"U8": 1, "BF16": 2, "F32": 4}[dtype] * math.prod(part) for _, dtype, part in plan)
    return spec.bits * math.prod(shape) + 16 * math.prod(spec.scale_shape((shape[0], shape[1])))


def spec_for(experts: CodeSpec) -> Callable[[Logical, Piece], CodeSpec | None]:
    def spec_of(logical: Logical, piece: Piece) -> CodeSpec | None:
        if layer_number(logical) is None or len(logical.shape) != 2 or logical.keep_fp32:
            return None
        return OTHERS if logical.index is None else experts

    return spec_of


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
    rows = [("fp32", 32.0, 0.0, scores(cfg, args.config, args.keys, model, args.generate))]
    for number, (name, (spec, algorithm, search)) in enumerate(VARIANTS.items()):
        spec_of, work = spec_for(spec), args.out / f"work{number}"
        options = Options(algorithm, clip_search=search)
        target = Target("paddle", spec_of)
        result = calibrate(source.config, source, calibration.batches, target, options, work, {"variant": name})
        restored = Restored(source, result, spec_of)
        directory = args.out / f"variant{number}"
        directory.mkdir(parents=True, exist_ok=True)
        rewrite(model, directory, "pt", "5GB", "float32", lambda _, restored=restored: restored)
        copy_companions(model, directory)
        result.finish()
        error = math.sqrt(restored.squared / restored.total)
        found = scores(cfg, args.config, args.keys, directory, args.generate)
        rows.append((name, restored.bits / restored.count, error, found))
    print("| experts | bits a weight | error of the experts | loss | perplexity | exact match |")
    print("|---|---|---|---|---|---|")
    for name, bits, error, found in rows:
        match = f"{found['exact_match']:.1%}" if "exact_match" in found else ""
        print(f"| {name} | {bits:.2f} | {error:.1%} | {found['loss']:.4f} | {found['perplexity']:.3f} | {match} |")


if __name__ == "__main__":
    main()
