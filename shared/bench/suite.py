"""Compare the chapters with Hugging Face on the same workloads, and with the machine's limit.

    make bench                       # every chapter; at most ten minutes
    make bench-v05                   # a chapter and the one before
    make bench-all                   # also larger workloads and models: by hand, on an idle machine

One thread, float32, greedy. Each forward pass has to read every weight once, which limits a single stream. Each
position has to be multiplied with every weight once, which limits a prompt and many requests. Memory bandwidth and
multiplication rate are measured here, in the same run. The bytes of a weight are those of the contestant that stores the
weights in the fewest. No engine can be faster than the limit; its share of the limit says how close it comes.

Every chapter runs the bundled model. If all chapters are measured, larger models run only on those whose steps on a CPU
differ from the steps of the one before.

Reads: shared/workloads.py, the chapters. Writes: docs/results/{suite, large}.json, through `python -m shared.bench`.
"""
import json
import math
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shared.bench.recorder import empty_prefix_cache
from shared.bench.timing import NOISY, interleave, progress, summary, timed, weight_bytes
from shared.chapters import CHAPTERS, ROOT, Chapter
from shared.workloads import Request, fixed, ragged, staircase

PEERS = ("HF generate", "HF continuous")
POCKET, SMOLLM, QWEN, LLAMA = "pocket", "smollm2-135m-shape", "qwen3-0.6b-shape", "llama-3.2-1b-shape"


@dataclass(frozen=True)
class Work:
    """One workload, to be timed for each contestant."""

    what: str
    requests: Callable[[int], list[Request]]  # from the vocabulary's size


SINGLE = Work("single stream: 16 tokens, then 48", lambda vocab: fixed([(16, 48)], vocab))
FIRST = Work("first token of 512", lambda vocab: fixed([(512, 1)], vocab))
STAIRS = Work("ragged: 32 requests, 4 to 60 and 1 to 120", staircase)
RAGGED_FEW = Work(
    "ragged: 8 requests, 16 to 64 and 16 to 64",
    lambda vocab: ragged(8, vocab, prompt_len=(16, 64), output_len=(16, 64), seed=3),
)
RAGGED_MANY = Work(
    "ragged: 32 requests, 4 to 32 and 4 to 32",
    lambda vocab: ragged(32, vocab, prompt_len=(4, 32), output_len=(4, 32), seed=3),
)
RAGGED = Work(
    "ragged: 32 requests, 16 to 256 and 16 to 256",
    lambda vocab: ragged(32, vocab, prompt_len=(16, 256), output_len=(16, 256), seed=3),
)
# The workloads for each model, each with the capability a chapter needs for it: without a KV cache, the larger models
# would take hours. The largest run on the last chapter only.
CHANGES_STEPS = {"chunked_prefill", "linear"}  # beside the chapters that race
LAST = None  # no chapter has this capability, but the last chapter is always measured
QUICK = {
    POCKET: ((SINGLE, "generate"), (FIRST, "generate"), (STAIRS, "generate")),
    SMOLLM: ((SINGLE, "kv_cache"), (FIRST, "kv_cache"), (RAGGED_MANY, "max_num_seqs")),
}
LARGE = {
    SMOLLM: ((RAGGED, "max_num_seqs"),),
    QWEN: ((SINGLE, LAST), (FIRST, LAST), (RAGGED_FEW, LAST)),
    LLAMA: ((SINGLE, LAST), (FIRST, LAST), (RAGGED_FEW, LAST)),
}


# ---- the machine's limits

def bandwidth() -> float:
    """Bytes per second of CPU time that one thread reads in a matrix-vector product."""
    import torch

    matrix = torch.rand(8192, 8192)
    vector = torch.rand(8192)
    matrix @ vector
    return matrix.nbytes / min(timed(lambda: matrix @ vector).cpu_s for _ in range(9))


