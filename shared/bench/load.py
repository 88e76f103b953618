"""Put load on an OpenAI-compatible server, and measure throughput and latency at its clients.

    python -m shared.bench.load --url http://127.0.0.1:8000 --connections 16 --requests 100   # closed loop
    python -m shared.bench.load --url http://127.0.0.1:8000 --rate 4 --requests 100           # open loop
    python -m shared.bench.load chapter [--write]     # the last chapter against batching as in v03, 1, 4, 16, 64 connections

In a closed loop, each of --connections clients sends its next request when its last one is answered; this measures the
server's capacity. In an open loop, requests are sent at random times (a Poisson process), --rate per second on average,
whether or not the server keeps up; this measures the latency that users see. Requests are seeded: streamed completions
with prompts of 4 to 60 words and answers of 8 to 64 tokens. Times are measured at the client:

    ttft    time to first token: from the request to the first text
    tpot    time per output token: from the first text to the last, per token after the first
    itl     inter-token latency: between two pieces of text of a stream

Reads: a running server. Writes: docs/results/load.json.
"""
import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
from tqdm import tqdm

from shared import programs
from shared.chapters import ROOT, find, last_with
from shared.results import write_row

WORDS = "once upon a time there was hare fox owl who lived near river and kept keys values in small blocks".split()
CHAPTER_CONNECTIONS = (1, 4, 16, 64)
CHAPTER_PLACES = 16


@dataclass
class Answer:
    """What a client measured of one request; times are seconds since it was sent."""

    pieces: list[float] = field(default_factory=list)  # when each text arrived; random weights may generate no text at all
    seconds: float = 0.0
    num_tokens: int = 0
    error: str | None = None


def workload(count: int, seed: int, model: str) -> list[dict]:
    """Bodies of completion requests; the same seed gives the same bodies."""
    rng = random.Random(seed)
    return [
        {
            "model": model,
            "prompt": " ".join(rng.choices(WORDS, k=rng.randint(4, 60))),
            "max_tokens": rng.randint(8, 64),
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(count)
    ]


async def ask(client: httpx.AsyncClient, url: str, body: dict) -> Answer:
    """Send a request and read its stream."""
    answer, start = Answer(), time.perf_counter()
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.error = f"{response.status_code}: {(await response.aread()).decode()[:200]}"
                return answer
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    answer.error = event["error"]["message"]
                elif event.get("usage"):
                    answer.num_tokens = event["usage"]["completion_tokens"]
                if event.get("choices") and event["choices"][0]["text"]:
                    answer.pieces.append(time.perf_counter() - start)
    # A server may also send what is no event of a completion.
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        answer.error = repr(error)
    answer.seconds = time.perf_counter() - start
    return answer


async def run(url: str, bodies: list[dict], connections: int | None, rate: float | None, key: str | None, seed: int) -> dict:
    """Send all requests, in a closed loop (connections) or an open one (rate); the summary."""
    answers, bar = [], tqdm(total=len(bodies), desc="requests", leave=False, disable=not sys.stderr.isatty())
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits, headers=headers) as client:

        async def one(body: dict) -> None:
            answers.append(await ask(client, url, body))
            bar.update()

        async def one_after_the_other(mine) -> None:
            for body in mine:
                await one(body)

        start = time.perf_counter()
        if connections is not None:
            shared = iter(bodies)
            await asyncio.gather(*(one_after_the_other(shared) for _ in range(connections)))
        else:
            rng, tasks = random.Random(seed), []
            for body in bodies:
                tasks.append(asyncio.create_task(one(body)))
                await asyncio.sleep(rng.expovariate(rate))
            await asyncio.gather(*tasks)
        seconds = time.perf_counter() - start
    bar.close()
    return summary(answers, seconds)


def summary(answers: list[Answer], seconds: float) -> dict:
    """Percentiles in ms, and counts; the percentiles leave out failed requests.

    >>> answers = [Answer(pieces=[0.1, 0.2, 0.4], num_tokens=3), Answer(error="no")]
    >>> summary(answers, seconds=2.0)["tpot_ms"], summary(answers, seconds=2.0)["failed"]
    ({'p50': 150.0, 'p90': 150.0, 'p99': 150.0}, 1)
    """
    good = [answer for answer in answers if answer.error is None and answer.num_tokens]
    result = {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "errors": sorted({answer.error or "the stream has no usage with its number of tokens" for answer in answers if answer not in good}),
        "seconds": round(seconds, 2),
        "tokens_per_s": round(sum(answer.num_tokens for answer in good) / seconds, 1),
        "requests_per_s": round(len(good) / seconds, 2),
    }
    times = {
        "ttft_ms": [answer.pieces[0] for answer in good if answer.pieces],
        "tpot_ms": [(answer.pieces[-1] - answer.pieces[0]) / (answer.num_tokens - 1) for answer in good if answer.pieces and answer.num_tokens > 1],
        "itl_ms": [after - before for answer in good for before, after in zip(answer.pieces, answer.pieces[1:])],
        "total_ms": [answer.seconds for answer in good],
    }
    for name, values in times.items():
        result[name] = {f"p{share}": round(1e3 * percentile(values, share), 1) for share in (50, 90, 99)} if values else None
    return result


