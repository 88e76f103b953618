"""The comparison with recorded decisions: small workloads decided by hand, random ones, and schedulers with planted bugs."""
import importlib
import inspect
import json
import math
import random
from itertools import chain, zip_longest
from types import ModuleType, SimpleNamespace

import pytest

from shared.chapters import ROOT, first_with
from shared.verify import decisions
from shared.verify.decisions import Driver, Sums, Trace, compare, sums
from shared.verify.rules import (
    AFTER_PREEMPTING,
    AT_ONCE,
    BY_RANK,
    ONCE_COMPUTED,
    ONE_EACH,
    WHOLE_PROMPTS,
    Decision,
    Model,
    rules_of,
)

CHAPTER = first_with("preemption")
CACHING = first_with("prefix_cache")
DIVIDING = first_with("chunked_prefill")
RECORDED = sorted((ROOT / "tests" / "golden" / "scheduler").glob("*.json"))


def request(request_id, prompt, max_tokens, arrives=0, priority=0, aborted=None):
    """A request in the format of a trace's file; a prompt may be given by its length."""
    return {
        "id": request_id,
        "arrives": arrives,
        "prompt": [5] * prompt if isinstance(prompt, int) else prompt,
        "max_tokens": max_tokens,
        "priority": priority,
        "aborted": aborted,
    }


def step(scheduled, free, preempted=(), finished=(), cached=None):
    """A step in the format of a trace's file: keys and preempted requests are strings."""
    return {
        "scheduled": {str(request_id): count for request_id, count in scheduled.items()},
        "preempted": [str(request_id) for request_id in preempted],
        "cached": cached or {},
        "free": free,
        "finished": list(finished),
    }


def content(requests, steps, *, num_blocks, block_size=2, max_num_seqs=2, budget=64, policy="fcfs", prefix_caching=False):
    """The content of a trace's file."""
    config = {
        "block_size": block_size,
        "num_blocks": num_blocks,
        "max_num_seqs": max_num_seqs,
        "budget": budget,
        "policy": policy,
        "prefix_caching": prefix_caching,
    }
    return {"config": config, "requests": requests, "steps": steps}


# Blocks run out: 1 is preempted, and waits ahead of 2, which has not run yet.
TIGHT = content(
    [request(0, 2, 3), request(1, 2, 3), request(2, 2, 1)],
    [
        step({0: 2, 1: 2}, free=1),
        step({0: 1}, free=1, preempted=[1]),
        step({0: 1}, free=1, finished=[0]),
        step({1: 3, 2: 2}, free=0, finished=[2]),
        step({1: 1}, free=1, finished=[1]),
    ],
    num_blocks=3,
)
# 2 arrives before 0; 1 is aborted while it runs, 3 while it waits, and 4 before it arrives, so that it runs all the same.
ABORTS = content(
    [
        request(2, 1, 2),
        request(1, 2, 9, aborted=2),
        request(3, 1, 9, aborted=1),
        request(0, 1, 1, arrives=1),
        request(4, 1, 1, arrives=4, aborted=3),
    ],
    [
        step({2: 1, 1: 2}, free=6),
        step({2: 1, 1: 1}, free=5, finished=[2]),
        step({0: 1}, free=7, finished=[0]),
        step({}, free=8),
        step({4: 1}, free=7, finished=[4]),
    ],
    num_blocks=8,
)
# 2 is the most important; it waits for one of the two places.
URGENT = content(
    [request(0, 2, 3, priority=1), request(1, 2, 3, priority=2), request(2, 2, 1, arrives=1)],
    [
        step({0: 2, 1: 2}, free=6),
        step({0: 1, 1: 1}, free=4),
        step({0: 1, 1: 1}, free=4, finished=[0, 1]),
        step({2: 2}, free=7, finished=[2]),
    ],
    num_blocks=8,
    policy="priority",
)
# 0 grows at the cost of 1, and leaves a block over, which 2 would fill.
LEFT_OVER = content(
    [request(0, 2, 2), request(1, 3, 2, priority=2), request(2, 2, 1, arrives=1, priority=1)],
    [
        step({0: 2, 1: 3}, free=0),
        step({0: 1}, free=1, preempted=[1], finished=[0]),
        step({2: 2, 1: 4}, free=0, finished=[2, 1]),
    ],
    num_blocks=3,
    max_num_seqs=3,
    policy="priority",
)
# 0 was admitted first and is the less important: it preempts itself, and 1 grows into its block.
OWN_VICTIM = content(
    [request(0, 1, 3, priority=1), request(1, 2, 2, arrives=1)],
    [
        step({0: 1}, free=1),
        step({0: 1, 1: 2}, free=0),
        step({1: 1}, free=0, preempted=[0], finished=[1]),
        step({0: 3}, free=0, finished=[0]),
    ],
    num_blocks=2,
    policy="priority",
)
# Equally important: the smaller id is served first, though it arrived later.
TIES = content(
    [request(3, 1, 2, priority=-1), request(2, 1, 1), request(1, 1, 1, arrives=1)],
    [
        step({3: 1}, free=7),
        step({3: 1}, free=7, finished=[3]),
        step({1: 1}, free=7, finished=[1]),
        step({2: 1}, free=7, finished=[2]),
    ],
    num_blocks=8,
    max_num_seqs=1,
    policy="priority",
)
ALL = [TIGHT, ABORTS, URGENT, LEFT_OVER, OWN_VICTIM, TIES]

