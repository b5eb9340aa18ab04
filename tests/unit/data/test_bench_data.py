"""tools/bench_data.py runs at its smallest size and reports every speed."""

import subprocess
import sys

from source_tree import REPOSITORY


def test_it_reports_every_speed():
    arguments = "--tokenizer examples/models/tiny-dense --steps 2 --seq 256 --rounds 1 data/demo/test.jsonl"
    done = subprocess.run(
        [sys.executable, "tools/bench_data.py", *arguments.split()],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [" ".join(row[:2]) for row in rows] == [
        "opening, records/s:",
        "encoding, samples/s:",
        "encoding, tokens/s:",
        "loader, samples/s:",
        "loader, tokens/s:",
    ]
    assert all(float(row[2].replace(",", "")) > 0 for row in rows)
