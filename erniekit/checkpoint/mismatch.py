"""Formats lists of missing, unexpected and misshapen tensors for error messages."""

from collections.abc import Iterable, Mapping

_SHOWN = 8  # names listed of each kind


def listed(names: Iterable[str], limit: int = 5, separator: str = ", ") -> str:
    """The first `limit` names, and how many more there are."""
    names = list(names)
    return separator.join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def mismatch_lines(by_kind: Mapping[str, list[str]]) -> list[str]:
    """A line for each kind ("missing", "unexpected", ...) of which there are any."""
    return [f"  {len(names)} {kind}: {listed(names, _SHOWN, '; ')}" for kind, names in by_kind.items() if names]