# 1 finds two blocks that 0 still holds, in a step in which only one is free.
HIT = content(
    [request(0, [1, 2, 3, 4, 5], 3), request(1, [1, 2, 3, 4, 6], 1, arrives=1)],
    [
        step({0: 5}, free=1),
        step({0: 1, 1: 1}, free=0, finished=[1], cached={1: 4}),
        step({0: 1}, free=0, finished=[0]),
    ],
    num_blocks=4,
    prefix_caching=True,
)
# Both blocks of 1's prompt can be found, but one token is computed. 2 finds both.
WHOLE_PROMPT = content(
    [request(0, [1, 2, 3, 4], 1), request(1, [1, 2, 3, 4], 1, arrives=1), request(2, [1, 2, 3, 4, 5], 1, arrives=2)],
    [
        step({0: 4}, free=6, finished=[0]),
        step({1: 2}, free=6, finished=[1], cached={1: 2}),
        step({2: 1}, free=5, finished=[2], cached={2: 4}),
    ],
    num_blocks=8,
    prefix_caching=True,
)
# 0 computes the block that 1 begins with.
SAME_STEP = content(
    [request(0, [1, 2, 3], 1), request(1, [1, 2, 4], 1)],
    [step({0: 3, 1: 1}, free=5, finished=[0, 1], cached={1: 2})],
    num_blocks=8,
    prefix_caching=True,
)
# 1 and 2 find a block of 0's, and the next block of both is the same.
SAME_STEP_AFTER_A_HIT = content(
    [request(0, [1, 2, 7], 1), request(1, [1, 2, 3, 4, 5], 1, arrives=1), request(2, [1, 2, 3, 4, 6], 1, arrives=1)],
    [step({0: 3}, free=6, finished=[0]), step({1: 3, 2: 1}, free=4, finished=[1, 2], cached={1: 2, 2: 4})],
    num_blocks=8,
    prefix_caching=True,
)
# Blocks 0 and 1 of request 0 can be found, block 2 is not full. Request 1 takes blocks 2, 3, 4 and 1, so that request 2
# finds only block 0; beside it, it takes 1 and 4. Request 3 takes 4, which is not full, and 3. Request 4 finds block 2.
EVICTION = content(
    [
        request(0, [1, 2, 3, 4, 5], 1),
        request(1, [21, 22, 23, 24, 25, 26, 27], 1, arrives=1),
        request(2, [1, 2, 3, 4, 9], 1, arrives=2),
        request(3, [31, 32, 33], 1, arrives=3),
        request(4, [21, 22, 29], 1, arrives=4),
    ],
    [
        step({0: 5}, free=2, finished=[0]),
        step({1: 7}, free=1, finished=[1]),
        step({2: 3}, free=2, finished=[2], cached={2: 2}),
        step({3: 3}, free=3, finished=[3]),
        step({4: 1}, free=3, finished=[4], cached={4: 2}),
    ],
    num_blocks=5,
    prefix_caching=True,
)
# 1 is preempted with two full blocks: 0 takes the second, and 1 finds the first again.
OWN_BLOCKS = content(
    [request(0, [1, 2, 3], 3), request(1, [11, 12, 13], 3)],
    [
        step({0: 3, 1: 3}, free=0),
        step({0: 1, 1: 1}, free=0),
        step({0: 1}, free=1, preempted=[1], finished=[0]),
        step({1: 3}, free=1, finished=[1], cached={1: 2}),
    ],
    num_blocks=4,
    prefix_caching=True,
)
# 2 begins as 0, and continues as 1 after another beginning.
OTHER_BEGINNING = content(
    [request(0, [5, 6, 7], 1), request(1, [1, 2, 3, 4, 7], 1), request(2, [5, 6, 3, 4, 8], 1, arrives=1)],
    [step({0: 3, 1: 5}, free=3, finished=[0, 1]), step({2: 3}, free=5, finished=[2], cached={2: 2})],
    num_blocks=8,
    prefix_caching=True,
)
# 0 generates 55, which fills its second block, in the step in which 1 arrives.
GENERATED = content(
    [request(0, [1, 2, 3], 3), request(1, [1, 2, 3, 55, 9], 1, arrives=1)],
    [
        step({0: 3}, free=6),
        step({0: 1, 1: 1}, free=5, finished=[1], cached={1: 4}),
        step({0: 1}, free=5, finished=[0]),
    ],
    num_blocks=8,
    prefix_caching=True,
)
# 0 and the more important 1, which was admitted later, finish together. 2 takes the full block that was freed first: the
# second of 0 or, if 1 is served before 0, the first of 1, which 3 then does not find.
FINISH_TOGETHER = content(
    [
        request(0, [1, 2, 3], 2, priority=1),
        request(1, [11, 12, 13], 1, arrives=1),
        request(2, [31, 32, 33, 34, 35], 1, arrives=2),
        request(3, [11, 12, 14], 1, arrives=3),
    ],
    [
        step({0: 3}, free=3),
        step({0: 1, 1: 3}, free=1, finished=[0, 1]),
        step({2: 5}, free=2, finished=[2]),
        step({3: 1}, free=3, finished=[3], cached={3: 2}),
    ],
    num_blocks=5,
    policy="priority",
    prefix_caching=True,
)
CACHED = [HIT, WHOLE_PROMPT, SAME_STEP, SAME_STEP_AFTER_A_HIT, EVICTION, OWN_BLOCKS, OTHER_BEGINNING, GENERATED, FINISH_TOGETHER]

