"""Every shipped YAML loads, says how to use it, points to data that is there, and asks for nothing that is missing."""

import re
from pathlib import Path

import pytest

from erniekit.config import Config, load, unsupported
from erniekit.models.config import ModelConfig
from erniekit.models.pipeline_layout import check_layout
from erniekit.parallel.mesh import ParallelDims
from erniekit.plan.shapes import NAMES, THINKING, published_values

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "examples" / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
COMMANDS = {"run_chat": "chat", "run_eval": "eval", "run_export": "export"}  # all others: train
TEXT_MODELS = ("0.3B", "21B-A3B", "21B-A3B-Thinking", "300B-A47B")
SIZES = {name: published_values(name) for name in NAMES}
SIZES |= {f"{name}-Thinking": SIZES[name] for name in THINKING}

# ERNIEKit's files of LoRA, of a low-bit base, of DPO, of function calls and with pictures: model, name, lengths.
ADAPTED_AND_PREFERRED = """
0.3B sft/run_sft_lora 8k,32k,128k
0.3B sft/run_sft_wint8mix_lora 8k,32k
0.3B dpo/run_dpo 8k,32k,128k
0.3B dpo/run_dpo_lora 8k,32k,128k
21B-A3B sft/run_sft_lora 8k,32k,128k
21B-A3B sft/run_sft_wint8mix_lora 8k,32k,128k
21B-A3B dpo/run_dpo 8k,32k,128k
21B-A3B dpo/run_dpo_lora 8k,32k,128k
21B-A3B dpo/run_dpo_wint8mix_lora 8k,32k,128k
21B-A3B fc/run_fc 8k
21B-A3B fc/run_fc_lora 8k
21B-A3B-Thinking fc/run_fc 8k
21B-A3B-Thinking fc/run_fc_lora 8k
21B-A3B-Thinking sft/run_sft_lora 8k,32k,128k
21B-A3B-Thinking sft/run_sft_wint8mix_lora 8k,32k,128k
300B-A47B sft/run_sft_lora 8k,32k
300B-A47B sft/run_sft_wint8mix_lora 8k,32k,128k
300B-A47B dpo/run_dpo 8k,32k,128k
300B-A47B dpo/run_dpo_lora 8k,32k,128k
300B-A47B dpo/run_dpo_wint8mix_lora 8k,32k,128k
VL-28B-A3B sft/run_sft 8k,32k,128k
VL-28B-A3B sft/run_sft_lora 8k,32k,128k
VL-28B-A3B-Thinking sft/run_sft 8k,32k,128k
VL-28B-A3B-Thinking sft/run_sft_lora 8k,32k,128k
VL-28B-A3B-Thinking sft_function_call/run_sft 8k,32k,128k
VL-28B-A3B-Thinking sft_function_call/run_sft_lora 8k,32k,128k
VL-424B-A47B sft/run_sft_lora 8k,32k
VL-424B-A47B sft/run_sft_wint8mix_lora 8k,32k,128k
""".strip().splitlines()

# Directories that the demos leave for the next file.
MADE_BY_DEMOS = (
    *(f"./demo_output/pretrain/{name}" for name in ("text", "long", "vision", "joint")),
    "./demo_output/dense",
    "./demo_output/moe",
    "./demo_output/styles",
    "./demo_output/rl/sft",
    "./demo_output/rl_pictures/box_sft",
    "./demo_output/rl_pictures/zoom_sft",
    "./demo_output/dpo",
    "./demo_output/vl/stage1_text",
    "./demo_output/vl/stage2_vision",
    "./demo_output/vl/stage3_joint",
)
# Directories of data, and what makes it.
MADE_DATA = {"./demo_output/vl/data": "make demo-vl", "./demo_output/rl_pictures": "tools/make_rl_picture_data.py"}


def command_of(name: str) -> str:
    return COMMANDS.get(Path(name).stem, "train")


def read(name: str) -> Config:
    return load(str(CONFIGS / name), None, command_of(name))


