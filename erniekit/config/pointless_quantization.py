"""Keys of a quantised export that another key makes pointless (see pointless.py)."""

from erniekit.config.pointless_rule import Rule, always

_EXPORT = "quantization_eval quantization_first_layers quantization_algorithm quantization_calibration_path"
_CALIBRATION = (
    "quantization_calibration_type quantization_calibration_samples quantization_calibration_length "
    "quantization_calibrate_all_experts quantization_damping quantization_act_order quantization_smoothing"
)

# Keys about the scales of exported 4-bit codes.
_QUANTISED = "quantization_group_size quantization_clip_search"

QUANTIZATION_RULES = [
    Rule("quantization_clip_search", always, "read only by export", ("train", "eval", "chat", "server", "split")),
    Rule("quantization_group_size", always, "read only by export", ("split",)),
    Rule(_QUANTISED, lambda cfg, _: cfg.quantization == "none", "quantization: none exports 16 bits", ("export",)),
    Rule(
        _QUANTISED,
        lambda cfg, _: cfg.quantization not in ("wint4", "wint4/8", "w4a8", "wint2"),
        "quantization: {quantization} has no 4-bit codes",
        ("export",),
    ),
    Rule(
        "quantization_clip_search",
        lambda cfg, _: cfg.quantization == "wint2" and cfg.quantization_first_layers == 0,
        "quantization: wint2 with quantization_first_layers: 0 has no 4-bit codes; the scales of 2-bit codes are "
        "always chosen by their error",
        ("export",),
    ),
    Rule(
        f"{_EXPORT} {_CALIBRATION}",
        always,
        "read only by export",
        ("train", "eval", "chat", "server", "split"),
    ),
    Rule(
        f"{_EXPORT} {_CALIBRATION}",
        lambda c, f: c.quantization == "none",
        "quantization is none",
        ("export",),
    ),
    Rule(
        _CALIBRATION,
        lambda c, f: c.quantization_calibration_path is None,
        "quantization_calibration_path is not given",
        ("export",),
    ),
    Rule(
        "quantization_damping quantization_act_order",
        lambda c, f: c.quantization_algorithm != "gptq",
        "read only with quantization_algorithm: gptq",
        ("export",),
    ),
    Rule(
        "quantization_smoothing",
        lambda c, f: c.quantization_algorithm != "smoothquant",
        "read only with quantization_algorithm: smoothquant",
        ("export",),
    ),
]
