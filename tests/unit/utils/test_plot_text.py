"""Names of any script in plots: a font that has the characters, one log line without one, and never a formula."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erniekit.training.reporting import plot
from erniekit.utils import log, plot_text

RECORDS = [{"step": 1, "loss": 2.0, "learning_rate": 0.1}, {"step": 2, "loss": 1.0, "learning_rate": 0.1}]


def drawn(path: Path, title: str) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.draw(RECORDS, path, title)
    return np.asarray(Image.open(path))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "once", lines.append)
    return lines


def test_characters_come_from_another_font_or_one_line_says_that_none_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
):
    name = "\u231a\u2332"  # characters of STIXGeneral, which matplotlib brings along, and not of its default font
    monkeypatch.setattr(plot_text, "_FONTS", ("STIXGeneral",))
    readable = drawn(tmp_path / "a.png", name)
    assert said == []
    monkeypatch.setattr(plot_text, "_FONTS", ("No Such Font",))
    boxes = drawn(tmp_path / "b.png", name)
    assert said and set(said) == {said[0]} and "Install one, such as No Such Font" in said[0]
    assert readable.shape == boxes.shape and (readable != boxes).any()


def test_dollar_signs_of_a_name_are_no_formula(tmp_path: Path, said: list[str]):
    drawn(tmp_path / "a.png", r"cost_$\frac{$")  # as a formula it would be an error
