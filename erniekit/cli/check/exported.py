"""Checks what `erniekit export` writes: whether the directory is free, and whether the scheme fits the model."""

from erniekit import hub
from erniekit.cli.check.report import Report
from erniekit.config import Config


def inspect(report: Report, cfg: Config) -> None:
    """Add the section `exported model`. No weight is read, and nothing is downloaded."""
    if cfg.model_name_or_path and hub.find_model(cfg.model_name_or_path) is None:
        return  # the section of the model says so
    section = report.section("exported model")
    with section.collecting():
        texts = cfg.quantization_calibration_path
        if cfg.quantization != "none" and texts and hub.find_dataset(texts, "quantization_calibration_path") is None:
            section.add("note", f"{texts} is not a local path: the scheme is checked once it is on this machine")
            return
        try:  # imports Paddle, which takes seconds
            from erniekit.export.export import check_export, output_of
        except ModuleNotFoundError as error:
            if error.name != "paddle":
                raise
            section.add("note", "what is exported is not checked: PaddlePaddle is not installed here")
            return
        check_export(cfg)
        form = "not quantised" if cfg.quantization == "none" else f"quantization: {cfg.quantization}"
        section.add("ok", f"{output_of(cfg) / 'export'}: layout {cfg.format}, {form}")
