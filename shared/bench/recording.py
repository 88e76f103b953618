"""What it costs to record every step, and to count what was recorded.

    python -m shared.bench.recording            # one minute
    python -m shared.bench.recording --write

Decode steps of pocket with 1, 16 and 64 streams, on one thread. The chapter before and the chapter take turns, step by
step. `record_us` is the time in the recorder's own methods, found by timing them alone on the same sequences; `count_us` is
the time in which the server's process adds a step's report to its metrics; `scrape_us` that of one scrape.

Reads: the chapters. Writes: docs/results/recording.json.
"""
import argparse
import importlib
import statistics
import time

from shared.bench.step import STREAMS, begin, end, make_engine
from shared.bench.timing import interleave, summary, timed
from shared.chapters import Chapter, first_with
from shared.programs import run
from shared.results import write_row

MODEL = "pocket"


def measure(chapter: Chapter, repeats: int) -> dict:
    """By number of streams: milliseconds of a step without and with records, and microseconds of recording and counting."""
    import torch
    from prometheus_client import CollectorRegistry, generate_latest

    torch.set_num_threads(1)
    metrics = importlib.import_module(f"{chapter.load().__name__}.metrics")
    max_new = 8 * repeats + 16
    engines = {each.id: (each, make_engine(each, MODEL, max_new, linear="auto")) for each in (chapter.previous, chapter)}
    found = {}
    for count in STREAMS:
        for owner, engine in engines.values():
            begin(owner, engine, count, max_new)
        timings = interleave({name: lambda engine=engine: timed(engine.step) for name, (_, engine) in engines.items()}, repeats)
        _, engine = engines[chapter.id]
        engine.take_report()
        counted, recorded = metrics.Metrics(metrics.Goal()), []
        spent = []
        for _ in range(repeats):
            engine.step()
            recorded.append(record_us(engine))
            report = engine.take_report()
            start = time.perf_counter()
            counted.add(report)
            spent.append(1e6 * (time.perf_counter() - start))
        registry = CollectorRegistry()
        registry.register(counted)
        start = time.perf_counter()
        generate_latest(registry)
        found[str(count)] = {
            "before_ms": summary(timings[chapter.previous.id])["cpu_ms"],
            "after_ms": summary(timings[chapter.id])["cpu_ms"],
            "record_us": round(statistics.median(recorded), 1),
            "count_us": round(statistics.median(spent), 1),
            "scrape_us": round(1e6 * (time.perf_counter() - start), 1),
        }
        for _, engine in engines.values():
            end(engine)
    return found


def record_us(engine) -> float:
    """Microseconds of what the recorder does in a step in which every running sequence gets a token."""
    recorder, seqs = type(engine.recorder)(), list(engine.seqs.values())
    start = time.perf_counter()
    recorder.begin()
    recorder.end_part()
    recorder.feed(seqs)
    for _ in range(3):
        recorder.end_part()
    for seq in seqs:
        recorder.token(seq)
    recorder.end_step(seqs, 0, 0)
    return 1e6 * (time.perf_counter() - start)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench.recording", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="write docs/results/recording.json")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    chapter = first_with("metrics")
    found = measure(chapter, args.repeats)
    for count, row in found.items():
        print(f"{count:>3} streams" + "".join(f"   {name} {value:8,.2f}" for name, value in row.items()))
    if args.write:
        path = write_row("recording", {"streams": found}, " ".join(["python -m shared.bench.recording", *argv]), [chapter.previous, chapter])
        print(f"wrote {path.name}; now `make sync`")
    return 0


if __name__ == "__main__":
    run(main)
