"""docs/data-formats.md: every example line is read, or refused, as the page says."""

import re
from pathlib import Path

import pytest

from erniekit.data.records.formats import FORMATS, PROMPT_FORMATS, parse_record
from erniekit.data.records.preference_formats import PREFERENCE_FORMATS
from erniekit.data.records.readers import load_record
from erniekit.utils.errors import DataError

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "data-formats.md").read_text("utf-8")
BLOCKS = re.findall(r"^```json (.+?)( refused)?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
LINES = [(kind, bool(refused), line) for kind, refused, block in BLOCKS for line in block.splitlines()]


def test_every_type_has_an_example():
    assert {kind for kind, refused, _ in LINES if not refused} == {*FORMATS, *PREFERENCE_FORMATS, *PROMPT_FORMATS}
    assert PAGE.count("```json") == len(BLOCKS)


@pytest.mark.parametrize(("kind", "refused", "line"), LINES)
def test_an_example_is_read_or_refused_as_the_page_says(kind, refused, line):
    if not refused:
        parse_record(load_record(line.encode(), "x:1"), kind, "x:1")
        return
    with pytest.raises(DataError, match=r"^x:1: .* Hint: "):
        parse_record(load_record(line.encode(), "x:1"), kind, "x:1")
