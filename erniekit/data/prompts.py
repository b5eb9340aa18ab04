"""The prompts of reinforcement learning: records as token ids that a model continues, numbered, with the fields that
rewards compare answers with.

Every prompt is rendered once at the start, so that each one that cannot be used is known before a weight is read. A
prompt is never shortened: one that is longer than `max_prompt_len` is left out and counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from erniekit.data.chat.encode import template_hash
from erniekit.data.chat.template import Template
from erniekit.data.records.dataset import Dataset, Source, SourceSpec, with_pictures
from erniekit.data.records.errors import SKIPPABLE, BadLine, BadRecord, reading
from erniekit.data.records.fields import has_content
from erniekit.data.records.formats import parse_record
from erniekit.data.records.prompt_formats import ANSWER
from erniekit.data.records.readers import load_record
from erniekit.data.records.sample import Sample
from erniekit.data.vision.encode import VisionSpec
from erniekit.data.vision.formats import parse_vision_record
from erniekit.data.vision.parts import media_of
from erniekit.data.vision.plan import MediaPlan, plan_media
from erniekit.data.vision.prompt import PicturePrompt, picture_prompt
from erniekit.data.vision.sequence import MediaTokens
from erniekit.utils import log
from erniekit.utils.errors import DataError, UserError
from erniekit.utils.progress import track
from erniekit.utils.wording import count_of

_SHOWN = 3  # places that a message names; the others are only counted
_LIMIT = "the smaller of max_prompt_len and max_seq_len - max_completion_length"
_KEPT_TOKENS = 32 << 20  # rendered prompts that are kept in memory, in tokens


@dataclass(frozen=True)
class Prompt:
    """A prompt. ids: its token ids, at the end the generation prompt. messages, tools: the conversation that they show.
    fields: the record's other fields. place: "file:line". pictures: where its images and videos are; None: text alone.
    short_ids: the ids with one placeholder for each picture. vision, tokens: how pictures are placed; None: the model
    reads text alone.
    """

    ids: list[int]
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    fields: Mapping[str, Any]
    place: str
    pictures: PicturePrompt | None = None
    short_ids: list[int] = field(default_factory=list)
    vision: VisionSpec | None = None
    tokens: MediaTokens | None = None

    def continued(self, ids: Sequence[int], plans: Sequence[MediaPlan] = ()) -> PicturePrompt | None:
        """The prompt with what comes after it, in which every picture of `plans` has one placeholder. None where there
        is no picture.
        """
        own = () if self.pictures is None else self.pictures.plans
        if not (own or plans):
            return None
        assert self.vision is not None and self.tokens is not None, "pictures need a model that sees them"
        return picture_prompt([*self.short_ids, *ids], [*own, *plans], self.tokens, self.vision)


@dataclass(frozen=True)
class PromptOptions:
    """How prompts are read. `enable_thinking` is passed to the chat template (None: it is not). `tools` are shown with
    every prompt that names none itself. `vision`: how pictures are prepared; None: the model reads text alone.
    """

    template: Template
    max_prompt_len: int
    enable_thinking: bool | None = None
    on_bad_line: str = "error"
    tools: list[dict[str, Any]] | None = None
    vision: VisionSpec | None = None


class PromptSet:
    """The usable prompts of one or several data sets, numbered from 0 in the order of their files.

    dataset: all records. num_too_long: prompts with more than max_prompt_len tokens, which are left out. identity:
    everything that decides which prompts there are, under names that a user knows.
    """

    def __init__(self, dataset: Dataset, options: PromptOptions) -> None:
        self.dataset, self._options = dataset, options
        self.num_too_long = self.num_bad = 0
        self._kept: dict[int, Prompt] = {}  # by number, while there is room
        self._room = _KEPT_TOKENS
        self._places_of_long: list[str] = []
        self._without_answer: list[int] = []
        self._records: list[int] = []
        longest = 0
        for number in track(range(len(dataset)), len(dataset), "reading prompts"):
            prompt = self._checked(number)
            if prompt is None:
                continue
            if not has_content(prompt.fields.get(ANSWER)):
                self._without_answer.append(len(self._records))
            self._keep(len(self._records), prompt)
            self._records.append(number)
            longest = max(longest, len(prompt.ids))
        self._report(longest)

    @staticmethod
    def open(specs: Sequence[SourceSpec], split: str, options: PromptOptions, download_hub: str | None) -> "PromptSet":
        """The prompts of data sets. Raises DataError for a record that is wrong, with its place, and if no prompt is
        left.
        """
        if options.vision is not None:
            specs = with_pictures(specs)
        sources = [Source(spec, split, options.on_bad_line, download_hub, vision=options.vision) for spec in specs]
        return PromptSet(Dataset(sources), options)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Prompt:
        prompt = self._kept.get(index)
        return self._render(self._records[index]) if prompt is None else prompt

    @property
    def sizes(self) -> list[int]:
        """The number of prompts of each data set."""
        ends = np.cumsum([0, *self.dataset.sizes])
        return np.diff(np.searchsorted(self._records, ends)).tolist()

    @property
    def identity(self) -> dict[str, Any]:
        """See the class."""
        options = self._options
        return {
            "content of the prompts": self.dataset.digests,
            "tokenizer": options.template.tokenizer.fingerprint,
            "chat template": template_hash(options.template),
            "max_prompt_len": options.max_prompt_len,
            "enable_thinking": options.enable_thinking,
            "tools": options.tools,
        } | ({} if options.vision is None else {"pictures": repr(options.vision)})

    def report(self) -> dict[str, int]:
        """prompts, too_long, bad_lines (skipped, with those that the chat template refuses), without_answer."""
        return {
            "prompts": len(self),
            "too_long": self.num_too_long,
            "bad_lines": self.dataset.bad_lines + self.num_bad,
            "without_answer": len(self._without_answer),
        }

    def _keep(self, index: int, prompt: Prompt) -> None:
        if self._room >= len(prompt.ids):
            self._room -= len(prompt.ids)
            self._kept[index] = prompt

    def _checked(self, number: int) -> Prompt | None:
        """The prompt of a record; None if it is not used, which is counted."""
        try:
            prompt = self._render(number)
        except BadLine as error:
            if self._options.on_bad_line != "skip":
                raise BadLine(f"{error} {SKIPPABLE}") from error
            self.num_bad += 1
            if self.num_bad <= _SHOWN:
                log.warning(f"skipped: {error}")
            return None
        if len(prompt.ids) > self._options.max_prompt_len:
            self.num_too_long += 1
            if self.num_too_long <= _SHOWN:
                self._places_of_long.append(f"{prompt.place} with {len(prompt.ids)}")
            return None
        return prompt

    def _render(self, number: int) -> Prompt:
        type_name, raw, where = self.dataset.record(number)
        with reading(where):
            record = load_record(raw, where)
            if self._options.vision is not None:
                return self._with_pictures(record, type_name, where, self._options.vision)
            sample = parse_record(record, type_name, where)
            return self._prompt(sample, where, self._ids(sample))

    def _with_pictures(self, record: Any, type_name: str, where: str, vision: VisionSpec) -> Prompt:
        options = vision.formats(where)
        sample = parse_vision_record(record, type_name, where, options)
        plans = plan_media(list(media_of(sample.messages)), options.reader, vision.settings_at(where), vision.video)
        ids, tokens = self._ids(sample), MediaTokens.of(self._options.template.tokenizer)
        pictures = picture_prompt(ids, plans, tokens, vision) if plans else None
        prompt = self._prompt(sample, where, ids if pictures is None else pictures.ids)
        return replace(prompt, pictures=pictures, short_ids=ids, vision=vision, tokens=tokens)

    def _prompt(self, sample: Sample, where: str, ids: list[int]) -> Prompt:
        return Prompt(ids, sample.messages, self._tools(sample), sample.fields, where, short_ids=ids)

    def _tools(self, sample: Sample) -> list[dict[str, Any]] | None:
        return self._options.tools if sample.tools is None else sample.tools

    def _ids(self, sample: Sample) -> list[int]:
        options = self._options
        try:
            return options.template.prompt_ids(sample.messages, self._tools(sample), options.enable_thinking)
        except UserError as error:
            raise BadRecord(str(error).removesuffix("."), "fix the record, or choose another chat_template") from None

    def _report(self, longest: int) -> None:
        limit = self._options.max_prompt_len
        if self.num_too_long:
            more = ", ..." if self.num_too_long > len(self._places_of_long) else ""
            log.warning(
                f"left out: {self.num_too_long} of {count_of(len(self.dataset), 'prompt')} with more than {limit} "
                f"tokens ({_LIMIT}): {', '.join(self._places_of_long)}{more}"
            )
        if not len(self):
            raise DataError(
                f"{', '.join(source.spec.path for source in self.dataset.sources)}: no prompt can be used: "
                f"{self.num_too_long} with more than {limit} tokens ({_LIMIT}), {self.num_bad} skipped. Hint: "
                "raise max_prompt_len or max_seq_len, or check the data."
            )
        if self._without_answer:
            first = self[self._without_answer[0]].place
            log.warning(
                f"{len(self._without_answer)} of {count_of(len(self), 'prompt')} without an answer (fields answer, "
                f"solution, ground_truth or reward_model.ground_truth; the first: {first}): a reward that compares "
                "with one cannot score them"
            )
        log.info(f"prompts: {len(self)} of {len(self.dataset)} used, the longest with {count_of(longest, 'token')}")
