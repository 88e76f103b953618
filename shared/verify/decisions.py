"""Compare a chapter's scheduler, step by step, with decisions recorded from vLLM's.

    python -m shared.verify.decisions DIR                # the last chapter that preempts
    python -m shared.verify.decisions DIR v11 --reserve 16

A trace is a JSON file: the limits of a scheduler, requests, and what vLLM decided in each step. The chapter's scheduler
runs the same requests with reserve_tokens=0, without a model. All of vLLM's decisions must follow from vLLM's rules, and
all of the chapter's from its own; shared/verify/rules.py knows both. Then the first difference has a name: the fewest of
the chapter's rules that lead to it. From then on the two states differ, so the line about a workload says what each run
took. The exit status is 1 if a difference has no name.

Reads: the traces in DIR, the chapter.
"""
import argparse
import importlib
import json
import math
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from shared.chapters import Chapter, find, last_with
from shared.programs import run
from shared.verify.rules import Decision, Model, explain, rules_of, token_at


class Trace:
    """A recorded workload and vLLM's decisions."""

    def __init__(self, name: str, content: dict):
        self.name = name
        self.config = content["config"]
        self.by_priority = self.config["policy"] == "priority"
        self.requests = content["requests"]
        self.decisions = [
            Decision(
                scheduled={int(request_id): count for request_id, count in step["scheduled"].items()},
                preempted=frozenset(map(int, step["preempted"])),
                cached={int(request_id): count for request_id, count in step["cached"].items()},
                free=step["free"],
                finished=frozenset(step["finished"]),
            )
            for step in content["steps"]
        ]

    def missing(self, capabilities: frozenset[str]) -> list[str]:
        """What a chapter needs beyond these capabilities to decide as vLLM within the same limits.

        A chapter that computes every prompt whole knows no budget: after a named difference, a step may exceed vLLM's.
        """
        missing = []
        if self.config["prefix_caching"] and "prefix_cache" not in capabilities:
            missing.append("a prefix cache")
        # A step that fills the budget may have cut a prompt short, or left a request waiting.
        is_full = any(sum(decision.scheduled.values()) >= self.config["budget"] for decision in self.decisions)
        if is_full and "chunked_prefill" not in capabilities:
            missing.append("pieces")
        return missing


