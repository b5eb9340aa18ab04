"""Every shipped YAML loads, says how to use it, points to data that is there, and asks only for what may be missing."""

import re
from pathlib import Path

import pytest
import yaml

from erniekit.config import Config, load, unsupported

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "examples" / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
COMMANDS = {"run_chat": "chat", "run_eval": "eval", "run_export": "export"}  # all others: train
TEXT_MODELS = ("0.3B", "21B-A3B", "21B-A3B-Thinking", "300B-A47B")

# What a shipped file may ask for although this version refuses it. Each line goes when its feature comes.
MISSING = (
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
    "expert_parallel_degree",
    "sharding_parallel_degree",
)


# Directories that `make demo-pretrain` leaves for the next file.
MADE_BY_DEMOS = ("./demo_output/pretrain/text", "./demo_output/dense")


def command_of(name: str) -> str:
    return COMMANDS.get(Path(name).stem, "train")


def read(name: str) -> Config:
    return load(str(CONFIGS / name), None, command_of(name))


def header(name: str) -> str:
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def test_the_text_models_have_erniekits_files():
    wanted = {"tiny/sft/run_sft_dense.yaml", "tiny/sft/run_sft_moe.yaml"}
    for model in TEXT_MODELS:
        names = ["run_chat", "run_eval", "run_export", *(f"sft/run_sft_{length}" for length in ("8k", "32k", "128k"))]
        wanted |= {f"ERNIE-4.5-{model}/{name}.yaml" for name in names}
    wanted |= {f"ERNIE-4.5-{model}/pt/run_pt_8k.yaml" for model in ("0.3B", "21B-A3B", "300B-A47B")}
    wanted |= {"ERNIE-4.5-0.3B/pt/run_pt_8k_offline_data.yaml", "tiny/dpo/run_dpo.yaml", "tiny/dpo/run_dpo_lora.yaml"}
    assert wanted <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_it_loads_and_saves(name, tmp_path):
    cfg = read(name)
    (tmp_path / "config.yaml").write_text(cfg.to_yaml(), encoding="utf-8")
    assert load(str(tmp_path / "config.yaml"), None, command_of(name)) == cfg


@pytest.mark.parametrize("name", FILES)
def test_it_asks_only_for_what_is_known_to_be_missing(name):
    asked = unsupported(read(name), command_of(name))
    assert [line for line in asked if line.partition(":")[0] not in MISSING] == []
    if name.startswith(("tiny/", "ERNIE-4.5-0.3B/")):
        assert asked == []


@pytest.mark.parametrize("name", FILES)
def test_its_header_says_what_it_needs_and_how_to_start_it(name):
    text = header(name)
    assert text.startswith("# ") and len(text.splitlines()[0]) > 30
    for word in ("# Needs:", "# Model:", "# Start:", "# Override:"):
        assert f"\n{word}" in text, word
    path = f"examples/configs/{name}"
    assert f"# Start:    erniekit {command_of(name)} {path}\n" in text
    override = re.search(rf"# Override: erniekit {command_of(name)} {re.escape(path)} (.+)", text)
    assert override, "the header shows no override"
    load(str(CONFIGS / name), override.group(1).split(), command_of(name))


@pytest.mark.parametrize("name", FILES)
def test_figures_for_gpus_say_whose_they_are(name):
    needs = " ".join(header(name).replace("#", " ").split())
    if "80 GB" in needs:
        assert "ERNIEKit" in needs and "measured" in needs


@pytest.mark.parametrize("name", FILES)
def test_its_model_and_data_are_there_or_have_a_hub_name(name):
    cfg = read(name)
    for path in (cfg.train_dataset_path, cfg.eval_dataset_path):
        assert path is None or (path.startswith("./") and (ROOT / path).is_file()), path
    for prefix in re.findall(r"\./[\w./-]+", cfg.input_dir or ""):
        # token files depend on the model's tokenizer: where none are shipped, the header says how to come by them
        assert "token files" in header(name) or (ROOT / f"{prefix}.idx").is_file(), prefix
    model = cfg.model_name_or_path
    assert model, "the model is not named"
    if model.startswith("."):
        assert (ROOT / model / "config.json").is_file() or model in MADE_BY_DEMOS, model
    else:
        assert re.fullmatch(r"baidu/ERNIE-4\.5-[\w.-]+", model), model
        assert model in header(name) or command_of(name) == "export"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("ERNIE")])
def test_it_is_named_after_its_model_and_length(name):
    cfg = read(name)
    assert cfg.model_name_or_path is not None
    assert name.split("/")[0] == cfg.model_name_or_path.removeprefix("baidu/").removesuffix("-Paddle")
    length = re.search(r"_(\d+)k\.yaml", name)
    if length:
        assert cfg.max_seq_len == int(length.group(1)) * 1024
    assert cfg.stage == ("PT" if "/pt/" in name or "/pretrain/" in name else "SFT")


@pytest.mark.parametrize("name", FILES)
def test_no_key_is_noise(name):
    """Keys without effect stay out, but for those that tell a reader what the file is for."""
    shown = {"sharding", "sequence_parallel", *MISSING}
    keys = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    without_effect = {key for key, _ in read(name).extras}
    assert without_effect <= shown and without_effect <= set(keys)
