"""The comparison with recorded decisions: small workloads decided by hand, and schedulers with planted bugs."""
import importlib
import inspect
import json
from types import ModuleType, SimpleNamespace

import pytest

from shared.chapters import first_with
from shared.verify import decisions
from shared.verify.decisions import Driver, Sums, Trace, compare, sums
from shared.verify.rules import AFTER_PREEMPTING, AT_ONCE, Decision

CHAPTER = first_with("preemption")


def request(request_id, prompt_len, max_tokens, arrives=0, priority=0, aborted=None):
    return {
        "id": request_id,
        "arrives": arrives,
        "prompt": [5] * prompt_len,
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


def content(requests, steps, *, num_blocks, max_num_seqs=2, budget=64, policy="fcfs", prefix_caching=False):
    """The content of a trace's file; a block has 2 positions."""
    config = {
        "block_size": 2,
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


@pytest.mark.parametrize(
    ("workload", "cost"),
    [
        (TIGHT, Sums(steps=5, preemptions=1, computed_twice=2)),
        (ABORTS, Sums(steps=5, preemptions=0, computed_twice=0)),
        (OWN_VICTIM, Sums(steps=4, preemptions=1, computed_twice=2)),
        (TIES, Sums(steps=4, preemptions=0, computed_twice=0)),
    ],
)
def test_where_nothing_differs_every_step_is_equal(workload, cost):
    comparison = compare(CHAPTER, Trace("by_hand", workload))
    assert comparison == (cost, cost, None, (), ())


@pytest.mark.parametrize(
    ("workload", "where", "names"),
    [(URGENT, 1, (AT_ONCE,)), (LEFT_OVER, 1, (AFTER_PREEMPTING,))],
)
def test_where_the_chapter_differs_on_purpose_the_rule_is_named(workload, where, names):
    comparison = compare(CHAPTER, Trace("by_hand", workload))
    assert (comparison.step, comparison.names) == (where, names)


@pytest.mark.parametrize("workload", ALL)
def test_a_difference_that_vllms_rules_do_not_make_has_no_name(workload):
    wrong = json.loads(json.dumps(workload))
    changed = wrong["steps"][1]
    changed["free"] += 1
    comparison = compare(CHAPTER, Trace("by_hand", wrong))
    assert (comparison.step, comparison.names) == (1, ())
    theirs, by_their_rules, ours, by_our_rules = comparison.details
    assert f"{changed['free']} blocks free" in theirs and f"{changed['free'] - 1} blocks free" in by_their_rules
    assert ours.removeprefix("v11").split() == by_our_rules.removeprefix("v11's rules").split()


@pytest.mark.parametrize("change", [lambda steps: steps.pop(), lambda steps: steps.append(steps[-1])])
def test_a_run_that_is_longer_or_shorter_is_a_difference_without_a_name(change):
    wrong = json.loads(json.dumps(TIGHT))
    change(wrong["steps"])
    comparison = compare(CHAPTER, Trace("by_hand", wrong))
    assert (comparison.step, comparison.names) == (min(5, len(wrong["steps"])), ())


GROW = "else:\n                self.preempt(self.running[-1])"
MAKE_ROOM = "while not self.fits(seq, self.running):\n            self.preempt(self.running[-1])"
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
    "a preempted request keeps its blocks": ("self.give_back(seq)\n        self.add(seq)", "self.add(seq)"),
    "a request that leaves keeps its blocks": ("self.waiting.remove(seq)\n        self.give_back(seq)", "self.waiting.remove(seq)"),
    "one more than max_num_seqs": ("len(others) == self.max_num_seqs", "len(others) > self.max_num_seqs"),
    "one token is reserved unasked": ("seq.num_tokens + self.reserve_tokens", "seq.num_tokens + 1"),
    "the last block stays empty": ("<= self.pool.num_blocks", "< self.pool.num_blocks"),
    "one admission per step": ("while self.waiting and self.admit", "if self.waiting and self.admit"),
    "the last in the queue is admitted first": ("self.admit(self.waiting[0]):", "self.admit(self.waiting[-1]):\n            self.waiting.rotate()"),
    "a more important request waits": ("if other.rank < seq.rank", ""),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_a_difference_without_a_name(bug, monkeypatch):
    scheduler = importlib.import_module(f"milestones.{CHAPTER.name}.scheduler")
    right, wrong = BUGS[bug]
    source = inspect.getsource(scheduler)
    assert source.count(right) == 1
    changed = ModuleType(scheduler.__name__)
    changed.__package__ = scheduler.__package__
    exec(compile(source.replace(right, wrong), "changed.py", "exec"), changed.__dict__)
    monkeypatch.setattr(scheduler, "Scheduler", changed.Scheduler)
    comparisons = [compare(CHAPTER, Trace("by_hand", workload)) for workload in ALL]
    assert any(comparison.step is not None and not comparison.names for comparison in comparisons)


def test_a_position_is_computed_twice_unless_it_is_found_in_the_cache():
    nothing = frozenset()
    steps = [
        Decision({1: 4, 2: 3}, nothing, {}, 0, nothing),
        Decision({1: 1}, frozenset({2}), {}, 0, nothing),
        Decision({1: 1, 2: 2}, nothing, {2: 2}, 0, nothing),  # positions 2 and 3, of which 2 was computed before
    ]
    assert sums(steps) == (3, 1, 1)


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
