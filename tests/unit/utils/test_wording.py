"""Numbers in messages."""

import pytest

from erniekit.utils.wording import count_of


@pytest.mark.parametrize(
    ("count", "noun", "expected"),
    [
        (0, ("row",), "0 rows"),
        (1, ("row",), "1 row"),
        (2, ("process", "processes"), "2 processes"),
        (1, ("tensor is", "tensors are"), "1 tensor is"),
        (1.0, ("epoch",), "1 epoch"),
        (0.96, ("epoch",), "0.96 epochs"),
        (2200.0, ("epoch",), "2200 epochs"),
    ],
)
def test_a_count_and_its_noun_agree(count, noun, expected):
    assert count_of(count, *noun) == expected
