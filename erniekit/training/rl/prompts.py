"""How a run reads its prompts."""

from erniekit.data.prompts import PromptOptions, PromptSet
from erniekit.rewards import Scorer
from erniekit.training.data import DataContext


def prompt_options(context: DataContext) -> PromptOptions:
    """The options of the prompts of a run or an evaluation."""
    cfg = context.cfg
    assert context.template is not None, "prompts need a chat template"
    return PromptOptions(
        context.template,
        min(cfg.max_prompt_len, cfg.max_seq_len - cfg.max_completion_length),
        cfg.enable_thinking,
        cfg.on_bad_line,
        vision=context.vision,
    )


def check_records(scorer: Scorer | None, prompts: PromptSet) -> None:
    """Raise DataError for a record without what the rewards need; `scorer`: None on the ranks that do not score."""
    if scorer is not None:
        for index in range(len(prompts)):
            prompt = prompts[index]
            scorer.check(prompt.fields, prompt.place)


def known_pass_rates(prompts: PromptSet) -> dict[int, float]:
    """What the records say of their prompts' pass rates."""
    rates = {}
    for index in range(len(prompts)):
        rate = prompts[index].fields.get("pass_rate")
        if isinstance(rate, int | float) and 0 <= rate <= 1:
            rates[index] = float(rate)
    return rates
