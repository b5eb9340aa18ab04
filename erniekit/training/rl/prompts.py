"""How a run reads its prompts."""

from erniekit.config.schema_rollout_tools import ZOOM
from erniekit.data.prompts import PromptOptions, PromptSet
from erniekit.rewards import Scorer
from erniekit.training.data import DataContext
from erniekit.training.rl.tools import ToolLoop
from erniekit.utils import log
from erniekit.utils.errors import ConfigError
from erniekit.utils.wording import count_of


def tool_loop(context: DataContext) -> ToolLoop | None:
    """The tools that the model may call while it answers; None: there are none. Raises ConfigError."""
    if not context.cfg.tools:
        return None
    assert context.template is not None, "prompts need a chat template"
    if ZOOM in context.cfg.tools and context.mesh.world > 1:
        raise ConfigError(f"tools: {ZOOM}: the pictures that it gives are not exchanged between ranks. Use one process")
    return ToolLoop(context.cfg, context.template, context.vision)


def prompt_options(context: DataContext, tools: ToolLoop | None) -> PromptOptions:
    """The options of the prompts of a run or an evaluation."""
    cfg = context.cfg
    assert context.template is not None, "prompts need a chat template"
    return PromptOptions(
        context.template,
        min(cfg.max_prompt_len, cfg.max_seq_len - cfg.max_completion_length),
        cfg.enable_thinking,
        cfg.on_bad_line,
        None if tools is None else tools.descriptions,
        context.vision,
    )


def check_records(scorer: Scorer | None, prompts: PromptSet) -> None:
    """Raise DataError for a record without what the rewards need; `scorer`: None on the ranks that do not score."""
    if scorer is not None:
        for index in range(len(prompts)):
            prompt = prompts[index]
            scorer.check(prompt.fields, prompt.place)


def known_pass_rates(prompts: PromptSet) -> dict[int, float]:
    """What the records say of their prompts' pass rates; a warning counts what is no number from 0 to 1."""
    rates: dict[int, float] = {}
    wrong: list[str] = []
    for index in range(len(prompts)):
        rate = prompts[index].fields.get("pass_rate")
        if isinstance(rate, int | float) and not isinstance(rate, bool) and 0 <= rate <= 1:
            rates[index] = float(rate)
        elif rate is not None:
            wrong.append(f"{prompts[index].place} has {str(rate)[:40]!r}")
    if wrong:
        log.warning(
            f"not used: the pass_rate of {len(wrong)} of {count_of(len(prompts), 'prompt')}, which must be a number "
            f"from 0 to 1 ({wrong[0]}{', ...' if len(wrong) > 1 else ''})"
        )
    return rates