# 0 is cut into pieces of 3, 3 and 1; beside the last, 1 is cut too.
PIECES = content(
    [request(0, 7, 2), request(1, 4, 1)],
    [
        step({0: 3}, free=6),
        step({0: 3}, free=5),
        step({0: 1, 1: 2}, free=3),
        step({0: 1, 1: 2}, free=2, finished=[0, 1]),
    ],
    num_blocks=8,
    budget=3,
)
# 0 is aborted after two of its three pieces. What it computed is found by 1, of which three tokens are left.
ABORTED_PIECE = content(
    [request(0, [1, 2, 3, 4, 5, 6, 7], 2, aborted=2), request(1, [1, 2, 3, 4, 5, 6, 9, 10, 11], 1, arrives=1)],
    [
        step({0: 3}, free=6),
        step({0: 3}, free=5),
        step({1: 3}, free=3, finished=[1], cached={1: 6}),
    ],
    num_blocks=8,
    budget=3,
    prefix_caching=True,
)
# 1 finds both blocks of 0, and the rest of it is cut into two pieces.
HIT_AND_PIECES = content(
    [request(0, [1, 2, 3, 4], 1), request(1, [1, 2, 3, 4, 5, 6, 7, 8], 1, arrives=2)],
    [
        step({0: 3}, free=6),
        step({0: 1}, free=6, finished=[0]),
        step({1: 3}, free=4, cached={1: 4}),
        step({1: 1}, free=4, finished=[1]),
    ],
    num_blocks=8,
    budget=3,
    prefix_caching=True,
)
# In the step of 0's last piece, 1 would find the block that this piece fills.
AWAITED_PIECE = content(
    [request(0, [1, 2, 3, 4, 5, 6], 1), request(1, [1, 2, 3, 4, 5, 6, 9], 1)],
    [step({0: 4}, free=6), step({0: 2, 1: 1}, free=4, finished=[0, 1], cached={1: 6})],
    num_blocks=8,
    budget=4,
    prefix_caching=True,
)
# In step 5, 0 needs the block of the less important 1. The token that was set aside for 1 goes to 0.
SPARE_TOKEN = content(
    [request(0, 7, 2, arrives=1), request(1, 1, 6, priority=3)],
    [
        step({1: 1}, free=4),
        step({1: 1, 0: 1}, free=3),
        step({1: 1, 0: 1}, free=2),
        step({1: 1, 0: 1}, free=1),
        step({1: 1, 0: 1}, free=0),
        step({0: 1}, free=2, preempted=[1]),
        step({0: 2}, free=1),
        step({0: 1}, free=1, finished=[0]),
        step({1: 2}, free=4),
        step({1: 2}, free=3),
        step({1: 2}, free=2, finished=[1]),
    ],
    num_blocks=5,
    budget=2,
    policy="priority",
)
# In step 4, 2 is preempted, which leaves a token and four blocks. The more important 0 needs three of them. But 1, whose
# prompt is not finished, needs two more, so it is preempted for 0.
STILL_NEEDED = content(
    [
        request(0, 3, 2, arrives=2),
        request(1, 6, 1, arrives=1),
        request(2, 1, 6, priority=2),
        request(3, 2, 1, arrives=1),
    ],
    [
        step({2: 1}, free=7),
        step({2: 1, 1: 1}, free=5),
        step({2: 1, 1: 1}, free=3),
        step({2: 1, 1: 1}, free=1),
        step({1: 1}, free=4, preempted=[2]),
        step({1: 2}, free=2, finished=[1]),
        step({0: 2}, free=6),
        step({0: 1, 3: 1}, free=4),
        step({0: 1, 3: 1}, free=2, finished=[0, 3]),
        step({2: 2}, free=6),
        step({2: 2}, free=4),
        step({2: 1}, free=3),
        step({2: 1}, free=2, finished=[2]),
    ],
    num_blocks=8,
    block_size=1,
    budget=2,
    policy="priority",
)
CUT = [PIECES, ABORTED_PIECE, HIT_AND_PIECES, AWAITED_PIECE, SPARE_TOKEN, STILL_NEEDED]


