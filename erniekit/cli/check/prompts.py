"""Checks the prompts of a method that learns from rewards: records, lengths, what the rewards need, examples."""

import numpy as np

from erniekit.cli.check import preview, survey
from erniekit.cli.check.contact_sheet import Tile
from erniekit.cli.check.model import ModelFacts
from erniekit.cli.check.report import Report, Section
from erniekit.config import Config
from erniekit.data.chat.encode import Encoded
from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.data.packed_batch import IGNORE, Document, DocumentPictures
from erniekit.data.prompts import Prompt, PromptSet
from erniekit.data.record_feed import specs_of
from erniekit.parallel.mesh import Mesh
from erniekit.rewards import Scorer
from erniekit.training.data import DataContext
from erniekit.training.rl.loader import RolloutLoader
from erniekit.training.rl.prompts import check_records, prompt_options, tool_loop
from erniekit.utils.wording import count_of


def inspect(
    section: Section, cfg: Config, split: str, facts: ModelFacts, decode: bool
) -> tuple[PromptSet | None, int | None]:
    """Add what a split's prompts are; with `decode` also what decoding every picture and video finds. Returns them,
    None where they cannot be read, and the steps of num_train_epochs, for training data.
    """
    assert facts.tokenizer is not None and facts.template is not None
    context = DataContext(cfg, facts.tokenizer, facts.template, Mesh.single(), facts.vision)
    prompts: PromptSet | None = None
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
        if decode and facts.vision is not None:
            survey.decode(section, cfg, (_record(prompts[index]) for index in range(len(prompts))))
        with Scorer(cfg) as scorer:
            check_records(scorer, prompts)
            section.add("ok", f"rewards: {', '.join(scorer.names)}; every record has what they need")
        if split == "train":
            loader = RolloutLoader(context, prompts, None)
            steps = loader.steps_left()
            total = cfg.max_steps if cfg.max_steps > 0 else steps
            epochs = total / loader.steps_per_rollout * cfg.rollout_batch_size / len(prompts)
            section.add("ok", f"training: {count_of(total, 'step')}, {count_of(float(epochs), 'epoch')} of prompts")
    return prompts, steps


def show(
    report: Report,
    prompts: PromptSet,
    tokenizer: Tokenizer,
    answer_key: str,
    split: str,
    count: int,
    first: int = 1,
    written: preview.Written | None = None,
) -> list[Tile]:
    """Show prompts and their answers as preview.inspect shows records. Prompts that are left out have no number."""
    tiles: list[Tile] = []
    numbers = range(first - 1, min(first - 1 + count, len(prompts)))
    if not numbers and first > 1:
        report.section(f"{split} prompt {first}").add("note", f"the data has {count_of(len(prompts), 'prompt')}")
    for number in numbers:
        which = f"the first {split} prompt" if number == 0 else f"{split} prompt {number + 1}"
        section = report.section(f"{which} as the model gets it")
        with section.collecting():
            prompt = prompts[number]
            tiles += preview.show(section, _record(prompt), tokenizer, True, split, written)
            section.add("ok", f"answer: {prompt.fields.get(answer_key)!r}")
    return tiles


def _record(prompt: Prompt) -> Encoded:
    """A prompt as a record of one document, of which nothing is trained."""
    pictures = None
    if prompt.pictures is not None:
        found = prompt.pictures
        grid = np.array([plan.geometry.grid for plan in found.plans], np.int64).reshape(-1, 3)
        pictures = DocumentPictures(found.modality, found.positions, grid, found.first_tokens, found.plans)
    ids = np.array(prompt.ids, np.int32)
    return Encoded(prompt.place, [Document(ids, np.full(len(ids), IGNORE, np.int32), pictures=pictures)])
