"""`erniekit check`: what it finds, what it says, and its exit codes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny_sizes
from support.source_tree import REPOSITORY
from support.tiny_directories import model_directory

from erniekit import config, lora
from erniekit.build import load_model
from erniekit.checkpoint.fingerprint import fingerprint
from erniekit.checkpoint.peft_attach import save_adapter
from erniekit.cli import check, launch
from erniekit.cli.check import data as check_data
from erniekit.cli.check import output as check_output
from erniekit.models.config import ModelConfig
from erniekit.parallel.mesh import Mesh
from erniekit.training.build import build_run
from erniekit.utils.errors import ConfigError, UserError

DENSE = str(REPOSITORY / "examples/models/tiny-dense")
MOE = str(REPOSITORY / "examples/models/tiny-moe")


def record(question: str, answer: str) -> str:
    return json.dumps({"src": [question], "tgt": [answer]})


@pytest.fixture
def given(tmp_path: Path):
    """Arguments of a run that is fine; keyword arguments replace keys."""
    (tmp_path / "train.jsonl").write_text("\n".join(record(f"q {i}", f"a {i}") for i in range(20)))
    (tmp_path / "eval.jsonl").write_text("\n".join(record(f"q {i}", f"a {i}") for i in range(90, 95)))
    base = {
        "model_name_or_path": DENSE,
        "continue_training": False,
        "fine_tuning": "Full",
        "train_dataset_path": tmp_path / "train.jsonl",
        "eval_dataset_path": tmp_path / "eval.jsonl",
        "do_eval": True,
        "max_seq_len": 64,
        "output_dir": tmp_path / "out",
    }

    def arguments(**keys: object) -> list[str]:
        return [f"{name}={value}" for name, value in {**base, **keys}.items() if value is not None]

    return arguments


def findings(args: list[str], level: str, command: str = "train") -> str:
    report = check.inspect(args, command)
    return "\n".join(f.text for section in report.sections for f in section.findings if f.level == level)


def test_a_run_that_is_fine(given, capsys, tmp_path):
    assert check.run(given()) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith("No errors and no warnings.")
    for line in (
        "8 keys given: 8 honoured, 0 without effect, 0 refused",
        "861,312 parameters, 4 layers; training starts at random (seed 42)",
        "one process; a step takes 1 row: 1 microbatch of 1 row",
        "chat template text: a trained answer ends with '</s>' (2)",
        "training: 20 steps; an epoch is 20 steps: 1 epoch",
        "no record of the evaluation is trained on",
        "nothing is there; a new run starts",
    ):
        assert line in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("truncation", "cure"), [("drop", "(raise it, or set truncation: cut)"), ("cut", "(raise it)")]
)
def test_many_dropped_samples_have_a_cure_that_is_not_in_force_already(given, tmp_path, truncation, cure):
    ignored = json.dumps({"src": ["q"], "tgt": ["a"], "label": [0]})
    (tmp_path / "train.jsonl").write_text("\n".join([ignored, *(record(f"q {i}", "a") for i in range(4))]))
    said = findings(given(truncation=truncation), "warning")
    assert f"20% of the samples are dropped: too long for max_seq_len {cure}, or without anything to learn" in said


def test_the_example_shows_what_is_trained(given):
    ok = findings(given(), "ok")
    assert "not trained: '<|begin_of_sentence|>User: q 0\\nAssistant: '\ntrained:     'a 0</s>'" in ok


def test_the_example_says_which_answer_is_the_better_one(given, tmp_path, capsys):
    pair = {"src": ["q"], "tgt": [], "response": [["worse"], ["better"]], "sort": [0, 1]}
    judged = [{"src": "q", "tgt": "a", "label": label} for label in (True, False)]
    for stage, records in (("DPO", [pair]), ("KTO", judged)):
        (tmp_path / f"{stage}.jsonl").write_text("\n".join(map(json.dumps, records)))
    args = {"eval_dataset_path": None, "do_eval": None}
    ok = findings([*given(stage="DPO", train_dataset_path=tmp_path / "DPO.jsonl", **args)], "ok")
    assert "trained, first the chosen answer, then the rejected one" in ok and ok.index("better") < ok.index("worse")
    check.run([*given(stage="KTO", train_dataset_path=tmp_path / "KTO.jsonl", **args), "preview=2"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.index("the answer is judged good") < said.index("the answer is judged bad")


def test_it_needs_no_paddle_where_output_dir_is_new(given):
    code = (
        "import sys; from erniekit.cli.main import main; code = main(['check', *sys.argv[1:]]); "
        "print(code, 'paddle' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *given()], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr


def test_every_wrong_key_is_listed(given, capsys):
    assert check.run(given(max_step=3, learning_rate="abc")) == 1
    said = capsys.readouterr().out
    assert "max_step: unknown key; did you mean max_steps?" in said and "learning_rate: expected a number" in said
    assert said.endswith("2 errors, 0 warnings: `erniekit train` would not run.\n")


def test_a_template_that_is_missing_is_one_error(given):
    report = check.inspect(given(chat_template="nope"), "train")
    assert report.count("error") == 1
    assert "20 records" in findings(given(chat_template="nope"), "ok")  # the records are checked all the same


def test_a_degree_is_not_compared_with_a_model_that_is_not_here(given):
    said = findings(given(model_name_or_path="nobody/model"), "ok")
    assert "1 process; whether the degrees divide the model is not known yet" in said


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"device": "npu"}, "this version does not have device: npu (this version runs on CUDA GPUs"),
        ({"stage": "OCR-VL-SFT"}, "this version does not have stage: OCR-VL-SFT (PaddleOCR-VL); it has SFT, PT"),
        ({"stage": "SFTT"}, "got 'SFTT'; did you mean SFT?"),
    ],
)
def test_what_this_version_does_not_have(given, keys, expected):
    assert expected in findings(given(**keys), "error")


def test_keys_without_effect_and_refused_ones(given):
    args = given(use_fp8=True, max_steps=3, num_train_epochs=1, use_flash_attention=True)
    assert "use_fp8: True (FP8 with scales" in findings(args, "error")
    notes = findings(args, "note")
    assert "num_train_epochs: no effect: max_steps: 3 decides" in notes and "use_flash_attention: no effect" in notes
    assert "12 keys given: 9 honoured, 2 without effect, 1 refused" in findings(args, "ok")


def test_what_only_the_model_makes_pointless(given):
    assert "moe_aux_loss_lambda: no effect: the model has no experts" in findings(
        given(moe_aux_loss_lambda=0.1), "note"
    )
    assert "moe_aux_loss_lambda" not in findings(given(moe_aux_loss_lambda=0.1, model_name_or_path=MOE), "note")


def test_defaults_that_are_not_erniekits_are_named_for_a_file_of_its(given):
    notes = findings(given(fine_tuning=None, fuse_rope=True, logging_steps=5), "note")
    assert "defaults: this file looks like one of ERNIEKit's" in notes and "fine_tuning LoRA (here Full)" in notes
    assert "logging_steps" not in notes and "defaults:" not in findings(given(fine_tuning=None), "note")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"continue_training": True},
            r"Copy the model's weight files there, or set continue_training: false \(with",
        ),
        (
            {"stage": "GKD", "teacher_model_name_or_path": DENSE},
            "teacher_model_name_or_path: .* holds no weights. A teacher cannot start at random",
        ),
        ({"model_name_or_path": "no/such/model"}, "model_name_or_path: there is no file or directory"),
        ({"tensor_parallel_degree": 3}, "tensor_parallel_degree: 3 does not divide the model's 4 attention heads"),
        ({"pipeline_parallel_degree": 9}, "pipeline_parallel_degree: 9 stages need a layer each"),
        ({"virtual_pp_degree": 2}, "there is one stage, and nothing to interleave"),
        ({"train_dataset_path": "no.jsonl"}, "train_dataset_path: there is no file or directory 'no.jsonl'"),
        ({"chat_template": "none-such"}, "chat_template: 'none-such' is neither a built-in template"),
        ({"max_seq_len": 4}, "none of 20 samples can be used"),
        ({"output_dir": DENSE}, "is also model_name_or_path"),
        ({"output_dir": f"{DENSE}/config.json/x"}, "output_dir: .*is not a directory"),
        ({"output_dir": "n" * 300}, "output_dir: .*a name of 300 bytes is too long"),
    ],
)
def test_what_would_stop_the_run(given, keys, expected):
    assert re.search(expected, findings(given(**keys), "error"))


def test_judged_answers_of_which_a_step_has_one(given):
    examples = REPOSITORY / "examples/data"
    args = {"stage": "KTO", "eval_dataset_path": None, "do_eval": False}
    args["train_dataset_path"] = examples / "kto-train.jsonl"
    assert "kto_loss_type: kto: a step has one answer" in findings(given(**args, batch_size=1), "warning")
    for keys in ({"batch_size": 2}, {"gradient_accumulation_steps": 2}, {"data_parallel_degree": 2}):
        assert "a step has one answer" not in findings(given(**args, **keys), "warning")


def test_evaluation_data_of_which_nothing_is_left_would_stop_the_run(given, tmp_path):
    (tmp_path / "eval.jsonl").write_text(json.dumps({"src": ["q"], "tgt": ["a"], "label": [0]}))
    args = given(eval_dataset_path=tmp_path / "eval.jsonl", do_eval=True)
    assert "eval.jsonl: none of 1 sample can be used" in findings(args, "error")


def test_all_bad_lines_are_found_and_are_warnings_where_they_are_skipped(given, tmp_path):
    lines = [record("q", "a"), '{"src": ["q"]}', '{"src": ', record("q2", "a2")]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    args = given(train_dataset_path=tmp_path / "bad.jsonl")
    errors = findings(args, "error")
    assert "bad.jsonl:2: " in errors and "bad.jsonl:3: not JSON" in errors
    skipping = given(train_dataset_path=tmp_path / "bad.jsonl", on_bad_line="skip")
    assert findings(skipping, "error") == "" and findings(skipping, "warning") == errors


def test_duplicates_within_and_between(given, tmp_path):
    same = json.dumps({"tgt": ["a 3"], "src": ["q 3"]})  # another order of the fields
    (tmp_path / "eval.jsonl").write_text("\n".join([record("x", "y"), record("x", "y"), same]))
    warnings = findings(given(), "warning")
    assert f"eval data: 1 of the records repeat an earlier one: {tmp_path}/eval.jsonl:2 repeats" in warnings
    assert f"1 of the evaluation's records are also trained on: {tmp_path}/eval.jsonl:3 repeats" in warnings


def test_large_files_are_sampled_and_that_is_said(given, monkeypatch):
    monkeypatch.setattr(check_data, "CHECKED_BYTES", 200)
    monkeypatch.setattr(check_data, "MEASURED_SAMPLES", 5)
    report = findings(given(), "note")
    assert "train.jsonl: one record of 4 was checked" in report
    assert "tokens of 5 of 20 samples" in findings(given(), "ok")
    monkeypatch.setattr(check_data, "COMPARED_RECORDS", 3)
    assert "no record repeats another (the first 3 of 20 were compared)" in findings(given(), "ok")


def test_warnings_count_only_when_strict(given, tmp_path, capsys):
    (tmp_path / "eval.jsonl").write_text(record("q 3", "a 3"))
    assert check.run(given()) == 0
    assert check.run([*given(), "strict=true"]) == 3
    assert "No errors, 1 warning." in capsys.readouterr().out


def test_json(given, tmp_path, capsys):
    assert check.run([*given(max_seq_len=4), f"json={tmp_path}/o.json"]) == 1
    read = json.loads((tmp_path / "o.json").read_text())
    assert (read["command"], read["exit_code"], read["errors"]) == ("train", 1, 2)  # both splits
    titles = [section["title"] for section in read["sections"]]
    assert titles[:4] == ["keys", "model", "layout", "tokenizer and template"]
    assert {"level", "text"} == {key for s in read["sections"] for f in s["findings"] for key in f}
    capsys.readouterr()


def test_a_model_that_is_not_here_is_not_downloaded_and_records_are_checked_all_the_same(given, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"src": ["q"]}\n' + record("q", "a"))
    args = given(model_name_or_path="baidu/ERNIE-4.5-0.3B-PT", continue_training=True)
    assert "is not a local path: the command downloads it" in findings(args, "note")
    assert "train.jsonl:1: " in findings(args, "error")
    assert f"1 record from {tmp_path}/train.jsonl\n" in findings(args, "ok")


def test_checkpoints_that_do_not_fit_on_the_disk(given, monkeypatch):
    usage = type("Usage", (), {"free": 15_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    args = given(save_steps=2, save_total_limit=3)
    assert "4 checkpoints at a time, each of 10.3 MB, and a final model of 3.45 MB: 44.8 MB" in findings(
        args, "warning"
    )
    usage.free = 15_000_000
    # 862,000 parameters: 2 bytes of weights, 12 of masters and moments, 4 of the average
    args = given(save_steps=2, save_total_limit=3, compute_type="bf16", emulate_precision=True)
    assert "each of 12.1 MB, and a final model of 1.72 MB" in findings(args, "warning")
    args = given(save_steps=2, save_total_limit=3, compute_type="bf16", emulate_precision=True, ema_decay=0.9)
    assert "each of 15.5 MB, and a final model of 5.17 MB" in findings(args, "error")
    usage.free = 5_000_000
    assert "disk: " in findings(args, "error")
    usage.free = 10**12
    # With Muon a projection has one moment (of 862,000 parameters the 73,728 of the embedding have two); with O2 both
    # moments of a matrix take 1.375 bytes a parameter.
    assert "each of 7.19 MB, and a final" in findings(given(optim="muon"), "ok")
    assert "each of 4.64 MB, and a final" in findings(given(ckpt_quant_stage="O2"), "ok")


def test_frozen_parameters_have_no_moments_on_the_disk(given):
    """The embedding's 73,728 parameters are saved, and have no moments of 8 bytes each."""
    assert "each of 10.3 MB, and a final model of 3.45 MB" in findings(given(), "ok")
    frozen = given(frozen_parameters="model.embed_tokens.weight")
    assert "each of 9.75 MB, and a final model of 3.45 MB" in findings(frozen, "ok")
    in_16_bits = given(frozen_parameters="model.embed_tokens.weight", compute_type="bf16", emulate_precision=True)
    assert "each of 11.2 MB, and a final model of 1.72 MB" in findings(in_16_bits, "ok")


