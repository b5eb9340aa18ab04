"""Checks whether this machine can multiply as the run asks. The run may be meant for another one."""

from erniekit.cli.check.report import Report
from erniekit.config import Config


def inspect(report: Report, cfg: Config) -> None:
    """Add the section `this machine`, if a key asks for products that only some processors or GPUs have."""
    wants_fp8 = cfg.fp8 != "none" and not cfg.emulate_precision
    if cfg.matmul_precision == "fp32" and not wants_fp8:
        return
    section = report.section("this machine")
    try:  # takes seconds
        import paddle

        from erniekit.precision import fp8, fp8_kernels, policy
    except ModuleNotFoundError as error:
        if error.name != "paddle":
            raise
        section.add("note", "matmul_precision, fp8: not compared with it: PaddlePaddle is not installed here")
        return
    name = paddle.get_device()
    if cfg.matmul_precision != "fp32":
        key, reason = f"matmul_precision: {cfg.matmul_precision}", policy.products_missing(name)
        section.add("warning" if reason else "ok", f"{key}: {reason or 'its processor has such products'}")
    if wants_fp8:  # a file for GPUs is often checked where there is none
        reason = fp8_kernels.missing(fp8.recipe_of(cfg), name, cfg.compute_type)
        text = f"training on this machine would be refused: {reason}" if reason else "its GPU has such products"
        section.add("note" if reason else "ok", f"fp8: {cfg.fp8}: {text}")
