"""Time cached generation of erniekit against transformers' `generate` on torch, in one run on this machine.

    python tools/bench_generate.py                                  # presets tiny, tinymoe and 0.3b
    python tools/bench_generate.py tiny --batches 1 8 64 --rounds 9
    python tools/bench_generate.py tiny --only ours --profile       # where the time goes, by function

Both sides have the same random weights (erniekit exports them, transformers loads them), fp32 and the same number of
threads, and continue the same prompts of `--prompt` tokens by `--tokens` tokens, greedily and by sampling (temperature
and top_p 0.8). A time is that of a whole call, prompts included. Each side lives in a process of its own; they take
turns (A B, B A, ...), never both at once: on a shared machine trust the ratios of the rounds, not the tokens a second.
torch runs under transformers' defaults (sdpa, dynamic cache).

The greedy tokens of both sides are compared first. Where a row differs, the two likeliest tokens must tie to within
1e-3 at that place, which is printed; anything else ends the tool with code 1.

Needs the extra `parity` for the torch side; without it, only erniekit is timed.
"""

import argparse
import cProfile
import importlib.util
import json
import os
import pstats
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_step import PRESETS as STEP_PRESETS
from bench_step import _dense
from bench_worker import PAUSE, ROOT, Worker, serve

TIE = 1e-3  # difference of two scores that either side may decide
DRAWN = {"temperature": 0.8, "top_p": 0.8}
# A wide start, so that the answers of a random model do not repeat one token.
_WIDE = {"initializer_range": 0.08, "tie_word_embeddings": False}
_SMALL = _dense(18, 1024, (16, 2), 3072, 103424) | {"head_dim": 128, "initializer_range": 0.04}
# name -> (config.json, new tokens)
PRESETS: dict[str, tuple[dict[str, Any], int]] = {
    "tiny": (STEP_PRESETS["tiny"][0] | _WIDE, 64),
    "tinymoe": (STEP_PRESETS["tinymoe"][0] | _WIDE, 64),
    "0.3b": (_SMALL, 16),
}


def prompts(vocab_size: int, batch: int, length: int) -> np.ndarray:
    """Random prompts [batch, length], the same on both sides."""
    return np.random.default_rng(batch).integers(3, vocab_size, (batch, length))


class Ours:
    """erniekit, which makes the model and saves it for the other side."""

    def __init__(self, job: dict[str, Any]) -> None:
        sys.path.insert(0, str(ROOT))
        from erniekit.utils import runtime

        runtime.prepare()  # before the first import of paddle
        import paddle

        from erniekit.checkpoint.model_io import save_model
        from erniekit.generation.generate import generate
        from erniekit.models.config import ModelConfig
        from erniekit.models.decoder import CausalLM

        self.threads = runtime.set_threads(job["threads"])
        paddle.seed(0)
        self._generate = generate
        self.model = CausalLM(ModelConfig.from_dict(job["config"]))
        self.model.eval()
        save_model(self.model, job["directory"])

    def generate(self, ids: np.ndarray, tokens: int, draws: bool) -> np.ndarray:
        """Continue prompts by exactly `tokens` tokens -> prompts and answers."""
        how: dict[str, Any] = DRAWN | {"seed": 1} if draws else {}
        return self._generate(self.model, ids, max_new_tokens=tokens, eos_token_id=[], do_sample=draws, **how).numpy()

    def margin(self, row: list[int]) -> float:
        """The difference between the two highest scores after a row."""
        lower, higher = np.partition(self.model(np.array([row])).numpy()[0, -1], -2)[-2:]
        return float(higher - lower)