@pytest.mark.parametrize(
    ("keys", "epochs", "warns"),
    [
        ({"gradient_accumulation_steps": 40}, "1 epoch", False),  # the only step takes the 20 rows of the only epoch
        ({"gradient_accumulation_steps": 40, "num_train_epochs": 2}, "2 epochs", True),
        ({"gradient_accumulation_steps": 20, "num_train_epochs": 2}, "2 epochs", False),
        ({"gradient_accumulation_steps": 40, "max_steps": 1}, "2 epochs", True),
        ({"gradient_accumulation_steps": 30, "max_steps": 1}, "1.5 epochs", False),
    ],
)
def test_a_step_that_reads_the_data_several_times(given, keys, epochs, warns):
    assert f"an epoch is 1 step: {epochs}" in findings(given(**keys), "ok")
    line = f"a step takes up to {keys['gradient_accumulation_steps']} rows, and reads all of the training data several"
    assert (line in findings(given(**keys), "warning")) == warns


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"warmup_steps": 30}, "warmup_steps: 30 steps of warm-up, but the schedule ends at step 20"),
        (
            {"evaluation_strategy": "steps", "eval_steps": 30, "load_best_model_at_end": True},
            "load_best_model_at_end: no effect: the run has 20 steps and eval_steps is 30",
        ),
    ],
)
def test_what_a_run_is_too_short_for(given, keys, expected):
    assert expected in findings(given(**keys), "warning")


