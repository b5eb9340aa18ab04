"""What `erniekit check` says about the disk."""

import pytest

from erniekit.cli.check.output import _size


@pytest.mark.parametrize(
    ("count", "shown"), [(999, "999 B"), (999_400, "999 kB"), (999_700, "1 MB"), (2.5e12, "2.5 TB")]
)
def test_a_size_has_three_digits_and_its_unit(count: float, shown: str):
    assert _size(count) == shown