def multiplications() -> float:
    """Floating-point operations per second of CPU time, in a product of large matrices, with the faster of two libraries."""
    import torch

    matrix = torch.rand(2048, 2048)
    products = [lambda: matrix @ matrix]
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(matrix, matrix, None, "none", [], ""))
    return 2 * 2048**3 / min(timed(product).cpu_s for product in products for _ in range(6))


def num_tokens(requests: list[Request]) -> int:
    return sum(request.max_tokens for request in requests)


def operations(model, positions: int, tokens: int) -> int:
    """Floating-point operations to compute so many positions and to generate so many tokens; attention is left out."""
    head = model.lm_head.in_features * model.lm_head.out_features
    body = sum(each.numel() for each in model.model.layers.parameters())
    return 2 * (body * positions + head * tokens)


def least_seconds(requests: list[Request], model, limits: dict[str, float]) -> float:
    """The least time any engine needs: each forward pass reads the weights, and each position is multiplied with them.

    There is at least one forward pass for each token of the longest output. The head is computed once per generated token.
    Weights are read in the bytes in which this model stores them. Attention is left out, so the true minimum is a little higher.
    """
    positions = sum(len(request.prompt_ids) + request.max_tokens - 1 for request in requests)
    passes = max(request.max_tokens for request in requests)
    multiplied = operations(model, positions, num_tokens(requests)) / limits["operations_per_s"]
    return max(multiplied, passes * weight_bytes(model) / limits["bytes_per_s"])


# ---- contestants

# Explicit, since chapters would choose a GPU if there is one, and the peers and the limits are measured on the CPU.
ON_CPU = {"device": "cpu", "dtype": "float32"}


