"""What a scheduler decides in a step: by vLLM's rules, and by the rules that the chapters have in their place.

This computes the decision in another way than the chapters do: it allocates no blocks, it only counts how many the
requests need. It knows neither a prefix cache nor prompts in pieces.
"""
from bisect import insort
from collections.abc import Iterable
from itertools import combinations
from typing import NamedTuple

# What the chapters do and vLLM does not.
AT_ONCE = "preempts for a more important request at once"  # vLLM: only when a running request cannot grow
AFTER_PREEMPTING = "admits in a step that preempted"  # vLLM: not before the next step
RULES = (AT_ONCE, AFTER_PREEMPTING)


class Request(NamedTuple):
    """A request before a step. Requests compare by rank: the smallest is served first and preempted last."""

    rank: tuple[int, int]  # unique
    id: int
    num_computed: int  # 0 while it waits
    num_tokens: int  # known so far
    last_num_tokens: int  # known when it finishes


class State(NamedTuple):
    """All requests before a step, and the limits."""

    running: list[Request]
    waiting: list[Request]
    max_num_seqs: int
    num_blocks: int
    block_size: int

    def num_free(self, running: list[Request]) -> int:
        """The number of blocks left once these requests hold all of their known tokens; negative if there are too few."""
        return self.num_blocks - sum(-(-request.num_tokens // self.block_size) for request in running)

    def fit(self, running: list[Request]) -> bool:
        return len(running) <= self.max_num_seqs and self.num_free(running) >= 0


class Decision(NamedTuple):
    """What was decided in a step; requests by id."""

    scheduled: dict[int, int]  # by request, the number of tokens to feed
    preempted: frozenset[int]
    cached: dict[int, int]  # by request admitted in this step, the positions found in the prefix cache; zeros left out
    free: int  # blocks that no request holds after scheduling
    finished: frozenset[int]  # requests that the step's tokens finish

    def __str__(self) -> str:
        parts = [f"feeds {dict(sorted(self.scheduled.items()))}"]
        for verb, requests in (("preempts", self.preempted), ("finishes", self.finished)):
            if requests:
                parts.append(f"{verb} {sorted(requests)}")
        if self.cached:
            parts.append(f"finds {dict(sorted(self.cached.items()))}")
        return ", ".join([*parts, f"leaves {self.free} blocks free"])


def decide(state: State, rules: Iterable[str]) -> Decision:
    """What follows from a state by these RULES, and by vLLM's own in place of the others."""
    running, waiting = sorted(state.running), sorted(state.waiting)
    preempted = set()

    def preempt_last() -> None:
        last = running.pop()
        preempted.add(last.id)
        insort(waiting, last._replace(num_computed=0))

    while not state.fit(running):
        preempt_last()
    while waiting and (not preempted or AFTER_PREEMPTING in rules):
        request = waiting[0]
        ahead = [other for other in running if other < request]
        if not state.fit([*(ahead if AT_ONCE in rules else running), request]):
            break
        while not state.fit([*running, request]):
            preempt_last()
        insort(running, waiting.pop(0))
    return Decision(
        scheduled={request.id: request.num_tokens - request.num_computed for request in running},
        preempted=frozenset(preempted),
        cached={},
        free=state.num_free(running),
        finished=frozenset(request.id for request in running if request.num_tokens + 1 == request.last_num_tokens),
    )


def explain(state: State, theirs: Decision | None, ours: Decision) -> tuple[str, ...]:
    """The fewest RULES by which our decision follows from the state.

    Empty unless their decision follows from vLLM's own rules, and ours from all RULES.
    """
    if decide(state, ()) != theirs or decide(state, RULES) != ours:
        return ()
    for count in range(1, len(RULES) + 1):
        for rules in combinations(RULES, count):
            if decide(state, rules) == ours:
                return rules
    return ()
