"""The one timer: every figure of speed in this repository comes from here.

    python -m shared.bench growth [v01 ...]       # time per token against the length of the sequence
    python -m shared.bench batch [v02 v03 ...]    # tokens per second against the number of requests in a pass
    python -m shared.bench decode v04 v05         # one decode step of 16 sequences of unequal length
    python -m shared.bench overhead [v01 ...]     # where the time of a step goes that is not the model's
    python -m shared.bench staircase [v01 ...]    # every chapter on one ragged workload, and what it took
    python -m shared.bench suite [v01 ...]        # chapters beside Hugging Face and the machine's limit; see bench_suite
    python -m shared.bench large [v01 ...]        # the same with more work and larger models

All of it on the CPU, also where there is a GPU: that is what `bench_gpu` and `bench_attention` are for.
Runs are warmed up, then interleaved (A B A B ...), so that a machine that slows down slows all of them
down. A figure is the median; beside it stands the spread: the middle half of the runs, from its fastest to
its slowest, divided by the median. CPU seconds are counted too: where cores are shared, they tell more
than wall time.
"""
import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
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
    warm_up: dict[str, Callable[[], object]] | None = None,
) -> dict[str, list[Timing]]:
    """Let each contestant run once unmeasured, or do its warm_up, then all of them in turn, `repeats` times.

    A contestant returns the Timing of the part that counts: what it prepares is not in it.
    """
    timings = {name: [] for name in contestants}
    for run in (warm_up or contestants).values():
        run()
    for round_id in progress(range(repeats), label):
        for name, run in contestants.items():
            timings[name].append(run())
    return timings


def progress(items: Iterable, label: str) -> Iterator[int]:
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


def write(name: str, results: dict, command: str, gpu: bool = False) -> Path:
    """Commit-ready JSON, a line a key: the results with the command, the machine and the date that made them."""
    from .machine import machine, today

    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    everything = {"command": command, "machine": machine(gpu), "date": today()} | results
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in everything.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return path


# ---- workloads

GROWTH_LENGTHS = (64, 128, 256, 512, 1024)
GROWTH_TOKENS = 4


def growth(chapters: list[Chapter], repeats: int) -> dict:
    """Milliseconds per generated token when the sequence is already this long: pocket, one request, one thread."""
    import torch

    from .checkpoints import POCKET

    torch.set_num_threads(1)
    engines = {chapter.id: (chapter.load(), chapter.load().Engine(POCKET, device="cpu")) for chapter in chapters}
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


BATCH_SIZES = (1, 2, 4, 8, 16)
BATCH_MODELS = ("pocket", "smollm2-135m-shape")
BATCH_PROMPT, BATCH_TOKENS = 16, 8


def batch(chapters: list[Chapter], repeats: int) -> dict:
    """Tokens per second when this many requests share every pass: decode steps after short prompts, one thread.

    A chapter that runs one request at a time is measured with one.
    """
    import torch

    from .checkpoints import checkpoint

    torch.set_num_threads(1)
    results = {}
    for chapter in chapters:
        package, results[chapter.id] = chapter.load(), {}
        together = "max_num_seqs" in chapter.capabilities
        sizes_here = BATCH_SIZES if together else BATCH_SIZES[:1]
        limits = {"max_model_len": 64} if "max_model_len" in chapter.capabilities else {}
        limits |= {"max_num_seqs": max(BATCH_SIZES)} if together else {}
        for model in BATCH_MODELS:
            engine = package.Engine(checkpoint(model), device="cpu", **limits)
            contestants = {str(size): lambda size=size: time_batch(package, engine, size) for size in sizes_here}
            sizes = {}
            for size, timings in interleave(contestants, repeats, f"{chapter.id}, {model}").items():
                sizes[size] = summary(timings, BATCH_TOKENS)
                sizes[size]["tokens_per_s"] = round(1e3 * int(size) / sizes[size]["wall_ms"], 1)
            sizes["weight_bytes"] = weight_bytes(engine.model)
            sizes["worst_spread"] = max(sizes[str(size)]["spread"] for size in sizes_here)
            results[chapter.id][model] = sizes
    return results


def time_batch(package, engine, size: int) -> Timing:
    """The time of BATCH_TOKENS steps in which this many requests get a token each."""
    params = package.SamplingParams(max_tokens=1 + BATCH_TOKENS, ignore_eos=True)
    for number in range(size):
        engine.add_request(random.Random(number).choices(range(8, 400), k=BATCH_PROMPT), params)
    engine.step()
    return timed(lambda: [engine.step() for _ in range(BATCH_TOKENS)])


DECODE_SEQS, DECODE_STEPS, DECODE_CONTEXTS, DECODE_MAX_LEN = 16, 8, (40, 300), 512


