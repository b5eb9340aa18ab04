"""Keys of FP8 training that another key, or the command, makes pointless (see config/pointless.py)."""

from erniekit.config.compat import RUN
from erniekit.config.methods import option_names
from erniekit.config.pointless_rule import USE, Rule
from erniekit.config.schema_fp8 import Fp8Args

_OPTIONS = " ".join(name for name in option_names(Fp8Args) if name != "fp8")

FP8_RULES = [
    Rule(f"fp8 {_OPTIONS}", lambda c, f: c.fp8 != "none", "only training multiplies in FP8", USE),
    Rule(_OPTIONS, lambda c, f: c.fp8 == "none", "fp8 is none", RUN),
    Rule(
        "fp8_recompute_up_gate_layers fp8_routing_weight",
        lambda c, f: "experts" not in c.fp8_modules or f.num_experts == 0,
        "no routed experts multiply in FP8",
    ),
    Rule(
        "fp8_statistics_steps",
        lambda c, f: 0 < c.max_steps < c.fp8_statistics_steps,
        "max_steps: {max_steps} ends before",
    ),
]