def by_hand(workload):
    return Trace("by_hand", workload)


def chapter_for(workload):
    """The first chapter that can run a workload."""
    if workload["config"]["budget"] < 64:
        return DIVIDING
    return CACHING if workload["config"]["prefix_caching"] else CHAPTER


def random_trace(seed, prefix_caching, is_cut=False):
    """A workload with little room, few beginnings, and the decisions that vLLM's rules make about it.

    is_cut: whether the budget is small, so that prompts are cut into pieces.
    """
    rng = random.Random(seed)
    block_size = rng.choice((1, 2, 4))
    beginnings = [[rng.randint(20, 1999) for _ in range(rng.randint(1, 3 * block_size))] for _ in range(3)]
    requests = []
    for request_id in range(rng.randint(5, 12)):
        prompt = [*rng.choice(beginnings), *(rng.choice(beginnings) if rng.random() < 0.3 else [])]
        prompt += [rng.randint(20, 23) for _ in range(rng.randint(0, block_size))]
        arrives = rng.choice((0, rng.randint(0, 15)))
        aborted = rng.randint(1, 15) if rng.random() < 0.1 else None
        requests.append(request(request_id, prompt, rng.randint(1, 2 * block_size + 3), arrives, rng.randint(0, 2), aborted))
    rng.shuffle(requests)
    num_blocks = max(-(-(len(member["prompt"]) + member["max_tokens"]) // block_size) for member in requests)
    limits = {
        "block_size": block_size,
        "num_blocks": num_blocks + rng.randint(0, num_blocks),
        "max_num_seqs": rng.choice((1, 2, 3, 8)),
        "budget": math.inf,
        "policy": rng.choice(("fcfs", "priority", "priority")),
    }
    if is_cut:
        limits["budget"] = limits["max_num_seqs"] + rng.choice((0, 1, 2, 4))
    trace = Trace(f"random {seed}", content(requests, [], prefix_caching=prefix_caching, **limits))
    trace.decisions = list(Model(trace.config, requests, rules=()).run())
    return trace


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_vllms_rules_make_every_recorded_decision(path):
    trace = Trace(path.stem, json.loads(path.read_text()))
    assert all(recorded == by_rules for recorded, by_rules in zip_longest(trace.decisions, Model(trace.config, trace.requests, rules=()).run()))


def test_all_36_recordings_are_there():
    assert len(RECORDED) == 36


@pytest.mark.parametrize("workload", [*ALL, *CACHED, *CUT])
def test_vllms_rules_decide_as_by_hand(workload):
    trace = by_hand(workload)
    assert list(Model(trace.config, trace.requests, rules=()).run()) == trace.decisions


@pytest.mark.parametrize("tested", [CHAPTER, CACHING, DIVIDING], ids=lambda tested: tested.id)
def test_no_difference_in_random_workloads_is_without_a_name(tested):
    num_equal, names = 0, set()
    for seed in range(100):
        able = tested.capabilities
        comparison = compare(tested, random_trace(seed, "prefix_cache" in able, "chunked_prefill" in able))
        assert comparison.step is None or comparison.names, (seed, comparison)
        num_equal += comparison.step is None
        names.update(comparison.names)
    assert num_equal and AT_ONCE in names and (ONCE_COMPUTED in names) == (tested is not CHAPTER)


@pytest.mark.parametrize("rule", rules_of(DIVIDING.capabilities))
def test_every_rule_changes_some_decision(rule):
    rules = rules_of(DIVIDING.capabilities)
    for trace in chain(map(by_hand, CUT), (random_trace(seed, prefix_caching=True) for seed in range(1000))):
        with_it, without_it = (list(Model(trace.config, trace.requests, subset).run()) for subset in (rules, set(rules) - {rule}))
        if with_it != without_it:
            return
    pytest.fail(f"no decision depends on: {rule}")


@pytest.mark.parametrize(
    ("workload", "cost"),
    [
        (HIT, Sums(steps=3, preemptions=0, computed_twice=0)),
        (WHOLE_PROMPT, Sums(steps=3, preemptions=0, computed_twice=0)),
        (EVICTION, Sums(steps=5, preemptions=0, computed_twice=0)),
        (OWN_BLOCKS, Sums(steps=4, preemptions=1, computed_twice=2)),
        (OTHER_BEGINNING, Sums(steps=2, preemptions=0, computed_twice=0)),
        (TIGHT, Sums(steps=5, preemptions=1, computed_twice=2)),
        (ABORTS, Sums(steps=5, preemptions=0, computed_twice=0)),
        (OWN_VICTIM, Sums(steps=4, preemptions=1, computed_twice=2)),
        (TIES, Sums(steps=4, preemptions=0, computed_twice=0)),
        (PIECES, Sums(steps=4, preemptions=0, computed_twice=0)),
        (ABORTED_PIECE, Sums(steps=3, preemptions=0, computed_twice=0)),
        (HIT_AND_PIECES, Sums(steps=4, preemptions=0, computed_twice=0)),
    ],
)
def test_where_nothing_differs_every_step_is_equal(workload, cost):
    comparison = compare(chapter_for(workload), by_hand(workload))
    assert comparison == (cost, cost, None, (), ())


@pytest.mark.parametrize(
    ("workload", "where", "names"),
    [
        (URGENT, 1, (AT_ONCE,)),
        (LEFT_OVER, 1, (AFTER_PREEMPTING,)),
        (SAME_STEP, 0, (ONCE_COMPUTED,)),
        (SAME_STEP_AFTER_A_HIT, 1, (ONCE_COMPUTED,)),
        (GENERATED, 1, (ONCE_COMPUTED,)),
        (FINISH_TOGETHER, 3, (BY_RANK,)),
        (AWAITED_PIECE, 1, (ONCE_COMPUTED,)),
        (SPARE_TOKEN, 5, (ONE_EACH,)),
        (STILL_NEEDED, 4, (AT_ONCE, AFTER_PREEMPTING, WHOLE_PROMPTS)),
    ],
)
def test_where_the_chapter_differs_on_purpose_the_rule_is_named(workload, where, names):
    comparison = compare(chapter_for(workload), by_hand(workload))
    assert (comparison.step, comparison.names) == (where, names)


@pytest.mark.parametrize("workload", ALL)
def test_a_difference_that_vllms_rules_do_not_make_has_no_name(workload):
    wrong = json.loads(json.dumps(workload))
    changed = wrong["steps"][1]
    changed["free"] += 1
    comparison = compare(CHAPTER, by_hand(wrong))
    assert (comparison.step, comparison.names) == (1, ())
    theirs, by_their_rules, ours, by_our_rules = comparison.details
    assert f"{changed['free']} blocks free" in theirs and f"{changed['free'] - 1} blocks free" in by_their_rules
    assert ours.removeprefix("v11").split() == by_our_rules.removeprefix("v11's rules").split()


@pytest.mark.parametrize("change", [lambda steps: steps.pop(), lambda steps: steps.append(steps[-1])])
def test_a_run_that_is_longer_or_shorter_is_a_difference_without_a_name(change):
    wrong = json.loads(json.dumps(TIGHT))
    change(wrong["steps"])
    comparison = compare(CHAPTER, by_hand(wrong))
    assert (comparison.step, comparison.names) == (min(5, len(wrong["steps"])), ())


GROW = "else:\n                self.preempt(self.running[-1])"
MAKE_ROOM = "while len(ahead) < len(self.running) and not self.fits(seq, self.running):\n            self.preempt(self.running[-1])"
BUGS = {
    "the first is preempted, not the last": (GROW, GROW.replace("-1", "0")),
    "a more important request preempts the first": (MAKE_ROOM, MAKE_ROOM.replace("-1", "0")),
    "back to the end of the queue": ("self.add(seq)\n        seq.preempted", "self.waiting.append(seq)\n        seq.preempted"),
    "running in order of admission": (
        "insort(self.running, seq, key=lambda seq: seq.rank)",
        "self.running.append(seq)",
    ),
    "the queue in order of arrival": ("insort(self.waiting, seq, key=lambda seq: seq.rank)", "self.waiting.append(seq)"),
    "computed positions are kept without their blocks": ("seq.num_computed = 0", "pass"),
    "a preempted request keeps its blocks": ("self.give_back(seq)\n        if not", "if not"),
    "a request that leaves keeps its blocks": ("self.waiting.remove(seq)\n        self.give_back(seq)", "self.waiting.remove(seq)"),
    "one more than max_num_seqs": ("len(others) == self.max_num_seqs", "len(others) > self.max_num_seqs"),
    "one token is reserved unasked": ("seq.num_tokens + self.reserve_tokens", "seq.num_tokens + 1"),
    "the last block stays empty": ("<= self.pool.num_blocks", "< self.pool.num_blocks"),
    "one admission per step": ("while self.waiting and self.admit", "if self.waiting and self.admit"),
    "the last in the queue is admitted first": ("self.admit(self.waiting[0]):", "self.admit(self.waiting[-1]):\n            self.waiting.rotate()"),
    "a more important request waits": ("[: bisect_left(self.running, seq.rank, key=lambda other: other.rank)]", "[:]"),
}
CACHE_BUGS = {
    "nothing is found": ("scheduler", "if not self.enable_prefix_caching:\n            return 0\n        return (seq", "if True:\n            return 0\n        return (seq"),
    "no token is left to compute": ("scheduler", "(seq.first_draw - 1) //", "seq.first_draw //"),
    "two tokens are computed": ("scheduler", "(seq.first_draw - 1) //", "(seq.first_draw - 2) //"),
    "no request waits for a block": ("scheduler", "if self.awaits(seq, len(found), ahead):", "if False:"),
    "all wait behind one that waits for a block": ("scheduler", "self.passed.append(seq)", "pass"),
    "a request waits for generated tokens": ("scheduler", "other.num_prompt // block_size", "other.num_tokens // block_size"),
    "a request waits for any block": ("scheduler", "other.block_key(num_found, block_size) == key", "True"),
    "a request waits only for a prompt's first block": ("scheduler", "num_found == self.most_cached(seq)", "num_found or not self.most_cached(seq)"),
    "a block can be found before it is computed": ("scheduler", "min(seq.num_computed //", "min(seq.num_tokens //"),
    "a shared block counts for each table": (
        "scheduler",
        "return num_held + missing <=",
        "return len(found) + sum(len(other.block_table) for other in others) + missing <=",
    ),
    "found blocks take no room": ("scheduler", " + sum(block_id in self.pool.free_ids for block_id in found)", ""),
    "no blocks are kept for those that wait for a block": ("scheduler", "[*others, *self.passed]", "others"),
    "found positions are computed": ("scheduler", "seq.num_computed = max(seq.num_computed, len(found) * self.pool.block_size)", "pass"),
    "what a request leaves cannot be found": ("scheduler", "else:\n            self.publish(seq)", ""),
    "only what a request leaves can be found": ("scheduler", "for seq in self.running:\n            self.publish(seq)", ""),
    "a failed request is taken for another": ("scheduler", 'seq.finish_reason == "error"', 'seq.finish_reason != "error"'),
    "a used block can still be found": ("cache", "self.forget(block_ids)\n", "\n"),
    "the latest copy is found": ("cache", "next(iter(self.blocks_of[key]))", "next(reversed(self.blocks_of[key]))"),
    "one copy can be found": ("cache", "self.key_of[block_id] = key\n", "if key in self.blocks_of:\n            return\n        self.key_of[block_id] = key\n"),
    "a found block stays free": ("cache", "self.free_ids.pop(block_id, None)", "pass"),
    "a shared block has one owner": ("cache", "self.num_owners[block_id] += 1", "self.num_owners[block_id] = 1"),
    "a table's first block is used first": ("cache", "in reversed(block_ids)", "in block_ids"),
    "all freed blocks are used last": ("cache", "last=block_id in self.key_of", "last=True"),
    "all freed blocks are used first": ("cache", "last=block_id in self.key_of", "last=False"),
    "blocks that can be found are used first": ("cache", "last=block_id in self.key_of", "last=block_id not in self.key_of"),
    "a block is found by its own tokens": ("sequence", "block_key(self.block_keys[-1], ", "block_key(self.block_keys[0], "),
    "keys move on by one token": ("sequence", "end = len(self.block_keys) * block_size", "end = len(self.block_keys) - 1 + block_size"),
}

BUDGET_BUGS = {
    "a prompt is not cut": ("scheduler", "min(seq.num_tokens - seq.num_computed, seq.num_scheduled + self.budget)", "seq.num_tokens - seq.num_computed"),
    "a piece has no end": ("sequence", "self.num_computed : self.num_computed + self.num_scheduled", "self.num_computed :"),
    "each request has the whole budget": ("scheduler", "self.budget += seq.num_scheduled - count", "pass"),
    "nothing is set aside": ("scheduler", "seq.num_scheduled = 1\n            self.budget -= 1", "seq.num_scheduled = 0"),
    "two tokens are set aside": ("scheduler", "self.budget -= 1", "self.budget -= 2"),
    "a token is set aside, and not taken off": ("scheduler", "seq.num_scheduled = 1\n            self.budget -= 1", "seq.num_scheduled = 1"),
    "a token is set aside and never used": ("scheduler", "seq.num_scheduled + self.budget)", "max(seq.num_scheduled, self.budget))"),
    "what a step leaves is added to the next": ("scheduler", "self.budget = self.max_num_batched_tokens", "self.budget += self.max_num_batched_tokens"),
    "one token less": ("scheduler", "self.budget = self.max_num_batched_tokens", "self.budget = self.max_num_batched_tokens - 1"),
    "a request is admitted without budget": ("scheduler", "len(self.waiting) and self.budget:", "len(self.waiting):"),
    "a preempted request's tokens are lost": ("scheduler", "self.budget += seq.num_scheduled\n", "pass\n"),
    "a preempted request keeps its tokens": ("scheduler", "seq.num_scheduled = 0", "pass"),
    "a piece takes blocks for the whole prompt": ("scheduler", "blocks_for(seq.num_computed + count)", "blocks_for(seq.num_tokens)"),
    "a piece takes blocks for one more token": ("scheduler", "blocks_for(seq.num_computed + count)", "blocks_for(seq.num_computed + count + 1)"),
    "only the next token is reserved": ("scheduler", "seq.num_tokens + self.reserve_tokens", "seq.num_computed + 1"),
}


@pytest.fixture
def plant(monkeypatch):
    def plant(chapter, name, class_name, right, wrong):
        """Replace a class of a chapter's module by one with a bug."""
        module = importlib.import_module(f"milestones.{chapter.name}.{name}")
        source = inspect.getsource(module)
        assert source.count(right) == 1
        changed = ModuleType(module.__name__)
        changed.__package__ = module.__package__
        exec(compile(source.replace(right, wrong), "changed.py", "exec"), changed.__dict__)
        monkeypatch.setattr(module, class_name, getattr(changed, class_name))

    return plant


def is_unnamed(comparison):
    return comparison.step is not None and not comparison.names


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_a_difference_without_a_name(bug, plant):
    plant(CHAPTER, "scheduler", "Scheduler", *BUGS[bug])
    assert any(is_unnamed(compare(CHAPTER, by_hand(workload))) for workload in ALL)


@pytest.mark.parametrize("bug", CACHE_BUGS)
def test_a_planted_bug_of_the_prefix_cache_is_a_difference_without_a_name(bug, plant):
    name, right, wrong = CACHE_BUGS[bug]
    plant(CACHING, name, {"scheduler": "Scheduler", "cache": "BlockPool", "sequence": "Sequence"}[name], right, wrong)
    traces = [by_hand(workload) for workload in CACHED] + [random_trace(seed, prefix_caching=True) for seed in range(100)]
    assert any(is_unnamed(compare(CACHING, trace)) for trace in traces)


@pytest.mark.parametrize("bug", BUDGET_BUGS)
def test_a_planted_bug_of_the_budget_is_a_difference_without_a_name(bug, plant):
    name, right, wrong = BUDGET_BUGS[bug]
    plant(DIVIDING, name, {"scheduler": "Scheduler", "sequence": "Sequence"}[name], right, wrong)
    traces = chain(map(by_hand, CUT), (random_trace(seed, prefix_caching=True, is_cut=True) for seed in range(100)))
    assert any(is_unnamed(compare(DIVIDING, trace)) for trace in traces)


def test_a_position_is_computed_twice_unless_it_is_found_in_the_cache():
    nothing = frozenset()
    steps = [
        Decision({1: 4, 2: 3}, nothing, {}, 0, nothing),
        Decision({1: 1}, frozenset({2}), {}, 0, nothing),
        Decision({1: 1, 2: 2}, nothing, {2: 2}, 0, nothing),  # positions 2 and 3, of which 2 was computed before
    ]
    assert sums(steps) == (3, 1, 1)


def test_a_position_that_was_found_and_later_computed_is_computed_once():
    nothing = frozenset()
    steps = [
        Decision({1: 1}, nothing, {1: 4}, 0, nothing),
        Decision({}, frozenset({1}), {}, 0, nothing),
        Decision({1: 4}, nothing, {1: 2}, 0, nothing),  # positions 2 to 5, of which 4 was computed before
    ]
    assert sums(steps) == (3, 1, 1)


def test_positions_found_after_a_preemption_are_not_those_swapped_in():
    """A sequence that is swapped in has computed positions, but found none."""
    driver = Driver(CACHING, by_hand(HIT), reserve_tokens=0)
    seq = SimpleNamespace(seq_id=0, num_computed=4)
    driver.ids[0] = 7
    driver.scheduler = SimpleNamespace(preempt=None, admit=lambda seq: True)
    driver.observe()
    driver.scheduler.admit(seq)
    assert driver.cached == {}


def test_a_workload_is_left_to_a_chapter_that_can_run_it():
    cut = content([request(0, 4, 1)], [step({0: 3}, free=0), step({0: 1}, free=0, finished=[0])], num_blocks=2, budget=3, prefix_caching=True)
    assert Trace("cut", cut).missing(CHAPTER.capabilities) == ["a prefix cache", "pieces"]
    assert Trace("cut", cut).missing(CHAPTER.capabilities | {"prefix_cache", "chunked_prefill"}) == []
    assert Trace("tight", TIGHT).missing(CHAPTER.capabilities) == []


def test_a_later_chapters_scheduler_gets_its_budget_and_its_cache(monkeypatch):
    scheduler = importlib.import_module(f"milestones.{CHAPTER.name}.scheduler")
    arguments = {}

    def make(**options):
        arguments.update(options)
        return SimpleNamespace(preempt=None, admit=None)

    monkeypatch.setattr(scheduler, "Scheduler", make)
    later = SimpleNamespace(name=CHAPTER.name, capabilities=CHAPTER.capabilities | {"prefix_cache", "chunked_prefill"})
    Driver(later, Trace("tight", TIGHT), reserve_tokens=7)
    assert (arguments["reserve_tokens"], arguments["enable_prefix_caching"], arguments["max_num_batched_tokens"]) == (7, False, 64)


@pytest.fixture
def directory(tmp_path):
    """A directory of traces, by name."""

    def directory(**traces):
        for name, trace in traces.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(trace))
        return str(tmp_path)

    return directory


def test_the_command_prints_a_line_for_each_workload_and_what_the_reservation_costs(directory, capsys):
    cut = content([request(0, 4, 1)], [step({0: 3}, free=0), step({0: 1}, free=0, finished=[0])], num_blocks=2, budget=3)
    status = decisions.main([directory(a=TIGHT, b=URGENT, c=cut), "v11", "--reserve", "16"])
    assert status == 0
    assert capsys.readouterr().out.splitlines() == [
        "a              equal, steps 5, preemptions 1, positions computed twice 2",
        "b              from step 1 on: preempts for a more important request at once; "
        "vLLM steps 4, preemptions 0, positions computed twice 0; v11 steps 4, preemptions 1, positions computed twice 2",
        "c              needs pieces",
        "2 of 3 compared: 1 equal, 1 with a named difference, 0 without a name",
        "vLLM               steps 9, preemptions 1, positions computed twice 2",
        "v11, reserve 0     steps 9, preemptions 2, positions computed twice 4",
        "v11, reserve 16    steps 10, preemptions 1, positions computed twice 2",
    ]


def test_the_command_fails_if_a_difference_has_no_name(directory, capsys):
    wrong = json.loads(json.dumps(TIGHT))
    wrong["steps"][1]["preempted"] = ["0"]
    assert decisions.main([directory(wrong=wrong), "v11"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "wrong          a difference without a name in step 1"
    assert lines[1:5] == [
        "    vLLM         feeds {0: 1}, preempts [0], leaves 1 blocks free",
        "    vLLM's rules feeds {0: 1}, preempts [1], leaves 1 blocks free",
        "    v11          feeds {0: 1}, preempts [1], leaves 1 blocks free",
        "    v11's rules  feeds {0: 1}, preempts [1], leaves 1 blocks free",
    ]
    assert lines[-1] == "1 of 1 compared: 0 equal, 0 with a named difference, 1 without a name"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["v99"], "there is no chapter 'v99'"),
        (["v10"], "v10 cannot preempt"),
        (["--reserve", "-1"], "--reserve must be 0 or more, got -1"),
        ([], "has no *.json"),
    ],
)
def test_the_command_answers_a_mistake_with_one_sentence(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        decisions.main([str(tmp_path), *argv])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
