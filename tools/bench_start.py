"""How long `erniekit train` takes until its first step, and where that time goes.

    python tools/bench_start.py                                  # the tiny dense model of examples/
    python tools/bench_start.py my.yaml max_seq_len=64 --rounds 9

Each round starts the command as a user does, reads from its output when training begins and when the first step is
done, and ends it. Then as many processes run the same command with a clock in it and name the parts. All times are wall
time from the start of the process, so they need a quiet machine; "CPU s" is the processor time until the first step,
data workers included, which another program disturbs less. The first round has no measured lengths of the data in the
cache (data/lengths.py); the others may.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "examples/configs/tiny/sft/run_sft_dense.yaml"
_BEGINS, _FIRST = "training begins", "step 1/"


def words_of(config: str, keys: list[str], directory: str) -> list[str]:
    """What follows `train` on the command line."""
    fixed = "logging_steps=1 disable_tqdm=true"
    return [config, *fixed.split(), "overwrite_output_dir=true", f"output_dir={directory}", *keys]


def run(words: list[str]) -> dict[str, float]:
    """Seconds from the start of the command to the line that training begins, and to the first step's line; and
    processor seconds.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began, seconds, lines = time.perf_counter(), dict[str, float](), []
    command = [sys.executable, "-m", "erniekit", "train", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            for sign in (_BEGINS, _FIRST):
                if sign in line:
                    seconds.setdefault(sign, time.perf_counter() - began)
            if _FIRST in seconds:
                process.kill()
                break
    if len(seconds) != 2:
        raise SystemExit(f"the command failed with code {process.returncode}:\n{''.join(lines)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds | {"CPU s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


class Clock:
    """Named parts of a start, in order, and their seconds. A part ends when the next one begins."""

    def __init__(self, began: float) -> None:
        self.parts: list[tuple[str, float]] = []
        self._began = began  # of time.time(), which processes share

    def ends(self, name: str) -> None:
        """A part of this name ends now."""
        now = time.time()
        self.parts.append((name, now - self._began))
        self._began = now

    def around(self, owner: Any, function: str, name: str, before: str, is_last: bool = False) -> None:
        """Replace a function by itself with a clock: what ran since the last part is `before`, and the function
        `name`.
        """
        original: Callable[..., Any] = vars(owner)[function]

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.ends(before)
            result = original(*args, **kwargs)
            self.ends(name)
            if is_last:
                self.print_and_end()
            return result

        setattr(owner, function, timed)

    def print_and_end(self) -> None:
        """Print the parts, and end the process."""
        print("PARTS " + json.dumps(self.parts), flush=True)
        os._exit(0)


def serve_parts(began: float, words: list[str]) -> None:
    """In a process of its own: the command with a clock."""
    clock = Clock(began)
    clock.ends("the interpreter")
    sys.path.insert(0, str(ROOT))
    from erniekit.utils import runtime

    runtime.prepare()
    with runtime.importing():
        from erniekit.cli import launch
        from erniekit.cli import train as train_command  # noqa: F401

    clock.ends("modules that read the configuration")
    cfg = launch.configure(words, "train")
    launch.job_of(cfg, words, "train")
    clock.ends("the configuration")
    with runtime.importing():
        import paddle  # noqa: F401

    clock.ends("Paddle")
    with runtime.importing():
        from erniekit.training import build, run, trainer

    clock.ends("the other modules")
    clock.around(build, "prepare", "the model's keys", "the output directory")
    clock.around(build, "load_tokenizer", "the tokenizer", "")
    clock.around(build, "_open_data", "the data: index, template, workers", "")
    clock.around(build.PreparedModel, "build", "the model", "checks")
    clock.around(build, "build_optimizer", "gradients and optimizer", "")
    clock.around(trainer.Trainer, "train_step", "the first step", "recipe, callbacks and first batch", is_last=True)
    run.train(cfg)


def parts_of(words: list[str]) -> list[tuple[str, float]]:
    """The parts of one start, timed in a new process."""
    command = [sys.executable, __file__, "--serve-parts", repr(time.time()), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("PARTS ")]
    if not lines:
        raise SystemExit(f"the command with a clock failed:\n{done.stdout}{done.stderr}")
    return [(name, seconds) for name, seconds in json.loads(lines[0].removeprefix("PARTS ")) if name]


def main() -> None:
    """Parse the command line, measure, print."""
    if sys.argv[1:2] == ["--serve-parts"]:
        serve_parts(float(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=CONFIG)
    parser.add_argument("keys", nargs="*", help="key=value")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as directory:
        os.environ["XDG_CACHE_HOME"] = f"{directory}/cache"
        # An installed package has compiled modules; a checkout has them from the second start on.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        words = words_of(args.config, args.keys, f"{directory}/run")
        rounds = [run(words) for _ in range(args.rounds)]
        samples = [dict(parts_of(words)) for _ in range(args.rounds)]
    result: dict[str, Any] = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    print(f"{args.config}, {args.rounds} rounds, load {os.getloadavg()[0]:.2f}")
    for name, seconds in result.items():
        values = [each[name] for each in rounds]
        print(f"{name:20}{seconds:7.2f} s ({min(values):.2f}-{max(values):.2f})")
    result["parts"] = {name: statistics.median(each[name] for each in samples) for name in samples[0]}
    print("where it goes (medians):")
    for name, seconds in result["parts"].items():
        print(f"  {name:42}{seconds:7.3f} s")
    print(f"  {'together':42}{sum(result['parts'].values()):7.3f} s")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
