"""Keys of the optimizer that another key makes pointless (see pointless.py)."""

from erniekit.config.pointless_rule import Rule

OPTIMIZER_RULES = [
    Rule(
        "muon_momentum muon_ns_steps muon_version muon_extra_scale_factor muon_qkv_update_mode muon_ffn_split",
        lambda c, f: c.optim != "muon",
        "read only with optim: muon",
    ),
]
