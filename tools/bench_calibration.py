"""Times the algorithms of quantisation with calibration on one matrix, in seconds of one core a million weights.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python tools/bench_calibration.py [--out 3072] [--in 2560] [--tokens 1024]

The default is gate|up of an expert of ERNIE-4.5-21B-A3B. GPTQ's H and its factor are timed by themselves: they serve
all matrices with the same inputs.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from erniekit.precision.codes import choose_scales, decode, encode, full_range
from erniekit.quantize.awq import Weighed, search
from erniekit.quantize.gptq import factorise, gptq
from erniekit.quantize.inputs import InputStatistics
from erniekit.quantize.smoothquant import smoothing_scale


def timed(name: str, size: int, run: Callable[[], object]) -> object:
    """Run once, print seconds and seconds a million weights, and return the result."""
    begin = time.process_time()  # of this process, whatever else the machine does
    result = run()
    seconds = time.process_time() - begin
    print(f"{name:40} {seconds:8.2f} s {1e6 * seconds / size:8.3f} s per M weights")
    return result


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=int, default=3072)
    parser.add_argument("--in", type=int, default=2560, dest="num_in")
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    num_out, num_in, size = arguments.out, arguments.num_in, arguments.out * arguments.num_in
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(num_out, num_in)).astype(np.float32)
    inputs = rng.normal(size=(arguments.tokens, num_in)).astype(np.float32) * rng.lognormal(0, 1, num_in)
    inputs = inputs.astype(np.float32)
    spec = full_range(4, 128 if num_in % 128 == 0 else None)
    print(f"[{num_out}, {num_in}], {arguments.tokens} tokens, 4 bits, group {spec.group}")

    def statistics() -> InputStatistics:
        result = InputStatistics(num_in, len(inputs), with_hessian=True)
        result.add(inputs)
        return result

    def plain() -> np.ndarray:
        scales = choose_scales(weight, spec)
        return decode(encode(weight, scales, spec), scales, spec)

    found = statistics()
    assert found.hessian is not None
    hessian = found.hessian
    timed("statistics with H", size, statistics)
    rounded = timed("rtn", size, plain)
    scales = timed("scales with clip search", size, lambda: choose_scales(weight, spec, True, found.mean_square))
    factor = timed("gptq: factor of H", size, lambda: factorise(hessian))
    codes = timed("gptq: codes", size, lambda: gptq(weight, factor, scales, spec))  # type: ignore[arg-type]
    sampled = [Weighed(weight, found.sample, 1.0, spec, True)]
    timed("awq: search, 10 ratios", size, lambda: search(lambda: sampled, found.mean_abs))
    timed("smoothquant: scale", size, lambda: smoothing_scale(found.max_abs, [weight]))
    compensated = decode(codes, scales, spec)  # type: ignore[arg-type]
    plain_error, error = (np.linalg.norm(inputs @ (each - weight).T) for each in (rounded, compensated))
    print(f"error of the outputs: gptq {error / plain_error:.3f} of rtn's")


if __name__ == "__main__":
    main()
