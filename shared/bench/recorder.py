"""Record a real run step by step: which requests each forward pass computed, how many positions, and whether they were needed.

Chapters need no code for this: a hook before the model's forward pass reads the batch and the scheduler's queues.
"""
import time
from dataclasses import dataclass, field

from shared.workloads import Request


@dataclass(frozen=True)
class Part:
    """What one forward pass did for one request."""

    request: int  # its index in the workload
    num_tokens: int  # positions computed for it, padding included
    useful: int  # those of them that its output needs and that were never computed before
    got_token: bool
    rows: list[int]  # its part of the cache: one row, or its blocks


@dataclass(frozen=True)
class Pass:
    """One forward pass."""

    parts: list[Part]
    waiting: list[int]  # requests waiting when its step began, including those admitted in it
    wall_s: float = field(compare=False)  # the time of its step


@dataclass(frozen=True)
class Trace:
    """One run of one chapter."""

    chapter: str
    places: int  # the most requests it could run at once
    lengths: list[tuple[int, int]]  # for each request: prompt tokens, output tokens
    passes: list[Pass]
    kv_bytes: int  # reserved for keys and values
    kv_read_bytes: int = 0  # keys and values that the cache returned for attention

    @property
    def num_tokens(self) -> int:
        """Tokens generated."""
        return sum(output for _, output in self.lengths)

    @property
    def num_positions(self) -> int:
        """Positions computed, needed or not."""
        return sum(part.num_tokens for each in self.passes for part in each.parts)

    @property
    def num_needed(self) -> int:
        """Positions that had to be computed: each once, except that of an output's last token and those found in a prefix cache."""
        return sum(part.useful for each in self.passes for part in each.parts)

    def ledger(self) -> list[dict[int, int]]:
        """For each forward pass, the positions computed, by request."""
        return [{part.request: part.num_tokens for part in each.parts} for each in self.passes]

    def useful_share(self) -> float:
        """Sequences that got a token / (forward passes x places), over the forward passes that began while a request waited."""
        passes = [each for each in self.passes if each.waiting]
        got = sum(part.got_token for each in passes for part in each.parts)
        return got / (len(passes) * self.places)

    def life(self, request: int) -> list[tuple[str, float]]:
        """The request's time, as (kind, seconds) in order.

        Kinds: waits; useful and wasted, in proportion to its positions; rides, when it is computed after it has finished.
        """
        spans = []
        for each in self.passes:
            part = next((part for part in each.parts if part.request == request), None)
            if part is None and request in each.waiting:
                spans.append(("waits", each.wall_s))
            elif part is not None and not part.got_token:
                spans.append(("rides", each.wall_s))
            elif part is not None:
                share = part.useful / part.num_tokens
                spans += [("useful", share * each.wall_s), ("wasted", (1 - share) * each.wall_s)]
        return spans

    def seconds_to_first(self, request: int) -> float:
        """From the start of the run to the end of the step that gave the request its first token."""
        got = (any(part.request == request and part.got_token for part in each.parts) for each in self.passes)
        first = next(number for number, here in enumerate(got) if here)
        return sum(each.wall_s for each in self.passes[: first + 1])

    def ends(self) -> list[int]:
        """For each request, the number of forward passes after which it had its last token."""
        last = [0] * len(self.lengths)
        for number, each in enumerate(self.passes, 1):
            for part in each.parts:
                if part.got_token:
                    last[part.request] = number
        return last

    def waits(self, request: int) -> int:
        """The number of forward passes that ran without the request while it was in the queue."""
        ran = (any(part.request == request for part in each.parts) for each in self.passes)
        return sum(request in each.waiting and not took_part for each, took_part in zip(self.passes, ran))


