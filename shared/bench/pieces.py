"""What a long prompt does to the streams beside it, by the number of tokens that a step may feed; and what that costs.

    python -m shared.bench.pieces              # pocket, one thread
    python -m shared.bench.pieces --write

Eight streams are generating when a prompt of 1,900 tokens arrives: the gap between two tokens of a stream, and the time
until the long prompt's first token. Then 24 prompts at once: tokens per second. Both interleaved, by budget, beside the
chapter before, which feeds every prompt whole. At last the memory that steps allocate, for prompts that arrive at once.

Reads: the chapters. Writes: docs/results/pieces.json.
"""
import argparse
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from shared import results
from shared.bench.admission import make_engine
from shared.bench.timing import Timing, interleave, summary, timed
from shared.chapters import ROOT, Chapter, find, first_with
from shared.programs import run

NUM_STREAMS, LONG = 8, 1900
BUDGETS = (16, 32, 64, 128, 256, 512, 2048)
MAX_NUM_SEQS = 16  # a smaller budget is refused
NUM_PROMPTS, PROMPT, OUTPUT = 24, (300, 600), 64
MEMORY_BUDGETS, MEMORY_PROMPTS, MEMORY_LONG = (128, 512, 2048), (1, 4, 16), 1900
WHOLE = "whole"  # prompts are not cut: the chapter before
COMMAND = "python -m shared.bench.pieces --write"


def uncached_engine(chapter: Chapter, **options):
    """An engine that computes every prompt of every run."""
    return make_engine(chapter, enable_prefix_caching=False, **options)


def engines_of(chapter: Chapter, **options) -> dict[str, tuple[Chapter, object]]:
    """The chapter before, and this one with each budget: by name, the chapter and an engine."""
    engines = {WHOLE: (chapter.previous, uncached_engine(chapter.previous, **options))}
    for budget in BUDGETS:
        engines[str(budget)] = chapter, uncached_engine(chapter, max_num_batched_tokens=budget, **options)
    return engines


# ---- the gap between two tokens of a stream


def gaps(chapter: Chapter, repeats: int) -> dict:
    """By budget: the longest and the median gap of the streams while the long prompt is computed, and its own time."""
    rng = random.Random(3)
    engines = engines_of(chapter, max_num_seqs=MAX_NUM_SEQS)
    vocab_size = engines[WHOLE][1].config.vocab_size
    streams = [[rng.randrange(8, vocab_size) for _ in range(20)] for _ in range(NUM_STREAMS)]
    long_prompt = [rng.randrange(8, vocab_size) for _ in range(LONG)]
    seen = {name: [] for name in engines}

    def arrival(name: str) -> Timing:
        runner, engine = engines[name]
        Params = runner.load().SamplingParams
        for prompt in streams:
            engine.add_request(prompt, Params(max_tokens=500, ignore_eos=True))
        # Until all of them generate.
        while len(engine.step()) < NUM_STREAMS:
            pass
        request_id = engine.add_request(long_prompt, Params(max_tokens=2, ignore_eos=True))
        start, steps, answered = time.perf_counter(), [], False
        while not answered:
            begun = time.perf_counter()
            outputs = engine.step()
            steps.append(time.perf_counter() - begun)
            answered = request_id in [output.request_id for output in outputs]
            # Each stream has a token in every step.
            assert len(outputs) == NUM_STREAMS + answered
        total = time.perf_counter() - start
        engine.close()
        seen[name].append({"steps": len(steps), "longest_s": max(steps), "median_s": statistics.median(steps), "first_token_s": total})
        return Timing(total, 0.0)

    interleave({name: lambda name=name: arrival(name) for name in engines}, repeats, "gaps")
    found = {}
    for name, runs in seen.items():
        # The first run was the warm-up.
        figures = {key: statistics.median(each[key] for each in runs[1:]) for key in ("longest_s", "median_s", "first_token_s")}
        found[name] = {"steps": runs[0]["steps"]} | {f"{key[:-2]}_ms": round(1e3 * value, 1) for key, value in figures.items()}
    return found


# ---- throughput