def limits_of(chapter: Chapter, requests: list[Request]) -> dict[str, int | str]:
    """The engine's arguments: on the CPU, and from v05 on at most 64 requests at once and a cache that holds all of them."""
    longest = max(len(request.prompt_ids) + request.max_tokens for request in requests)
    limits = ON_CPU | {"max_model_len": longest}
    if "kv_bytes" in chapter.capabilities:
        limits |= {"max_num_seqs": 64, "num_blocks": len(requests) * -(-longest // 16)}
    return limits


def serve(engine, package, requests: list[Request]) -> list[list[int]]:
    empty_prefix_cache(engine)
    params = [package.SamplingParams(max_tokens=request.max_tokens, ignore_eos=True) for request in requests]
    return [done.token_ids for done in engine.generate([request.prompt_ids for request in requests], params)]


def contest(model_name: str, work: Work, chapters: list[Chapter], repeats: int, limits: dict[str, float]) -> dict:
    """Each contestant's figures for the same workload, timed in turns, with the number of answers that differ from the first's."""
    from shared.bench.peers import ContinuousBatching, HuggingFace
    from shared.checkpoints import checkpoint

    path = checkpoint(model_name)
    requests = work.requests(json.loads((path / "config.json").read_text())["vocab_size"])
    short = [Request(each.prompt_ids[:16], min(each.max_tokens, 4)) for each in requests[:2]]
    jobs, least = {}, math.inf
    for chapter in chapters:
        package = chapter.load()
        engine = package.Engine(path, **limits_of(chapter, requests))
        jobs[chapter.id] = partial(serve, engine, package)
        least = min(least, least_seconds(requests, engine.model, limits))
    batching = ContinuousBatching(path, 2 * sum(len(each.prompt_ids) + each.max_tokens for each in requests) + 256 * 64)
    jobs |= {PEERS[0]: HuggingFace(path).generate, PEERS[1]: batching.generate}
    outputs = {}

    def run(name: str) -> None:
        outputs[name] = jobs[name](requests)

    contestants = {name: lambda name=name: timed(lambda: run(name)) for name in jobs}
    warm_up = {name: lambda name=name: jobs[name](short) for name in jobs}
    try:
        timings = interleave(contestants, repeats, f"{model_name}, {work.what}", warm_up)
    finally:
        batching.stop()
    first = next(iter(outputs))
    rows = {}
    for name, each in timings.items():
        row = summary(each)
        row["tokens_per_cpu_s"] = round(1e3 * num_tokens(requests) / row["cpu_ms"], 1)
        row["share_of_limit"] = round(1e3 * least / row["cpu_ms"], 3)
        row["other_answers"] = sum(a != b for a, b in zip(outputs[name], outputs[first], strict=True))
        rows[name] = row
    for row in rows.values():
        row["times_hf"] = round(rows[PEERS[0]]["cpu_ms"] / row["cpu_ms"], 2)
    return rows


# ---- arrivals

ARRIVALS, RATE = 32, 24.0  # requests, and their average rate per second


def arrivals(chapters: list[Chapter]) -> dict:
    """Time to first token when requests arrive at random times (a Poisson process, the same for all chapters)."""
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
        empty_prefix_cache(engine)
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
    """A contestant's peak memory on pocket's 32 ragged requests, above that of a process with everything imported."""
    code = "import sys; from shared.bench.suite import measure_memory; measure_memory(sys.argv[1])"
    command = [sys.executable, "-c", code, name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure_memory(name: str) -> None:
    """Print this process's peak in MiB; `peak_mib` runs this in its own process."""
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
    """This process's peak memory; getrusage's would start at that of the parent process."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# ---- the whole

def suite(chapters: list[Chapter], repeats: int) -> dict:
    """Every chapter on workloads of seconds; then requests that arrive at random, and peak memory."""
    results = contests(QUICK, chapters, repeats)
    results["arrivals"] = arrivals(chapters)
    names = [chapter.id for chapter in chapters] + list(PEERS)
    if sys.platform == "linux":  # it is read from /proc
        # Nothing is timed here, so two run at once.
        with ThreadPoolExecutor(2) as pool:
            peaks = progress(pool.map(peak_mib, names), "memory")
            results["peak_mib"] = {name: round(peak, 1) for name, peak in zip(names, peaks, strict=True)}
    return results


def large(chapters: list[Chapter], repeats: int) -> dict:
    """Larger workloads, and models of realistic sizes; most run on the last chapter only."""
    return contests(LARGE, chapters, repeats)


def contests(works: dict, chapters: list[Chapter], repeats: int) -> dict:
    """The machine's limits, and each workload's rows by model."""
    import torch

    torch.set_num_threads(1)
    limits = {"bytes_per_s": bandwidth(), "operations_per_s": multiplications()}
    results = {"limits": {"gb_per_s": round(limits["bytes_per_s"] / 1e9, 2), "gflops": round(limits["operations_per_s"] / 1e9, 1)}}
    for model_name, each in works.items():
        results[model_name] = {}
        for work, needed in each:
            able = [chapter for chapter in chapters if needed in chapter.capabilities or chapter is CHAPTERS[-1]]
            if needed is not LAST and model_name != POCKET and len(chapters) == len(CHAPTERS):
                able = [chapter for chapter in able if chapter.races or not CHANGES_STEPS.isdisjoint(chapter.adds)]
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
                    print(f"{name}: {row['other_answers']} answers differ from those of {next(iter(rows))}")
            if max(row["spread"] for row in rows.values()) > NOISY:
                print("noisy: repeated runs differ widely; run it again on an idle machine")
    if "arrivals" in results:
        print_arrivals(results["arrivals"])
    if "peak_mib" in results:
        print("\npocket, ragged: peak memory in MiB, above that of the imports")
        print("   ".join(f"{name} {mib:.0f}" for name, mib in results["peak_mib"].items()))


def print_arrivals(rows: dict) -> None:
    print(f"\npocket, {ARRIVALS} requests that arrive at random, {RATE:g} per second on average: ms to the first token")
    for name, row in rows.items():
        print(f"{name:16}p50 {row['ttft_ms_p50']:10,.0f}   p95 {row['ttft_ms_p95']:10,.0f}   all done after {row['seconds']:.1f} s")
