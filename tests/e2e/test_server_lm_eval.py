"""lm-evaluation-harness against `erniekit server`: what it measures through `/v1/completions` is what it measures of
the model itself.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.benchmark_oracle import RECORDED, benchmark_model, lm_eval_scores

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4  # of sums of log-probabilities down to -25, in float32


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a server, and the directory of its model."""
    for package in ("lm_eval", "transformers", "aiohttp"):
        pytest.importorskip(package)
    directory = benchmark_model(tmp_path_factory.mktemp("served") / "tiny")
    words = [f"model_name_or_path={directory}", "compute_type=fp32", "port=0", "temperature=0"]
    process = subprocess.Popen([sys.executable, "-m", "erniekit", "server", *words], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"served at (http://\S+/v1)", line):
            break
    else:
        pytest.fail("".join(said))
    yield found[1], directory
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM


@pytest.mark.parametrize(("benchmark", "mode", "shots"), [("mmlu", "loglikelihood", 3), ("mmlu", "generate", 2)])
def test_lm_eval_measures_the_same_through_the_server(
    served: tuple[str, Path], tmp_path: Path, benchmark: str, mode: str, shots: int, monkeypatch: pytest.MonkeyPatch
):
    address, directory = served
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "EMPTY"}.items():
        monkeypatch.setenv(name, value)
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[f"{benchmark} {mode} {shots}"]
    found = lm_eval_scores(directory, tmp_path / "tasks", benchmark, mode, shots, server=address)
    for subject, expected in recorded["subjects"].items():
        answers = found["subjects"][subject]["answers"]
        if mode == "generate":
            # A random model writes bytes that are no characters. A stream shows what follows them otherwise.
            for ours, theirs in zip(answers, expected["answers"], strict=True):
                assert ours.startswith(theirs.partition("\ufffd")[0])
            continue
        for ours, theirs in zip(answers, expected["answers"], strict=True):
            assert ours == pytest.approx(theirs, abs=TOLERANCE)
    assert found["accuracy"] == pytest.approx(recorded["accuracy"])
