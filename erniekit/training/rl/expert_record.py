"""Brings the experts that every rank recorded while it generated to the completions, which all ranks hold."""

from collections.abc import Mapping, Sequence

import numpy as np

from erniekit.data.prompts import Prompt
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import noted_layers
from erniekit.moe.choices import empty_table, join_layers, table_bytes
from erniekit.parallel import comm
from erniekit.training.rl.completions import Completion


def record_bytes(model: CausalLM, num_tokens: int) -> int:
    """The memory of the experts of this many tokens in all sparse layers."""
    config = model.config
    return table_bytes(num_tokens, len(config.sparse_layers), config.moe_k, config.moe_num_experts)


def add_experts(
    model: CausalLM,
    prompts: Sequence[Prompt],
    completions: Mapping[int, Completion],
    mine: Mapping[int, np.ndarray | None],
) -> None:
    """Give each completion the experts of its tokens and of its prompt's, in all layers of the model. Every rank calls
    it.

    prompts: of each completion, by its number. mine: what this data rank recorded for the sparse layers that it holds,
    by the number of the completion.
    """
    config, mesh = model.config, model.mesh
    layers = noted_layers(model)
    tables = [table for _, table in sorted(mine.items()) if table is not None]
    assert len(tables) == len(mine), "the engine records"
    table = np.concatenate([empty_table(len(layers), config.moe_k, config.moe_num_experts), *tables])
    table = _joined(_of_stages(table, layers, model), model)
    numbers = comm.gather_objects(sorted(mine), mesh.data_group)
    shared: dict[int, np.ndarray] = {}  # by the group, which shares one prompt
    for rows, part in zip(comm.gather_arrays(_as_bytes(table), mesh.data_group), numbers, strict=True):
        if not part:
            continue
        rows = _from_bytes(rows, table)
        lengths = [len(prompts[n].ids) - 1 + len(completions[n].ids) for n in part]
        for number, record in zip(part, np.split(rows, np.cumsum(lengths)[:-1]), strict=True):
            before = len(prompts[number].ids) - 1
            completion = completions[number]
            completion.experts = record[before:].copy()
            completion.prompt_experts = shared.setdefault(completion.group, record[:before].copy())


def _of_stages(table_NSK: np.ndarray, layers: Sequence[int], model: CausalLM) -> list[tuple[list[int], np.ndarray]]:
    """The layers of each pipeline stage with its table."""
    group = model.mesh.pipe_group
    if group.size == 1:
        return [(list(layers), table_NSK)]
    num_tokens, _, top_k = table_NSK.shape
    by_layer = np.ascontiguousarray(table_NSK.transpose(1, 0, 2)).reshape(-1, top_k)  # stages differ in their layers
    parts = comm.gather_arrays(_as_bytes(by_layer), group)
    names = comm.gather_objects(list(layers), group)
    return [
        (numbers, _from_bytes(part, by_layer).reshape(len(numbers), num_tokens, top_k).transpose(1, 0, 2))
        for numbers, part in zip(names, parts, strict=True)
    ]


def _joined(stages: Sequence[tuple[list[int], np.ndarray]], model: CausalLM) -> np.ndarray:
    table = join_layers([part for _, part in stages], [numbers for numbers, _ in stages])
    assert table.shape[1] == len(model.config.sparse_layers), "every sparse layer is on one stage"
    return np.ascontiguousarray(table)


def _as_bytes(table: np.ndarray) -> np.ndarray:
    """The table as bytes with the same first axis: Paddle takes uint16 for another type."""
    return np.ascontiguousarray(table).view(np.uint8)


def _from_bytes(rows: np.ndarray, like: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view(like.dtype)