def percentile(values: list[float], share: int) -> float:
    """The smallest value that at least `share` percent of the values do not exceed.

    >>> percentile([4, 1, 3, 2], 50), percentile([4, 1, 3, 2], 99)
    (2, 4)
    """
    return sorted(values)[-(-share * len(values) // 100) - 1]


def show(result: dict) -> None:
    print(f"{result['requests']} requests in {result['seconds']} s, {result['failed']} failed; "
          f"{result['tokens_per_s']} tokens/s, {result['requests_per_s']} requests/s")
    for error in result["errors"]:
        print(f"  failed: {error}")
    print(f"{'':10}{'p50':>10}{'p90':>10}{'p99':>10}")
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "total_ms"):
        if result[name]:
            print(f"{name:10}" + "".join(f"{result[name][f'p{share}']:>10,.1f}" for share in (50, 90, 99)))


def measure_chapter(requests_each: int, seed: int) -> dict:
    """Figures of the last chapter's server, and of the same server with batches that admit requests only when empty."""
    chapter = last_with("serve")
    flags = ["serve", "--port", "0", "--max-num-seqs", str(CHAPTER_PLACES), "--max-model-len", "512"]
    commands = {
        "continuous": [sys.executable, "-m", f"milestones.{chapter.name}", *flags],
        "in_groups": [sys.executable, "-m", "shared.bench.load", "serve-in-groups", chapter.name, *flags],
    }
    results = {"chapter": chapter.id, "places": CHAPTER_PLACES}
    for name, command in commands.items():
        server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        try:
            url = url_of(server)
            asyncio.run(run(url, workload(8, seed, "pocket"), 4, None, None, seed))
            results[name] = {}
            for connections in CHAPTER_CONNECTIONS:
                bodies = workload(max(requests_each, 2 * connections), seed, "pocket")
                results[name][str(connections)] = asyncio.run(run(url, bodies, connections, None, None, seed))
                print(f"\n{name}, {connections} connections: ", end="")
                show(results[name][str(connections)])
        finally:
            server.kill()
            server.wait()
            server.stderr.close()
    return results


def url_of(server: subprocess.Popen) -> str:
    """Wait until a chapter's server is ready, and return its URL, read from its stderr, which must be a text pipe.

    Raises:
        RuntimeError: if the server exits first; includes its stderr.
    """
    lines = []
    while not (lines and lines[-1].startswith("  curl ")):
        lines.append(server.stderr.readline())
        if not lines[-1]:
            raise RuntimeError(f"`{' '.join(server.args)}` exited before it was ready:\n{''.join(lines)}")
    return lines[-1].split()[1].removesuffix("/v1/completions")


def serve_in_groups(chapter_name: str, argv: list[str]) -> int:
    """Run the chapter's server with v03's kind of batching: no request is admitted before all running ones have finished.

    Unlike in v03, finished requests are not computed any further.
    """
    import importlib

    schedule_in_groups(chapter_name)
    if "engine_process" in find(chapter_name).capabilities:
        # The engine's process does not see this process's changes, so it has to make its own.
        engine_process = importlib.import_module(f"milestones.{chapter_name}.engine_process")
        engine_process.load_engine = partial(load_in_groups, chapter_name)
    return importlib.import_module(f"milestones.{chapter_name}.__main__").main(argv)


def schedule_in_groups(chapter_name: str) -> None:
    """Make the chapter's scheduler in this process admit requests only when none is running."""
    import importlib

    scheduler = importlib.import_module(f"milestones.{chapter_name}.scheduler").Scheduler
    admit, schedule = scheduler.admit, scheduler.schedule

    def schedule_group(self):
        self.is_group_under_way = bool(self.running)
        return schedule(self)

    scheduler.schedule = schedule_group
    scheduler.admit = lambda self, seq: not self.is_group_under_way and admit(self, seq)


def load_in_groups(chapter_name: str, model_dir: str, **options):
    """Load the engine with that scheduler; the engine's process calls this."""
    import importlib

    schedule_in_groups(chapter_name)
    return importlib.import_module(f"milestones.{chapter_name}.engine_process").load_engine(model_dir, **options)


def main(argv: list[str]) -> int:
    if argv[:1] == ["serve-in-groups"]:
        return serve_in_groups(argv[1], argv[2:])
    parser = argparse.ArgumentParser(prog="python -m shared.bench.load", description="Put load on an OpenAI-compatible server.")
    parser.add_argument("what", nargs="?", choices=["url", "chapter"], default="url")
    parser.add_argument("--url", type=programs.server_url, default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="(default: the first model the server lists)")
    parser.add_argument("--api-key")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--connections", type=int, help="closed loop with this many clients (default: 16)")
    parser.add_argument("--rate", type=float, help="open loop with this many requests per second on average")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the result to this file")
    parser.add_argument("--write", action="store_true", help="with chapter: write the result under docs/results/")
    args = parser.parse_args(argv)
    if args.connections is not None and args.rate is not None:
        parser.error("--connections makes a closed loop and --rate an open one; choose one of them")
    for name in ("requests", "connections", "rate"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name} must be above 0, got {getattr(args, name)}")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).resolve().parent.is_dir()):
        parser.error(f"--json {args.json}: it is a directory, or its directory does not exist")
    if args.api_key and not args.api_key.isascii():
        parser.error("--api-key must be ASCII")
    if args.write and args.what != "chapter":
        parser.error("--write is for the last chapter's server, which `chapter` starts; add `chapter`, or write the result with --json FILE")
    for name in ("url", "model", "api_key", "connections", "rate", "json") if args.what == "chapter" else ():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is for a server that runs already, and `chapter` starts its own; leave one of them out")
    if args.what == "chapter":
        results = measure_chapter(args.requests, args.seed)
        if args.write:
            write_row("load", results, " ".join(["python -m shared.bench.load", *argv]), [last_with("serve")])
        return 0
    headers = {"authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    try:
        model = args.model or httpx.get(f"{args.url}/v1/models", headers=headers).raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        parser.error(f"no OpenAI server answers at {args.url} ({error}); start one with `make serve`")
    connections = None if args.rate else args.connections or 16
    bodies = workload(args.requests, args.seed, model)
    result = asyncio.run(run(args.url, bodies, connections, args.rate, args.api_key, args.seed))
    show(result)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=2)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    programs.run(main)
