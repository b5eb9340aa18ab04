"""docs/vision-data.md: every example line is read, or refused, as the page says."""

import re
from pathlib import Path

import pytest

from erniekit.data.records.readers import load_record
from erniekit.data.vision.formats import FORMATS, parse_vision_record
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.tags import FormatOptions
from erniekit.utils.errors import DataError

PAGE = (Path(__file__).resolve().parents[4] / "docs" / "vision-data.md").read_text("utf-8")
BLOCKS = re.findall(r"^```json (.+?)( refused)?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
LINES = [(kind, bool(refused), line) for kind, refused, block in BLOCKS for line in block.splitlines()]


def test_every_type_has_an_example():
    of_prompts = {kind for kind in FORMATS if kind.endswith("(RL)")}  # docs/rl-prompts.md has those
    assert {kind for kind, refused, _ in LINES if not refused} == set(FORMATS) - of_prompts
    assert PAGE.count("```json") == len(BLOCKS)


@pytest.mark.parametrize(("kind", "refused", "line"), LINES)
def test_an_example_is_read_or_refused_as_the_page_says(kind, refused, line, tmp_path):
    options = FormatOptions(MediaReader(tmp_path))
    record = load_record(line.encode(), "x:1")
    if not refused:
        parse_vision_record(record, kind, "x:1", options)
        return
    with pytest.raises(DataError, match=r"^x:1: .* Hint: "):
        parse_vision_record(record, kind, "x:1", options)
