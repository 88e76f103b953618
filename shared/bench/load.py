"""Load on an OpenAI server, and what its clients feel of it.

    python -m shared.bench.load --url http://127.0.0.1:8000 --connections 16 --requests 100   # closed loop
    python -m shared.bench.load --url http://127.0.0.1:8000 --rate 4 --requests 100           # open loop
    python -m shared.bench.load chapter [--write]     # the last chapter against batches of v03's kind, at 1, 4, 16, 64

A closed loop has so many clients, each of which sends its next request when its last one is answered; it shows
what a server can do. An open loop sends them at random moments, so many a second on average (Poisson), whether
or not the server keeps up; it shows what people feel. Requests are seeded: streams of completions, with prompts of
4 to 60 words and answers of 8 to 64 tokens. Times are those of the client:

    ttft    from the request to the first piece of text
    tpot    from the first to the last piece, per token after the first
    itl     between two pieces of a stream

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
class Told:
    """What one client saw of one request, in seconds since it was sent."""

    pieces: list[float] = field(default_factory=list)  # of text; a model with random weights may say nothing readable
    seconds: float = 0.0
    num_tokens: int = 0
    error: str | None = None


def workload(count: int, seed: int, model: str) -> list[dict]:
    """Bodies of completions; the same for the same seed."""
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


async def ask(client: httpx.AsyncClient, url: str, body: dict) -> Told:
    """Send a request and read its stream."""
    told, start = Told(), time.perf_counter()
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                told.error = f"{response.status_code}: {(await response.aread()).decode()[:200]}"
                return told
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    told.error = event["error"]["message"]
                elif event.get("usage"):
                    told.num_tokens = event["usage"]["completion_tokens"]
                if event.get("choices") and event["choices"][0]["text"]:
                    told.pieces.append(time.perf_counter() - start)
    except httpx.HTTPError as error:
        told.error = repr(error)
    told.seconds = time.perf_counter() - start
    return told


async def run(url: str, bodies: list[dict], connections: int | None, rate: float | None, key: str | None, seed: int) -> dict:
    """All requests, closed (connections) or open (rate); the summary."""
    found, bar = [], tqdm(total=len(bodies), desc="requests", leave=False, disable=not sys.stderr.isatty())
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits, headers=headers) as client:

        async def one(body: dict) -> None:
            found.append(await ask(client, url, body))
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
    return summary(found, seconds)


def summary(found: list[Told], seconds: float) -> dict:
    """Percentiles in ms; requests that failed are counted, and in no percentile.

    >>> told = [Told(pieces=[0.1, 0.2, 0.4], num_tokens=3), Told(error="no")]
    >>> summary(told, seconds=2.0)["tpot_ms"], summary(told, seconds=2.0)["failed"]
    ({'p50': 150.0, 'p90': 150.0, 'p99': 150.0}, 1)
    """
    good = [told for told in found if told.error is None and told.num_tokens]
    result = {
        "requests": len(found),
        "failed": len(found) - len(good),
        "errors": sorted({told.error or "the answer does not say how many tokens it has" for told in found if told not in good}),
        "seconds": round(seconds, 2),
        "tokens_per_s": round(sum(told.num_tokens for told in good) / seconds, 1),
        "requests_per_s": round(len(good) / seconds, 2),
    }
    times = {
        "ttft_ms": [told.pieces[0] for told in good if told.pieces],
        "tpot_ms": [(told.pieces[-1] - told.pieces[0]) / (told.num_tokens - 1) for told in good if told.pieces and told.num_tokens > 1],
        "itl_ms": [after - before for told in good for before, after in zip(told.pieces, told.pieces[1:])],
        "total_ms": [told.seconds for told in good],
    }
    for name, values in times.items():
        result[name] = {f"p{share}": round(1e3 * percentile(values, share), 1) for share in (50, 90, 99)} if values else None
    return result


def percentile(values: list[float], share: int) -> float:
    """The smallest value that so many percent of the values do not exceed.

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
    """The last chapter that serves, and the same server with groups that only change when all have ended."""
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
    """Wait until a chapter's server listens, and read its address from its stderr, which must be a pipe of text.

    Raises:
        RuntimeError: if it ends first; with what it said.
    """
    lines = []
    while not (lines and lines[-1].startswith("  curl ")):
        lines.append(server.stderr.readline())
        if not lines[-1]:
            raise RuntimeError(f"{' '.join(server.args)} ended before it served:\n{''.join(lines)}")
    return lines[-1].split()[1].removesuffix("/v1/completions")


def serve_in_groups(chapter_name: str, argv: list[str]) -> int:
    """The chapter's server, whose scheduler lets nobody in before all have ended: batches of v03's kind.

    It is kinder than v03: who has ended does not ride along.
    """
    import importlib

    schedule_in_groups(chapter_name)
    if "engine_process" in find(chapter_name).capabilities:
        # What is changed in this process is not changed in the engine's.
        engine_process = importlib.import_module(f"milestones.{chapter_name}.engine_process")
        engine_process.load_engine = partial(load_in_groups, chapter_name)
    return importlib.import_module(f"milestones.{chapter_name}.__main__").main(argv)


def schedule_in_groups(chapter_name: str) -> None:
    """Change the chapter's scheduler in this process."""
    import importlib

    scheduler = importlib.import_module(f"milestones.{chapter_name}.scheduler").Scheduler
    admit, schedule = scheduler.admit, scheduler.schedule

    def schedule_group(self):
        self.is_group_under_way = bool(self.running)
        return schedule(self)

    scheduler.schedule = schedule_group
    scheduler.admit = lambda self, seq: not self.is_group_under_way and admit(self, seq)


def load_in_groups(chapter_name: str, model_dir: str, **options):
    """What the engine's process calls to make its engine."""
    import importlib

    schedule_in_groups(chapter_name)
    return importlib.import_module(f"milestones.{chapter_name}.engine_process").load_engine(model_dir, **options)


def main(argv: list[str]) -> int:
    if argv[:1] == ["serve-in-groups"]:
        return serve_in_groups(argv[1], argv[2:])
    parser = argparse.ArgumentParser(prog="python -m shared.bench.load", description="Load on an OpenAI server.")
    parser.add_argument("what", nargs="?", choices=["url", "chapter"], default="url")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="(default: the first that the server lists)")
    parser.add_argument("--api-key")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--connections", type=int, help="closed loop with so many clients (default: 16)")
    parser.add_argument("--rate", type=float, help="open loop with so many requests a second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--write", action="store_true", help="of chapter: write the result under docs/results/")
    args = parser.parse_args(argv)
    if args.connections is not None and args.rate is not None:
        parser.error("--connections is a closed loop and --rate an open one; give one of them")
    for name in ("requests", "connections", "rate"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name} must be above 0, got {getattr(args, name)}")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        parser.error(f"--json {args.json}: there is no such folder")
    if args.what == "chapter":
        results = measure_chapter(args.requests, args.seed)
        if args.write:
            write_row("load", results, " ".join(["python -m shared.bench.load", *argv]), [last_with("serve")])
        return 0
    headers = {"authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    url = programs.server_url(args.url)
    try:
        model = args.model or httpx.get(f"{url}/v1/models", headers=headers).raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
        parser.error(f"no OpenAI server answers at {url} ({error}); start one with `make serve`")
    connections = None if args.rate else args.connections or 16
    bodies = workload(args.requests, args.seed, model)
    result = asyncio.run(run(url, bodies, connections, args.rate, args.api_key, args.seed))
    show(result)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=2)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    programs.run(main)