class Torch:
    """transformers on torch."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(job["threads"])
        self.torch, self.threads = torch, job["threads"]
        self.model = AutoModelForCausalLM.from_pretrained(job["directory"], dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None

    def generate(self, ids: np.ndarray, tokens: int, draws: bool) -> np.ndarray:
        """See Ours."""
        how: dict[str, Any] = DRAWN | {"top_k": 0} if draws else {}
        given = self.torch.from_numpy(ids)
        with self.torch.inference_mode():
            made = self.model.generate(
                given,
                attention_mask=self.torch.ones_like(given),
                max_new_tokens=tokens,
                do_sample=draws,
                pad_token_id=0,
                **how,
            )
        return made.numpy()


SIDES = {"ours": Ours, "torch": Torch}


def serve_side(name: str) -> None:
    """The worker: a job, then calls to make."""
    commands, answer = serve()
    job = next(commands)
    side = SIDES[name](job)
    vocab_size = job["config"]["vocab_size"]
    answer({"threads": side.threads})
    for command in commands:
        if "margin" in command:
            assert isinstance(side, Ours)
            answer({"margin": side.margin(command["margin"])})
            continue
        ids = prompts(vocab_size, command["batch"], job["prompt"])
        profile = cProfile.Profile()
        times, made = [], ids
        for _ in range(command["calls"]):
            begun = time.perf_counter(), time.process_time()
            if command.get("profile"):
                profile.enable()
            made = side.generate(ids, job["tokens"], command["draws"])
            profile.disable()
            times.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
        if command.get("profile"):
            pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(45)
        assert made.shape == (len(ids), ids.shape[1] + job["tokens"]), made.shape
        answer({"times": times, "tokens": made.tolist()})


def check_equal(ours: Worker, theirs: Worker, batch: int, prompt: int) -> str:
    """Compare greedy tokens -> what the table says of them. Ends the program where they differ without a tie."""
    command = {"batch": batch, "draws": False, "calls": 1}
    made, expected = (np.array(worker.ask(command)["tokens"]) for worker in (ours, theirs))
    ties = 0
    for row, (mine, other) in enumerate(zip(made, expected, strict=True)):
        if (mine == other).all():
            continue
        place = int(np.argmax(mine != other))
        margin = ours.ask({"margin": mine[:place].tolist()})["margin"]
        if margin > TIE:
            raise SystemExit(f"row {row} of {batch}: other tokens from place {place - prompt} on, by {margin:.2g}")
        ties += 1
    distinct = np.median([len(set(row)) for row in made[:, prompt:].tolist()])
    return f"greedy tokens equal in {batch - ties} of {batch} rows, {ties} differ behind a tie; {distinct:.0f} distinct"


def bench(name: str, job: dict[str, Any], args: argparse.Namespace, sides: list[str]) -> list[dict[str, Any]]:
    """Every batch size of one model, greedily and drawn."""
    workers: list[Worker] = []
    for side in sides:
        workers.append(Worker(__file__, side, job))
        job = job | {"threads": workers[0].about["threads"]}  # torch gets as many as erniekit took
    results = []
    for batch in args.batches:
        if len(workers) == 2:
            print(f"\n{name}, batch {batch}: {check_equal(*workers, batch, job['prompt'])}")
        for draws in args.choices:
            command: dict[str, Any] = {"batch": batch, "draws": draws == "sampled", "calls": 1}
            seconds = {worker.side: worker.ask(command)["times"][0][0] for worker in workers}  # the first call warms up
            seconds = {worker.side: worker.ask(command)["times"][0][0] for worker in workers}
            calls = {side: max(1, min(50, round(args.turn / spent))) for side, spent in seconds.items()}
            turns: dict[str, list[tuple[float, float]]] = {worker.side: [] for worker in workers}
            for number in range(args.rounds):
                for worker in workers if number % 2 == 0 else reversed(workers):
                    time.sleep(PAUSE)
                    times = worker.ask(command | {"calls": calls[worker.side]})["times"]
                    turns[worker.side].append(tuple(statistics.median(each) for each in zip(*times, strict=True)))
            results.append(report(name, job, batch, draws, turns))
            if args.profile:
                workers[0].ask(command | {"calls": calls[workers[0].side], "profile": True})
    for worker in workers:
        worker.close()
    return results


def report(
    name: str, job: dict[str, Any], batch: int, draws: str, turns: dict[str, list[tuple[float, float]]]
) -> dict[str, Any]:
    """Print one line; `turns` are the seconds and the processor seconds of a call, side -> round by round."""
    made = batch * job["tokens"]
    result: dict[str, Any] = {"model": name, "batch": batch, "choice": draws}
    text = f"{name:8} batch {batch:3} {draws:7} load {os.getloadavg()[0]:4.1f}:"
    for side, times in turns.items():
        spent, used = (statistics.median(each) for each in zip(*times, strict=True))
        result[side] = made / spent
        text += f"  {side} {made / spent:7.0f} tokens/s ({1e3 * spent / job['tokens']:.2f} ms a step)"
        result[f"{side}_cpu"] = used
    if len(turns) == 2:
        ratios = [theirs[0] / mine[0] for mine, theirs in zip(turns["ours"], turns["torch"], strict=True)]
        result["ratio"], result["ratios"] = statistics.median(ratios), ratios
        text += f"  ratio {statistics.median(ratios):.2f} (rounds {min(ratios):.2f}-{max(ratios):.2f})"
        text += f", by processor time {result['torch_cpu'] / result['ours_cpu']:.2f}"
    print(text, flush=True)
    return result


def main() -> None:
    """Parse the command line and run every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", choices=[*PRESETS, []], help=f"default: {' '.join(PRESETS)}")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--choices", nargs="+", choices=["greedy", "sampled"], default=["greedy", "sampled"])
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, help="new tokens (default: the preset's)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=float, default=1.0, help="seconds that a side runs in a round, about")
    parser.add_argument("--threads", type=int, help="of each side (default: what erniekit takes by itself)")
    parser.add_argument("--only", choices=list(SIDES)[:1], help="this side alone")
    parser.add_argument("--profile", action="store_true", help="afterwards, erniekit's time by function (stderr)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--serve", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_side(args.serve)
        return
    sides = [args.only] if args.only else list(SIDES)
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if "torch" in sides and absent:
        print(f'not installed: {", ".join(absent)}; only erniekit is timed (pip install "erniekit[parity]")')
        sides.remove("torch")
    results = []
    for name in args.presets or PRESETS:
        config, tokens = PRESETS[name]
        with tempfile.TemporaryDirectory() as directory:
            job = {"config": config, "directory": directory, "prompt": args.prompt, "threads": args.threads}
            results += bench(name, job | {"tokens": args.tokens or tokens}, args, sides)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
