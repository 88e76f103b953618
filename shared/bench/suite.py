"""Chapters beside Hugging Face on the same work, and beside what the machine allows.

    make bench                       # every chapter; at most ten minutes
    make bench-v05                   # a chapter and the one before
    make bench-all                   # and after that larger work and models: by hand, on an idle machine

One thread, float32, greedy. The limit of a single stream is that each token reads every weight once; of a prompt and
of many requests, that each position multiplies each weight once. Bandwidth and rate of multiplication are measured
here, in the same minute. Nothing can be faster than the limit, whatever it is written in; how near it comes is the share.

Reads: shared/workloads.py, the chapters. Writes: docs/results/{suite, large}.json, through `python -m shared.bench`.
"""
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shared.bench.timing import NOISY, interleave, progress, summary, timed, weight_bytes
from shared.chapters import CHAPTERS, ROOT, Chapter
from shared.workloads import Request, fixed, ragged, staircase

PEERS = ("HF generate", "HF continuous")
POCKET, SMOLLM, QWEN, LLAMA = "pocket", "smollm2-135m-shape", "qwen3-0.6b-shape", "llama-3.2-1b-shape"


@dataclass(frozen=True)
class Work:
    """One kind of work, to be timed for each contestant."""

    what: str
    requests: Callable[[int], list[Request]]  # of a vocabulary's size


SINGLE = Work("single stream: 16 tokens, then 48", lambda vocab: fixed([(16, 48)], vocab))
FIRST = Work("first token of 512", lambda vocab: fixed([(512, 1)], vocab))
STAIRS = Work("ragged: 32 requests, 4 to 60 and 1 to 120", staircase)
RAGGED_FEW = Work(
    "ragged: 8 requests, 16 to 64 and 16 to 64",
    lambda vocab: ragged(8, vocab, prompt_len=(16, 64), output_len=(16, 64), seed=3),
)
RAGGED = Work(
    "ragged: 32 requests, 16 to 256 and 16 to 256",
    lambda vocab: ragged(32, vocab, prompt_len=(16, 256), output_len=(16, 256), seed=3),
)
# What is measured with which model, and what a chapter must be able to do for it: without a cache the larger ones would
# take hours. The largest are for the last chapter alone.
LAST = None  # no chapter has it as a capability; the last one is always measured
QUICK = {
    POCKET: ((SINGLE, "generate"), (FIRST, "generate"), (STAIRS, "generate")),
    SMOLLM: ((SINGLE, "kv_cache"), (FIRST, "kv_cache"), (RAGGED_FEW, "kv_cache")),
}
LARGE = {
    SMOLLM: ((RAGGED, "max_num_seqs"),),
    QWEN: ((SINGLE, LAST), (FIRST, LAST), (RAGGED_FEW, LAST)),
    LLAMA: ((SINGLE, LAST), (FIRST, LAST), (RAGGED_FEW, LAST)),
}


# ---- the machine's limits

def bandwidth() -> float:
    """Bytes a second that one thread reads, as a product of a matrix and a vector does."""
    import torch

    matrix = torch.rand(8192, 8192)
    vector = torch.rand(8192)
    matrix @ vector
    return matrix.nbytes / min(timed(lambda: matrix @ vector).wall_s for _ in range(9))


def multiplications() -> float:
    """Floating-point operations a second of one thread, in a product of large matrices, by the better of two libraries."""
    import torch

    matrix = torch.rand(2048, 2048)
    products = [lambda: matrix @ matrix]
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(matrix, matrix, None, "none", [], ""))
    return 2 * 2048**3 / min(timed(product).wall_s for product in products for _ in range(6))


def num_tokens(requests: list[Request]) -> int:
    return sum(request.max_tokens for request in requests)


def least_seconds(requests: list[Request], model, limits: dict[str, float]) -> float:
    """No engine takes less: each pass reads the weights, each position is multiplied with them.

    There are at least as many passes as the longest output has tokens. The head is needed once a token. Attention is
    left out, which makes the limit a little too good.
    """
    head = model.lm_head.in_features * model.lm_head.out_features
    body = sum(each.numel() for each in model.model.layers.parameters())
    positions = sum(len(request.prompt_ids) + request.max_tokens - 1 for request in requests)
    operations = 2 * (body * positions + head * num_tokens(requests))
    passes = max(request.max_tokens for request in requests)
    return max(operations / limits["operations_per_s"], passes * weight_bytes(model) / limits["bytes_per_s"])


# ---- contestants

# Where there is a GPU too: the peers run on the CPU, and so do the limits.
ON_CPU = {"device": "cpu", "dtype": "float32"}