def header(name: str) -> str:
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def test_the_models_have_erniekits_files():
    wanted = {f"tiny/sft/run_sft_{name}.yaml" for name in ("dense", "moe", "fc")}
    for model in TEXT_MODELS:
        names = ["run_chat", "run_eval", "run_export", *(f"sft/run_sft_{length}" for length in ("8k", "32k", "128k"))]
        wanted |= {f"ERNIE-4.5-{model}/{name}.yaml" for name in names}
    for name in ADAPTED_AND_PREFERRED:
        model, kind, lengths = name.split()
        wanted |= {f"ERNIE-4.5-{model}/{kind}_{length}.yaml" for length in lengths.split(",")}
    uses = ("run_chat", "run_eval", "run_export")
    wanted |= {f"ERNIE-4.5-{model}/{use}.yaml" for model in SIZES if model.startswith("VL") for use in uses}
    wanted |= {f"ERNIE-4.5-{model}/pt/run_pt_8k.yaml" for model in ("0.3B", "21B-A3B", "300B-A47B")}
    stages = ("stage2_vision", "stage3_joint", "stage3_long")
    wanted |= {f"tiny/pretrain/{name}.yaml" for name in ("stage1_text", "stage1_long", *stages)}
    wanted |= {f"ERNIE-4.5-VL-{size}/pretrain/{name}.yaml" for size in ("28B-A3B", "424B-A47B") for name in stages}
    wanted |= {"ERNIE-4.5-0.3B/pt/run_pt_8k_offline_data.yaml", "tiny/dpo/run_dpo.yaml", "tiny/dpo/run_dpo_lora.yaml"}
    assert wanted <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_it_loads_and_saves(name, tmp_path):
    cfg = read(name)
    (tmp_path / "config.yaml").write_text(cfg.to_yaml(), encoding="utf-8")
    assert load(str(tmp_path / "config.yaml"), None, command_of(name)) == cfg


@pytest.mark.parametrize("name", FILES)
def test_nothing_that_it_asks_for_is_missing(name):
    assert unsupported(read(name), command_of(name)) == []


TRAINED = [name for name in FILES if name.startswith("ERNIE") and command_of(name) == "train"]


@pytest.mark.parametrize("name", TRAINED)
def test_its_degrees_divide_the_published_model_over_the_gpus_that_it_names(name):
    text = header(name)
    gpus = re.search(r"# Needs:    (\d+) GPUs? with 80 GB", text)
    assert gpus, "the header names no number of GPUs"
    assert "nothing here has run on a GPU" in " ".join(text.replace("#", " ").split())
    assert ("NNODES" in text) == (int(gpus.group(1)) > 8)
    cfg = read(name)
    degrees = ParallelDims.from_config(cfg, int(gpus.group(1)))
    check_layout(cfg, degrees, ModelConfig.from_dict(SIZES[name.split("/")[0].removeprefix("ERNIE-4.5-")]))


def test_the_published_layouts_of_pretraining():
    cases = {
        "300B-A47B/pretrain/pretrain_96_gpus": (96, ParallelDims(pipeline=12, data=8, expert=8, sharding=8)),
        "300B-A47B/pretrain/pretrain_2016_gpus": (2016, ParallelDims(pipeline=12, data=168, expert=8, sharding=168)),
        "21B-A3B/pretrain/pretrain_8_gpus": (8, ParallelDims(data=8, expert=8, sharding=8)),
    }
    for name, (gpus, degrees) in cases.items():
        assert ParallelDims.from_config(read(f"ERNIE-4.5-{name}.yaml"), gpus) == degrees


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
    for path in (*cfg.train_dataset_path, *cfg.eval_dataset_path):
        if (maker := MADE_DATA.get(path.rpartition("/")[0])) is not None:
            assert maker in header(name), path
            continue
        assert not path or (path.startswith("./") and (ROOT / path).is_file()), path
    for prefix in (word for word in cfg.input_dir if word.startswith("./")):
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
    model = cfg.model_name_or_path.removeprefix("baidu/").removesuffix("-Paddle")
    if name.split("/")[1] == "pretrain" and "-VL-" in name:
        model = name.split("/")[0] if cfg.vision_config_path else model.removesuffix("-Base")
    assert name.split("/")[0] == model
    length = re.search(r"_(\d+)k\.yaml", name)
    if length:
        assert cfg.max_seq_len == int(length.group(1)) * 1024
    stage = {"pt": "PT", "pretrain": "PT", "dpo": "DPO", "rl": "RL", "rm": "RM"}.get(name.split("/")[1], "SFT")
    if "-VL-" in name and command_of(name) in ("train", "eval"):
        stage = f"VL-{stage}"
    assert cfg.stage == stage
    assert (cfg.fine_tuning == "LoRA") == ("_lora" in name) and (cfg.compute_type == "wint4/8") == ("wint8mix" in name)


@pytest.mark.parametrize("name", FILES)
def test_no_key_is_noise(name):
    assert read(name).extras == ()


@pytest.mark.parametrize("name", FILES)
def test_no_key_is_pointless(name):
    """But for keys of the evaluation that is run with the same file."""
    assert [note for note in read(name).notes if not note.endswith("read by eval and chat")] == []


@pytest.mark.parametrize("name", [name for name in FILES if command_of(name) in ("chat", "eval")])
def test_no_header_says_that_a_degree_has_no_effect(name):
    """`chat` and `eval` run on as many ranks as the degrees ask for."""
    assert "one process" not in header(name) and "no effect" not in header(name)
