"""Rewards by a model that stage: RM trained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import paddle

from erniekit.build import AdapterDirectory, ModelOptions, prepare_model
from erniekit.checkpoint.adapter_config import base_of
from erniekit.checkpoint.model_dir import find_checkpoint, is_adapter
from erniekit.config.schema import Config
from erniekit.data.chat.template import Template, load_template
from erniekit.data.chat.tokenizer import check_fits, load_tokenizer
from erniekit.data.packed_batch import IGNORE, Document, PackedBatch, join_rows, make_row
from erniekit.generation.thinking import OPEN
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.models.overrides import Overrides
from erniekit.models.scoring import last_token_scores
from erniekit.precision import policy
from erniekit.rewards import Sample
from erniekit.training.forward_pass import final_norm, forward_pass
from erniekit.utils import log
from erniekit.utils.errors import ConfigError, UserError

_MAX_TOKENS = 8192  # of one pass, unless one text is longer
_SHOWN = 3


def score_rows(model: CausalLM, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """The scores of texts as token ids, each at its last token: float64 [N]. Each text attends to itself alone. `model`
    is a whole reward model of this process.
    """
    scores = np.zeros(len(rows), np.float64)
    for numbers in _batches(rows):
        documents = [np.asarray(rows[number], np.int64) for number in numbers]
        batch = join_rows([make_row([Document(ids, np.full_like(ids, IGNORE))], [""]) for ids in documents])
        scores[numbers] = _scores_of(model, batch)
    return scores


@paddle.no_grad()
def _scores_of(model: CausalLM, batch: PackedBatch) -> np.ndarray:
    found: list[np.ndarray] = []

    def note(number: int, x_TD: paddle.Tensor, inputs: ModelInputs) -> None:
        hidden = model.enter_head(final_norm(model, x_TD))
        found.append(last_token_scores(model, hidden, inputs, batch, np.arange(batch.num_segments)).numpy())

    forward_pass(model, [batch], note)
    return found[0].astype(np.float64)


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The numbers of rows, the longest first, in batches of up to _MAX_TOKENS tokens."""
    batch: list[int] = []
    size = 0
    for number in sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i)):
        if batch and size + len(rows[number]) > _MAX_TOKENS:
            yield batch
            batch, size = [], 0
        batch.append(number)
        size += len(rows[number])
    if batch:
        yield batch


class RewardModel:
    """The model of reward_model_path, whole, in the process that scores. Its weights are read when the first text is
    scored.

    A completion is shown to it by its own chat template, as in its training data.
    """

    def __init__(self, cfg: Config) -> None:
        """Raises ConfigError or CheckpointError if the directory is no reward model."""
        assert cfg.reward_model_path is not None, "config.schema_rewards.reward_problems"
        path = find_checkpoint(cfg.reward_model_path)
        adapter = AdapterDirectory(path) if is_adapter(path) else None
        base = path if adapter is None else base_of(path, None)
        precision = policy.choose(cfg.compute_type, paddle.get_device())
        overrides = Overrides(score_head=True if adapter else None)
        self._prepared = prepare_model(base, ModelOptions(precision, adapter=adapter, overrides=overrides))
        if not self._prepared.config.has_score_head:
            raise ConfigError(
                f"reward_model_path: {path} is a model of another kind: it has no score head. Name a directory that "
                "stage: RM wrote"
            )
        tokenizer = load_tokenizer(path)
        check_fits(tokenizer, self._prepared.config.vocab_size, str(path))
        self._template: Template = load_template(tokenizer, None, path)
        self._num_refused = 0

    @cached_property
    def _model(self) -> CausalLM:
        log.info(f"reward_model_path: {self._prepared.path} is read, into this process alone")
        return self._prepared.build()

    def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
        """The scores of completions, float64 [N]; NaN where the chat template cannot show one."""
        rows = [self._row(sample) for sample in samples]
        scores = np.full(len(rows), np.nan)
        shown = [number for number, row in enumerate(rows) if row]
        scores[shown] = score_rows(self._model, [rows[number] for number in shown])
        return scores

    def _row(self, sample: Sample) -> list[int]:
        """The token ids of a conversation with its completion; empty if the template refuses it."""
        messages = list(sample.messages)
        if sample.opened_thought and not sample.turns:
            messages[-1] = {**messages[-1], "content": f"{OPEN}\n{sample.completion}"}
        try:
            sequences = self._template.encode_all([*sample.prompt, *messages], None, None)
            return self._template.labels(sequences[-1])[0]
        except UserError as error:
            self._num_refused += 1
            if self._num_refused <= _SHOWN:
                more = " (further ones are only counted)" if self._num_refused == _SHOWN else ""
                log.warning(f"reward reward_model: {sample.place}: it has no reward from it: {error}{more}")
            return []


def reward_models(cfg: Config) -> Mapping[str, Callable[[Sequence[Sample]], np.ndarray]]:
    """The reward functions that are models of this process, by name."""
    return {"reward_model": RewardModel(cfg)} if "reward_model" in cfg.reward_funcs else {}
