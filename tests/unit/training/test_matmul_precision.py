"""`matmul_precision: bf16`: products that round their factors train as fp32 does; and what is refused."""

from pathlib import Path

import pytest
from support import equality, sixteen_bits
from support.sixteen_bits import CASES, keys_of

from erniekit import config
from erniekit.nn import factors, onednn
from erniekit.precision import policy
from erniekit.training.run import train
from erniekit.utils.errors import ConfigError

# Of losses of 0.4 to 8.4 over five steps, which are up to 0.004 off. Without the gradients of the weights of
# projections, or of the inputs of gate and up, those of the case "mtp" were 0.42 and 0.12 off.
LOSS, NORM = 0.01, 0.02
QUICK = ("mtp", "lora", "vl")

can_multiply = pytest.mark.skipif(not onednn.multiplies_bf16(), reason="this processor has no bf16 products")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("matmul_precision")
    sixteen_bits.prepare(path)
    return path


def check(directory: Path, case: str) -> None:
    model, more = CASES[case]
    wide, narrow = (
        equality.train_some(keys_of(directory, model, "fp32", matmul_precision=precision, **more))["steps"]
        for precision in ("fp32", "bf16")
    )
    for mine, other in zip(narrow, wide, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=LOSS)
        assert mine["norm"] == pytest.approx(other["norm"], rel=NORM)
    assert narrow != wide
    losses, norms = ([(mine[key], other[key]) for mine, other in zip(narrow, wide)] for key in ("loss", "norm"))
    furthest = max(abs(mine - other) for mine, other in losses), max(abs(mine / other - 1) for mine, other in norms)
    print(f"{case}: losses within {furthest[0]:.4f} of fp32's, norms within {furthest[1]:.2%}")


@can_multiply
@pytest.mark.parametrize("case", QUICK)
def test_a_run_trains_as_in_fp32(directory: Path, case: str):
    check(directory, case)


@can_multiply
@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK])
def test_so_does_every_method(directory: Path, case: str):
    check(directory, case)


@can_multiply
def test_the_command_rounds_factors_during_its_run_and_says_so(
    directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    keys = keys_of(directory, "dense", "fp32", max_steps=2, output_dir=str(tmp_path / "out"))
    wide, narrow = (
        train(config.load(None, keys | {"matmul_precision": precision, "overwrite_output_dir": True}, "train"))
        for precision in ("fp32", "bf16")
    )
    said = "matmul_precision: bf16: products of projections, experts, adapters and the head round their factors to bf16"
    assert capfd.readouterr().err.count(said) == 1
    losses = [[step["loss"] for step in run.history] for run in (wide, narrow)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=LOSS)
    assert not factors.are_rounded()


@can_multiply
def test_a_run_resumes_bit_for_bit(directory: Path, tmp_path: Path):
    def losses(out: str, steps: int) -> list[float]:
        given = {"output_dir": str(tmp_path / out), "max_steps": steps, "matmul_precision": "bf16"}
        more = given | {"save_steps": 2, "lr_scheduler_type": "constant"}
        return [
            step["loss"]
            for step in train(config.load(None, keys_of(directory, "moe", "fp32", **more), "train")).history
        ]

    assert losses("parts", 2) + losses("parts", 4) == losses("whole", 4)


def test_a_gpu_and_a_processor_without_the_instructions_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"matmul_precision: bf16: .* on a CPU, and this run is on gpu:0\. Remove it"):
        policy.products("bf16", "gpu:0").__enter__()
    monkeypatch.setattr(onednn, "multiplies_bf16", lambda: False)
    with pytest.raises(ConfigError, match="matmul_precision: bf16: this processor has no bf16 products"):
        policy.products("bf16", "cpu").__enter__()
    with policy.products("fp32", "cpu"):
        assert not factors.are_rounded()


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"compute_type": "bf16", "emulate_precision": True}, "have 16-bit factors already"),
        ({"compute_type": "wint8", **sixteen_bits.LORA}, "multiplies by the base of compute_type: wint8 in fp32"),
    ],
)
def test_products_that_have_another_precision_anyway_are_refused(directory: Path, keys: dict, problem: str):
    with pytest.raises(ConfigError, match=f"matmul_precision: bf16: .*{problem}"):
        config.load(None, keys_of(directory, "dense", "fp32", matmul_precision="bf16") | keys, "train")