class Recorder:
    """While entered, records the forward pass of every step of an engine."""

    def __init__(self, engine):
        self.engine = engine
        self.numbers: dict[int, int] = {}  # request id to number in the workload
        self.computed: dict[int, int] = {}  # request id to the number of its positions computed so far
        self.passes: list[Pass] = []
        self.kv_read_bytes = 0

    def __enter__(self) -> "Recorder":
        self.hook = self.engine.model.register_forward_pre_hook(lambda _model, args: self.before(*args))
        self.engine.step = self.watch_step(self.engine.step)
        if hasattr(self.engine, "cache"):
            self.engine.cache.read = self.count_read(self.engine.cache.read)
        return self

    def __exit__(self, *exception) -> None:
        self.hook.remove()
        del self.engine.step
        if hasattr(self.engine, "cache"):
            del self.engine.cache.read

    def watch_step(self, step):
        def watched():
            self.parts = None
            start = time.perf_counter()
            outputs = step()
            if self.parts is not None:
                self.passes.append(Pass(self.parts, self.waiting, time.perf_counter() - start))
            return outputs

        return watched

    def count_read(self, read):
        def counted(*args):
            k, v = read(*args)
            self.kv_read_bytes += k.nbytes + v.nbytes
            return k, v

        return counted

    def before(self, batch) -> None:
        """Read the batch and the scheduler's queues when the model is called."""
        running = self.engine.scheduler.running
        # Without a cache, every forward pass computes all tokens.
        fed = [len(getattr(seq, "new_ids", seq.token_ids)) for seq in running]
        num_tokens = len(batch.token_ids)
        if num_tokens != sum(fed):
            # A rectangle: every row is padded to the widest.
            assert num_tokens == len(fed) * max(fed), f"{num_tokens} tokens in the batch, its sequences have {fed}"
        drawn = {draw.seq.seq_id for draw in batch.draws}
        waiting = [seq.seq_id for seq in self.engine.scheduler.waiting]
        parts = []
        for row, (seq, width) in enumerate(zip(running, fed)):
            if seq.seq_id not in self.computed:
                waiting.append(seq.seq_id)
            known = self.computed.get(seq.seq_id, 0)
            start = getattr(seq, "num_computed", 0)
            reached = start + width
            self.computed[seq.seq_id] = max(known, reached)
            parts.append(
                Part(
                    request=self.numbers[seq.seq_id],
                    num_tokens=width if num_tokens == sum(fed) else max(fed),
                    useful=0 if seq.finished else max(reached - max(known, start), 0),
                    got_token=seq.seq_id in drawn,
                    rows=held(seq, row),
                )
            )
        self.waiting = sorted(self.numbers[seq_id] for seq_id in waiting)
        self.parts = parts


def held(seq, row: int) -> list[int]:
    """A sequence's part of the cache: its blocks, or its row, which is its row in the batch if it has no attribute `row`."""
    if hasattr(seq, "block_table"):
        return list(seq.block_table)
    return [getattr(seq, "row", row)]


def empty_prefix_cache(engine) -> None:
    """Let the next run compute what an earlier one has computed. An engine without a prefix cache does so anyway."""
    if hasattr(engine, "reset_prefix_cache"):
        engine.reset_prefix_cache()


def run(engine, package, requests: list[Request], arrived=lambda number, request_id: None) -> list[list[int]]:
    """Run a workload to its end; the tokens of each request.

    A prefix cache is emptied first. Requests are added, and aborted, before the steps that the workload names. Each is
    greedy and runs to its max_tokens.

    Raises:
        ValueError: if the engine already has requests.
        AssertionError: if it takes more steps than generating one token per step would.
    """
    if engine.has_unfinished_requests():
        raise ValueError(f"the engine has requests {list(engine.seqs)}; run a workload on an idle engine")
    empty_prefix_cache(engine)
    tokens = [[] for _ in requests]
    numbers = {}
    step_id = 0
    limit = max((r.arrival_step for r in requests), default=0) + sum(r.max_tokens for r in requests) + 1
    while engine.has_unfinished_requests() or len(numbers) < len(requests):
        assert step_id <= limit, f"requests {list(engine.seqs)} have not finished after {step_id} steps"
        for number, request in enumerate(requests):
            if request.arrival_step == step_id:
                params = package.SamplingParams(max_tokens=request.max_tokens, ignore_eos=True)
                request_id = engine.add_request(request.prompt_ids, params)
                numbers[request_id] = number
                arrived(number, request_id)
        for request_id, number in numbers.items():
            if requests[number].abort_step == step_id:
                engine.abort_request(request_id)
        for output in engine.step():
            tokens[numbers[output.request_id]].append(output.token_id)
        step_id += 1
    return tokens


def record(chapter, engine, requests: list[Request]) -> tuple[Trace, list[list[int]]]:
    """Run a workload on an engine of this chapter; the trace, and the tokens of each request."""
    with Recorder(engine) as recorder:

        def arrived(number: int, request_id: int) -> None:
            recorder.numbers[request_id] = number

        tokens = run(engine, chapter.load(), requests, arrived)
    trace = Trace(
        chapter=chapter.name,
        places=getattr(engine, "max_num_seqs", 1),
        lengths=[(len(request.prompt_ids), len(ids)) for request, ids in zip(requests, tokens)],
        passes=recorder.passes,
        kv_bytes=engine.cache.kv_bytes if hasattr(engine, "cache") else 0,
        kv_read_bytes=recorder.kv_read_bytes,
    )
    return trace, tokens


def summary(trace: Trace) -> str:
    """A line of figures for a run."""
    needed = trace.num_needed / trace.num_positions
    return (
        f"{len(trace.lengths)} requests, at most {trace.places} at once: {len(trace.passes)} forward passes, "
        f"{trace.num_positions} positions, {needed:.0%} of them needed; "
        f"while requests waited, forward passes gave {trace.useful_share():.0%} of the tokens they had room for"
    )
