"""Boxes in the texts of data sets."""

import pytest

from erniekit.data.records.errors import BadRecord
from erniekit.data.vision.boxes import boxes_in, convert_text


@pytest.mark.parametrize("quote", ['"', "'"])
def test_either_kind_of_quotes(quote):
    """Answers are JSON, or Python's text of a dict."""
    text = f"[{{{quote}bbox_2d{quote}: [20, 10, 200, 100], {quote}label{quote}: {quote}cup{quote}}}]"
    converted = convert_text(text, "pixels", lambda: (200, 100), "an answer")
    assert converted == text.replace("[20, 10, 200, 100]", "[100, 100, 1000, 1000]")
    assert boxes_in(converted) == [[100, 100, 1000, 1000]]
    with pytest.raises(BadRecord, match="outside the picture"):
        convert_text(text, "fraction", lambda: (200, 100), "an answer")