class Driver:
    """A chapter's scheduler on a trace's requests. Instead of a model, the recording's formula generates the tokens."""

    def __init__(self, chapter: Chapter, trace: Trace, reserve_tokens: int):
        import torch

        cache, params, scheduler, sequence = (
            importlib.import_module(f"milestones.{chapter.name}.{name}") for name in ("cache", "params", "scheduler", "sequence")
        )
        self.Params, self.Sequence = params.SamplingParams, sequence.Sequence
        self.trace, config = trace, trace.config
        self.pool = cache.BlockPool(config["num_blocks"], config["block_size"])
        options, self.seq_options = {}, {}
        if "prefix_cache" in chapter.capabilities:
            self.seq_options["root_key"] = b"root"
            options["enable_prefix_caching"] = config["prefix_caching"]
        if "chunked_prefill" in chapter.capabilities:
            options["max_num_batched_tokens"] = config["budget"]
        blocks = torch.empty(1, config["num_blocks"], config["block_size"], 1, 1)
        self.scheduler = scheduler.Scheduler(
            max_num_seqs=config["max_num_seqs"],
            pool=self.pool,
            reserve_tokens=reserve_tokens,
            swap=cache.SwapSpace(SimpleNamespace(block_size=config["block_size"], k=blocks, v=blocks), num_blocks=0),
            **options,
        )
        self.ids: dict[int, int] = {}  # by seq_id, the request's id
        self.seqs = {}  # unfinished sequences, by the request's id
        self.preempted: set[int] = set()  # requests, in this step
        self.cached: dict[int, int] = {}  # positions by request, in this step
        self.observe()

    def observe(self) -> None:
        """Record what the scheduler preempts, and what a sequence that it admits finds in the prefix cache."""
        preempt, admit = self.scheduler.preempt, self.scheduler.admit

        def preempt_and_record(seq) -> None:
            request_id = self.ids[seq.seq_id]
            # Two requests that preempt each other would never stop.
            assert request_id not in self.preempted, f"request {request_id} is preempted twice in one step"
            self.preempted.add(request_id)
            preempt(seq)

        def admit_and_record(seq) -> bool:
            num_computed = seq.num_computed  # not 0 if it is swapped out
            admitted = admit(seq)
            if admitted and seq.num_computed > num_computed:
                self.cached[self.ids[seq.seq_id]] = seq.num_computed
            return admitted

        self.scheduler.preempt, self.scheduler.admit = preempt_and_record, admit_and_record

    def run(self) -> Iterator[Decision]:
        """Yield each step's decision until all requests have finished.

        AssertionError if requests preempt each other in one step, or never finish.
        """
        last_arrival = max(request["arrives"] for request in self.trace.requests)
        limit = 20 * len(self.trace.decisions)
        step = 0
        while step <= last_arrival or self.seqs:
            assert step < limit, f"{self.trace.name}: requests {list(self.seqs)} have not finished after {limit} steps"
            for request in self.trace.requests:
                if request["arrives"] == step:
                    self.add(request)
            for request in self.trace.requests:
                # An abort before the arrival has no effect.
                if request["aborted"] == step and request["id"] in self.seqs:
                    self.release(request["id"])
            yield self.step()
            step += 1

    def add(self, request: dict) -> None:
        # vLLM serves equally important requests in order of arrival time, which is the id here, under the policy
        # "priority", and in the order in which they were added under "fcfs".
        seq_id = request["id"] if self.trace.by_priority else len(self.ids)
        self.ids[seq_id] = request["id"]
        seq = self.Sequence(
            seq_id=seq_id,
            prompt_ids=request["prompt"],
            params=self.Params(priority=request["priority"] if self.trace.by_priority else 0),
            max_tokens=request["max_tokens"],
            end_ids=(),
            stream=SimpleNamespace(stop_ids=set()),
            **self.seq_options,
        )
        self.seqs[request["id"]] = seq
        self.scheduler.add(seq)

    def release(self, request_id: int) -> None:
        self.scheduler.release(self.seqs.pop(request_id))

    def step(self) -> Decision:
        """Schedule, feed each sequence its tokens, and append the next one where all known tokens are fed."""
        self.preempted, self.cached = set(), {}
        seqs = self.scheduler.schedule()
        free = self.pool.num_free
        scheduled, finished = {}, set()
        for seq in seqs:
            request_id = self.ids[seq.seq_id]
            scheduled[request_id] = len(seq.new_ids)
            seq.num_computed += len(seq.new_ids)
            if seq.num_computed == seq.num_tokens:
                seq.append(token_at(request_id, seq.num_tokens))
            if seq.finished:
                finished.add(request_id)
                self.release(request_id)
        return Decision(scheduled, frozenset(self.preempted), self.cached, free, frozenset(finished))


class Sums(NamedTuple):
    """What a run took."""

    steps: int
    preemptions: int
    computed_twice: int  # positions that preempted requests computed again

    def __str__(self) -> str:
        return f"steps {self.steps}, preemptions {self.preemptions}, positions computed twice {self.computed_twice}"


def sums(decisions: Iterable[Decision]) -> Sums:
    """What these steps took. A position is computed twice if the same request was fed it before; what it found in the cache does not count."""
    num_computed: dict[int, int] = {}  # by request
    fed: dict[int, set[int]] = {}  # by request, all positions that it was ever fed
    steps = preemptions = twice = 0
    for decision in decisions:
        num_computed |= dict.fromkeys(decision.preempted, 0) | decision.cached
        for request_id, count in decision.scheduled.items():
            start = num_computed.get(request_id, 0)
            num_computed[request_id] = start + count
            positions, earlier = set(range(start, start + count)), fed.setdefault(request_id, set())
            twice += len(positions & earlier)
            earlier |= positions
        steps += 1
        preemptions += len(decision.preempted)
    return Sums(steps, preemptions, twice)


class Comparison(NamedTuple):
    """What a workload took on both sides, and how they differ."""

    theirs: Sums
    ours: Sums
    step: int | None = None  # of the first difference, or of the one without a name
    names: tuple[str, ...] = ()  # the rules that lead to it, if they do
    details: tuple[str, ...] = ()  # for a difference without a name: what was decided, and what the rules say


