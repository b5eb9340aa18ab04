"""Loads an OpenAI-compatible server: requests at a rate, or a number at a time -> time to the first token, time per
token, throughput, percentiles, and a picture.

  python tools/bench_serving.py --url http://127.0.0.1:8188 --concurrency 1 2 4 8 16 --requests 32 --tokens 64
  python tools/bench_serving.py --url http://127.0.0.1:8188 --rate 2 --requests 60

Each request streams `--tokens` tokens (ignore_eos) after a prompt of `--words` random words, which differ, so that no
prompt is known before. TTFT is the time to the first chunk with text; TPOT is (latency - TTFT) / (tokens - 1);
throughput counts all tokens that the server reports, over the wall time. With --start KEY=VALUE ... the tool starts a
server of its own on a free port.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np


@dataclass
class Result:
    """One request: seconds to the first token and to the last, tokens, and what went wrong."""

    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
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
    finally:
        writer.close()
    return result


async def load(args: argparse.Namespace, model: str, at_a_time: int | None, rate: float | None) -> list[Result]:
    """All requests of one setting."""
    draws = random.Random(args.seed)
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


def draw(rows: list[dict], path: Path) -> None:
    """Throughput and time to the first token, load by load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    names = [row["load"] for row in rows]
    left.bar(names, [row["tokens/s"] for row in rows], color="#3867d6")
    left.set(title="Throughput", ylabel="tokens/s", xlabel="load")
    for percent, style in ((50, "o-"), (99, "s--")):
        right.plot(names, [row[f"TTFT p{percent} ms"] for row in rows], style, label=f"TTFT p{percent}")
        right.plot(names, [row[f"TPOT p{percent} ms"] for row in rows], style, label=f"TPOT p{percent}")
    right.set(title="Times", ylabel="ms", xlabel="load", yscale="log")
    right.legend(fontsize=8)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8188")
    parser.add_argument("--start", metavar="KEY=VALUE", nargs="+", help="start a server with these keys")
    parser.add_argument("--model", help="its name; default: the first in /v1/models")
    parser.add_argument("--key", default="EMPTY")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rate", type=float, nargs="+", help="requests a second, arriving at random (Poisson)")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--words", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a PNG file")
    args = parser.parse_args()
    process = None
    if args.start:
        process, args.url = start(args.start)
    try:
        model = args.model or first_model(args)
        asyncio.run(load(argparse.Namespace(**vars(args) | {"requests": 2}), model, 1, None))  # warm-up
        rows = []
        loads = [(None, rate) for rate in args.rate] if args.rate else [(count, None) for count in args.concurrency]
        for at_a_time, rate in loads:
            begun = time.monotonic()
            results = asyncio.run(load(args, model, at_a_time, rate))
            name = f"{rate:g}/s" if rate else f"{at_a_time}"
            rows.append(line(name, results, time.monotonic() - begun))
    finally:
        if process:
            process.terminate()
            process.wait()
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    if args.out:
        draw(rows, args.out)
    if any(row["failed"] for row in rows):
        raise SystemExit(1)


def first_model(args: argparse.Namespace) -> str:
    """The name of the model that the server has."""
    import urllib.request

    request = urllib.request.Request(f"{args.url}/v1/models", headers={"Authorization": f"Bearer {args.key}"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["data"][0]["id"]


if __name__ == "__main__":
    main()
