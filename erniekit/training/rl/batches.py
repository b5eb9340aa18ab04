"""Turns completions into the microbatches of a step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from erniekit.data.packed_batch import IGNORE, NO_COMPLETIONS, NO_SEGMENT, CompletionTable, PackedBatch, join_rows
from erniekit.data.prompts import Prompt
from erniekit.losses.policy import entropy_threshold
from erniekit.training.rl.completions import Completion
from erniekit.training.rl.sequence_pictures import SequencePictures


@dataclass(frozen=True)
class BatchOptions:
    """mask_truncated: a completion without an end token has no loss. pair_margin: the best and the worst completion of
    each group are a pair if their rewards differ by more (None: no pairs); microbatches then hold whole groups.
    min_entropy: see CompletionTable. replays_experts: tokens go to the experts that were recorded, if they were.
    is_offline: the completions are pairs that were made in advance.
    """

    mask_truncated: bool = False
    pair_margin: float | None = None
    min_entropy: float | None = None
    replays_experts: bool = True
    is_offline: bool = False


def microbatches(
    completions: Sequence[Completion],
    prompt_of: Callable[[int], Prompt],
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    options: BatchOptions = BatchOptions(),
) -> list[PackedBatch]:
    """A data rank's microbatches of up to `batch_size` completions; every rank has the same number, the last ones
    perhaps without completions. Microbatch m of rank r has the completions (m * world + r) * batch_size + [0,
    batch_size).
    """
    share = batch_size * world
    starts = range(rank * batch_size, rank * batch_size + math.ceil(len(completions) / share) * share, share)
    return [batch_of(completions[start : start + batch_size], prompt_of, options) for start in starts]


def batch_of(
    completions: Sequence[Completion], prompt_of: Callable[[int], Prompt], options: BatchOptions = BatchOptions()
) -> PackedBatch:
    """One row of completions. Neighbours of one prompt share its tokens: the prompt without its last token is a segment
    which the completions attend to; each of them begins with that last token, which predicts its first one.

    The labels are the tokens that the policy chose.
    """
    if not completions:
        return replace(join_rows([]), completions=replace(NO_COMPLETIONS, is_offline=options.is_offline))
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    prompt_segments: list[int] = []
    segments: list[int] = []
    sources: list[str] = []
    pictures = SequencePictures()
    experts: list[np.ndarray] = []
    for number, members in groupby(completions, key=lambda completion: completion.prompt):
        prompt, neighbours = prompt_of(number), list(members)
        before = len(prompt.ids) - 1
        shared = NO_SEGMENT
        if before:
            shared = len(ids)
            ids.append(np.array(prompt.ids[:-1], np.int64))
            labels.append(np.full(before, IGNORE))
            positions.append(np.arange(before))
            if neighbours[0].prompt_experts is not None:
                experts.append(neighbours[0].prompt_experts)
        pictures.add_prompt(prompt, before)
        for completion in neighbours:
            prompt_segments.append(shared)
            segments.append(len(ids))
            sources.append(prompt.place)
            ids.append(np.append(prompt.ids[-1], completion.input_ids[:-1]))
            labels.append(np.where(_has_loss(completion, options), completion.ids, IGNORE))
            positions.append(np.arange(before, before + len(completion.ids)))
            if completion.experts is not None:
                experts.append(completion.experts)
            pictures.add_completion(prompt, completion, before)
    row = PackedBatch.text_row(
        np.concatenate(ids),
        np.concatenate(labels),
        np.concatenate(positions),
        np.repeat(np.arange(len(ids)), [len(part) for part in ids]),
        sources,
    )
    table = _table(completions, prompt_segments, segments, options)
    if experts:
        table = replace(table, experts=np.concatenate(experts), replays_experts=options.replays_experts)
    return pictures.fill(replace(row, completions=table))


def _has_loss(completion: Completion, options: BatchOptions) -> np.ndarray:
    """bool [n]: the tokens of a completion that carry loss."""
    return completion.is_sampled & (not (options.mask_truncated and completion.is_truncated))


def min_entropy_of(
    completions: Sequence[Completion], entropies: Sequence[np.ndarray], share: float, options: BatchOptions
) -> float:
    """The entropy that `share` of the tokens with loss reach, over all completions of a step, so that its division into
    microbatches changes nothing. `entropies`: of the tokens of each completion by the weights of the step.
    """
    parts = [values[_has_loss(c, options)] for c, values in zip(completions, entropies, strict=True)]
    return entropy_threshold(np.concatenate(parts), share)


def _pairs_of(completions: Sequence[Completion], options: BatchOptions) -> np.ndarray:
    """The best and the worst completion of each group, int64 [P, 2], if their rewards differ by more than the margin;
    of those that have a reward and loss. None without a margin.
    """
    if options.pair_margin is None:
        return np.zeros((0, 2), np.int64)
    pairs = []
    for _, members in groupby(range(len(completions)), key=lambda i: completions[i].group):
        usable = [
            i for i in members if not np.isnan(completions[i].reward) and _has_loss(completions[i], options).any()
        ]
        if usable:
            best = max(usable, key=lambda i: completions[i].reward)
            worst = min(usable, key=lambda i: completions[i].reward)
            if completions[best].reward - completions[worst].reward > options.pair_margin:
                pairs.append((best, worst))
    return np.array(pairs, np.int64).reshape(-1, 2)


def _table(
    completions: Sequence[Completion], prompts: list[int], segments: list[int], options: BatchOptions
) -> CompletionTable:
    masks = [_has_loss(completion, options) for completion in completions]

    def column(name: str) -> np.ndarray | None:
        parts = [vars(completion)[name] for completion in completions]
        if parts[0] is None:
            return None
        return np.concatenate([part[mask] for part, mask in zip(parts, masks, strict=True)]).astype(np.float32)

    rollout = column("rollout_logps")
    assert rollout is not None
    return CompletionTable(
        prompts=np.array(prompts, np.int64),
        segments=np.array(segments, np.int64),
        advantages=np.array([completion.advantage for completion in completions], np.float32),
        groups=np.array([completion.group for completion in completions], np.int64),
        lengths=np.array([mask.sum() for mask in masks], np.int64),
        rollout_log_probs=rollout,
        old_log_probs=column("old_logps"),
        reference_log_probs=column("reference_logps"),
        min_entropy=options.min_entropy,
        is_offline=options.is_offline,
        pairs=_pairs_of(completions, options),
    )
