"""The rotary positions of a config.json: their base, and how they are scaled for longer texts."""

import math
from typing import Any

from erniekit.models.config_keys import refusal
from erniekit.nn.frequencies import RopeScaling
from erniekit.utils import log
from erniekit.utils.errors import ConfigError
from erniekit.utils.user_files import JsonObject

_DEFAULT_ROPE_THETA = 500000.0
_MAX_ROPE_THETA = 1e18
# rope_type -> the keys that it has besides.
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
_BETAS = (("beta_fast", 32.0), ("beta_slow", 1.0))


def read_rope(config: JsonObject, length: int) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies, and how they are scaled; `length` is max_position_embeddings. As in
    transformers 5, `rope_scaling`, the older name, stands for `rope_parameters` where both are there, and a base inside
    of it counts more than the one at the top level.
    """
    key = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    inner = config.get_object(key)
    if key == "rope_scaling" and _kind(config.get_object("rope_parameters")) not in (None, _kind(inner)):
        log.once(f"{config.where}: rope_parameters and rope_scaling are of different types: the latter counts")
    own = config.get_number("rope_theta", _DEFAULT_ROPE_THETA, 1, _MAX_ROPE_THETA)
    theta = float(inner.get_number("rope_theta", own, 1, _MAX_ROPE_THETA))
    if theta != own and "rope_theta" in config:
        log.once(f"{config.where}: rope_theta: {own:g} at the top level, {theta:g} in {key}: the latter counts")
    kind = _kind(inner) or "default"
    if kind not in _KEYS:
        raise refusal(config, key, f"rope_type {kind!r:.40}: one of {', '.join(_KEYS)} is supported")
    known = ("rope_theta", "type", "rope_type", *_KEYS[kind])
    for name, value in inner.values.items():
        if name not in known and value is not None and (name, value) != ("partial_rotary_factor", 1):
            raise refusal(config, key, f"{name} {value!r:.40} is not supported for positions of rope_type {kind}")
    return theta, None if kind == "default" else _rope_scaling(inner, kind, length)


def scaled_positions(kind: str, length: int, wanted: int) -> RopeScaling:
    """The scaling of `kind` that makes `wanted` positions of `length`, with transformers' defaults."""
    given: dict[str, Any] = {"rope_type": kind, "factor": wanted / length}
    if kind == "yarn":  # the others have no such key: linear needs none, dynamic takes max_position_embeddings
        given["original_max_position_embeddings"] = length
    # A file with linear positions has no other length than max_position_embeddings, which is raised.
    return _rope_scaling(JsonObject(given, "rope_scaling", ConfigError), kind, wanted if kind == "linear" else length)


def written_rope(theta: float, scaling: RopeScaling | None, with_parameters: bool) -> dict[str, Any]:
    """What a config.json says about positions. Transformers 5 reads rope_parameters (`with_parameters`: -PT), older
    readers the top-level rope_theta and rope_scaling.
    """
    given = {} if scaling is None else dict(scaling.given)
    out: dict[str, Any] = {"rope_theta": theta}
    if scaling is not None and scaling.kind == "dynamic":
        out["max_position_embeddings"] = scaling.length  # readers scale the positions beyond it
    if with_parameters:
        out["rope_parameters"] = {"rope_type": "default", "rope_theta": theta} | given
    return out | ({"rope_scaling": given | {"rope_theta": theta}} if given else {})


def _kind(rope: JsonObject) -> str | None:
    """The type of positions by either of its names."""
    return rope.get_text("rope_type", None) or rope.get_text("type", None)


def _rope_scaling(inner: JsonObject, kind: str, length: int) -> RopeScaling:
    """Scaling by the keys in `inner`; see _KEYS. Defaults are those of transformers."""
    assert kind in ("linear", "dynamic", "yarn")
    factor = inner.get_number("factor", None, 1, 1e6)
    original = inner.get_int("original_max_position_embeddings", length, 1, 1 << 40)
    if factor is None and kind == "yarn" and "original_max_position_embeddings" in inner:
        factor = length / original
    if factor is None:
        raise inner.error(f"{inner.where}: factor: {kind} positions need it. Copy config.json again from its source.")
    if kind == "dynamic" and original != length:  # which transformers takes from max_position_embeddings alone
        raise inner.error(
            f"{inner.where}: original_max_position_embeddings: {original}, but dynamic positions are scaled beyond "
            f"max_position_embeddings, {length}. Remove it, or make them equal."
        )
    beta_fast, beta_slow = (inner.get_number(name, 0, 0, 1e6) or usual for name, usual in _BETAS)
    given: dict[str, Any] = {"rope_type": kind, "factor": factor}
    given |= {name: inner.values[name] for name in _KEYS[kind] if inner.values.get(name) is not None}
    if kind == "yarn":  # by default max_position_embeddings, which a key may raise before the file is written
        given["original_max_position_embeddings"] = original
    return RopeScaling(
        kind=kind,  # type: ignore[arg-type]
        factor=float(factor),
        length=original,
        attention_factor=_attention_factor(inner, factor) if kind == "yarn" else 1.0,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=bool(inner.get_bool("truncate", True)),
        given=tuple(given.items()),
    )


def _attention_factor(inner: JsonObject, factor: float) -> float:
    """What yarn multiplies queries and keys by: 0.1 log(factor) + 1 unless the file says otherwise."""

    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    own = inner.get_number("attention_factor", None, 1e-3, 1e3)
    if own is not None:
        return float(own)
    mscale, of_all = (inner.get_number(name, 0, 0, 1e3) for name in ("mscale", "mscale_all_dim"))
    return grown(mscale) / grown(of_all) if mscale and of_all else grown(1.0)
