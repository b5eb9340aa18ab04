"""Checks the prompts of a method that learns from rewards: records, lengths, what the rewards need, one example."""

import numpy as np

from erniekit.cli.check.model import ModelFacts
from erniekit.cli.check.report import Report, Section, count_of
from erniekit.config import Config
from erniekit.data.prompts import PromptSet
from erniekit.data.record_feed import specs_of
from erniekit.parallel.mesh import Mesh
from erniekit.rewards import Scorer
from erniekit.training.data import DataContext
from erniekit.training.rl.loader import RolloutLoader
from erniekit.training.rl.prompts import check_records, prompt_options, tool_loop

_SHOWN_CHARACTERS = 300


def inspect(report: Report, section: Section, cfg: Config, split: str, facts: ModelFacts) -> int | None:
    """Add what a split's prompts are, and an example. Returns the steps of num_train_epochs, for training data."""
    assert facts.tokenizer is not None and facts.template is not None
    context = DataContext(cfg, facts.tokenizer, facts.template, Mesh.single(), facts.vision)
    steps: int | None = None
    with section.collecting():
        tools = tool_loop(context)
        if tools is not None:
            names = ", ".join(tool["function"]["name"] for tool in tools.descriptions)
            tools.close()
            section.add("ok", f"tools: {names}; the chat template shows them")
        prompts = PromptSet.open(specs_of(cfg, split), split, prompt_options(context, tools), cfg.download_hub)
        lengths = np.array([len(prompts[index].ids) for index in range(len(prompts))])
        section.add(
            "ok",
            f"{count_of(len(prompts), 'prompt')}, median {int(np.median(lengths))} tokens, the longest "
            f"{int(lengths.max())}; {prompts.num_too_long} left out as longer than max_prompt_len",
        )
        with Scorer(cfg) as scorer:
            check_records(scorer, prompts)
            section.add("ok", f"rewards: {', '.join(scorer.names)}; every record has what they need")
        if split == "train":
            loader = RolloutLoader(context, prompts, None)
            steps = loader.steps_left()
            total = cfg.max_steps if cfg.max_steps > 0 else steps
            epochs = total / loader.steps_per_rollout * cfg.rollout_batch_size / len(prompts)
            section.add("ok", f"training: {count_of(total, 'step')}, {epochs:.3g} epochs of prompts")
        example = report.section(f"{split} example")
        text = facts.tokenizer.decode(prompts[0].ids)
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ..."
        example.add("ok", f"{prompts[0].place}: {shown!r}, answer {prompts[0].fields.get(cfg.answer_key)!r}")
    return steps
