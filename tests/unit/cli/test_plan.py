"""`erniekit plan`: what it prints and writes, and which requests it refuses."""

import json
from pathlib import Path

import pytest
from support.source_tree import REPOSITORY

from erniekit.cli import plan
from erniekit.config import load
from erniekit.nn import onednn
from erniekit.plan.calibrate import Measured, calibrate
from erniekit.plan.hardware import load_hardware
from erniekit.utils.errors import ConfigError

CONFIGS = REPOSITORY / "examples" / "configs"
PRETRAIN_96 = str(CONFIGS / "ERNIE-4.5-300B-A47B" / "pretrain" / "pretrain_96_gpus.yaml")
SFT_SMALL = str(CONFIGS / "ERNIE-4.5-0.3B" / "sft" / "run_sft_8k.yaml")


def test_a_plan_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Text, JSON and chart of a model that nobody has downloaded. The chart is a PNG file under any name."""
    files = [f"json={tmp_path / 'plan.json'}", f"chart={tmp_path / 'plan.chart'}"]
    assert plan.run([SFT_SMALL, "gpus=1", "gpu=H800", "tokens=1e9", "recompute=true", *files]) == 0
    text = capsys.readouterr().out
    for expected in (
        "FITS",
        " kernels with ",
        "0.36 B parameters",
        "1 x H800",
        "GPU-hours",
        "MFU",
        "assumptions:",
        "largest on stage 0",
    ):
        assert expected in text
    values = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    stage = values["stages"][0]
    assert values["fits"] and sum(stage["bytes"].values()) == pytest.approx(stage["peak"], abs=len(stage["bytes"]))
    assert stage["bytes"]["parameters"] == 2 * 360_748_032
    assert values["seconds"] and values["mfu"]["full"] >= values["mfu"]["causal"] > 0
    assert (tmp_path / "plan.chart").read_bytes().startswith(b"\x89PNG")


def test_keys_without_effect_are_named(capsys: pytest.CaptureFixture[str]):
    plan.run([SFT_SMALL, "gpus=1", "recompute_granularity=moe"])
    assert "recompute_granularity: no effect: recompute is False" in capsys.readouterr().err


def test_a_reward_model_is_planned_with_its_score_head():
    cfg = load(SFT_SMALL, ["stage=RM"], "train")
    model = plan.job_of(cfg, plan.PlanOptions(gpus=1), load_hardware("H800", None)).model
    assert model.has_score_head


def test_a_plan_for_a_cpu_says_where_its_numbers_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    calibrate(tmp_path / "mine.yaml", "CPU", Measured({64: 1e10, 256: 6e10, 1024: 8e10}, 12e9, 5e-6, 9e9))
    tiny = [str(CONFIGS / "tiny" / "sft" / "run_sft_dense.yaml"), "gpu=cpu", "gpus=1"]
    plan.run(tiny)
    text = capsys.readouterr().out
    assert "are placeholders" in text and "0.86 M parameters" in text
    plan.run([*tiny, f"hardware={tmp_path / 'mine.yaml'}"])
    assert "are placeholders" not in capsys.readouterr().out


def test_a_plan_for_this_processor_says_that_it_has_no_products_in_bf16(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    tiny = [str(CONFIGS / "tiny" / "sft" / "run_sft_dense.yaml"), "gpu=cpu", "matmul_precision=bf16"]
    for multiplies in (True, False):
        monkeypatch.setattr(onednn, "multiplies_bf16", lambda answer=multiplies: answer)
        plan.run(tiny)
        said = capsys.readouterr().out
        assert "matmul_precision: bf16: memory and time are planned as for fp32" in said
        assert ("matmul_precision: bf16: training on this machine would be refused" in said) == (not multiplies)


def test_a_published_text_model_gets_the_vision_part_that_is_added_to_it():
    """By the name of the published model that vision_config_path ends in: nothing has been downloaded."""
    path = str(CONFIGS / "ERNIE-4.5-VL-28B-A3B" / "pretrain" / "stage2_vision.yaml")
    card = load_hardware("H800", None)
    model = plan.job_of(load(path, [], "train"), plan.PlanOptions(), card).model
    assert model == plan.published_shape("baidu/ERNIE-4.5-VL-28B-A3B-Base-Paddle")
    other = load(path, ["vision_config_path=./models/ERNIE-4.5-VL-424B-A47B-Base-Paddle"], "train")
    with pytest.raises(ConfigError, match=r"vision_config_path: .*other sizes"):
        plan.job_of(other, plan.PlanOptions(), card)


def test_a_cpu_runs_all_processes_of_the_degrees_on_one_host(capsys: pytest.CaptureFixture[str]):
    """As `erniekit train` starts them; only GPUs are eight in a host."""
    plan.run([str(CONFIGS / "tiny" / "sft" / "run_sft_dense.yaml"), "gpu=cpu", "data_parallel_degree=9"])
    assert "9 x cpu: 1 pipeline stage x 9 data ranks x 1 tensor rank;" in capsys.readouterr().out


def test_context_ranks_are_planned_as_each_device_has_them(capsys: pytest.CaptureFixture[str]):
    tiny = [str(CONFIGS / "tiny" / "sft" / "run_sft_dense.yaml"), "gpus=2", "context_parallel_degree=2"]
    assert plan.run([*tiny, "gpu=cpu"]) == 0
    assert plan.run([*tiny, "gpu=H800", "cp_comm_type=a2a"]) == 0
    assert "rows shared by 2 data ranks" in capsys.readouterr().out


def test_inputs_of_recomputed_layers_leave_the_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stages = []
    for offloads in ("false", "true"):
        file = tmp_path / f"{offloads}.json"
        words = ["gpus=1", "gpu=H800", "recompute=true", f"offload_activations={offloads}", f"json={file}"]
        plan.run([SFT_SMALL, *words])
        stages.append(json.loads(file.read_text("utf-8")))
    assert "host memory for what is offloaded" in capsys.readouterr().out
    kept, offloaded = (values["stages"][0] for values in stages)
    inputs = 18 * 2 * 8192 * 1024  # of 18 layers, 16 bits, 8192 tokens of 1024 features
    assert (kept["host_bytes"], offloaded["host_bytes"]) == (0, inputs)
    # At the peak, that of the head or of the layer that runs again, at most two inputs are on the device.
    assert inputs * 16 / 18 <= kept["bytes"]["activations"] - offloaded["bytes"]["activations"] <= inputs
    seconds = [values["seconds"].get("offload", 0.0) for values in stages]
    assert seconds[0] == 0 and seconds[1] > 0


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_to_change(capsys: pytest.CaptureFixture[str]):
    assert plan.run([SFT_SMALL, "gpus=1", "gpu=RTX4090", "batch_size=3"]) == 3
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text and "too much" in text
    assert "fits at the least cost with: " in text and "which fits; a step takes " in text
    assert "a step takes -" not in text  # steps of other sizes are compared by their tokens


def test_a_model_too_large_for_its_cluster_gets_the_least_one(capsys: pytest.CaptureFixture[str]):
    keys = [
        "gpus=12",
        "gpus_per_node=4",
        "expert_parallel_degree=1",
        "sharding_parallel_degree=1",
        "gradient_accumulation_steps=12",
    ]
    assert plan.run([PRETRAIN_96, *keys]) == 3
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if "the fewest that hold it: " in line]
    proposed = line.partition("the fewest that hold it: ")[2].partition(" (")[0].split()
    assert proposed[0].startswith("gpus=") and "batch_size=1" not in proposed  # what the file has already is not named
    assert plan.run([PRETRAIN_96, *keys[1:], *proposed]) == 0  # every key that it needs is named


def test_a_search_lists_the_fastest_layouts_that_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    words = [SFT_SMALL, "gpus=4", "gpu=H800", "gradient_accumulation_steps=4", "search=true", f"json={tmp_path / 'p'}"]
    assert plan.run(words) == 0
    assert "the fastest layouts that fit, of" in (text := capsys.readouterr().out)
    assert "that may by a lower bound of their memory" in text  # most of these are never planned in full
    found = json.loads((tmp_path / "p").read_text("utf-8"))["search"]
    assert [each["step_seconds"] for each in found] == sorted(each["step_seconds"] for each in found)
    assert all(each["headroom"] > 0 and each["binds"] for each in found)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gpu=H80"], "H800"),
        (["gpu=TPUv9"], "is not in the hardware table"),
        (["gpus=0"], "expected a whole number from 1"),
        (["gpus=-8"], "expected a whole number from 1"),
        (["gpus=eight"], "expected a whole number from 1"),
        (["gpus=99999999999"], "expected a whole number from 1"),
        (["gpus=12", "gpus_per_node=8"], "do not make whole hosts"),
        (["gpus=8", "tensor_parallel_degree=3"], "there are 8"),
        (["gpus=8", "tensor_parallel_degree=4"], "key-value heads"),
        (["memory=-1"], "expected a positive number"),
        (["memory=nan"], "expected a positive number"),
        (["tokens=1e99"], "expected a positive number"),
        (["picture_tokens=100"], "the model has no vision"),
        (["document_tokens=100000"], "is more than a row"),
        (["gpu=V100", "compute_type=bf16"], "V100 has no bf16 units"),
        (["gpu=V100", "compute_type=wint8", "fine_tuning=LoRA"], "wint8: it computes in bf16, and V100 has no bf16"),
        (["emulate_precision=true"], "emulate_precision: it is for a CPU; training on H800, which has bf16 itself"),
        (["gpu=A100", "fp8=blockwise"], "A100 has no FP8 units"),
        (["stage=VL-SFT"], "is a model of text alone"),
        (["frozen_parameters=nothing"], "nothing means no parameter of this model"),
        (["gpu=L40S", "fp8=blockwise"], "this GPU has compute capability 8.9"),
        (["gpu=B200", "fp8=blockwise"], "this GPU has compute capability 10.0"),
        (["fp8=rowwise"], "kernels have blocks only"),
        (["fp8=blockwise", "fp8_gradients=e5m2"], "E4M3 only"),
        (["fp8=blockwise", "compute_type=fp16"], "not fp16"),
        (["fp8=blockwise", "emulate_precision=true"], "emulated on H800"),
        (["recompute=true", "recompute_granularity=selective", "recompute_modules=atention"], "did you mean attention"),
        (["json=/nowhere/at/all.json"], "a directory that exists"),
        (["model_name_or_path=baidu/ERNIE-4.5-0.4B"], "nearest name is baidu/ERNIE-4.5-0.3B"),
        (["gpuz=8"], "gpuz=8: the options of `erniekit plan` are gpus, .*; did you mean gpu?"),
        (["gpus=2", "context_parallel_degree=2"], "cp_comm_type: p2p: .* for CPUs; training on H800 would be refused"),
        (["matmul_precision=bf16"], "matmul_precision: bf16: it is for a CPU; training on H800 would be refused"),
    ],
)
def test_bad_requests_are_refused(words: list[str], expected: str):
    with pytest.raises(ConfigError, match=expected):
        plan.run([SFT_SMALL, *words])


def test_a_model_that_fits_on_no_cluster_is_called_that(capsys: pytest.CaptureFixture[str]):
    assert plan.run([SFT_SMALL, "memory=0.01"]) == 3
    assert "no cluster of up to 16,384" in capsys.readouterr().out


def test_nothing_to_plan_is_refused():
    with pytest.raises(ConfigError, match="Missing configuration file"):
        plan.run(["gpus=8"])


def test_a_measurement_replaces_a_file_only_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    measured = Measured({64: 1e10, 256: 6e10}, 12e9, 5e-6, 9e9)
    monkeypatch.setattr("erniekit.plan.calibrate.measure", lambda: measured)
    path = tmp_path / "sft.yaml"
    path.write_text("stage: SFT\n")
    with pytest.raises(ConfigError, match=r"sft\.yaml: the file exists\. Name another one, or add overwrite=true"):
        plan.run(["calibrate", str(path)])
    assert path.read_text() == "stage: SFT\n"
    assert plan.run(["calibrate", str(path), "overwrite=true"]) == 0
    assert load_hardware("cpu", path).peak("fp32") == pytest.approx(6e10)
    assert f"use it with hardware={path}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="takes the file to write"):
        plan.run(["calibrate", "overwrite=true"])
