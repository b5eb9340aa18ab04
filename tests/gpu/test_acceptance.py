"""The script for the first run on a GPU (tools/gpu_acceptance.py), as far as it runs without one."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import paddle
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "gpu_acceptance.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_acceptance", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="this Paddle may have a GPU")
def test_without_a_gpu_it_refuses_and_says_why():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no GPU: this Paddle" in done.stderr and "paddlepaddle-gpu" in done.stderr and "--device cpu" in done.stderr


def test_a_wrong_operator_and_a_refusing_one_are_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    def differs() -> dict[str, np.ndarray]:
        return {"y": np.ones(3) + 0.1 * script.fused._enabled}

    def refuses() -> dict[str, np.ndarray]:
        raise RuntimeError("unaligned")

    def has_nan() -> dict[str, np.ndarray]:
        """In the first of two tensors: the largest of several numbers does not show it."""
        bad = np.array([np.nan if script.fused._enabled else 1.0, 1.0])
        return {"gradient": bad, "result": np.ones(2)}

    def has_nan_both_ways() -> dict[str, np.ndarray]:
        return {"result": np.full(2, np.nan)}

    def finds_something_in_nothing() -> dict[str, np.ndarray]:
        return {"result": np.full(2, 1e-9 * script.fused._enabled)}

    runs = {"same": lambda: {"y": np.ones(3)}, "differs": differs, "refuses": refuses}
    runs |= {"nan": has_nan, "nans": has_nan_both_ways, "zeros": finds_something_in_nothing}
    runs |= {"nothing": lambda: {"result": np.zeros(2)}}
    monkeypatch.setattr(script, "cases", lambda on_gpu: runs)
    lines = {line.split()[0]: line for line in script.operators_table(False)}
    for name in ("nan", "nans", "zeros"):
        assert "WRONG" in lines[name] and " inf " in lines[name], lines[name]
    assert " gradient " in lines["nan"] and " ok " in lines["nothing"]
    assert " ok " in lines["same"] and "WRONG" in lines["differs"] and "1.00e-01" in lines["differs"]
    assert "FAILED RuntimeError: unaligned" in lines["refuses"]
    assert script.fused._enabled


def test_every_fused_operator_is_in_one_of_its_cases(script: ModuleType):
    names = set(script.cases(False))
    assert names == {
        *("RMSNorm", "rotation, far positions", "SwiGLU", "attention, four documents", "products of experts"),
        *("weights in 8 bits", "weights in 4 bits", "weights in 4 bits, one token", "sparse layer", "head and loss"),
    }
    assert len(script.fused.OPERATORS) == 8  # permute and unpermute are in the sparse layer
