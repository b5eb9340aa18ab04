"""Completions of prompts: what a policy generated, with what is known of each token and each completion."""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from erniekit.data.prompts import Prompt
from erniekit.data.vision.plan import MediaPlan
from erniekit.utils.errors import CheckpointError


@dataclass
class Completion:
    """A completion of n tokens.

    prompt: number of its prompt. group: number of its group in the rollout. ids int32 [n]: the tokens after the
    prompt, with the end token and results of tools. is_sampled bool [n]: False for results of tools. rollout_logps
    float32 [n]: log-probabilities that generating reported, NaN where there is none. is_truncated: whether it ended
    without an end token. reward: the weighted sum of its rewards with penalties, NaN where no function gave one.
    old_logps, reference_logps float32 [n]: of the policy before the first update and of the reference, as the training
    computation evaluates them; None where nobody needs them.

    experts unsigned [n, S, K]: the experts of the last token of the prompt and of the completion's tokens but the last,
    as the engine chose them in each of S sparse layers; prompt_experts [prompt - 1, S, K] those of the tokens before,
    which the completions of a group share (the first one's, where a prompt was read several times). None: not recorded.

    With tools: inputs int32 [n], the ids as the model reads them, which differ from `ids` at the end of a turn that
    others follow (None: they are the same). turns: the completion as messages. plans: the pictures among the results,
    each of which has one placeholder in short_inputs.
    """

    prompt: int
    group: int
    ids: np.ndarray
    is_sampled: np.ndarray
    rollout_logps: np.ndarray
    is_truncated: bool
    reward: float = float("nan")
    advantage: float = 0.0
    old_logps: np.ndarray | None = None
    reference_logps: np.ndarray | None = None
    inputs: np.ndarray | None = None
    experts: np.ndarray | None = None
    prompt_experts: np.ndarray | None = None
    turns: tuple[dict[str, Any], ...] = ()
    plans: tuple[MediaPlan, ...] = ()
    short_inputs: tuple[int, ...] = ()

    @property
    def input_ids(self) -> np.ndarray:
        """The ids as the model reads them, int32 [n]."""
        return self.ids if self.inputs is None else self.inputs

    @property
    def num_sampled(self) -> int:
        """The number of tokens that the policy chose."""
        return int(self.is_sampled.sum())


_ARRAYS = ("ids", "is_sampled", "rollout_logps", "old_logps", "reference_logps", "inputs", "experts")


def to_bytes(completions: Sequence[Completion]) -> bytes:
    """The completions as a file, an .npz of flat arrays."""
    arrays = {"lengths": np.array([len(c.ids) for c in completions], np.int64)}
    for name in _ARRAYS:
        parts = [vars(c)[name] for c in completions]
        if parts and parts[0] is not None:
            arrays[name] = np.concatenate(parts)
    for name, kind in (("prompt", np.int64), ("group", np.int64), ("is_truncated", np.bool_)):
        arrays[name] = np.array([vars(c)[name] for c in completions], kind)
    for name in ("reward", "advantage"):
        arrays[name] = np.array([vars(c)[name] for c in completions], np.float64)
    shared = {c.group: c.prompt_experts for c in completions if c.prompt_experts is not None}
    if shared:
        arrays["prompt_groups"] = np.array(list(shared), np.int64)
        arrays["prompt_lengths"] = np.array([len(table) for table in shared.values()], np.int64)
        arrays["prompt_experts"] = np.concatenate(list(shared.values()))
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes the arrays for other arguments
    return file.getvalue()


def from_bytes(data: bytes, where: str) -> list[Completion]:
    """The completions in a file. Raises CheckpointError if it is damaged."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = dict(file)
        ends = np.cumsum(arrays["lengths"])[:-1]
        columns = {name: np.split(arrays[name], ends) if name in arrays else None for name in _ARRAYS}
        shared: dict[int, np.ndarray] = {}
        if "prompt_groups" in arrays:
            tables = np.split(arrays["prompt_experts"], np.cumsum(arrays["prompt_lengths"])[:-1])
            shared = dict(zip(arrays["prompt_groups"].tolist(), tables, strict=True))
        return [
            Completion(
                prompt=int(arrays["prompt"][i]),
                group=int(arrays["group"][i]),
                is_truncated=bool(arrays["is_truncated"][i]),
                reward=float(arrays["reward"][i]),
                advantage=float(arrays["advantage"][i]),
                prompt_experts=shared.get(int(arrays["group"][i])),
                **{name: None if column is None else column[i] for name, column in columns.items()},  # type: ignore[arg-type]
            )
            for i in range(len(arrays["lengths"]))
        ]
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{where}: cannot be read ({error!r:.100}). Resume from an older checkpoint.") from None


@dataclass
class Group:
    """The completions of one prompt, with their rewards by function (float64 [G] each)."""

    prompt: int
    completions: list[Completion]
    rewards: dict[str, np.ndarray] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)


def sample_records(
    groups: Sequence[Group], prompts: dict[int, Prompt], texts: dict[int, str], step: int, answer_key: str
) -> list[dict[str, Any]]:
    """The completions as lines of samples.jsonl; `texts` by id(completion)."""
    records = []
    for group in groups:
        prompt = prompts[group.prompt]
        for i, completion in enumerate(group.completions):
            record = {
                "step": step,
                "source": prompt.place,
                "prompt": prompt.messages,
                "completion": texts[id(completion)],
                "answer": json_value(prompt.fields.get(answer_key)),
                "rewards": {name: number(values[i]) for name, values in group.rewards.items()},
                "reward": number(completion.reward),
                "advantage": number(completion.advantage),
                "length": completion.num_sampled,
                "truncated": completion.is_truncated,
            } | ({"turns": json_value([dict(turn) for turn in completion.turns])} if completion.turns else {})
            # What the user's functions logged, under names of its own.
            extras = {f"logged/{name}" if name in record else name: column[i] for name, column in group.extras.items()}
            records.append(record | {name: json_value(value) for name, value in extras.items()})
    return records


def number(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return None if np.isnan(value) else float(value)


def json_value(value: Any) -> Any:
    """A value of a record, as text where JSON in UTF-8 has no form for it."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError):
        return str(value).encode("utf-8", "backslashreplace").decode()
    return value
