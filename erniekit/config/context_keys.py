"""What context parallelism does not go together with."""

from collections.abc import Iterator

from erniekit.config.methods import METHODS, join_names
from erniekit.config.schema import Config


def problems(cfg: Config) -> Iterator[str]:
    """The problems of a training whose rows several ranks share."""
    if cfg.context_parallel_degree <= 1:
        return
    key = f"context_parallel_degree: {cfg.context_parallel_degree}"
    if not cfg.method.divides_rows:
        able = join_names([name for name, facts in METHODS.items() if facts.divides_rows], "and")
        yield f"{key}: not built for stage: {cfg.method.name}; it is for {able}. Leave the key out"
    if cfg.moe_capacity_factor is not None:
        yield (
            f"{key}: not with moe_capacity_factor: {cfg.moe_capacity_factor:g}: which pairs are dropped depends on the "
            "earlier tokens of a row, which other ranks have. Leave one of the two out"
        )
    if cfg.qat_distill_weight > 0:
        yield f"{key}: not built with qat_distill_weight: {cfg.qat_distill_weight:g}. Leave one of the two out"
    if cfg.cp_comm_type == "p2p" and cfg.attention_probs_dropout_prob > 0:
        yield (
            f"{key}: the ring (cp_comm_type: p2p) does not support attention_probs_dropout_prob: "
            f"{cfg.attention_probs_dropout_prob:g}. Set cp_comm_type: a2a, or attention_probs_dropout_prob: 0"
        )
    if cfg.cp_comm_type == "p2p" and cfg.emulate_precision:
        yield (
            f"{key}: the ring (cp_comm_type: p2p) computes in fp32, and emulate_precision asks for 16 bits. Set "
            "cp_comm_type: a2a, or emulate_precision: False"
        )
