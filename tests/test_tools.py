"""Every script in tools/ runs at its smallest size, so that none rots; `make test-all` also runs those that take long.

Scripts that compare with torch, transformers, PEFT or TRL are skipped where those are absent.
"""

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from erniekit.utils import runtime

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = "examples/models/tiny-dense"
MOE = "examples/configs/tiny/sft/run_sft_moe.yaml"

# Name of a case: the script and its arguments; {tmp} is a directory of the test with the file text.jsonl in it,
# and a model `drafts` whose prediction block drafts tokens.
FAST = {
    "bench_sft, ours alone": "bench_sft.py --num-samples 60 --batches 4 --rounds 1 --against",
    "bench_step, ours alone": "bench_step.py tiny --only ours --rounds 1 --warmup 1 --batch 1 --seq 16",
    "bench_step, two checkouts": "bench_step.py tiny --only ours --before . --rounds 1 --warmup 1 --batch 1 --seq 16",
    "bench_generate, ours alone": "bench_generate.py tiny --only ours --rounds 1 --turn 0 --batches 2 --tokens 3",
    "bench_vl, ours alone": "bench_vl.py tiny --only ours --rows 1 --seq 436 --rounds 1 --warmup 1",
    "bench_all, one part": "bench_all.py --smallest --parts neighbour --lines {tmp}/all.jsonl --picture {tmp}/all.png",
    "bench_length": "bench_length.py --tokens 64 128 --layers 1 --out {tmp}/length.png",
    "bench_products": "bench_products.py --rounds 1",
    "bench_convolutional_code": "bench_convolutional_code.py --out 4 --in 128",
    "bench_calibration": "bench_calibration.py --out 32 --in 64 --tokens 40",
    "bench_quantise": "bench_quantise.py --out 128 --in 128 --rounds 1 --export 20 --directory {tmp}",
    "bench_moe": "bench_moe.py --experts 2 --tokens 16 --hidden 16 --ffn 16 --rounds 1",
    "bench_token_files": f"bench_token_files.py {{tmp}}/text.jsonl --tokenizer {TOKENIZER} --rounds 1",
    "gpu_acceptance, on a CPU": "gpu_acceptance.py --device cpu --steps 2 --out {tmp}/acceptance.txt",
    "bench_serving": f"bench_serving.py --start model_name_or_path={TOKENIZER} continue_training=false "
    "compute_type=fp32 --concurrency 2 --requests 2 --tokens 4 --out {tmp}/load.png",
    "bench_drafts": "bench_drafts.py {tmp}/drafts --random --batches 2 --tokens 3 --rounds 1",
    "make_config_page": "make_config_page.py --check",
    "bench_data": f"bench_data.py --tokenizer {TOKENIZER} --steps 2 --seq 256 --rounds 1 data/demo/test.jsonl",
    "bench_data, pictures": "bench_data.py --pictures 2 --size 90x60 --rounds 1",
    "make_doc_tables": "make_doc_tables.py --check",
    "wrap_docs": "wrap_docs.py {tmp}/page.md",
    "plan_accuracy": "plan_accuracy.py --only 22B",
    "make_demo_data": "make_demo_data.py --train 20 --test 5 --demo-dir {tmp} --examples-dir {tmp}",
    "make_tool_demo_data": "make_tool_demo_data.py --train 12 --test 4 --demo-dir {tmp} --examples-dir {tmp}",
    "make_rl_demo_data": "make_rl_demo_data.py --sft 4 --train 3 --test 2 --out {tmp}",
    "make_rl_picture_data": "make_rl_picture_data.py {tmp}/pictures --sft 4 --train 3 --test 2",
    "bench_rl, ours alone": "bench_rl.py --only ours --rounds 1 --prompts 2 --generations 2 --tokens 4",
    "join_captions": "join_captions.py {tmp}/text.jsonl {tmp}/long.jsonl",
    "make_picture_example_data": "make_picture_example_data.py --out {tmp}",
}
IN_BF16 = {
    "bench_all": "bench_all.py --smallest --parts bf16 --lines {tmp}/all.jsonl --picture {tmp}/all.png",
    "bench_sft": "bench_sft.py --num-samples 60 --batches 4 --rounds 1 --against ours-bf16",
    "bench_step": "bench_step.py tiny --only ours-bf16 --rounds 1 --warmup 1 --batch 1 --seq 16",
}
SLOW = {
    "bench_lora": "bench_lora.py --batch 1 --seq 16 --rounds 1 --sides lora",
    "bench_recompute": "bench_recompute.py --batch 1 --seq 16 --rounds 1",
    "bench_save": "bench_save.py --rounds 1 --directory {tmp}",
    "bench_resume": "bench_resume.py --rounds 1 --layers 1 --directory {tmp}",
    "bench_start": "bench_start.py --rounds 1",
    "bench_neighbour": "bench_neighbour.py tiny --batch 1 --seq 16 --rounds 1 --seconds 0 --spinning 1",
    "compare_ckpt_quant": f"compare_ckpt_quant.py {MOE} --steps 2 --out {{tmp}}/quant batch_size=1 max_seq_len=64",
    "compare_balancing": f"compare_balancing.py {MOE} --steps 2 --out {{tmp}}/balancing",
    "compare_fp8": f"compare_fp8.py {MOE} batch_size=1 max_evaluate_steps=1 --steps 2 --out {{tmp}}/curve",
    "compare_layouts": "compare_layouts.py dense-dp2",
    "compare_rl": (
        "compare_rl.py examples/configs/tiny/rl/run_gspo.yaml --steps 2 --seeds 1 --only GSPO --out {tmp}/rl "
        "model_name_or_path=examples/models/tiny-moe continue_training=false max_evaluate_steps=1 rollout_batch_size=4"
    ),
    "demo_quantise": (
        "demo_quantise.py --schemes fp8 --model {tmp}/m --out {tmp}/d --require 0 max_steps=2 max_evaluate_steps=1"
    ),
    "compare_two_bits": f"compare_two_bits.py {MOE} --steps 2 --samples 2 --out {{tmp}}/2 output_dir={{tmp}}/run",
    "compare_qat": f"compare_qat.py {MOE} batch_size=1 max_evaluate_steps=1 --steps 1 --more 1 --schemes w8a8 "
    "--out {tmp}/qat",
    "compare_optimizers": f"compare_optimizers.py {MOE} --steps 2 --rates 1e-3 --out {{tmp}}/optimizers",
    "compare_moments": f"compare_moments.py {MOE} --steps 2 --out {{tmp}}/moments batch_size=1 max_seq_len=64",
    "compare_layouts, cost": "compare_layouts.py --cost dense-dp2",
    "make_pretrain_corpus": "make_pretrain_corpus.py --out {tmp}/corpus.jsonl --max-bytes 20000",
    "measure_convert_memory": "measure_convert_memory.py --megabytes 1 --directory {tmp}",
    "measure_load_memory": "measure_load_memory.py --model dense --directory {tmp}",
    "start_ranks": "start_ranks.py --starts 1 --ranks 2",
    "train_tokenizer": "train_tokenizer.py --out {tmp}/tokenizer",
}
# Needs these modules.
FOREIGN = {
    "bench_step": ("bench_step.py tiny --rounds 1 --warmup 1 --batch 1 --seq 16", ("torch", "transformers")),
    "bench_generate": (
        "bench_generate.py tiny tinymoe --rounds 1 --turn 0 --batches 2 --tokens 8",
        ("torch", "transformers"),
    ),
    "bench_vl": ("bench_vl.py tiny --rows 1 --seq 436 --rounds 1 --warmup 1", ("torch", "transformers")),
    "bench_sft": ("bench_sft.py --num-samples 60 --batches 4 --rounds 1", ("torch", "transformers", "trl")),
    "make_parity_fixtures": ("make_parity_fixtures.py --out {tmp} dense_tied", ("torch", "transformers")),
    "make_vision_fixtures": ("make_vision_fixtures.py --out {tmp}", ("torch", "transformers")),
    "make_peft_fixture": ("make_peft_fixture.py --help", ("torch", "transformers", "peft")),
    "make_preference_fixture": ("make_preference_fixture.py --help", ("torch", "trl")),
    "make_processor_fixture": (
        "make_processor_fixture.py --out {tmp}/processor.npz",
        ("torch", "torchvision", "transformers"),
    ),
    "make_vl_demo_data": ("make_vl_demo_data.py {tmp}/pictures --train 3 --test 2", ("sklearn",)),
    "make_rotary_fixture": ("make_rotary_fixture.py --out {tmp}/rotary.npz", ("torch", "transformers")),
}
# Run by hand. The demos replace what an earlier demo left; the commands they are made of are those of tests/e2e. The
# tables of the planner take minutes; tests/distributed/test_plan_memory.py and tests/unit/plan call what they call.
DEMOS = {"demo.py", "demo_align.py", "demo_pretrain.py", "demo_rl.py", "demo_vl.py"}
BY_HAND = {"plan_truth.py", "plan_minimum.py"} | DEMOS
# No scripts.
HELPERS = {"bench_worker.py", "comparison.py", "published_runs.py"}


