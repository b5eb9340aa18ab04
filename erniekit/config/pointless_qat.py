"""Keys of quantisation-aware training that another key, or the command, makes pointless (see config/pointless.py)."""

from erniekit.config.compat import RUN
from erniekit.config.methods import option_names
from erniekit.config.pointless_rule import USE, Rule, always
from erniekit.config.schema_qat import WITH_RANGES, QatArgs

_OPTIONS = " ".join(name for name in option_names(QatArgs) if name != "qat")

QAT_RULES = [
    Rule(_OPTIONS, lambda c, f: c.qat == "none", "qat is none", RUN),
    Rule(
        "apply_hadamard hadamard_block_size apply_online_actscale_step actscale_moving_rate",
        lambda c, f: c.qat not in WITH_RANGES,
        f"read only with qat: {' or '.join(WITH_RANGES)}",
        RUN,
    ),
    Rule("hadamard_block_size", lambda c, f: not c.apply_hadamard, "apply_hadamard is False", RUN),
    Rule(
        "apply_online_actscale_step actscale_moving_rate quant_input_grad quant_weight_grad qat_distill_weight",
        always,
        "read only by train",
        USE,
    ),
    Rule(f"qat {_OPTIONS}", always, "`{command}` keeps weights as they are", ("split",)),
    Rule(
        _OPTIONS,
        always,
        "`{command}` reads qat alone: the rest is a matter of training",
        ("export",),
    ),
    Rule(
        "quantization_group_size",
        lambda cfg, _: cfg.qat not in ("wint4", "wint4/8"),
        "read only by export, and with qat: wint4 or wint4/8",
        RUN,
    ),
]
