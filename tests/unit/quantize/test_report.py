"""The report of a quantisation: its numbers, and that its picture is drawn from any of them."""

import json
import math

import pytest

from erniekit.quantize.report import (
    PICTURE_FILE,
    REPORT_FILE,
    REPORT_FILES,
    MatrixLoss,
    Written,
    build,
    error_of,
    write,
)

WRITTEN = Written("wint4/8", "rtn", "pt", 2000, 4000, 1600)
LOSSES = [
    MatrixLoss("a", 0, "attention", 400, 400, 1.0, 10000.0),
    MatrixLoss("b", 1, "experts", 400, 200, 4.0, 400.0),
    MatrixLoss("c", 1, "experts", 800, 400, 100.0, 2500.0),
    MatrixLoss("d", 1, "attention", 0, 0, 0.0, 0.0),
]


def test_errors_are_of_all_weights_together_and_bits_count_the_scales():
    report = build(WRITTEN, LOSSES)
    assert report["weights"] == {"model": 2000, "quantised": 1600}
    assert report["bits_per_weight"] == {"quantised": 5.0, "model": 6.4}
    assert report["error"]["all"] == pytest.approx(math.sqrt(105 / 12900))
    assert report["error"]["by_kind"] == pytest.approx({"attention": 0.01, "experts": math.sqrt(104 / 2900)})
    rows = {(row["layer"], row["kind"]): row for row in report["error"]["by_layer"]}
    assert rows[1, "experts"]["worst"] == "c" and rows[1, "experts"]["worst_error"] == pytest.approx(0.2)
    assert rows[1, "experts"]["bits"] == 4.0 and rows[0, "attention"]["bits"] == 8.0
    assert error_of([LOSSES[3]]) == 0


MEASURED = {
    "rows": 2,
    "tokens": 90,
    "layers": [
        {"number": 0, "seconds": 1.0, "expert_tokens": {}, "notes": [], "matrices": []},
        {
            "number": 1,
            "seconds": 2.5,
            "expert_tokens": {0: [90, 0], 1: [3, 4]},
            "notes": ["one expert without tokens"],
            "matrices": [
                {"name": "b", "output_error": 0.3, "note": ""},
                {"name": "c", "output_error": 0.4, "note": "rtn: no tokens"},
                {"name": "d", "output_error": None, "note": ""},
            ],
        },
    ],
}


def test_what_calibration_measured_is_in_the_report():
    report = build(WRITTEN, LOSSES, MEASURED)
    assert report["calibration"] == {
        "rows": 2,
        "tokens": 90,
        "seconds": 3.5,
        "expert_tokens": {"1": [90, 0], "1.vision": [3, 4]},
        "notes": ["layer 1: one expert without tokens", "c: rtn: no tokens"],
    }
    outputs = {(row["layer"], row["kind"]): row.get("output_error") for row in report["error"]["by_layer"]}
    assert outputs == {(0, "attention"): None, (1, "attention"): None, (1, "experts"): pytest.approx(0.125**0.5)}


EVALUATED = {"loss": 0.25, "perplexity": math.exp(0.25), "num_samples": 4}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"evaluation": {"data": ["x"], "before": EVALUATED, "after": EVALUATED | {"exact_match": 1.0}}},
        {
            "evaluation": {"data": ["x"], "before": EVALUATED, "after": EVALUATED},
            "routing": {"tokens": 3, "unchanged": 0.5, "kept": 0.75, "by_layer": {str(n): 0.5 for n in range(54)}},
        },
    ],
    ids=["errors alone", "dense", "sparse"],
)
def test_report_and_picture_are_written(tmp_path, more):
    report = build(WRITTEN, LOSSES, MEASURED if "routing" in more else None) | more
    write(report, tmp_path)
    assert json.loads((tmp_path / REPORT_FILE).read_text()) == report
    assert (tmp_path / PICTURE_FILE).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == set(REPORT_FILES)  # which the next export removes


def test_a_picture_that_cannot_be_drawn_is_not_announced(tmp_path, monkeypatch, caplog):
    def draw(*args):
        raise OSError("no space left")

    monkeypatch.setattr("erniekit.quantize.picture.draw", draw)
    write(build(WRITTEN, LOSSES), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [REPORT_FILE]
    assert f"{PICTURE_FILE} could not be drawn" in caplog.text
    assert caplog.messages[-1] == f"report: {tmp_path / REPORT_FILE}"
