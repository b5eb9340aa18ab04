"""The section `this machine` of `erniekit check`: what its processor or GPU cannot multiply."""

import pytest

from erniekit.cli.check import device
from erniekit.cli.check.report import Report
from erniekit.config import Config
from erniekit.nn import onednn


def findings(**keys: object) -> list[tuple[str, str]]:
    report = Report("train")
    device.inspect(report, Config(**keys))
    return [(finding.level, finding.text) for section in report.sections for finding in section.findings]


@pytest.mark.parametrize(("multiplies", "level"), [(False, "warning"), (True, "ok")])
def test_products_in_bf16_that_this_processor_lacks_are_a_warning(monkeypatch, multiplies: bool, level: str):
    monkeypatch.setattr(onednn, "multiplies_bf16", lambda: multiplies)
    [(found, text)] = findings(matmul_precision="bf16")
    assert found == level and text.startswith("matmul_precision: bf16: ")
    assert ("this processor has no bf16 products" in text) == (not multiplies)


def test_a_file_for_gpus_with_fp8_is_not_warned_of_but_the_refusal_is_said():
    [(level, text)] = findings(compute_type="bf16", fp8="blockwise")
    assert level == "note"
    assert text.startswith("fp8: blockwise: training on this machine would be refused: cpu has no products in FP8")


def test_nothing_is_said_where_every_machine_computes_what_the_run_asks_for():
    assert findings() == findings(compute_type="bf16", fp8="blockwise", emulate_precision=True) == []
