"""The shipped file for function calls from the command line: train, evaluate its calls, export, chat."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "examples/configs/tiny/sft/run_sft_fc.yaml"


def erniekit(command, *overrides, stdin=None):
    done = subprocess.run(
        [sys.executable, "-m", "erniekit", command, CONFIG, *overrides],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_train_eval_export_and_chat(tmp_path):
    where = f"output_dir={tmp_path}"
    trained = erniekit("train", where, "max_steps=2", "do_eval=false", "dataloader_num_workers=0")
    assert "2400 samples from ./data/demo/tools-train.jsonl" in trained.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 2
    said = erniekit("eval", where, "max_evaluate_steps=1", "batch_size=8", "max_new_tokens=8").stdout
    assert "calls: exact match" in said
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert results["num_tool_calls_expected"] > 4 and results["tool_call_exact_match"] == 0.0
    lines = [json.loads(line) for line in (tmp_path / "eval_predictions.jsonl").read_text("utf-8").splitlines()]
    assert any("<tool_output>" in line["prompt"] for line in lines) and all("<tool_list>" in x["prompt"] for x in lines)
    erniekit("export", where, "format=pt")
    exported = (tmp_path / "export" / "chat_template.jinja").read_text("utf-8")
    assert exported == (ROOT / "erniekit/data/chat/templates/text.jinja").read_text("utf-8")
    assert erniekit("chat", where, "max_new_tokens=4", stdin="你好\n").stdout