def run(arguments: str, directory: Path) -> None:
    (directory / "page.md").write_text("One sentence.\n", encoding="utf-8")
    (directory / "drafts").mkdir()
    config = json.loads((ROOT / TOKENIZER / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    shutil.copytree(ROOT / TOKENIZER, directory / "drafts", dirs_exist_ok=True)
    (directory / "drafts" / "config.json").write_text(json.dumps(config))
    (directory / "text.jsonl").write_text('{"text": "print(1 + 1)"}\n' * 20, encoding="utf-8")
    script, *words = [word.format(tmp=directory) for word in arguments.split()]
    done = subprocess.run(
        [sys.executable, f"tools/{script}", *words], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{script}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("case", FAST)
def test_scripts_run(case: str, tmp_path: Path):
    run(FAST[case], tmp_path)


@pytest.mark.skipif("avx512_bf16" not in runtime.cpu_flags(), reason="this processor has no bf16 products")
@pytest.mark.parametrize("case", IN_BF16)
def test_scripts_that_multiply_in_bf16_run(case: str, tmp_path: Path):
    run(IN_BF16[case], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_scripts_that_take_longer_run(case: str, tmp_path: Path):
    run(SLOW[case], tmp_path)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("case", FOREIGN)
def test_scripts_that_compare_with_others_run(case: str, tmp_path: Path):
    arguments, modules = FOREIGN[case]
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    run(arguments, tmp_path)


def test_no_script_is_left_out():
    commands = [*FAST.values(), *SLOW.values(), *(arguments for arguments, _ in FOREIGN.values())]
    known = {command.split()[0] for command in commands} | BY_HAND | HELPERS
    assert {path.name for path in (ROOT / "tools").glob("*.py")} == known


def loaded(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script, ROOT / "tools" / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_clips_of_the_demo_have_their_times(tmp_path: Path):
    """So that its runs are without the warning about frames that come without times."""
    from erniekit.data.records.fields import Notes
    from erniekit.data.vision.formats import parse_vision_record
    from erniekit.data.vision.media import MediaReader
    from erniekit.data.vision.parts import media_of
    from erniekit.data.vision.tags import FormatOptions
    from erniekit.data.vision.video import open_video

    drawing, reader, notes = loaded("make_vl_demo_data"), MediaReader(tmp_path), Notes()
    row = drawing.clip(random.Random(0), held_out=False)
    (tmp_path / "media").mkdir()
    question, caption = drawing.records(row, drawing.write_media(row, tmp_path / "media" / "clip"), 0)
    for record, kind in ((question, "messages"), (caption, "text")):
        (clip,) = media_of(parse_vision_record(record, kind, "a.jsonl:1", FormatOptions(reader), notes).messages)
        assert open_video(clip, reader, notes=notes).times[:3] == [0.0, 0.5, 1.0]
    assert not notes.doubts


def test_the_demo_evaluates_the_start_of_training_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where an earlier demo left its model."""
    from support.tiny_directories import model_directory

    from erniekit.config import load
    from erniekit.generation.load import find_model

    demo = loaded("demo")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    model_directory(tmp_path / "demo_output" / "dense")
    monkeypatch.chdir(tmp_path)
    evaluated: list[Path] = []

    def first_command(command: str, *args: str) -> str:
        assert command == "eval"
        evaluated.append(find_model(load(args[0], list(args[1:]), command)).path)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", first_command)
    with pytest.raises(KeyboardInterrupt):
        demo.demonstrate("dense", ["max_steps=2"])
    assert [path.resolve() for path in evaluated] == [(ROOT / "examples/models/tiny-dense").resolve()]
