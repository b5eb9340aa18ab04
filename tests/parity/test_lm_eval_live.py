"""The recorded scores of lm-evaluation-harness are what it computes; `erniekit eval` is compared with them in
tests/unit/evaluate/test_benchmark.py.
"""

import json
from pathlib import Path

import pytest
from support.benchmark_oracle import CASES, RECORDED, benchmark_model, lm_eval_scores

pytestmark = [pytest.mark.parity, pytest.mark.slow]


@pytest.mark.parametrize(("benchmark", "mode", "shots"), CASES)
def test_lm_eval_computes_what_is_recorded(
    tmp_path: Path, benchmark: str, mode: str, shots: int, monkeypatch: pytest.MonkeyPatch
):
    for package in ("torch", "transformers", "lm_eval"):
        pytest.importorskip(package)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[f"{benchmark} {mode} {shots}"]
    found = lm_eval_scores(benchmark_model(tmp_path / "model"), tmp_path / "tasks", benchmark, mode, shots)
    for subject, expected in recorded["subjects"].items():
        answers = found["subjects"][subject]["answers"]
        if mode == "generate":
            assert answers == expected["answers"]
            continue
        for ours, theirs in zip(answers, expected["answers"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)  # the same code on another processor or thread count
    assert {name: found[name] for name in ("accuracy", "stderr", "macro")} == pytest.approx(
        {name: recorded[name] for name in ("accuracy", "stderr", "macro")}
    )
