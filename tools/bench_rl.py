"""A whole step of GRPO against TRL's GRPOTrainer: generation, rewards, and the update.

    PYTHONPATH=<a directory with torch, transformers and TRL> python tools/bench_rl.py
    python tools/bench_rl.py --only ours --rounds 1 --prompts 2 --generations 2 --tokens 4

Both sides train the same model (examples/models/tiny-dense or tiny-moe with random weights) in fp32 on the same
prompts, with the same group size, lengths and reward, without a reference, each with its own generation (TRL with
transformers' generate, no vLLM). Each side is a process of its own, and they take turns: on a shared machine, trust
the ratio, not the seconds.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_worker import PAUSE, Worker, serve

ROOT = Path(__file__).resolve().parents[1]
REWARD = """
def checksum(prompts, completions, completion_ids, **kwargs):
    return [float(sum(ids) % 7) / 7 for ids in completion_ids]
"""


def prepare(directory: Path, model: str) -> None:
    """The model with random weights, prompts and the reward, in a process that ends before the sides begin."""
    sys.path.insert(0, str(ROOT))
    import shutil

    import erniekit
    from erniekit.models.config import ModelConfig
    from erniekit.models.decoder import CausalLM
    from erniekit.models.init import init_weights

    source = ROOT / "examples" / "models" / model
    made = CausalLM(ModelConfig.from_dir(source))
    init_weights(made, 0)
    erniekit.save_model(made, directory / "model")
    for file in source.glob("*token*"):
        shutil.copy(file, directory / "model")
    lines = [json.dumps({"src": [f"What is {n} plus {n * n % 97}?"], "answer": str(n)}) for n in range(512)]
    (directory / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "reward.py").write_text(REWARD)


def serve_ours(commands: Any, answer: Any, job: dict[str, Any]) -> None:
    """In the worker: each command is a number of steps; the answer has the seconds of each."""
    sys.path.insert(0, str(ROOT))
    from erniekit.utils import runtime

    runtime.prepare()
    runtime.set_threads(job["threads"])
    from erniekit import config
    from erniekit.parallel.mesh import Mesh
    from erniekit.training.build import build_run
    from erniekit.training.trainer import Trainer

    directory = job["directory"]
    count = job["prompts"] * job["generations"]
    cfg = config.load(
        None,
        {
            "stage": "RL",
            "rl_algorithm": "grpo",
            "model_name_or_path": f"{directory}/model",
            "train_dataset_path": f"{directory}/prompts.jsonl",
            "output_dir": f"{directory}/ours",
            "reward_funcs": f"{directory}/reward.py:checksum",
            "num_generations": job["generations"],
            "rollout_batch_size": job["prompts"],
            "max_completion_length": job["tokens"],
            "rollout_max_running": count,
            "batch_size": job["microbatch"],
            "max_seq_len": 512,
            "max_steps": 100000,
            "learning_rate": 1e-6,
            "compute_type": "fp32",
        },
    )
    run = build_run(cfg, Mesh.single())
    trainer = Trainer(run, [])
    for steps in commands:
        rows = []
        for _ in range(steps):
            began, cpu = time.perf_counter(), time.process_time()
            batches = run.loader.next_step()
            generated = time.perf_counter()
            trainer.train_step(batches)
            length = run.loader.report_step().metrics["completions/mean_length"]
            rows.append([time.perf_counter() - began, time.process_time() - cpu, length, generated - began])
        answer({"rows": rows})
    run.close()


def serve_trl(commands: Any, answer: Any, job: dict[str, Any]) -> None:
    """The same for TRL, whose trainer runs the loop: a callback answers and waits between steps."""
    import torch
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(job["threads"])
    directory = job["directory"]
    tokenizer = AutoTokenizer.from_pretrained(f"{directory}/model")
    lines = [json.loads(line) for line in Path(f"{directory}/prompts.jsonl").read_text().splitlines()]
    count = job["prompts"] * job["generations"]
    args = GRPOConfig(
        output_dir=f"{directory}/trl",
        loss_type="grpo",
        beta=0.0,
        num_generations=job["generations"],
        per_device_train_batch_size=job["microbatch"],
        gradient_accumulation_steps=count // job["microbatch"],
        max_completion_length=job["tokens"],
        learning_rate=1e-6,
        temperature=1.0,
        max_steps=100000,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=True,
    )
    scope: dict[str, Any] = {}
    exec(REWARD, scope)

    class Turns(TrainerCallback):
        def __init__(self) -> None:
            self.rows: list[list[float]] = []
            self.left, self.began, self.cpu = 0, 0.0, 0.0

        def wait(self, control: Any) -> None:
            steps = next(commands, None)
            if steps is None:
                control.should_training_stop = True
            else:
                self.left, self.rows = steps, []
            self.began, self.cpu = time.perf_counter(), time.process_time()

        def on_train_begin(self, args: Any, state: Any, control: Any, **__: Any) -> None:
            self.wait(control)

        def on_step_end(self, args: Any, state: Any, control: Any, **__: Any) -> None:
            now, cpu = time.perf_counter(), time.process_time()
            length = trainer._metrics["train"]["completions/mean_length"][-1]
            self.rows.append([now - self.began, cpu - self.cpu, length])
            self.began, self.cpu = now, cpu
            self.left -= 1
            if self.left == 0:
                answer({"rows": self.rows})
                self.wait(control)

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(f"{directory}/model", dtype=torch.float32),
        reward_funcs=scope["checksum"],
        args=args,
        train_dataset=Dataset(
            InMemoryTable.from_pydict({"prompt": [line["src"][0] for line in lines]}), fingerprint="prompts"
        ),
        processing_class=tokenizer,
        callbacks=[Turns()],
    )
    trainer.train()


def serve_side(side: str) -> None:
    """The worker: a job, then numbers of steps to run."""
    commands, answer = serve()
    job = next(commands)
    answer({"threads": job["threads"]})
    {"ours": serve_ours, "trl": serve_trl}[side](commands, answer, job)


def main() -> None:
    """Interleave the sides and print samples a second."""
    if sys.argv[1:2] == ["--serve"]:
        serve_side(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-dense", choices=("tiny-dense", "tiny-moe"))
    parser.add_argument("--only", choices=("ours", "trl"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="the largest length of a completion")
    parser.add_argument("--microbatch", type=int, default=32, help="completions of a forward and backward pass")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-rl-") as name:
        if (child := os.fork()) == 0:
            prepare(Path(name), args.model)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit("bench_rl: the model could not be prepared")
        measure(args, name)


def measure(args: argparse.Namespace, directory: str) -> None:
    """Run the sides by turns and print the table."""
    count = args.prompts * args.generations
    job = vars(args) | {"directory": directory, "microbatch": min(args.microbatch, count)}
    workers = [Worker(__file__, side, job) for side in ([args.only] if args.only else ["ours", "trl"])]
    for worker in workers:
        worker.ask(1)  # warm up
    rows: dict[str, list[list[float]]] = {worker.side: [] for worker in workers}
    for number in range(args.rounds):
        for worker in workers if number % 2 == 0 else reversed(workers):
            time.sleep(PAUSE)
            rows[worker.side] += worker.ask(2)["rows"]
    for worker in workers:
        worker.close()
    report(args, rows, {worker.side: worker.peak_mb for worker in workers})


def report(args: argparse.Namespace, rows: dict[str, list[list[float]]], peaks: dict[str, float]) -> None:
    """Print a line for each side, and the ratio of both."""
    count = args.prompts * args.generations
    print(
        f"{args.model}: {args.prompts} prompts x {args.generations} completions of up to {args.tokens} tokens, "
        f"{args.threads} threads, {args.rounds} rounds of 2 steps, load {os.getloadavg()[0]:.1f}"
    )
    for side, of_side in rows.items():
        seconds, processor, length = (statistics.median(row[i] for row in of_side) for i in range(3))
        print(
            f"{side:5} {count / seconds:8.1f} samples/s  length {length:.1f}  {processor:.2f} s of processor "
            f"time a step  peak {peaks[side]:.0f} MB"
        )
    if len(rows) == 2:
        ratios = [theirs[0] / mine[0] for mine, theirs in zip(rows["ours"], rows["trl"], strict=True)]
        used = [statistics.median(row[1] for row in rows[side]) for side in ("trl", "ours")]
        print(
            f"ours / trl: {statistics.median(ratios):.2f} of its samples/s (steps {min(ratios):.2f} to "
            f"{max(ratios):.2f}), {used[0] / used[1]:.2f} of its samples per second of processor time"
        )


if __name__ == "__main__":
    main()
