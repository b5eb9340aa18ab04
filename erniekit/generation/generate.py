"""`model.generate`: the public way to continue prompts."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import paddle

from erniekit.generation.decode import decode
from erniekit.generation.request import Limits
from erniekit.generation.sampling import Sampling
from erniekit.models.decoder import CausalLM
from erniekit.models.pictures import PictureArguments, PictureTables, picture_tables, rows_of
from erniekit.utils.errors import UserError


def generate(
    model: CausalLM,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    max_new_tokens: int = 1024,
    min_new_tokens: int = 0,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    use_cache: bool = True,
    stream: Callable[[int, int], None] | None = None,
    position_ids: Any = None,
    **pictures: Any,
) -> paddle.Tensor:
    """Continue prompts, token by token.

    Args:
        input_ids: integers [B, S] (tensor, array, nested lists), one list of ids (one prompt), or lists of different
            lengths, which are padded on the left.
        attention_mask: [B, S], 0 marks padding, on either side; default: nothing is padding.
        max_new_tokens, min_new_tokens: bounds on the number of new tokens; an end token is banned before the lower one.
        do_sample: True draws tokens, False takes the likeliest. Not given: drawn if temperature (other than 0), top_p,
            top_k or min_p is given.
        temperature, top_p, top_k, min_p, repetition_penalty, frequency_penalty, presence_penalty: see
            sampling.Sampling; temperature is 1 when drawing without it.
        seed: equal seeds give equal tokens, whatever else is in the batch.
        eos_token_id: token or tokens that end a row (default: the model's, from its generation_config.json or, if that
            does not say, its config.json).
        pad_token_id: fills rows that ended early (default: the model's).
        use_cache: False runs the whole sequence at each step: slow, for checking only. The tokens are the same.
        stream: called with (row, token) as each token is chosen.
        position_ids: [3, B, S] of prompts with images or videos (default: by position_rule).
        pictures: the images and videos of prompts, see models.pictures.PictureArguments.

    Returns:
        int64 [B, S + N]: the input as given (padded to the longest prompt, S), then the new tokens of each row, its end
        token included, padded on the right to the longest answer. So `result[:, S:]` holds the answers.

    Raises:
        TypeError: an argument is unknown.
        UserError: an argument is out of its range, a prompt is empty, longer than the model's context, or outside its
            vocabulary.
    """
    padding = model.fill_id if pad_token_id is None else pad_token_id
    ids, mask = _prompts(input_ids, attention_mask, padding)
    limits = Limits(max_new_tokens, min_new_tokens, model.end_ids if eos_token_id is None else _as_ids(eos_token_id))
    sampling = Sampling(
        _temperature(do_sample, temperature, draws={top_p, top_k, min_p} != {None}),
        top_k or 0,
        1.0 if top_p is None else top_p,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        seed,
        min_p or 0.0,
    )
    prompts = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    on_token = (lambda row, token: None) if stream is None else stream
    rows = _picture_rows(model, ids, mask, _picture_arguments(pictures), position_ids)
    answers = decode(model, prompts, limits, sampling, use_cache=use_cache, on_token=on_token, pictures=rows)
    new = np.full((len(ids), max(len(answer.all_ids) for answer in answers)), padding, dtype=np.int64)
    for row, answer in zip(new, answers, strict=True):
        row[: len(answer.all_ids)] = answer.all_ids
    return paddle.to_tensor(np.concatenate([ids, new], axis=1))


def _temperature(do_sample: bool | None, temperature: float | None, draws: bool) -> float:
    """The temperature of sampling; 0 always takes the likeliest token. draws: another argument asks for drawing."""
    if do_sample is None:
        do_sample = temperature != 0 and (temperature is not None or draws)
    if not do_sample:
        return 0.0
    if temperature == 0:
        raise UserError(
            "temperature: 0 always takes the likeliest token, which do_sample=True excludes. Give one of them."
        )
    return 1.0 if temperature is None else temperature


def _picture_arguments(given: dict[str, Any]) -> PictureArguments:
    known = [field.name for field in fields(PictureArguments)]
    for name in given:
        if name not in known:
            raise TypeError(f"generate() has no argument {name!r}; of pictures it has {', '.join(known)}")
    return PictureArguments(**given)


def _picture_rows(
    model: CausalLM, ids: np.ndarray, mask: np.ndarray, arguments: PictureArguments, position_ids: Any
) -> list[PictureTables] | None:
    """The images and videos of each prompt; None where there are none."""
    tables = picture_tables(model.config, ids, mask.astype(np.int64), arguments)
    if position_ids is not None:
        axes = _host(position_ids)
        if tables is None or axes.shape != (3, *ids.shape):
            raise UserError(
                f"position_ids: expected [3, batch, seq] beside images or videos, got {list(axes.shape)}. Positions of "
                "text alone are counted."
            )
        tables = replace(tables, positions=np.moveaxis(axes, 0, -1))
    if tables is None or model.config.vision is None:
        return None
    return rows_of(tables, mask, model.config.vision.spatial_merge_size)


def _as_ids(value: int | Sequence[int]) -> tuple[int, ...]:
    return (int(value),) if isinstance(value, int | np.integer) else tuple(int(item) for item in value)


def _prompts(input_ids: Any, attention_mask: Any, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [B, S] int64, padded on the left; what is real [B, S] bool)."""
    if isinstance(input_ids, list | tuple) and input_ids and isinstance(input_ids[0], list | tuple | np.ndarray):
        ids, real = _pad_left(input_ids, padding)
    else:
        ids = _host(input_ids)
        ids = ids[None] if ids.ndim == 1 else ids
        real = np.ones(ids.shape, dtype=bool)
    if ids.ndim != 2 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"input_ids: expected token ids of shape [batch, seq], got {ids.dtype} of shape {ids.shape}")
    if attention_mask is not None:
        mask = _host(attention_mask)
        if mask.shape != ids.shape:
            raise UserError(f"attention_mask: shape {mask.shape} differs from that of input_ids, {ids.shape}")
        real &= mask.astype(bool)
    return ids.astype(np.int64), real


def _pad_left(lists: Sequence[Any], padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads lists of different lengths on the left: (array [B, longest], mask of their own tokens)."""
    rows = [np.asarray(row) if len(row) else np.empty(0, dtype=np.int64) for row in lists]
    width = max(len(row) for row in rows)
    ids = np.stack([np.pad(row, (width - len(row), 0), constant_values=padding) for row in rows])
    return ids, np.arange(width) >= width - np.array([[len(row)] for row in rows])


def _host(values: Any) -> np.ndarray:
    return values.numpy() if isinstance(values, paddle.Tensor) else np.asarray(values)
