"""Compare a chapter's scheduler, step by step, with decisions recorded from vLLM's.

    python -m shared.verify.decisions DIR                # the last chapter that preempts
    python -m shared.verify.decisions DIR v11 --reserve 16

A trace is a JSON file: the limits of a scheduler, requests, and what vLLM decided in each step. The chapter's scheduler
runs the same requests with reserve_tokens=0, without a model. The first difference has a name if vLLM's decision follows
from the state by vLLM's rules, and the chapter's by its own; shared/verify/rules.py knows both. From then on the two
states differ, so the line about a workload says what each run took. The exit status is 1 if a difference has no name.

Reads: the traces in DIR, the chapter.
"""
import argparse
import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from shared.chapters import Chapter, find, last_with
from shared.programs import run
from shared.verify.rules import RULES, Decision, Request, State, decide, explain


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
        """What a chapter needs beyond these capabilities to run this workload within the same limits."""
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
        options = {}
        if "prefix_cache" in chapter.capabilities:
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
            admitted = admit(seq)
            if admitted and seq.num_computed:
                self.cached[self.ids[seq.seq_id]] = seq.num_computed
            return admitted

        self.scheduler.preempt, self.scheduler.admit = preempt_and_record, admit_and_record

    def run(self) -> Iterator[tuple[State, Decision]]:
        """Yield each step's state, after arrivals and aborts, and the decision.

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
            yield self.state(), self.step()
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
        )
        self.seqs[request["id"]] = seq
        self.scheduler.add(seq)

    def release(self, request_id: int) -> None:
        self.scheduler.release(self.seqs.pop(request_id))

    def state(self) -> State:
        def request_of(seq, num_computed: int) -> Request:
            # Not seq.rank, which is under test.
            rank = seq.params.priority, seq.seq_id
            return Request(rank, self.ids[seq.seq_id], num_computed, seq.num_tokens, seq.num_prompt + seq.max_tokens)

        return State(
            running=[request_of(seq, seq.num_computed) for seq in self.scheduler.running],
            waiting=[request_of(seq, 0) for seq in self.scheduler.waiting],
            max_num_seqs=self.trace.config["max_num_seqs"],
            num_blocks=self.trace.config["num_blocks"],
            block_size=self.trace.config["block_size"],
        )

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
                seq.append((97 * request_id + 13 * seq.num_tokens) % 2000 + 16)
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
    """What these steps took. A position is computed twice if the same request was fed it before."""
    computed, furthest = {}, {}  # positions by request: in the cache now, and the most that ever were
    steps = preemptions = twice = 0
    for decision in decisions:
        computed |= dict.fromkeys(decision.preempted, 0) | decision.cached
        for request_id, count in decision.scheduled.items():
            start = computed.get(request_id, 0)
            computed[request_id] = end = start + count
            twice += max(0, min(end, furthest.get(request_id, 0)) - start)
            furthest[request_id] = max(end, furthest.get(request_id, 0))
        steps += 1
        preemptions += len(decision.preempted)
    return Sums(steps, preemptions, twice)


class Comparison(NamedTuple):
    """What a workload took on both sides, and how they differ."""

    theirs: Sums
    ours: Sums
    step: int | None = None  # of the first difference, or of the one without a name
    names: tuple[str, ...] = ()  # the rules that explain it, if they do
    details: tuple[str, ...] = ()  # for a difference without a name: what was decided, and what the rules say


def compare(chapter: Chapter, trace: Trace) -> Comparison:
    """Run a trace's workload on a chapter's scheduler with nothing reserved.

    Each of the chapter's decisions must follow from its rules, those after a named difference too.
    """
    ran, failure = [], None
    try:
        for state_and_decision in Driver(chapter, trace, reserve_tokens=0).run():
            ran.append(state_and_decision)
    except AssertionError as error:
        failure = str(error)
    # The rules know neither a prefix cache nor pieces: of a chapter that has them, only the first difference is explained.
    rules_apply = chapter.capabilities.isdisjoint({"prefix_cache", "chunked_prefill"})
    comparison = Comparison(sums(trace.decisions), sums(decision for _, decision in ran))
    for step, (state, ours) in enumerate(ran):
        by_rules = decide(state, RULES)
        has_reason = ours == by_rules or not rules_apply
        said = {chapter.id: ours, f"{chapter.id}'s rules": by_rules}
        if not comparison.names:
            theirs = trace.decisions[step] if step < len(trace.decisions) else None
            said = {"vLLM": theirs or "has finished", "vLLM's rules": decide(state, ())} | said
            if ours != theirs:
                comparison = comparison._replace(step=step, names=explain(state, theirs, ours))
                has_reason = bool(comparison.names)
        if not has_reason:
            lines = tuple(f"{who:12} {decision}" for who, decision in said.items())
            return comparison._replace(step=step, names=(), details=lines)
    if failure or not comparison.names and len(ran) < len(trace.decisions):
        failure = failure or f"{chapter.id} has finished, vLLM has not"
        return comparison._replace(step=len(ran), names=(), details=(failure,))
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
        reserved = [sums(decision for _, decision in Driver(chapter, trace, args.reserve).run()) for trace in compared]
        print_total("vLLM", [comparison.theirs for comparison in compared.values()])
        print_total(f"{chapter.id}, reserve 0", [comparison.ours for comparison in compared.values()])
        print_total(f"{chapter.id}, reserve {args.reserve}", reserved)
    return 1 if num_unnamed else 0


def print_total(name: str, runs: list[Sums]) -> None:
    print(f"{name:18} {Sums(*map(sum, zip(*runs)))}")


if __name__ == "__main__":
    run(main)
