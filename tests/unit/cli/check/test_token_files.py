"""What `erniekit check` says of token files while the model, and its tokenizer, is not on this machine yet."""

from pathlib import Path

import numpy as np
from support.token_files import write_token_files

from erniekit.cli import check


def found(directory: Path, prefix: str) -> dict[str, list[str]]:
    words = ["model_name_or_path=baidu/ERNIE-4.5-0.3B-Paddle", f"output_dir={directory / 'out'}", "max_steps=1"]
    report = check.inspect([*words, "stage=PT", "dataset_type=pretrain", f"input_dir={directory / prefix}"], "train")
    return {
        level: [f.text for s in report.sections for f in s.findings if f.level == level] for level in ("ok", "error")
    }


def test_files_are_looked_at_before_the_tokenizer_is_there(tmp_path: Path):
    write_token_files(tmp_path / "part0", [np.arange(5), np.arange(7)], "<u2")
    whole = found(tmp_path, "part0")
    assert f"{tmp_path / 'part0'}: 2 documents, 12 tokens" in whole["ok"] and not whole["error"]
    assert found(tmp_path, "part1")["error"] == [
        f"{tmp_path / 'part1.idx'}: no such file. Hint: there are {tmp_path / 'part0'}."
    ]
    (tmp_path / "part0.bin").write_bytes(b"")
    assert "truncated" in found(tmp_path, "part0")["error"][0]
