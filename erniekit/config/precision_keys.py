"""Which kinds of arithmetic do not go together in training."""

from collections.abc import Iterator
from itertools import chain

from erniekit.config import rl_keys
from erniekit.config.schema import Config

LOW_BIT = ("wint8", "wint4", "wint4/8", "nf4")


def problems(cfg: Config) -> Iterator[str]:
    """The problems of the keys that say in what a training computes."""
    return chain(_low_bit(cfg), _emulation(cfg), _products(cfg), _fp8(cfg))


def _low_bit(cfg: Config) -> Iterator[str]:
    if cfg.compute_type in LOW_BIT and cfg.fine_tuning != "LoRA":
        yield (
            f"compute_type: {cfg.compute_type}: the base is held in 8 or 4 bits and frozen, but fine_tuning: "
            f"{cfg.fine_tuning} trains it: set fine_tuning: LoRA, or compute_type: bf16"
        )


def _emulation(cfg: Config) -> Iterator[str]:
    if cfg.emulate_precision and cfg.compute_type not in ("bf16", "fp16"):
        yield (
            f"emulate_precision: it is for compute_type: bf16 or fp16, which a CPU lacks, not for {cfg.compute_type}. "
            "Remove it, or set compute_type: bf16"
        )
    elif cfg.emulate_precision and cfg.fp8 == "none" and rl_keys.generates(cfg):  # with fp8 a GPU emulates, too
        yield rl_keys.no_generation(cfg)


def _products(cfg: Config) -> Iterator[str]:
    if cfg.matmul_precision == "fp32":
        return
    problem = f"matmul_precision: {cfg.matmul_precision}: "
    if cfg.emulate_precision:
        yield f"{problem}with emulate_precision: True products have 16-bit factors already. Remove one of the two keys"
    if cfg.compute_type in LOW_BIT:
        yield (
            f"{problem}a CPU multiplies by the base of compute_type: {cfg.compute_type} in fp32. Remove it, or set "
            "compute_type: bf16"
        )
    if rl_keys.generates(cfg):
        yield (
            f"{problem}a CPU generates in fp32, so stage: {cfg.method.name} would train another model than the one "
            "that answers. Remove it"
        )


def _fp8(cfg: Config) -> Iterator[str]:
    if cfg.fp8 != "none" and cfg.compute_type not in ("bf16", "fp16"):
        yield (
            f"fp8: {cfg.fp8}: it multiplies 16-bit weights in FP8, but compute_type is {cfg.compute_type}. Set "
            "compute_type: bf16, or fp8: none"
        )
    if cfg.fp8 != "none" and not cfg.fp8_modules:
        yield "fp8_modules: empty: name what multiplies in FP8, such as experts,shared_experts; or set fp8: none"
