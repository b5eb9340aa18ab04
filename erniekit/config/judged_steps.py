"""Whether a step of KTO has the answers that its loss compares with."""

from erniekit.config.schema import Config


def lone_answer_line(cfg: Config, data_ranks: int) -> str | None:
    """A line about a run whose steps have one judged answer each; None for any other run."""
    if not cfg.method.reads("kto_loss_type") or cfg.kto_loss_type != "kto" or cfg.packing:
        return None
    if cfg.batch_size * cfg.gradient_accumulation_steps * data_ranks > 1:
        return None
    return (
        "kto_loss_type: kto: a step has one answer, and how far the policy is from its reference is estimated by "
        "answers to other prompts of the same step: it counts as 0. Raise batch_size or gradient_accumulation_steps, "
        "or set kto_loss_type: apo_zero_unpaired, which needs no estimate"
    )
