"""Pairs of answers that were made in advance, for the preference term of reinforcement learning (offline UPO)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from erniekit.config.methods import METHODS, Records
from erniekit.data.packed_batch import IGNORE, Document
from erniekit.data.prompts import Prompt
from erniekit.data.records.dataset import Dataset, Source, read_specs
from erniekit.data.sampler import permutation
from erniekit.data.workers import EncoderSpec, EncodingService
from erniekit.training.data import DataContext
from erniekit.training.rl.completions import Completion
from erniekit.utils import log
from erniekit.utils.errors import DataError
from erniekit.utils.wording import count_of

_KEY = 2  # the number that tells these orders from others in the keys of random numbers


class OfflinePairs:
    """The pairs of upo_offline_path, numbered from 0, in shuffled epochs. identity: what decides which there are."""

    def __init__(self, documents: Sequence[Document], places: Sequence[str], seed: int, digests: object = None) -> None:
        self._documents, self._places, self._seed = documents, places, seed
        self.identity = {"content of upo_offline_path": digests, "number of offline pairs": len(documents)}
        self._order: tuple[int, np.ndarray] | None = None

    @staticmethod
    def open(context: DataContext) -> "OfflinePairs":
        """Read and tokenise the pairs. Raises DataError for a record that is wrong, with its place."""
        cfg = context.cfg
        pairs = next(facts for facts in METHODS.values() if facts.records is Records.PAIRS and not facts.vision)
        specs = read_specs(cfg.upo_offline_path, cfg.upo_offline_type, [], "train", pairs)
        dataset = Dataset([Source(spec, "train", cfg.on_bad_line, cfg.download_hub) for spec in specs])
        spec = EncoderSpec(
            context.tokenizer, cfg.max_seq_len, "drop", cfg.on_bad_line, cfg.max_prompt_len, context.template
        )
        service = EncodingService(dataset, spec)
        documents, places = [], []
        for encoded in service.stream(range(len(dataset))):
            documents += encoded.documents
            places += [encoded.where] * len(encoded.documents)
        if not documents:
            raise DataError(
                f"upo_offline_path: none of {count_of(len(dataset), 'pair')} can be used: each has more than "
                f"max_seq_len {cfg.max_seq_len} tokens. Hint: raise max_seq_len."
            )
        log.info(f"upo_offline_path: {len(documents)} of {count_of(len(dataset), 'pair')} used")
        return OfflinePairs(documents, places, cfg.seed, dataset.digests)

    def __len__(self) -> int:
        return len(self._documents)

    def prompt(self, number: int) -> Prompt:
        """The prompt of a pair."""
        document = self._documents[number]
        assert document.pair is not None
        return Prompt(document.ids[: document.pair.prompt + 1].tolist(), [], None, {}, self._places[number])

    def draw(self, start: int, count: int) -> list[Completion]:
        """The pairs at the places start, ..., start + count - 1 of all epochs, each as two completions that share a
        group: the chosen one with the reward 1, the rejected one with 0.
        """
        result = []
        for group, place in enumerate(range(start, start + count)):
            number = self._number(place)
            result += self._completions(number, group)
        return result

    def _number(self, place: int) -> int:
        epoch, index = divmod(place, len(self))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(len(self), (self._seed, _KEY, epoch))
        return int(self._order[1][index])

    def _completions(self, number: int, group: int) -> list[Completion]:
        document = self._documents[number]
        assert document.pair is not None
        prompt, chosen, rejected, _ = document.pair
        return [
            replace(_completion(document, prompt + begin, count), prompt=number, group=group, reward=reward)
            for begin, count, reward in ((0, chosen, 1.0), (chosen, rejected, 0.0))
        ]


def _completion(document: Document, begin: int, count: int) -> Completion:
    """The answer whose tokens [begin, begin + count) of the document predict it."""
    labels = document.labels[begin : begin + count]
    # What follows the last token is known as its label alone; without one it has no loss.
    ids = np.append(document.ids[begin + 1 : begin + count], 0 if labels[-1] == IGNORE else labels[-1])
    unknown = np.full(count, np.nan, np.float32)
    return Completion(0, 0, ids.astype(np.int32), labels != IGNORE, unknown, is_truncated=False)
