"""The chain of examples/configs/tiny/pretrain, from text to pictures at a longer context, as a user runs it."""

import json
import shutil
from pathlib import Path

import pytest

import erniekit
from erniekit.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("stage1_text", "stage1_long", "stage2_vision", "stage3_joint", "stage3_long")


@pytest.mark.slow
def test_each_stage_begins_with_what_the_one_before_it_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    text, pictures = tmp_path / "demo_output" / "pretrain", tmp_path / "demo_output" / "vl" / "data"
    text.mkdir(parents=True)
    lines = [json.dumps({"text": f"def f{number}():\n    return {number}\n" * 40}) for number in range(60)]
    (text / "corpus.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    tokens = ["tokenizer=examples/models/tiny-pretrain", f"output={text}/corpus_text"]
    assert main(["tokenize", str(text / "corpus.jsonl"), *tokens]) == 0
    shutil.copytree(ROOT / "examples" / "data" / "pictures", pictures / "pictures")
    captions = [
        json.loads(line) for line in (ROOT / "examples" / "data" / "pt_vl-train.jsonl").read_text("utf-8").splitlines()
    ]
    (pictures / "captions-train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in captions * 3), "utf-8")
    joined = {"text": "\n".join(line["text"] for line in captions)}
    for key in ("images", "videos"):
        joined[key] = [name for line in captions for name in line.get(key, [])]
    (pictures / "long-train.jsonl").write_text((json.dumps(joined) + "\n") * 4, "utf-8")

    keys = {"max_steps": 2, "save_strategy": "no", "evaluation_strategy": "no", "do_eval": False, "disable_tqdm": True}
    for stage in STAGES:
        result = erniekit.train(f"examples/configs/tiny/pretrain/{stage}.yaml", batch_size=1, **keys)
        assert len(result.history) == 2, stage
    model = erniekit.load_model(text / "joint_long")
    assert model.config.vision is not None and model.config.rope_theta == 500000.0
    assert model.config.max_position_embeddings == 2048
    longest = max(record["num_tokens"] for record in result.history)
    assert longest > 512, "rows are longer than in the stage before"
