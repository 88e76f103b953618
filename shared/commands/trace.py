"""Trace a real run: which requests each forward pass computed, how many positions, and whether they were needed.

    make trace ARGS="v03 v04"                          # the small workload, as timelines in the terminal
    make trace ARGS="v04 --times"                      # with the time of each forward pass
    make trace ARGS="v03 v04 --html build/trace.html"  # as a self-contained page
    make trace ARGS="v17 --perfetto build/trace.json"  # for https://ui.perfetto.dev, from the chapter that records its steps
    make trace ARGS=--write                            # write the result that the chapters' pictures are drawn from

Reads: the chapters. Writes: docs/results/timeline.json, a page.
"""
import argparse
import contextlib
import importlib
import io
from dataclasses import asdict
from pathlib import Path

from shared.bench.recorder import Trace, record, summary
from shared.book.pictures import name_of, page
from shared.programs import run
from shared.results import write
from shared.workloads import (
    SHARED_BLOCKS,
    TIGHT_BLOCKS,
    TIMELINE,
    TIMELINE_BLOCK_SIZE,
    TIMELINE_BLOCKS,
    TIMELINE_PLACES,
    fixed,
    shared_beginnings,
)

WAITS, PROMPT, TOKEN, WASTE = "\u00b7", "\u2593", "\u2588", "\u2591"


def cells(trace: Trace, request: int) -> str:
    """One character for each forward pass: the request waits, computes its prompt, one token or nothing needed, or is absent."""
    line = ""
    for each in trace.passes:
        part = next((part for part in each.parts if part.request == request), None)
        if part is None:
            line += WAITS if request in each.waiting else " "
        elif not part.useful:
            line += WASTE
        else:
            line += PROMPT if part.useful > 1 else TOKEN
    return line.rstrip()


def timeline(trace: Trace) -> list[str]:
    """One line per request, one column per forward pass."""
    heads = [f"{name_of(i):3}{prompt:>4} +{output:>4}" for i, (prompt, output) in enumerate(trace.lengths)]
    return [f"{head}  {cells(trace, i)}" for i, head in enumerate(heads)]


def times(trace: Trace) -> list[str]:
    """One line per forward pass: how many positions it computed, and how long its step took."""
    fed = [sum(positions.values()) for positions in trace.ledger()]
    rows = enumerate(zip(fed, trace.passes, strict=True), 1)
    return [f"forward pass {i:3}: {num:4} positions {1e3 * each.wall_s:8.1f} ms" for i, (num, each) in rows]


def main(argv: list[str]) -> int:
    from shared.chapters import CHAPTERS, ROOT, find, first_with
    from shared.checkpoints import POCKET

    parser = argparse.ArgumentParser(prog="python -m shared.commands.trace", description="Trace a real run, one forward pass at a time.")
    parser.add_argument("chapters", nargs="*", metavar="vNN", help="default: all")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead")
    parser.add_argument("--perfetto", type=Path, metavar="FILE", help="write what the engine records as a file for Perfetto; name one chapter that records it")
    parser.add_argument("--times", action="store_true", help="also print the time of each forward pass")
    parser.add_argument("--write", action="store_true", help="write the result of all chapters under docs/results/")
    args = parser.parse_args(argv)
    if args.write and args.chapters:
        parser.error("--write always traces all chapters, since the pictures are drawn from one file; name none")
    if args.times and args.html:
        parser.error("--times prints to the terminal, and --html writes a page; choose one of them")
    try:
        chapters = [find(text) for text in args.chapters] or list(CHAPTERS)
        for path in (args.html, args.perfetto):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.perfetto:
        if len(chapters) != 1 or "metrics" not in chapters[0].capabilities:
            parser.error(f"--perfetto needs one chapter that records its steps, {first_with('metrics').id} or later")
        write_perfetto(chapters[0], POCKET, args.perfetto)
        print(f"wrote {args.perfetto}; open it at https://ui.perfetto.dev")
        return 0
    traces = {chapter.id: small_trace(chapter, POCKET) for chapter in chapters}
    if args.html:
        args.html.write_text(page({name: asdict(trace) for name, trace in traces.items()}))
        print(f"wrote {args.html}")
    else:
        print(f"{PROMPT} prompt   {TOKEN} one token   {WASTE} computed for nothing   {WAITS} waits")
        for trace in traces.values():
            print(f"\n{trace.chapter}: {summary(trace)}", *timeline(trace), *(times(trace) if args.times else []), sep="\n")
    if args.write:
        traces["shared"] = shared_trace(POCKET)
        path = write("timeline", {name: without_times(trace) for name, trace in traces.items()}, command(argv))
        print(f"\nwrote {path.relative_to(ROOT)}; now `make sync`")
    return 0


def write_perfetto(chapter, model_dir: Path, path: Path) -> None:
    """Write the steps and requests that this chapter's engine records of the small workload."""
    observe = importlib.import_module(f"{chapter.load().__name__}.observe")
    engine = small_engine(chapter, model_dir)
    record(chapter, engine, fixed(TIMELINE, engine.config.vocab_size))
    report = engine.take_report()
    path.write_text("".join(observe.document(report.steps, report.ended)))


def small_trace(chapter, model_dir: Path) -> Trace:
    """A trace of this chapter on the workload that is small enough to draw."""
    engine = small_engine(chapter, model_dir)
    trace, _ = record(chapter, engine, fixed(TIMELINE, engine.config.vocab_size))
    return trace


def small_engine(chapter, model_dir: Path):
    """An engine of this chapter for the small workload."""
    limits = {"max_num_seqs": TIMELINE_PLACES} if "max_num_seqs" in chapter.capabilities else {}
    if "num_blocks" in chapter.capabilities:
        limits |= {"num_blocks": TIMELINE_BLOCKS, "block_size": TIMELINE_BLOCK_SIZE}
    if "preemption" in chapter.capabilities:
        limits |= {"num_blocks": TIGHT_BLOCKS, "reserve_tokens": 0}
    with contextlib.redirect_stderr(io.StringIO()):
        return chapter.load().Engine(model_dir, device="cpu", **limits)


def shared_trace(model_dir: Path) -> Trace:
    """A trace of the first chapter with a prefix cache on the requests that have the same beginning."""
    from shared.chapters import first_with

    chapter = first_with("prefix_cache")
    limits = {"max_num_seqs": TIMELINE_PLACES, "num_blocks": SHARED_BLOCKS, "block_size": TIMELINE_BLOCK_SIZE, "reserve_tokens": 0}
    with contextlib.redirect_stderr(io.StringIO()):
        engine = chapter.load().Engine(model_dir, device="cpu", **limits)
    trace, _ = record(chapter, engine, shared_beginnings(engine.config.vocab_size))
    return trace


def without_times(trace: Trace) -> dict:
    """A trace without its times: what is the same in every run."""
    fields = asdict(trace)
    for each in fields["passes"]:
        del each["wall_s"]
    return fields


def command(argv: list[str]) -> str:
    return " ".join(["python -m shared.commands.trace", *argv])


if __name__ == "__main__":
    run(main)
