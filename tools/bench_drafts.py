"""Time generation with a model's drafted tokens (`num_speculative_tokens: 1`) against generation without, in one run.

    python tools/bench_drafts.py ./demo_output/dense --prompts data/demo/test.jsonl
    python tools/bench_drafts.py ./random --random --batches 1 4

DIRECTORY has a model with a block of multi-token prediction (num_nextn_predict_layers); with --random its config.json
is enough, and no draft will be right. Prompts are the first questions (`src`) of a file in erniekit's format; answers
are greedy and have `--tokens` tokens, whatever the model would end them with. Both ways have the same weights and
take turns; their tokens are compared. Times are processor time of the process, for answers alone, prompts excluded. A
pass is one step of the batch; a gain is more tokens a second than without drafts.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from erniekit.utils import runtime

runtime.prepare()

from erniekit.config import load  # noqa: E402  after the environment of Paddle is set
from erniekit.generation.engine import Engine  # noqa: E402
from erniekit.generation.load import open_model  # noqa: E402
from erniekit.generation.request import Limits, Request  # noqa: E402
from erniekit.generation.sampling import Sampling  # noqa: E402
from erniekit.generation.speculative import Drafting  # noqa: E402
from erniekit.models.decoder import CausalLM  # noqa: E402


def answer(
    model: CausalLM, prompts: list[list[int]], limits: Limits, drafts: bool
) -> tuple[list[list[int]], float, int, Drafting | None]:
    """Answer prompts -> (tokens, seconds, passes, what the drafts were)."""
    engine, passes = Engine(model, len(prompts), drafts=drafts), 0
    rows = [engine.add(Request(prompt, limits, Sampling())) for prompt in prompts]
    engine.step()
    begun = time.process_time()
    while not engine.is_idle:
        engine.step()
        passes += 1
    return [row.answer.all_ids for row in rows], time.process_time() - begun, passes, engine.drafting


def bench(model: CausalLM, prompts: list[list[int]], limits: Limits, rounds: int) -> str:
    """A row of the table for one batch."""
    gains, costs = [], []
    for number in range(rounds + 1):
        plain, plain_seconds, plain_passes, _ = answer(model, prompts, limits, False)
        drafted, seconds, passes, drafting = answer(model, prompts, limits, True)
        assert drafted == plain, "drafts have changed an answer"
        if number:  # the first round warms up
            gains.append(plain_seconds / seconds)
            costs.append(seconds / passes / (plain_seconds / plain_passes))
    assert drafting is not None, "it drafts"
    share = drafting.num_accepted / max(1, drafting.num_drafts)
    spread = f"{statistics.median(gains):.2f} ({min(gains):.2f}-{max(gains):.2f})"
    return f"| {len(prompts)} | {share:.0%} | {plain_passes} -> {passes} | {statistics.median(costs):.2f} | {spread} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--prompts", type=Path, default=Path("data/demo/test.jsonl"))
    parser.add_argument("--random", action="store_true", help="random weights")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="answers at a time")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    keys = {"model_name_or_path": str(args.directory), "compute_type": "fp32", "continue_training": not args.random}
    chat = open_model(load(None, keys, command="server"))
    lines = args.prompts.read_text(encoding="utf-8").splitlines()[: max(args.batches)]
    prompts = [chat.tokenizer.encode(f"User: {json.loads(line)['src'][0]}\nAssistant: ") for line in lines]
    limits = Limits(args.tokens)
    print("| answers at a time | right drafts | passes | cost of a pass | gain (rounds) |\n|---|---|---|---|---|")
    for count in args.batches:
        print(bench(chat.model, prompts[:count], limits, args.rounds), flush=True)


if __name__ == "__main__":
    main()