def test_answers_that_are_all_good_or_all_bad(given, tmp_path):
    def said(*labels: bool) -> str:
        lines = (json.dumps({"src": f"q {i}", "tgt": f"a {i}", "label": label}) for i, label in enumerate(labels))
        (tmp_path / "train.jsonl").write_text("\n".join(lines))
        return findings(given(stage="KTO", do_eval=None, eval_dataset_path=None), "warning")

    assert "train_dataset_path: every answer is judged good. stage: KTO learns what sets" in said(True, True)
    assert "every answer is judged bad" in said(False, False)
    assert "every answer" not in said(True, False)


def test_modules_that_are_trained_whole_count_with_the_adapter():
    """A tied embedding is twice in PEFT's file, and has two moments."""
    model = ModelConfig.from_dir(Path(DENSE))

    def sizes(*more: str) -> tuple[int, int]:
        needed = [f"model_name_or_path={DENSE}", "output_dir=o", "train_dataset_path=x.jsonl", "compute_type=fp32"]
        return check_output._sizes(config.load(None, [*needed, "fine_tuning=LoRA", *more], "train"), model)

    added = [with_it - without for with_it, without in zip(sizes("modules_to_save=embed_tokens"), sizes(), strict=True)]
    embedding = model.vocab_size * model.hidden_size
    assert added == [embedding * (2 * 4 + 8), embedding * 2 * 4]