def throughput(chapter: Chapter, repeats: int) -> dict:
    """By budget: tokens per second of prompts that all arrive at once."""
    rng = random.Random(4)
    engines = engines_of(chapter, max_num_seqs=MAX_NUM_SEQS)
    vocab_size = engines[WHOLE][1].config.vocab_size
    prompts = [[rng.randrange(8, vocab_size) for _ in range(rng.randint(*PROMPT))] for _ in range(NUM_PROMPTS)]
    counts = {}

    def serve_all(name: str) -> None:
        runner, engine = engines[name]
        before = engine.num_steps
        engine.generate(prompts, runner.load().SamplingParams(max_tokens=OUTPUT, ignore_eos=True))
        counts[name] = {"steps": engine.num_steps - before, "tokens": NUM_PROMPTS * OUTPUT}

    timings = interleave({name: lambda name=name: timed(lambda: serve_all(name)) for name in engines}, repeats, "throughput")
    for name, row in counts.items():
        row |= summary(timings[name])
        row["tokens_per_s"] = round(1e3 * row["tokens"] / row["wall_ms"], 1)
    return counts


# ---- memory


def memory(chapter: Chapter) -> dict:
    """By budget, and by how many long prompts arrive at once: MiB that a process needs more than with short prompts."""
    found = {}
    for runner, budget in [(chapter.previous, None), *((chapter, budget) for budget in MEMORY_BUDGETS)]:
        peaks = {}
        for count in (0, *MEMORY_PROMPTS):
            arguments = ["--peak", runner.id, str(budget or 0), str(count)]
            done = subprocess.run([sys.executable, "-m", "shared.bench.pieces", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
            peaks[count] = float(done.stdout)
        found[WHOLE if budget is None else str(budget)] = {str(count): round(peaks[count] - peaks[0], 1) for count in MEMORY_PROMPTS}
    return found


def peak(chapter: Chapter, budget: int, count: int) -> float:
    """The most MiB that this process used while it served count long prompts that arrived at once. Linux only."""
    options = {"max_num_batched_tokens": budget} if budget else {}
    engine = uncached_engine(chapter, max_num_seqs=MAX_NUM_SEQS, **options)
    rng = random.Random(5)
    # The cache's own pages are touched first, so that they do not count.
    engine.cache.k.fill_(0.0), engine.cache.v.fill_(0.0)
    prompts = [[rng.randrange(8, engine.config.vocab_size) for _ in range(MEMORY_LONG)] for _ in range(count)]
    params = chapter.load().SamplingParams(max_tokens=1)
    engine.generate([[9]], params)
    # From here on, VmHWM is the most that has been resident since.
    Path("/proc/self/clear_refs").write_text("5")
    engine.generate(prompts or [[9]], params)
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench.pieces", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write docs/results/pieces.json")
    parser.add_argument("--peak", nargs=3, metavar=("vNN", "BUDGET", "COUNT"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    import torch

    torch.set_num_threads(1)
    if args.peak:
        print(peak(find(args.peak[0]), int(args.peak[1]), int(args.peak[2])))
        return 0
    chapter = first_with("chunked_prefill")
    start = time.perf_counter()
    figures = {"gaps": gaps(chapter, args.repeats), "throughput": throughput(chapter, args.repeats), "memory": memory(chapter)}
    for name, row in figures["gaps"].items():
        print(
            f"{name:>6}: {row['steps']:4} steps, longest gap {row['longest_ms']:6.1f} ms, median {row['median_ms']:5.1f} ms, "
            f"first token of the long prompt after {row['first_token_ms']:7.1f} ms"
        )
    for name, row in figures["throughput"].items():
        print(f"{name:>6}: {row['tokens_per_s']:7.1f} tokens/s in {row['steps']} steps, spread {row['spread']:.0%}")
    for name, row in figures["memory"].items():
        print(f"{name:>6}: " + ", ".join(f"{count} prompts {mib:.0f} MiB" for count, mib in row.items()))
    print(f"{time.perf_counter() - start:.0f} s")
    if args.write:
        print(results.write_row("pieces", figures, COMMAND, [chapter.previous, chapter]))
    return 0


if __name__ == "__main__":
    run(main)
