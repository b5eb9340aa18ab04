"""Spans of sorted rows."""

from erniekit.utils.spans import spans


def test_spans_follow_one_another_and_may_be_empty():
    assert spans([2, 0, 3]) == [(0, 2), (2, 2), (2, 5)]
    assert spans([]) == []