def test_output_dir_with_something_else_in_it(given, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").mkdir()
    assert "is not a file, and the run writes one there" in findings(given(), "error")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.jsonl"]


def test_other_commands(given, tmp_path):
    report = check.inspect(
        [f"model_name_or_path={DENSE}", f"eval_dataset_path={tmp_path}/eval.jsonl", "output_dir=o"], "eval"
    )
    titles = [section.title for section in report.sections]
    assert "eval data" in titles and "layout" in titles and "output directory" not in titles


def test_an_evaluation_needs_no_training_data_but_weights(given):
    args = given(train_dataset_path=None, do_eval=None)
    assert findings(args, "error", "eval") == ""
    assert "chat template text: " in findings(args, "ok", "eval") and "tokens of all samples" in findings(
        args, "ok", "eval"
    )
    for command in ("eval", "chat"):
        assert f"{DENSE} holds no weights" in findings([*args, "continue_training=true"], "error", command)


def test_weights_in_files_that_are_not_read_are_named(given, tmp_path):
    """Instead of advice to begin from a random start alone."""
    shutil.copytree(DENSE, tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"x")
    args = given(model_name_or_path=str(tmp_path / "model"), continue_training=True)
    assert "It has pytorch_model.bin, which this toolkit does not read" in findings(args, "error")


def test_parameters_to_freeze_are_those_of_the_model(given):
    assert "freeze_vision means no parameter of this model" in findings(given(freeze_config="freeze_vision"), "error")
    assert "every parameter is frozen" in findings(given(frozen_parameters="language"), "error")
    assert findings(given(frozen_parameters=".*norm.*"), "error") == ""


LORA = {"fine_tuning": "LoRA", "continue_training": True}


@pytest.mark.parametrize(
    ("model", "keys", "expected"),
    [
        ("moe", {"use_dora": True}, "use_dora: .* in a mixture of experts only attention can have DoRA"),
        ("dense", {"lora_path": "nowhere"}, "nowhere"),
        ("moe", {"lora_path": "dora"}, "is an adapter for another base"),
        ("dense", {"lora_path": "dora", "tensor_parallel_degree": 2}, "tensor_parallel_degree: 2: not with the DoRA"),
        ("dense", {"lora_path": "dora", "sharding": "stage3"}, "sharding: stage3 does not .* Set sharding: stage2"),
        ("dense", {"lora_path": "dora", "qat": "w8a8"}, "qat: w8a8: weights with a DoRA adapter"),
        ("dense", {"lora_path": "dora", "stage": "RM"}, "stage: RM: .* has no score head"),
        ("dense", {"lora_path": "dora", "frozen_parameters": "language"}, "every parameter is frozen"),
        ("dense", {"lora_path": "dora", "frozen_parameters": r".*self_attn.*"}, "every adapter belongs to a frozen"),
        ("dense", {"rope_scaling": "yarn", "max_seq_len": 128}, ""),
        ("scaled", {"rope_scaling": "linear", "max_seq_len": 256}, "rope_scaling: linear: .* are scaled already"),
        ("moe", {"moe_group_experts": True}, "moe_group_experts: 5 experts do not divide into moe_k 2 groups"),
        ("dense", {"qat": "wint4", "quantization_group_size": 64}, r"qat: wint4: .* will refuse .* (32|64) inputs"),
        ("dense", {"stage": "GKD", "teacher_model_name_or_path": "nowhere"}, "teacher_model_name_or_path: .*nowhere"),
        ("dense", {"stage": "GKD", "teacher_model_name_or_path": "moe"}, ""),
        ("dense", {"stage": "GKD", "teacher_model_name_or_path": "renamed"}, "renamed has another vocabulary"),
        (
            "dense",
            {"stage": "GKD", "teacher_model_name_or_path": "moe", "pipeline_parallel_degree": 3},
            "teacher_model_name_or_path: .* is divided as the trained model is: .*3 stages need a layer each",
        ),
    ],
)
def test_what_the_model_or_an_adapter_does_not_allow_is_found_before_the_start(tmp_path, models, model, keys, expected):
    """By check and by the training alike, which reads no weight."""
    of_pairs = {"src": ["q"], "tgt": [], "response": [["a"], ["b"]], "sort": [1, 0]}
    data = of_pairs if keys.get("stage") == "RM" else {"src": ["q"], "tgt": ["a"]}
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(data | {"src": [f"q {i}"]}) for i in range(9)))
    adapts = LORA if keys.keys() & {"use_dora", "lora_path"} else {"continue_training": True}
    paths = {
        name: models / value for name, value in keys.items() if name in ("lora_path", "teacher_model_name_or_path")
    }
    values = {
        "model_name_or_path": models / model,
        "train_dataset_path": tmp_path / "data.jsonl",
        "output_dir": tmp_path / "out",
        "max_seq_len": 64,
        "max_steps": 1,
        "compute_type": "fp32",
    }
    given = [f"{name}={value}" for name, value in (values | adapts | keys | paths).items()]
    found = findings(given, "error")
    assert re.search(expected, found) if expected else found == ""
    if not expected:
        return
    cfg = config.load(None, given, "train")
    if launch.degrees_of(cfg).world == 1:
        with pytest.raises(UserError, match=expected):
            build_run(cfg, Mesh.single())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models dense (6 layers), moe (2 layers, 5 experts; a tokenizer with one file more), scaled (of 128 positions) and
    renamed (one token stands for another text), and an adapter with DoRA.
    """
    path = tmp_path_factory.mktemp("models")
    sparse = {name: value for name, value in tiny_sizes.MOE.items() if name != "vocab_size"}
    model_directory(path / "dense", num_hidden_layers=6, max_position_embeddings=64, intermediate_size=64)
    model_directory(path / "moe", **sparse | {"moe_num_experts": 5})
    (path / "moe" / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    tokens = model_directory(path / "renamed") / "tokenizer.json"
    tokens.write_text(tokens.read_text(encoding="utf-8").replace("日", "曰"), encoding="utf-8")
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    model_directory(path / "scaled", max_position_embeddings=128, rope_scaling=scaling)
    model = load_model(path / "dense")
    lora.attach(model, lora.LoraOptions(rank=2, dora=True, targets=("qkv_proj", "o_proj")), tied=True)
    state = lora.state_of(model)
    state.base_fingerprint = fingerprint(path / "dense")
    save_adapter(model, path / "dora")
    return path


@pytest.mark.parametrize("command", ["export", "split"])
def test_what_is_exported_is_not_model_name_or_path(given, command):
    assert "No valid checkpoint found in: " in findings(given(do_eval=None), "error", command)


def test_the_template_of_a_chat(given):
    assert "'none_such' is neither a built-in template" in findings(given(chat_template="none_such"), "error", "chat")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "Missing configuration files"),
        (["strict=perhaps", "x.yaml"], "strict=perhaps: expected True or False"),
        (["command=fly", "x.yaml"], "command=fly: expected one of train"),
        (["json=no/such/directory/out.json", "x.yaml"], "json=.*: expected a file to be written, in a directory that"),
    ],
)
def test_wrong_options(args, expected):
    with pytest.raises(ConfigError, match=expected):
        check.run(args)


@pytest.mark.parametrize("command", ["eval", "chat"])
def test_the_ranks_that_a_model_is_used_on(given, command):
    def said(level: str, **degrees: int) -> str:
        return findings(given(do_eval=None, **degrees), level, command)

    assert "2 processes" in said("ok", tensor_parallel_degree=2)
    refused = said("error", tensor_parallel_degree=3)
    assert "tensor_parallel_degree: 3 does not divide the model's 4 attention heads" in refused
    assert ("2 processes" in said("ok", data_parallel_degree=2)) == (command == "eval")
