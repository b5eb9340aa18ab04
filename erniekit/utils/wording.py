"""Words for messages."""


def count_of(count: float, singular: str, plural: str = "") -> str:
    """A number with its noun, such as 1 row or 2 rows; `plural` is needed if it is not `singular` with an s."""
    number = f"{count}"
    if isinstance(count, float):
        number = f"{count:.3g}" if abs(count) < 1000 else f"{count:.0f}"
    return f"{number} {singular if count == 1 else plural or f'{singular}s'}"