def decode(chapters: list[Chapter], repeats: int) -> dict:
    """Milliseconds of a decode step of 16 sequences, whose contexts are 40 to 300 tokens long; equal memory, one thread."""
    import torch

    from .checkpoints import checkpoint

    torch.set_num_threads(1)
    results = {chapter.id: {} for chapter in chapters}
    for model in BATCH_MODELS:
        contestants = {}
        for chapter in chapters:
            limits = {"max_num_seqs": DECODE_SEQS, "max_model_len": DECODE_MAX_LEN}
            limits |= {"num_blocks": DECODE_SEQS * DECODE_MAX_LEN // 16} if "num_blocks" in chapter.capabilities else {}
            engine = chapter.load().Engine(checkpoint(model), device="cpu", **limits)
            contestants[chapter.id] = lambda chapter=chapter, engine=engine: time_decode(chapter.load(), engine)
        for name, timings in interleave(contestants, repeats, model).items():
            results[name][model] = summary(timings, DECODE_STEPS)
    return results


def time_decode(package, engine) -> Timing:
    """The time of DECODE_STEPS steps in which each sequence gets a token."""
    rng = random.Random(1)
    for _ in range(DECODE_SEQS):
        prompt_ids = rng.choices(range(8, 400), k=rng.randint(*DECODE_CONTEXTS))
        engine.add_request(prompt_ids, package.SamplingParams(max_tokens=1 + DECODE_STEPS, ignore_eos=True))
    engine.step()
    return timed(lambda: [engine.step() for _ in range(DECODE_STEPS)])


def print_decode(results: dict) -> None:
    print(f"{'ms a step of 16 sequences':28}" + "".join(f"{model:>24}" for model in BATCH_MODELS))
    for name, models in results.items():
        cells = (f"{models[model]['wall_ms']:.2f} (spread {models[model]['spread']:.0%})" for model in BATCH_MODELS)
        print(f"{name:28}" + "".join(f"{cell:>24}" for cell in cells))


def weight_bytes(model) -> int:
    """What one pass reads of the weights: all of them, but of an embedding that is not the head a few rows only."""
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    embedding = model.model.embed_tokens.weight
    if model.lm_head.weight.data_ptr() != embedding.data_ptr():
        del weights[embedding.data_ptr()]
    return sum(weights.values())


def print_batch(results: dict) -> None:
    print(f"{'tokens/s with requests in a pass':36}" + "".join(f"{size:>10}" for size in BATCH_SIZES))
    for name, models in results.items():
        for model, sizes in models.items():
            found = [sizes[str(size)]["tokens_per_s"] for size in BATCH_SIZES if str(size) in sizes]
            print(f"{name + '  ' + model:36}" + "".join(f"{each:10,.0f}" for each in found))
            if sizes["worst_spread"] > NOISY:
                print(f"noisy: runs differ by up to {sizes['worst_spread']:.0%}; run it again on an idle machine")


def staircase(chapters: list[Chapter], repeats: int) -> dict:
    """The chapters on one ragged workload: tokens per second, and what was computed, read and reserved for it.

    pocket, one thread, float32. Tokens a second come from runs without a tracer. Traced runs, taken in turns with them,
    tell when each request was served, and check that all chapters say the same; of these the one of median length counts.
    """
    import torch

    from .trace import record, run
    from .workloads import staircase

    torch.set_num_threads(1)
    engines = {chapter.id: staircase_engine(chapter) for chapter in chapters}
    requests = staircase(engines[chapters[0].id].config.vocab_size)
    traces, said = {chapter.id: [] for chapter in chapters}, {}

    def traced(chapter: Chapter) -> Timing:
        trace, said[chapter.id] = record(chapter, engines[chapter.id], requests)
        traces[chapter.id].append(trace)
        return Timing(sum(each.wall_s for each in trace.passes), 0.0)

    contestants = {
        chapter.id: lambda chapter=chapter: timed(lambda: run(engines[chapter.id], chapter.load(), requests))
        for chapter in chapters
    }
    contestants |= {f"{chapter.id}, traced": lambda chapter=chapter: traced(chapter) for chapter in chapters}
    # What of a step is due to running several at once, and what to other changes of the same chapter.
    lonely = [chapter for chapter in chapters if "max_num_seqs" in chapter.adds]
    for chapter in lonely:
        engine = staircase_engine(chapter, max_num_seqs=1)
        contestants[f"{chapter.id}, one place"] = lambda chapter=chapter, engine=engine: timed(
            lambda: run(engine, chapter.load(), requests)
        )
    timings = interleave(contestants, repeats, "staircase")
    results = {}
    for chapter in chapters:
        if said[chapter.id] != said[chapters[0].id]:
            raise AssertionError(f"{chapter.id} says other tokens than {chapters[0].id}")
        # The first was to warm up.
        by_length = sorted(traces[chapter.id][1:], key=lambda trace: sum(each.wall_s for each in trace.passes))
        results[chapter.id] = row = counts(engines[chapter.id], by_length[len(by_length) // 2])
        row |= summary(timings[chapter.id])
        row["tokens_per_s"] = round(1e3 * row["tokens"] / row["wall_ms"], 1)
    for chapter in lonely:
        row = results[chapter.id]
        row["one_place"] = summary(timings[f"{chapter.id}, one place"])
        row["one_place"]["tokens_per_s"] = round(1e3 * row["tokens"] / row["one_place"]["wall_ms"], 1)
    return results


# The bytes of v04's slab: 8 rows of 2,048 positions of pocket.
STAIRCASE_KV_BYTES = 40 * 2**20


def staircase_engine(chapter: Chapter, **limits):
    """The chapter with its own limits; where memory is handed out, with as many bytes as the slab before it had."""
    from .checkpoints import POCKET

    if "kv_bytes" in chapter.capabilities:
        limits = {"kv_bytes": STAIRCASE_KV_BYTES, "max_num_seqs": 32} | limits
    return chapter.load().Engine(POCKET, device="cpu", **limits)


def counts(engine, trace) -> dict:
    """What a traced run took, without its time; and the life of one request, with it."""
    watched = watched_request(trace.lengths)
    life = {}
    for what, seconds in trace.life(watched):
        life[what] = round(life.get(what, 0) + 1e3 * seconds, 2)
    ended = [trace.ends()[number] for number, (_, output) in enumerate(trace.lengths) if output <= SHORT_OUTPUT]
    seconds = list(accumulate(each.wall_s for each in trace.passes))
    return {
        "requests": len(trace.lengths),
        "places": trace.places,
        "tokens": trace.num_tokens,
        "passes": len(trace.passes),
        "tokens_per_pass": round(trace.num_tokens / len(trace.passes), 2),
        "positions": trace.num_positions,
        "needed": trace.num_needed,
        "needed_share": round(trace.num_needed / trace.num_positions, 4),
        "useful_share": round(trace.useful_share(), 4),
        "kv_bytes": trace.kv_bytes,
        "kv_read_bytes": trace.kv_read_bytes,
        "weight_read_bytes": weight_bytes(engine.model) * len(trace.passes),
        "late_ttft_ms": round(1e3 * trace.seconds_to_first(watched), 1),
        "short": {
            "requests": len(ended),
            "passes": statistics.median(ended),
            "ms": round(1e3 * statistics.median(seconds[number - 1] for number in ended), 1),
        },
        "watched": {"request": watched, "lengths": trace.lengths[watched], "life_ms": life},
    }


# Requests that get no more tokens than this are the short ones.
SHORT_OUTPUT = 20


def watched_request(lengths: list[tuple[int, int]]) -> int:
    """The request that is followed through all chapters: a short one that comes late."""
    return min(range(len(lengths) // 2, len(lengths)), key=lambda number: abs(lengths[number][1] - 12))


def print_staircase(results: dict) -> None:
    columns = ("passes", "tokens/pass", "positions", "needed", "KV MiB", "tokens/s")
    print(f"{'':8}" + "".join(f"{column:>13}" for column in columns))
    for name, row in results.items():
        cells = (
            f"{row['passes']:,}",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['positions']:,}",
            f"{row['needed_share']:.0%}",
            f"{row['kv_bytes'] / 2**20:.1f}",
            f"{row['tokens_per_s']:,.0f}",
        )
        print(f"{name:8}" + "".join(f"{cell:>13}" for cell in cells))
        if row["spread"] > NOISY:
            print(f"{'':8}noisy: runs differ by {row['spread']:.0%}; run it again on an idle machine")


def elsewhere(module: str, name: str) -> Callable:
    """A function of a module that itself imports this one, and so is looked up when it is called."""
    return lambda *arguments: getattr(import_module(f"{__package__}.{module}"), name)(*arguments)


WORKLOADS = {
    "growth": (growth, print_growth),
    "batch": (batch, print_batch),
    "decode": (decode, print_decode),
    "overhead": (elsewhere("bench_overhead", "overhead"), elsewhere("bench_overhead", "print_overhead")),
    "staircase": (staircase, print_staircase),
    "suite": (elsewhere("bench_suite", "suite"), elsewhere("bench_suite", "print_suite")),
    "large": (elsewhere("bench_suite", "large"), elsewhere("bench_suite", "print_suite")),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench", description="Measure chapters side by side.")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("chapters", nargs="*", metavar="vNN", help="default: all")
    parser.add_argument("--before", action="store_true", help="also the chapter before each of these")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write the result under docs/results/")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    if args.write and args.chapters and args.workload in ("staircase", "suite", "large"):
        parser.error("--write takes all chapters: in the texts each stands beside the one before")
    try:
        chapters = [find(text) for text in args.chapters] or list(CHAPTERS)
        if args.before:
            chapters = [each for each in CHAPTERS if each in chapters or each in [chapter.previous for chapter in chapters]]
    except ValueError as error:
        parser.error(str(error))
    measure, show = WORKLOADS[args.workload]
    results = measure(chapters, args.repeats)
    show(results)
    if args.write:
        path = write(args.workload, results, " ".join(["python -m shared.bench", *argv]))
        print(f"wrote {path.name}; now `make sync`")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
