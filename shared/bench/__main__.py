"""Measure chapters side by side.

    python -m shared.bench growth [v01 ...]       # time per token as the sequence grows
    python -m shared.bench batch [v02 v03 ...]    # tokens per second by the number of requests per forward pass
    python -m shared.bench decode v04 v05         # one decode step of 16 sequences of different lengths
    python -m shared.bench overhead [v01 ...]     # the engine's own share of a decode step
    python -m shared.bench staircase [v01 ...]    # every chapter on the same 32 requests: speed and cost
    python -m shared.bench crowded [v10 ...]      # chats with one system prompt in a cache that is too small for all
    python -m shared.bench suite [v01 ...]        # chapters beside Hugging Face and the machine's limit; see suite
    python -m shared.bench large [v01 ...]        # the same with larger workloads and models

All of these run on the CPU, even on a machine with a GPU; `shared.bench.gpu` and `shared.bench.attention` measure GPUs.
`timing` describes how runs are timed.

Reads: shared/workloads.py, the chapters. Writes: docs/results/{growth, batch, decode, overhead, staircase, crowded, suite, large}.json.
"""
import argparse

from shared.bench import batches, growth, overhead, staircase, suite
from shared.chapters import CHAPTERS, find
from shared.programs import run
from shared.results import write_row

WORKLOADS = {
    "growth": (growth.growth, growth.print_growth),
    "batch": (batches.batch, batches.print_batch),
    "decode": (batches.decode, batches.print_decode),
    "overhead": (overhead.overhead, overhead.print_overhead),
    "staircase": (staircase.staircase, staircase.print_staircase),
    "crowded": (staircase.crowded, staircase.print_crowded),
    "suite": (suite.suite, suite.print_suite),
    "large": (suite.large, suite.print_suite),
}

# What a chapter needs to run a workload, and why.
NEEDS = {
    "decode": ("max_num_seqs", "measures a step of 16 sequences", "runs one at a time"),
    "crowded": ("num_blocks", "sizes the cache in blocks", "does not"),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench", description="Measure chapters side by side.")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("chapters", nargs="*", metavar="vNN", help="default: every chapter that can run the workload; for crowded, those that differ in it")
    parser.add_argument("--before", action="store_true", help="also measure the chapter before each of these")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write the result under docs/results/")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    if args.write and args.chapters and args.workload in ("staircase", "crowded", "suite", "large"):
        parser.error("--write always measures all chapters, since the texts show each beside the one before; name none")
    needed, what, why = NEEDS.get(args.workload, (None, "", ""))
    able = [each for each in CHAPTERS if needed is None or needed in each.capabilities]
    default = staircase.that_differ_when_full(able) if args.workload == "crowded" else able
    try:
        chapters = [find(text) for text in args.chapters] or default
        if args.before:
            chapters = [each for each in CHAPTERS if each in chapters or each in [chapter.previous for chapter in chapters]]
    except ValueError as error:
        parser.error(str(error))
    unable = [each.id for each in chapters if each not in able]
    if unable:
        parser.error(f"{args.workload} {what}, and {', '.join(unable)} {why}; name later chapters")
    measure, show = WORKLOADS[args.workload]
    results = measure(chapters, args.repeats)
    show(results)
    if args.write:
        path = write_row(args.workload, results, " ".join(["python -m shared.bench", *argv]), chapters)
        print(f"wrote {path.name}; now `make sync`")
    return 0


if __name__ == "__main__":
    run(main)
