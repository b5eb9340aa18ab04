"""Pretraining end to end on a CPU, as `make demo-pretrain` runs it: text, token files, a tiny mixture-of-experts at a
short context, the same continued at a longer one, and a sample of its writing.

Every step but the last two is a command a user can type; each is printed before it runs.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
OUT = "demo_output/pretrain"
CONFIGS = "examples/configs/tiny/pretrain"
TOKENIZER = "examples/models/tiny-pretrain"
OLD_LIMIT, NEW_LIMIT = 256, 1024
HELD_OUT = 0.02  # the files' split is 980,20,0: the last documents are never trained
PROMPTS = ("def read(", "The value of the", "class Error(Exception):\n    ")


def run(*command: str) -> None:
    """Run a command of this interpreter in the checkout, printed first."""
    print(f"\n$ python {' '.join(command)}", flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"demo-pretrain: this command failed with exit code {done.returncode}")


def held_out_rows(tokenizer: Any, count: int) -> np.ndarray:
    """The beginnings of the longest held-out documents [count, NEW_LIMIT + 1]."""
    lines = (ROOT / OUT / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[-int(len(lines) * HELD_OUT) :]]
    texts.sort(key=len, reverse=True)
    rows = [tokenizer.encode_plain(text[: 8 * NEW_LIMIT])[: NEW_LIMIT + 1] for text in texts[: 2 * count]]
    return np.array([row for row in rows if len(row) == NEW_LIMIT + 1][:count])


def loss_by_position(model: Any, rows: np.ndarray) -> np.ndarray:
    """Mean -log p (nats) at each position [NEW_LIMIT]."""
    import paddle

    from erniekit.losses.lm import label_nll

    total = np.zeros(NEW_LIMIT)
    with paddle.no_grad():
        for row in rows:
            logits = model(row[None, :-1])
            nll = label_nll(logits[0], paddle.to_tensor(row[1:]))
            total += nll.numpy()
    return total / len(rows)


def report(rows: np.ndarray, models: dict[str, Any]) -> None:
    """Loss inside and past the old limit, before and after the longer context; as a table and a picture."""
    curves = {name: loss_by_position(model, rows) for name, model in models.items()}
    print(f"\nloss by position, {len(rows)} held-out documents")
    print(f"{'positions':<14}" + "".join(f"{name:>18}" for name in curves))
    for start, stop in ((0, OLD_LIMIT), (OLD_LIMIT, 2 * OLD_LIMIT), (2 * OLD_LIMIT, NEW_LIMIT)):
        means = "".join(f"{curve[start:stop].mean():>18.3f}" for curve in curves.values())
        print(f"{f'{start}-{stop - 1}':<14}{means}")
    draw(curves, ROOT / OUT / "loss_by_position.png")


def draw(curves: dict[str, np.ndarray], path: Path) -> None:
    """The curves, smoothed over 32 positions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(np.arange(16, NEW_LIMIT - 15), np.convolve(curve, np.ones(32) / 32, "valid"), label=name)
    axes.axvline(OLD_LIMIT, color="#9ca3af", linewidth=0.8)
    axes.set_xlabel("position (grey: the old limit)")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def write(model: Any, tokenizer: Any) -> None:
    """A sample for each prompt, with a fixed seed."""
    for prompt in PROMPTS:
        ids = tokenizer.encode_plain(prompt)
        out = model.generate([ids], max_new_tokens=60, temperature=0.7, top_p=0.9, seed=0)
        print(f"\n--- {prompt!r}\n{tokenizer.decode([int(i) for i in out[0]], skip_special_tokens=True)}")


def main() -> None:
    """The whole way."""
    started = time.monotonic()
    run("tools/make_pretrain_corpus.py", "--out", f"{OUT}/corpus.jsonl", "--max-bytes", "8000000")
    tokens = (f"tokenizer={TOKENIZER}", f"output={OUT}/corpus_text", "workers=2", "overwrite=true")
    run("-m", "erniekit", "tokenize", f"{OUT}/corpus.jsonl", *tokens)
    for stage in ("text", "long"):
        run("-m", "erniekit", "train", f"{CONFIGS}/stage1_{stage}.yaml", "overwrite_output_dir=true")

    import erniekit
    from erniekit.data.chat.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ROOT / TOKENIZER)
    directories = {"short context": "text", "short, averaged": "text/ema", "long context": "long"}
    models = {name: erniekit.load_model(str(ROOT / OUT / where)) for name, where in directories.items()}
    report(held_out_rows(tokenizer, 16), models)
    write(models["long context"], tokenizer)
    seconds = time.monotonic() - started
    print(f"\nThe whole demo took {seconds:.0f} s. {OUT} holds loss.png and expert_load.png of each stage.")


if __name__ == "__main__":
    main()
