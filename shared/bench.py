"""The one timer: every figure of speed in this repository comes from here.

    python -m shared.bench growth [v01 ...]    # time per token against the length of the sequence

Runs are warmed up, then interleaved (A B A B ...), so that a machine that slows down slows all of them
down. A figure is the median; beside it stands the spread: the middle half of the runs, from its fastest to
its slowest, divided by the median. CPU seconds are counted too: where cores are shared, they tell more than
wall time.
"""
import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .chapters import CHAPTERS, ROOT, Chapter, find

RESULTS = ROOT / "docs" / "results"
# Above this spread a median says little, and the report says so.
NOISY = 0.25


@dataclass(frozen=True)
class Timing:
    """One run of one contestant, in seconds."""

    wall_s: float
    cpu_s: float


def timed(run: Callable[[], object]) -> Timing:
    """Run once."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def interleave(
    contestants: dict[str, Callable[[], Timing]],
    repeats: int,
    label: str = "",
) -> dict[str, list[Timing]]:
    """Let each contestant run once unmeasured, then all of them in turn, `repeats` times.

    A contestant returns the Timing of the part that counts: what it prepares is not in it.
    """
    timings = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for round_id in progress(range(repeats), label):
        for name, run in contestants.items():
            timings[name].append(run())
    return timings


def progress(items: range, label: str) -> Iterator[int]:
    """A progress bar on stderr, where that is a terminal."""
    from tqdm import tqdm

    return iter(tqdm(items, desc=label, leave=False, disable=not sys.stderr.isatty()))


def summary(timings: list[Timing], units: int = 1) -> dict[str, float]:
    """Medians and spread of repeated runs, the times divided by the number of units of work in a run.

    >>> summary([Timing(2.0, 1.0), Timing(1.0, 1.0), Timing(4.0, 1.5)], units=2)
    {'wall_ms': 1000.0, 'cpu_ms': 500.0, 'spread': 0.75, 'repeats': 3}
    """
    wall = [timing.wall_s for timing in timings]
    median = statistics.median(wall)
    fast, _, slow = statistics.quantiles(wall, n=4, method="inclusive") if len(wall) > 1 else (median,) * 3
    return {
        "wall_ms": round(1e3 * median / units, 4),
        "cpu_ms": round(1e3 * statistics.median(timing.cpu_s for timing in timings) / units, 4),
        "spread": round((slow - fast) / median, 3),
        "repeats": len(timings),
    }


def write(name: str, results: dict, command: str) -> Path:
    """Commit-ready JSON: the results with the command, the machine and the date that made them."""
    from .machine import machine, today

    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"command": command, "machine": machine(), "date": today()} | results, indent=2) + "\n")
    return path


# ---- workloads

GROWTH_LENGTHS = (64, 128, 256, 512, 1024)
GROWTH_TOKENS = 4


def growth(chapters: list[Chapter], repeats: int) -> dict:
    """Milliseconds per generated token when the sequence is already this long: pocket, one request, one thread."""
    import torch

    from .checkpoints import POCKET

    torch.set_num_threads(1)
    engines = {chapter.id: (chapter.load(), chapter.load().Engine(POCKET)) for chapter in chapters}
    results = {chapter.id: {} for chapter in chapters}
    for length in GROWTH_LENGTHS:
        contestants = {
            name: lambda package=package, engine=engine: time_tokens(package, engine, length)
            for name, (package, engine) in engines.items()
        }
        for name, timings in interleave(contestants, repeats, f"length {length}").items():
            results[name][str(length)] = summary(timings, GROWTH_TOKENS)
    for chapter in chapters:
        lengths = results[chapter.id]
        first, last = (lengths[str(n)]["wall_ms"] for n in (GROWTH_LENGTHS[0], GROWTH_LENGTHS[-1]))
        lengths["worst_spread"] = max(lengths[str(n)]["spread"] for n in GROWTH_LENGTHS)
        lengths["ratio"] = round(last / first, 2)
    return results


def time_tokens(package, engine, length: int) -> Timing:
    """The time of GROWTH_TOKENS steps after a prompt of this length and its first token."""
    ids = random.Random(length).choices(range(8, engine.config.vocab_size), k=length)
    engine.add_request(ids, package.SamplingParams(max_tokens=1 + GROWTH_TOKENS, ignore_eos=True))
    engine.step()
    return timed(lambda: [engine.step() for _ in range(GROWTH_TOKENS)])


def print_growth(results: dict) -> None:
    print(f"{'ms per token at length':24}" + "".join(f"{n:>10}" for n in GROWTH_LENGTHS) + "     longest/shortest")
    for name, lengths in results.items():
        row = "".join(f"{lengths[str(n)]['wall_ms']:10.2f}" for n in GROWTH_LENGTHS)
        print(f"{name:24}{row}{lengths['ratio']:14.1f} x")
        if lengths["worst_spread"] > NOISY:
            print(f"{'':24}noisy: runs differ by up to {lengths['worst_spread']:.0%}; run it again on an idle machine")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench", description="Measure chapters side by side.")
    parser.add_argument("workload", choices=["growth"])
    parser.add_argument("chapters", nargs="*", metavar="vNN", help="default: all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write the result under docs/results/")
    args = parser.parse_args(argv)
    chapters = [find(text) for text in args.chapters] or list(CHAPTERS)
    results = growth(chapters, args.repeats)
    print_growth(results)
    if args.write:
        print(write(args.workload, results, f"python -m shared.bench {' '.join(argv)}").relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