def limits_of(chapter: Chapter, requests: list[Request]) -> dict[str, int | str]:
    """On a CPU; the chapter's own defaults, but with as many places as it can use and a cache that holds the work."""
    longest = max(len(request.prompt_ids) + request.max_tokens for request in requests)
    limits = ON_CPU | {"max_model_len": longest}
    if "kv_bytes" in chapter.capabilities:
        limits |= {"max_num_seqs": 64, "num_blocks": len(requests) * -(-longest // 16)}
    return limits


def serve(engine, package, requests: list[Request]) -> list[list[int]]:
    params = [package.SamplingParams(max_tokens=request.max_tokens, ignore_eos=True) for request in requests]
    return [done.token_ids for done in engine.generate([request.prompt_ids for request in requests], params)]


def contest(model_name: str, work: Work, chapters: list[Chapter], repeats: int, limits: dict[str, float]) -> dict:
    """Each contestant's time for the same work, taken in turns; who says other tokens than the first is named."""
    from shared.bench.peers import ContinuousBatching, HuggingFace
    from shared.checkpoints import checkpoint

    path = checkpoint(model_name)
    requests = work.requests(json.loads((path / "config.json").read_text())["vocab_size"])
    short = [Request(each.prompt_ids[:16], min(each.max_tokens, 4)) for each in requests[:2]]
    jobs = {}
    for chapter in chapters:
        package = chapter.load()
        engine = package.Engine(path, **limits_of(chapter, requests))
        jobs[chapter.id] = partial(serve, engine, package)
    least = least_seconds(requests, engine.model, limits)
    batching = ContinuousBatching(path, 2 * sum(len(each.prompt_ids) + each.max_tokens for each in requests) + 256 * 64)
    jobs |= {PEERS[0]: HuggingFace(path).generate, PEERS[1]: batching.generate}
    said = {}

    def run(name: str) -> None:
        said[name] = jobs[name](requests)

    contestants = {name: lambda name=name: timed(lambda: run(name)) for name in jobs}
    warm_up = {name: lambda name=name: jobs[name](short) for name in jobs}
    try:
        timings = interleave(contestants, repeats, f"{model_name}, {work.what}", warm_up)
    finally:
        batching.stop()
    first = next(iter(said))
    rows = {}
    for name, each in timings.items():
        row = summary(each)
        row["tokens_per_cpu_s"] = round(1e3 * num_tokens(requests) / row["cpu_ms"], 1)
        row["share_of_limit"] = round(1e3 * least / row["cpu_ms"], 3)
        row["other_answers"] = sum(a != b for a, b in zip(said[name], said[first], strict=True))
        rows[name] = row
    for row in rows.values():
        row["times_hf"] = round(rows[PEERS[0]]["cpu_ms"] / row["cpu_ms"], 2)
    return rows


# ---- arrivals

ARRIVALS, RATE = 32, 24.0  # requests, and how many come in a second, on average


def arrivals(chapters: list[Chapter]) -> dict:
    """Requests that come when they come (a Poisson process, the same for all): how long until each sees its first token."""
    from shared.checkpoints import POCKET as path

    rng = random.Random(5)
    requests = ragged(ARRIVALS, 2048, prompt_len=(4, 60), output_len=(1, 120), seed=5)
    times, now = [], 0.0
    for _ in requests:
        now += rng.expovariate(RATE)
        times.append(now)
    rows = {}
    for chapter in progress(chapters, "arrivals"):
        package = chapter.load()
        engine = package.Engine(path, **limits_of(chapter, requests))
        serve(engine, package, requests[:2])
        first, begun, next_one, number = {}, time.perf_counter(), 0, {}
        while next_one < len(requests) or engine.has_unfinished_requests():
            elapsed = time.perf_counter() - begun
            while next_one < len(requests) and times[next_one] <= elapsed:
                params = package.SamplingParams(max_tokens=requests[next_one].max_tokens, ignore_eos=True)
                number[engine.add_request(requests[next_one].prompt_ids, params)] = next_one
                next_one += 1
            if not engine.has_unfinished_requests():
                time.sleep(max(0.0, times[next_one] - elapsed))
                continue
            for output in engine.step():
                first.setdefault(number[output.request_id], time.perf_counter() - begun)
        waits = sorted(1e3 * (first[i] - times[i]) for i in range(len(requests)))
        rows[chapter.id] = {
            "ttft_ms_p50": round(statistics.median(waits), 1),
            "ttft_ms_p95": round(waits[int(0.95 * len(waits))], 1),
            "seconds": round(time.perf_counter() - begun, 2),
        }
    return rows


# ---- memory

def peak_mib(name: str) -> float:
    """What a contestant needs at most for the ragged work on pocket, above a process that has only imported everything."""
    command = [sys.executable, "-m", "shared.bench.suite", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure_memory(name: str) -> None:
    """In a process of its own: print the peak in MiB."""
    import torch

    from shared.bench.peers import ContinuousBatching, HuggingFace
    from shared.checkpoints import POCKET as path

    torch.set_num_threads(1)
    requests = staircase(2048)
    before = peak_kib()
    if name in PEERS:
        peer = ContinuousBatching(path, 8 * 2048) if name == PEERS[1] else HuggingFace(path)
        peer.generate(requests)
        peer.stop()
    else:
        chapter = next(chapter for chapter in CHAPTERS if chapter.id == name)
        package = chapter.load()
        limits = {"kv_bytes": 40 * 2**20} if "kv_bytes" in chapter.capabilities else {}
        serve(package.Engine(path, **ON_CPU, **limits), package, requests)
    print((peak_kib() - before) / 1024)


def peak_kib() -> int:
    """The most memory that this process has had; not getrusage's, which begins with that of the process it came from."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# ---- the whole

def suite(chapters: list[Chapter], repeats: int) -> dict:
    """Every chapter on work of seconds; then requests that arrive by chance, and the peak of memory."""
    results = contests(QUICK, chapters, repeats)
    results["arrivals"] = arrivals(chapters)
    names = [chapter.id for chapter in chapters] + list(PEERS)
    if sys.platform == "linux":  # elsewhere nobody tells
        results["peak_mib"] = {name: round(peak_mib(name), 1) for name in progress(names, "memory")}
    return results


def large(chapters: list[Chapter], repeats: int) -> dict:
    """More work, and models of the sizes that people run: most of it for the last chapter alone."""
    return contests(LARGE, chapters, repeats)


def contests(works: dict, chapters: list[Chapter], repeats: int) -> dict:
    """The machine's limits, and of each model each work's rows."""
    import torch

    torch.set_num_threads(1)
    limits = {"bytes_per_s": bandwidth(), "operations_per_s": multiplications()}
    results = {"limits": {"gb_per_s": round(limits["bytes_per_s"] / 1e9, 2), "gflops": round(limits["operations_per_s"] / 1e9, 1)}}
    for model_name, each in works.items():
        results[model_name] = {}
        for work, needed in each:
            able = [chapter for chapter in chapters if needed in chapter.capabilities or chapter is CHAPTERS[-1]]
            if able:
                results[model_name][work.what] = contest(model_name, work, able, repeats, limits)
    return results


def print_suite(results: dict) -> None:
    limits = results["limits"]
    print(f"one thread reads {limits['gb_per_s']} GB/s and does {limits['gflops']} GFLOPS")
    for model_name in (POCKET, SMOLLM, QWEN, LLAMA):
        for what, rows in results.get(model_name, {}).items():
            print(f"\n{model_name}, {what}")
            print(f"{'':16}{'CPU s':>9}{'wall s':>9}{'tokens/CPU s':>14}{'x HF':>7}{'of limit':>10}{'spread':>8}")
            for name, row in rows.items():
                print(
                    f"{name:16}{row['cpu_ms'] / 1e3:9.3f}{row['wall_ms'] / 1e3:9.3f}{row['tokens_per_cpu_s']:14,.0f}"
                    f"{row['times_hf']:7.2f}{row['share_of_limit']:10.0%}{row['spread']:8.0%}"
                )
            for name, row in rows.items():
                if row["other_answers"]:
                    print(f"{name} says other tokens than {next(iter(rows))} in {row['other_answers']} answers")
            if max(row["spread"] for row in rows.values()) > NOISY:
                print("noisy: runs of the same differ widely; run it again on an idle machine")
    if "arrivals" in results:
        print_arrivals(results["arrivals"])
    if "peak_mib" in results:
        print("\npocket, ragged: MiB at the peak, above the imports")
        print("   ".join(f"{name} {mib:.0f}" for name, mib in results["peak_mib"].items()))


def print_arrivals(rows: dict) -> None:
    print(f"\npocket, {ARRIVALS} requests that arrive by chance, {RATE:g} a second: ms to the first token")
    for name, row in rows.items():
        print(f"{name:16}p50 {row['ttft_ms_p50']:10,.0f}   p95 {row['ttft_ms_p95']:10,.0f}   all done after {row['seconds']:.1f} s")


if __name__ == "__main__":
    measure_memory(sys.argv[1])
