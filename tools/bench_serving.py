"""Loads an OpenAI-compatible server: requests at a rate, or a number at a time -> time to the first token, time per
token, throughput, percentiles, and a picture.

  python tools/bench_serving.py --url http://127.0.0.1:8188 --concurrency 1 2 4 8 16 --requests 32 --tokens 64
  python tools/bench_serving.py --url http://127.0.0.1:8188 --concurrency --rate 2 5 --requests 60

Each request streams `--tokens` tokens (ignore_eos) after a prompt of `--words` random words, which differ, so that no
prompt is known before. TTFT is the time to the first chunk with text; TPOT is (latency - TTFT) / (tokens - 1);
throughput counts all tokens that the server reports, over the wall time. With --start KEY=VALUE ... the tool starts a
server of its own on a free port.

--against DIRECTORY also measures transformers' `generate` on torch with the configuration in that directory, random
weights, fp32: one static batch of as many prompts as the largest number of requests at a time, prompts and answers as
long as the server's. Server and torch take turns for --rounds rounds; needs the extra `parity`. With --start it also
compares the processor time that each of the two processes takes for a token, which other jobs change less.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from bench_worker import PAUSE, Worker, serve


@dataclass
class Result:
    """One request: seconds to the first token and to the last, tokens, those of the prompt, and what went wrong."""

    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    error: str = ""

    @property
    def per_token(self) -> float:
        return (self.last - self.first) / max(1, self.tokens - 1)


async def ask(url: str, model: str, prompt: str, tokens: int, key: str) -> Result:
    """Stream one answer over a connection of its own."""
    place, result, begun = urlsplit(url), Result(), time.monotonic()
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "stream": True}
    body |= {"ignore_eos": True, "temperature": 0, "stream_options": {"include_usage": True}}
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {key}\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 22)
    try:
        writer.write(head.encode() + data)
        status = (await reader.readline()).decode()
        if " 200 " not in status:
            return Result(error=status.strip() + " " + (await reader.read()).decode()[-200:])
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return Result(error=event["error"]["message"])
            delta = event["choices"][0]["delta"] if event["choices"] else {}
            if any(delta.get(name) for name in ("content", "reasoning")):
                result.first = result.first or time.monotonic() - begun
            if event["choices"]:
                result.last = time.monotonic() - begun
            if event.get("usage"):
                result.tokens = event["usage"]["completion_tokens"]
                result.prompt_tokens = event["usage"]["prompt_tokens"]
    finally:
        writer.close()
    return result


async def load(
    args: argparse.Namespace, model: str, at_a_time: int | None, rate: float | None, number: int
) -> list[Result]:
    """All requests of one setting, whose `number` decides about the prompts."""
    draws = random.Random(f"{args.seed} {number}")
    gate = asyncio.Semaphore(at_a_time or args.requests)

    async def one(prompt: str) -> Result:
        async with gate:
            return await ask(args.url, model, prompt, args.tokens, args.key)

    tasks = []
    for _ in range(args.requests):
        prompt = " ".join(str(draws.randrange(10**6)) for _ in range(args.words))
        tasks.append(asyncio.create_task(one(prompt)))
        if rate:
            await asyncio.sleep(draws.expovariate(rate))
    return await asyncio.gather(*tasks)


def line(name: str, results: list[Result], seconds: float) -> dict[str, float | str | int]:
    """One row of the table."""
    good = [result for result in results if not result.error]
    for result in (result for result in results if result.error):
        print(f"{name}: {result.error}", file=sys.stderr)
    row: dict[str, float | str | int] = {"load": name, "answers": len(good), "failed": len(results) - len(good)}
    row["tokens/s"] = round(sum(result.tokens for result in good) / seconds, 1)
    for label, values in (("TTFT", [r.first for r in good]), ("TPOT", [r.per_token for r in good])):
        for percent in (50, 99):
            row[f"{label} p{percent} ms"] = round(1000 * float(np.percentile(values or [0.0], percent)), 1)
    return row


def draw(tables: dict[str, list[dict]], path: Path) -> None:
    """Throughput, time to the first token and time per token, a row of panels for each kind of load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = 10, 3.1 * len(tables)
    figure, panels = pyplot.subplots(len(tables), 3, figsize=size, layout="constrained", squeeze=False)
    for (kind, rows), (throughput, *times) in zip(tables.items(), panels, strict=True):
        names = [row["load"] for row in rows]
        throughput.plot(names, [row["tokens/s"] for row in rows], "o-", color="#2d3436")
        throughput.set(title="Throughput", ylabel="tokens/s", xlabel=kind)
        for panel, name, title in zip(times, ("TTFT", "TPOT"), ("Time to the first token", "Time per token")):
            for percent, style, color in ((50, "o-", "#3867d6"), (99, "s--", "#eb3b5a")):
                values = [row[f"{name} p{percent} ms"] for row in rows]
                panel.plot(names, values, style, color=color, label=f"{percent}th percentile")
            panel.set(title=f"{title} ({name})", ylabel="ms", xlabel=kind)
            panel.legend(fontsize=8)
        for panel in (throughput, *times):
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def start(keys: list[str]) -> tuple[subprocess.Popen, str]:
    """A server with these keys of its YAML on a free port -> (its process, its address)."""
    command = [sys.executable, "-m", "erniekit", "server", *keys, "port=0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said = []
    for text in process.stderr:
        said.append(text)
        if found := re.search(r"served at (http://\S+)/v1", text):
            return process, found[1]
    raise SystemExit("".join(said))


class Static:
    """transformers' generate on torch with one batch that stays as it is."""

    def __init__(self, job: dict) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        self.torch = torch
        config = AutoConfig.from_pretrained(job["directory"])
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.ids = torch.randint(3, config.vocab_size, (job["batch"], job["prompt"]))

    def run(self, tokens: int) -> float:
        """Continue all prompts by `tokens` tokens -> tokens a second."""
        begun = time.monotonic()
        with self.torch.inference_mode():
            mask = self.torch.ones_like(self.ids)
            made = self.model.generate(
                self.ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        assert made.shape[1] == self.ids.shape[1] + tokens
        return self.ids.shape[0] * tokens / (time.monotonic() - begun)


def processor_seconds(pid: int) -> float:
    """Processor time that a process has had (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(args: argparse.Namespace, model: str, prompt: int, pid: int | None) -> None:
    """The server at its largest number of requests at a time and a static batch of transformers, by turns."""
    batch = max(args.concurrency)
    job = {"directory": str(args.against), "batch": batch, "prompt": prompt, "tokens": args.tokens}
    worker = Worker(__file__, "torch", job)
    calls = max(1, round(args.requests / batch))
    pairs, costs = [], []
    for number in range(args.rounds):
        time.sleep(PAUSE)
        begun, before = time.monotonic(), processor_seconds(pid) if pid else 0
        results = asyncio.run(load(args, model, batch, None, 100 + number))
        tokens = sum(result.tokens for result in results)
        served = tokens / (time.monotonic() - begun)
        cost = (processor_seconds(pid) - before) / tokens if pid else 0
        time.sleep(PAUSE)
        answers = [worker.ask("run") for _ in range(calls)]
        pairs.append((served, statistics.median(answer["rate"] for answer in answers)))
        costs.append((cost, statistics.median(answer["seconds"] for answer in answers) / (batch * args.tokens)))
    worker.close()
    ratios = [served / static for served, static in pairs]
    served, static = (statistics.median(each) for each in zip(*pairs, strict=True))
    print(
        f"\n{batch} requests at a time: server {served:.0f} tokens/s, transformers' generate with a static batch of "
        f"{batch} {static:.0f} tokens/s (prompts of {prompt} tokens), ratio {statistics.median(ratios):.2f} "
        f"(rounds {min(ratios):.2f}-{max(ratios):.2f})"
    )
    if pid:
        ratios = [other / own for own, other in costs]
        own, other = (1e6 * statistics.median(each) for each in zip(*costs, strict=True))
        print(
            f"processor time a token: server {own:.0f} us, transformers {other:.0f} us, ratio "
            f"{statistics.median(ratios):.2f} (rounds {min(ratios):.2f}-{max(ratios):.2f})"
        )


def serve_static() -> None:
    """The worker of `compare`: a job, then calls to make."""
    commands, answer = serve()
    job = next(commands)
    static = Static(job)
    static.run(job["tokens"])  # warm-up
    answer({})
    for _ in commands:
        before = time.process_time()
        answer({"rate": static.run(job["tokens"]), "seconds": time.process_time() - before})


def measure(args: argparse.Namespace, model: str, tables: dict[str, list[dict]]) -> int:
    """Fill a table for each kind of load -> the tokens of a prompt."""
    settings = {"requests at a time": [(count, None) for count in args.concurrency]}
    settings |= {"requests a second": [(None, rate) for rate in args.rate]}
    warm = max([1, *args.concurrency])
    args.requests, requests = 2 * warm, args.requests
    asyncio.run(load(args, model, warm, None, -1))
    args.requests = requests
    prompt = 0
    for kind, loads in ((kind, loads) for kind, loads in settings.items() if loads):
        tables[kind] = []
        for at_a_time, rate in loads:
            begun = time.monotonic()
            results = asyncio.run(load(args, model, at_a_time, rate, len(tables) * 10 + len(tables[kind])))
            name = f"{rate:g}" if rate else f"{at_a_time}"
            tables[kind].append(line(name, results, time.monotonic() - begun))
            prompt = prompt or results[0].prompt_tokens
    return prompt


def show(tables: dict[str, list[dict]]) -> None:
    """Print the tables."""
    for kind, rows in tables.items():
        print(f"\n| {kind} | " + " | ".join(list(rows[0])[1:]) + " |\n|" + "---|" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(map(str, row.values())) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8188")
    parser.add_argument("--start", metavar="KEY=VALUE", nargs="+", help="start a server with these keys")
    parser.add_argument("--model", help="its name; default: the first in /v1/models")
    parser.add_argument("--key", default="EMPTY")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 2, 4, 8, 16], help="requests at a time")
    parser.add_argument("--rate", type=float, nargs="*", default=[], help="requests a second, at random (Poisson)")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--words", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a PNG file")
    parser.add_argument("--against", type=Path, metavar="DIRECTORY", help="compare with transformers on torch")
    parser.add_argument("--rounds", type=int, default=5, help="of --against")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_static()
        return
    process = None
    if args.start:
        process, args.url = start(args.start)
    tables: dict[str, list[dict]] = {}
    try:
        model = args.model or first_model(args)
        prompt = measure(args, model, tables)
        show(tables)
        if args.against:
            compare(args, model, prompt, process.pid if process else None)
    finally:
        if process:
            process.terminate()
            process.wait()
    if args.out:
        draw(tables, args.out)
    if any(row["failed"] for rows in tables.values() for row in rows):
        raise SystemExit(1)


def first_model(args: argparse.Namespace) -> str:
    """The name of the model that the server has."""
    import urllib.request

    request = urllib.request.Request(f"{args.url}/v1/models", headers={"Authorization": f"Bearer {args.key}"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["data"][0]["id"]


if __name__ == "__main__":
    main()
