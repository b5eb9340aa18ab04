"""The first run on a GPU: checks what could not be checked without one (docs/gpu.md), on one card, in ten minutes.

    python tools/gpu_acceptance.py                      # writes the table that it prints to gpu_acceptance.txt
    python tools/gpu_acceptance.py --device cpu         # tiny sizes: shows that the script runs, and nothing of a GPU

It compares each fused operator with the plain operations, forward and backward; trains a few steps of a dense model of
0.3 B parameters and of a small mixture of experts, and reports losses, speed, MFU and memory beside the plan's, the
places where the host waits for the device, and where the time goes. Paste the table into a report.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from erniekit.utils import runtime  # noqa: E402

runtime.prepare()  # before Paddle is imported

import numpy as np  # noqa: E402
import paddle  # noqa: E402

from erniekit import config  # noqa: E402
from erniekit.losses.lm import Head, linear_cross_entropy  # noqa: E402
from erniekit.moe.layer import MoELayer, MoESizes, TokenInfo  # noqa: E402
from erniekit.moe.router import RouterOptions  # noqa: E402
from erniekit.nn import fused  # noqa: E402
from erniekit.nn.attention import HeadLayout, PackedAttention  # noqa: E402
from erniekit.nn.attention_mask import make_plan  # noqa: E402
from erniekit.nn.grouped import grouped_matmul  # noqa: E402
from erniekit.nn.mlp import swiglu  # noqa: E402
from erniekit.nn.norm import rms_norm  # noqa: E402
from erniekit.nn.rotary import Rotary  # noqa: E402
from erniekit.plan.shapes import published_values  # noqa: E402
from erniekit.precision.quantized_weight import QuantizedWeight  # noqa: E402
from erniekit.precision.weight_only import INT4, INT8, Scheme  # noqa: E402

Arrays = dict[str, np.ndarray]
# Of the relative error of bfloat16 results: two roundings of 2^-9 and sums in another order.
TOLERANCE = 0.02
_SAVED = "models/weights.py:to_numpy"  # the final model, once a run
TOKENIZER = ROOT / "examples" / "models" / "tiny-dense"
DENSE = published_values("0.3B") | {
    "architectures": ["Ernie4_5ForCausalLM"],
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
MOE = DENSE | {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "num_hidden_layers": 6,
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_intermediate_size": 512,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 5,
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="cpu: tiny sizes, not a GPU's result")
    parser.add_argument("--out", type=Path, default=Path("gpu_acceptance.txt"), help="where the table goes, too")
    parser.add_argument("--steps", type=int, default=12, help="training steps of each model")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "gpu"
    if on_gpu and not (paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count()):
        built = "sees no GPU" if paddle.is_compiled_with_cuda() else "is built for CPUs (install paddlepaddle-gpu)"
        raise SystemExit(f"no GPU: this Paddle {paddle.__version__} {built}. --device cpu shows that the script runs.")
    if not on_gpu:
        paddle.set_device("cpu")
    runtime.ensure_threads()
    lines = [*about(on_gpu), "", *operators_table(on_gpu)]
    for name, model in (("dense, 0.3 B", DENSE), ("mixture of experts", MOE)):
        lines += ["", f"## {name}", *training(name, model if on_gpu else tiny(model), on_gpu, arguments.steps)]
    if not on_gpu:
        lines = [f"[CPU, not a GPU's result] {line}".rstrip() for line in lines]
    text = "\n".join(lines)
    print(text)
    arguments.out.write_text(text + "\n", encoding="utf-8")


def about(on_gpu: bool) -> list[str]:
    """What was run, on what."""
    names = ("FLAGS_embedding_deterministic", "FLAGS_cudnn_deterministic", "FLAGS_flash_attn_version")
    flags = {name: value for name in names if (value := _flag(name)) is not None}
    lines = ["# erniekit on one GPU" if on_gpu else "# erniekit without a GPU", f"device: {runtime.device_name()}"]
    if on_gpu:
        major, minor = paddle.device.cuda.get_device_capability()
        lines.append(
            f"compute capability {major}.{minor}, CUDA {paddle.version.cuda()}, cuDNN {paddle.version.cudnn()}"
        )
    return [*lines, f"Paddle {paddle.__version__}; {flags}"]


def _flag(name: str) -> Any:
    try:
        return paddle.get_flags([name])[name]
    except ValueError:  # this build has no such flag
        return None


# Fused operators against plain operations

LEGEND = f"""Each row is a function of the package, computed with fused operators and with plain operations.
  error: the largest |fused - plain| / |plain| (Euclidean norms) of its result and of the gradient of each input;
         `in` names the tensor: result, or the input whose gradient it is
  ok:    error <= {TOLERANCE}; WRONG: more, or a value that is not finite; FAILED: the operator refused or stopped
  ms:    one forward and backward pass, the second of two, with fused operators and with plain operations"""


def operators_table(on_gpu: bool) -> list[str]:
    """Each function of the package that has a fused way, both ways."""
    lines = [
        "## fused operators against plain operations",
        *LEGEND.splitlines(),
        f"{'what':<28} {'error':>9} {'in':<8} {'':6} fused, plain ms",
    ]
    for name, run in cases(on_gpu).items():
        try:
            error, worst, times = compare(run, on_gpu)
        except Exception as problem:  # a kernel that refuses is a result, and the others go on
            lines.append(f"{name:<28} {'':>9} {'':<8} FAILED {type(problem).__name__}: {str(problem).strip()[-300:]}")
            continue
        verdict = "ok" if error <= TOLERANCE else "WRONG"
        lines.append(f"{name:<28} {error:>9.2e} {worst:<8} {verdict:<6} {times[0]:.2f}, {times[1]:.2f}")
    return lines


def compare(run: Callable[[], Arrays], on_gpu: bool) -> tuple[float, str, tuple[float, float]]:
    """The largest relative error of any result or gradient, which tensor's it is, and milliseconds of both ways, the
    second time each.
    """
    results, times = [], []
    for enabled in (True, False):
        fused.enable(enabled)
        try:
            run()
            _synchronize(on_gpu)
            began = time.perf_counter()
            results.append(run())
            _synchronize(on_gpu)
            times.append((time.perf_counter() - began) * 1e3)
        finally:
            fused.enable(True)
    errors = {name: relative_error(results[0][name], plain) for name, plain in results[1].items()}
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst, (times[0], times[1])


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|; infinite where a value of either is not finite, since NaN is larger than no
    tolerance, and where only zeros were expected and others found.
    """
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    distance, norm = np.linalg.norm(found - expected), np.linalg.norm(expected)
    return 0.0 if distance == 0 else float(distance / norm) if norm else float("inf")