def compare(chapter: Chapter, trace: Trace) -> Comparison:
    """Run a trace's workload on a chapter's scheduler with nothing reserved.

    Each of the chapter's decisions must follow from its rules, those after a named difference too, and each of vLLM's
    from vLLM's rules.
    """
    rules = rules_of(chapter.capabilities)
    # A chapter that computes every prompt whole runs only workloads that vLLM's budget does not cut.
    limits = trace.config if "chunked_prefill" in chapter.capabilities else trace.config | {"budget": math.inf}
    ours, failure = [], None
    try:
        for decision in Driver(chapter, trace, reserve_tokens=0).run():
            ours.append(decision)
    except AssertionError as error:
        failure = str(error)
    comparison = Comparison(sums(trace.decisions), sums(ours))
    runs = {
        "vLLM": trace.decisions,
        "vLLM's rules": Model(trace.config, trace.requests, rules=()).run(),
        chapter.id: ours,
        f"{chapter.id}'s rules": Model(limits, trace.requests, rules).run(),
    }
    for step, (theirs, by_their_rules, mine, by_our_rules) in enumerate(zip_longest(*runs.values())):
        if theirs != by_their_rules or mine != by_our_rules:
            if step == len(ours) and failure:
                return comparison._replace(step=step, names=(), details=(failure,))
            said = zip(runs, (theirs, by_their_rules, mine, by_our_rules))
            lines = tuple(f"{who:12} {decision or 'has finished'}" for who, decision in said)
            return comparison._replace(step=step, names=(), details=lines)
        if mine != theirs and comparison.step is None:
            names = explain(limits, trace.requests, rules, ours[: step + 1])
            comparison = comparison._replace(step=step, names=names)
    return comparison


def describe(comparison: Comparison, chapter: Chapter) -> str:
    """A line about a workload; after a difference without a name, more lines with the decisions."""
    if comparison.step is None:
        return f"equal, {comparison.ours}"
    if comparison.names:
        both = f"vLLM {comparison.theirs}; {chapter.id} {comparison.ours}"
        return f"from step {comparison.step} on: {' and '.join(comparison.names)}; {both}"
    return "\n    ".join([f"a difference without a name in step {comparison.step}", *comparison.details])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.verify.decisions", description=__doc__.partition("\n")[0])
    parser.add_argument("directory", metavar="DIR", type=Path, help="a directory of traces, *.json")
    parser.add_argument("chapter", nargs="?", metavar="vNN", help="default: the last that preempts")
    parser.add_argument("--reserve", type=int, metavar="N", help="also show what reserve_tokens=N buys and costs")
    args = parser.parse_args(argv)
    if args.reserve is not None and args.reserve < 0:
        parser.error(f"--reserve must be 0 or more, got {args.reserve}")
    try:
        chapter = find(args.chapter) if args.chapter else last_with("preemption")
    except ValueError as error:
        parser.error(str(error))
    if "preemption" not in chapter.capabilities:
        parser.error(f"{chapter.id} cannot preempt; name a later chapter")
    traces = [Trace(path.stem, json.loads(path.read_text())) for path in sorted(args.directory.glob("*.json"))]
    if not traces:
        parser.error(f"{args.directory} has no *.json")
    compared: dict[Trace, Comparison] = {}
    for trace in traces:
        if missing := trace.missing(chapter.capabilities):
            print(f"{trace.name:14} needs {' and '.join(missing)}")
        else:
            compared[trace] = compare(chapter, trace)
            print(f"{trace.name:14} {describe(compared[trace], chapter)}")
    num_equal = sum(comparison.step is None for comparison in compared.values())
    num_named = sum(bool(comparison.names) for comparison in compared.values())
    num_unnamed = len(compared) - num_equal - num_named
    print(f"{len(compared)} of {len(traces)} compared: {num_equal} equal, {num_named} with a named difference, {num_unnamed} without a name")
    if args.reserve is not None and compared:
        reserved = [sums(Driver(chapter, trace, args.reserve).run()) for trace in compared]
        print_total("vLLM", [comparison.theirs for comparison in compared.values()])
        print_total(f"{chapter.id}, reserve 0", [comparison.ours for comparison in compared.values()])
        print_total(f"{chapter.id}, reserve {args.reserve}", reserved)
    return 1 if num_unnamed else 0


def print_total(name: str, runs: list[Sums]) -> None:
    print(f"{name:18} {Sums(*map(sum, zip(*runs)))}")


if __name__ == "__main__":
    run(main)