def _synchronize(on_gpu: bool) -> None:
    if on_gpu:
        paddle.device.synchronize()


def cases(on_gpu: bool) -> dict[str, Callable[[], Arrays]]:
    """By name, functions that compute results and gradients of random inputs."""
    tokens, size, width = (4096, 2560, 1536) if on_gpu else (48, 64, 32)
    dtype = "bfloat16" if on_gpu else "float32"
    experts, top_k = (64, 6) if on_gpu else (8, 2)
    lengths = np.full(4, tokens // 4)
    counts = [0, *([tokens // (experts - 1)] * (experts - 2))]
    counts.append(tokens - sum(counts))

    def random(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
        return scale * np.random.default_rng([seed, *shape]).normal(size=shape)

    def attention(qkv: paddle.Tensor) -> paddle.Tensor:
        plan = make_plan(np.repeat(np.arange(4), lengths)[None])
        rotation = Rotary(128, 500000.0).at(plan.position_in_document, 10, 2)
        return PackedAttention(plan, rotation, HeadLayout(8, 2, 128)).attend(qkv, 0)

    def rotate(x: paddle.Tensor) -> paddle.Tensor:
        return Rotary(128, 500000.0).at(np.arange(100_000, 100_000 + tokens), 10, 2).apply(x)

    def head(x: paddle.Tensor, w: paddle.Tensor) -> paddle.Tensor:
        labels = paddle.to_tensor(np.random.default_rng(1).integers(0, w.shape[0], tokens))
        return linear_cross_entropy(x, Head(w, True), labels, paddle.full([tokens], 1.0 / tokens), tokens // 4)[0]

    def sparse(x: paddle.Tensor) -> paddle.Tensor:
        paddle.seed(1)
        with _default_dtype(dtype):
            layer = MoELayer(MoESizes(size, (width,), experts, 2, False, 0.02), RouterOptions(top_k))
        return layer(x, TokenInfo([tokens]))[0]

    def by_codes(scheme: Scheme) -> Callable[[paddle.Tensor], paddle.Tensor]:
        def multiply(x: paddle.Tensor) -> paddle.Tensor:
            held = QuantizedWeight((size, 2 * width), scheme)
            held.fill(0, random(size, 2 * width, scale=0.02).astype(np.float32))
            return held(x)

        return multiply

    inputs: dict[str, tuple[Callable[..., paddle.Tensor], Arrays]] = {
        "RMSNorm": (lambda x, w: rms_norm(x, w, 1e-5), {"x": random(tokens, size), "w": 1 + random(size, scale=0.1)}),
        "rotation, far positions": (rotate, {"x": random(tokens, 12, 128)}),
        "SwiGLU": (swiglu, {"gate_up": random(tokens, 2 * width)}),
        "attention, four documents": (attention, {"qkv": random(tokens, 12 * 128, scale=0.5)}),
        "products of experts": (
            lambda x, w: grouped_matmul(x, w, counts),
            {"x": random(tokens, size), "w": random(experts, size, width, scale=0.02)},
        ),
        "sparse layer": (sparse, {"x": random(tokens, size)}),
        "weights in 8 bits": (by_codes(INT8), {"x": random(tokens, size)}),
        "weights in 4 bits": (by_codes(INT4), {"x": random(tokens, size)}),
        "weights in 4 bits, one token": (by_codes(INT4), {"x": random(1, size)}),
        "head and loss": (head, {"x": random(tokens, size), "w": random(32 * width, size, scale=0.02)}),
    }
    return {
        name: lambda make=make, arrays=arrays: results_of(make, arrays, dtype)
        for name, (make, arrays) in inputs.items()
    }


@contextmanager
def _default_dtype(dtype: str) -> Iterator[None]:
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        yield
    finally:
        paddle.set_default_dtype(before)


def results_of(make: Callable[..., paddle.Tensor], arrays: Arrays, dtype: str) -> Arrays:
    """The result of make(**tensors) and the gradients of all tensors."""
    tensors = {name: paddle.to_tensor(array.astype(np.float32)).astype(dtype) for name, array in arrays.items()}
    for tensor in tensors.values():
        tensor.stop_gradient = False
    y = make(**tensors)
    towards = np.random.default_rng(7).normal(size=y.shape).astype(np.float32)
    (y.astype("float32") * paddle.to_tensor(towards)).sum().backward()
    found = {name: tensor.grad for name, tensor in tensors.items()} | {"result": y}
    return {name: tensor.astype("float32").numpy() for name, tensor in found.items()}


# Training


def tiny(model: dict[str, Any]) -> dict[str, Any]:
    """The same kind of model in a size that a CPU trains at once."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    experts = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_end_index": 1}
    return model | small | {"vocab_size": 1024} | (experts if "moe_k" in model else {})


def training(name: str, model: dict[str, Any], on_gpu: bool, steps: int) -> list[str]:
    """Train with fused operators, with a profile, and without; the losses, the profile, and the host's reads."""
    from support.host_reads import counted

    from erniekit.training.run import train

    lines: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        (directory / "config.json").write_text(json.dumps(model))
        data = directory / "train.jsonl"
        data.write_text("".join(json.dumps(_sample(number)) + "\n" for number in range(4000 if on_gpu else 60)))
        losses = {}
        for enabled in (True, False):
            keys = _keys(directory, data, on_gpu, steps) | {"fused_operators": enabled, "profile": enabled}
            cfg = config.load(None, keys | {"output_dir": str(directory / f"out-{enabled}")}, "train")
            try:
                with counted() as transfers:
                    history = train(cfg).history
            except Exception as problem:  # the other run, and the other model, still tell something
                lines.append(f"fused_operators: {enabled}: FAILED {type(problem).__name__}: {str(problem)[-600:]}")
                continue
            losses[enabled] = [step["loss"] for step in history]
            if enabled:
                lines += (directory / "out-True" / "profile.txt").read_text().splitlines()
                reads = {place: count / steps for place, count in transfers.reads.most_common(9) if place != _SAVED}
                lines.append("the host waits for a value of the device, times a step by place: " + _shown(reads))
        if len(losses) == 2:
            distances = np.abs(np.subtract(losses[True], losses[False]))  # NaN stays NaN
            first, last, far = losses[True][0], losses[True][-1], float(distances.max())
            wrong = "" if np.isfinite(far) else "WRONG: "
            lines.append(
                f"{wrong}loss {first:.4f} -> {last:.4f} in {steps} steps; the largest distance of a step's loss from "
                f"that with plain operations is {far:.4f}"
            )
    fused.enable(True)
    return lines


def _shown(counts: dict[str, float]) -> str:
    return ", ".join(f"{place} {count:g}" for place, count in counts.items()) or "never"


def _sample(number: int) -> dict[str, Any]:
    a, b = number % 97, number % 89
    return {"src": [f"{a}加{b}等于几？" * 8], "tgt": [f"{a}加{b}等于{a + b}。" * 8]}


def _keys(directory: Path, data: Path, on_gpu: bool, steps: int) -> dict[str, Any]:
    return {
        "model_name_or_path": str(directory),
        "tokenizer_name_or_path": str(TOKENIZER),
        "continue_training": False,
        "stage": "SFT",
        "fine_tuning": "Full",
        "train_dataset_path": str(data),
        "train_dataset_type": "erniekit",
        "max_seq_len": 8192 if on_gpu else 256,
        "packing": True,
        "gradient_accumulation_steps": 2,
        "max_steps": steps,
        "learning_rate": 1e-4,
        "compute_type": "bf16",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": steps,
        "profile_step_start": min(4, steps),
        "profile_step_end": steps,
    }


if __name__ == "__main__":
    main()
