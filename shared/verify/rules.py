"""What a scheduler decides in a step: by vLLM's rules, and by the rules that the chapters have in their place.

This computes the decisions in another way than the chapters do: it runs all requests from the start, compares tokens
instead of hashes, and finds out who holds a block by looking into all tables.
"""
from collections.abc import Iterable, Iterator
from itertools import combinations, count
from typing import NamedTuple

# What the chapters do and vLLM does not.
AT_ONCE = "preempts for a more important request at once"  # vLLM: only when a running request cannot grow
AFTER_PREEMPTING = "admits in a step that preempted"  # vLLM: not before the next step
ONCE_COMPUTED = "finds a block only once it is computed"  # vLLM: in the step that computes it, so no request waits for it
BY_RANK = "serves running requests in order of rank"  # vLLM: in the order in which they were admitted
ONE_EACH = "sets one token aside for every running request"  # vLLM: a prompt served first may use up the budget
WHOLE_PROMPTS = "counts the blocks that running prompts still need"  # vLLM: those of the new request's prompt only
RULES = {  # by the capability that needs them
    "preemption": (AT_ONCE, AFTER_PREEMPTING),
    "prefix_cache": (ONCE_COMPUTED, BY_RANK),  # without a cache, the order of serving changes nothing
    "chunked_prefill": (ONE_EACH, WHOLE_PROMPTS),
}


def rules_of(capabilities: Iterable[str]) -> tuple[str, ...]:
    """The rules of a chapter with these capabilities."""
    return tuple(rule for capability, rules in RULES.items() if capability in capabilities for rule in rules)


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


def token_at(request_id: int, position: int) -> int:
    """The token that a recorded request generates at a position, instead of a model."""
    return (97 * request_id + 13 * position) % 2000 + 16


class Request:
    """A request's tokens and blocks. Requests compare by rank: the smallest is served first and preempted last."""

    def __init__(self, request: dict, rank: tuple[int, int]):
        self.id = request["id"]
        self.rank = rank  # unique
        self.tokens = tuple(request["prompt"])  # known so far
        self.num_prompt = len(self.tokens)
        self.last_num_tokens = self.num_prompt + request["max_tokens"]  # known when it finishes
        self.num_computed = 0
        self.table: list[int] = []  # the blocks of its positions, in order

    def __lt__(self, other: "Request") -> bool:
        return self.rank < other.rank


class Model:
    """A scheduler with a recording's limits that decides by some of the RULES, and by vLLM's own in place of the others.

    A budget of math.inf tokens per step feeds every prompt whole.
    """

    def __init__(self, config: dict, requests: list[dict], rules: Iterable[str]):
        self.config = config
        self.requests = requests
        self.rules = frozenset(rules)
        self.block_size = config["block_size"]
        self.free = list(range(config["num_blocks"]))  # blocks that no request holds; the next to be used is first
        self.contents: dict[int, tuple] = {}  # by block that can be found, all tokens up to its end; the first published is first
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.num_added = 0
        # Of one step:
        self.budget = 0  # tokens that may still be scheduled
        self.scheduled: dict[int, int] = {}
        self.preempted: set[int] = set()
        self.cached: dict[int, int] = {}

    def run(self) -> Iterator[Decision]:
        """Yield each step's decision until all requests have finished."""
        last_arrival = max(request["arrives"] for request in self.requests)
        for step in count():
            if step > last_arrival and not self.running and not self.waiting:
                return
            for request in self.requests:
                if request["arrives"] == step:
                    self.add(request)
            for request in self.requests:
                if request["aborted"] == step:
                    self.abort(request["id"])
            yield self.step()

    def add(self, request: dict) -> None:
        by_priority = self.config["policy"] == "priority"
        self.waiting.append(Request(request, (request["priority"], request["id"]) if by_priority else (0, self.num_added)))
        self.waiting.sort()
        self.num_added += 1

    def abort(self, request_id: int) -> None:
        for requests in (self.running, self.waiting):
            for request in requests:
                if request.id == request_id:
                    requests.remove(request)
                    self.give_back(request)
                    return

    def step(self) -> Decision:
        """Decide, feed the scheduled tokens, and generate a token where all known ones are fed."""
        self.budget = self.config["budget"]
        self.scheduled, self.preempted, self.cached = {}, set(), {}
        for request in self.running:
            self.publish(request, request.num_computed)
        if ONE_EACH in self.rules:
            for request in self.running:
                self.take(request, 1)
        for request in list(self.running):
            if request in self.running and self.num_affordable(request):
                self.grow(request)
        self.passed = []
        while len(self.passed) < len(self.waiting) and self.budget and (not self.preempted or AFTER_PREEMPTING in self.rules):
            num_passed = len(self.passed)
            if not self.admit(self.waiting[num_passed]) and len(self.passed) == num_passed:
                break
        free, finished = len(self.free), set()
        for request in list(self.running):
            if request.id in self.scheduled:
                self.advance(request)
                if len(request.tokens) == request.last_num_tokens:
                    finished.add(request.id)
                    self.running.remove(request)
                    self.give_back(request)
        return Decision(self.scheduled, frozenset(self.preempted), self.cached, free, frozenset(finished))

    def grow(self, request: Request) -> None:
        """Schedule a running request, at the cost of those of a later rank or, if there are none, preempt it."""
        num_tokens = self.num_affordable(request)
        while request in self.running and self.num_missing(request, request.num_computed + num_tokens) > len(self.free):
            self.preempt_last()
            # In vLLM, what the preempted request had goes to those that are served after this one.
            if ONE_EACH in self.rules and request in self.running:
                num_tokens = self.num_affordable(request)
        if request in self.running:
            self.schedule(request, num_tokens)

    def admit(self, request: Request) -> bool:
        """Let a waiting request run if it fits; otherwise change nothing and return False."""
        request.table = self.find(request)
        ahead = [other for other in self.running if other < request]
        has_place = len(ahead) + len(self.passed) < self.config["max_num_seqs"]
        awaits = has_place and self.awaits(request, ahead)
        if awaits:
            self.passed.append(request)
        if awaits or not self.fits(request, ahead if AT_ONCE in self.rules else self.running):
            request.table = []
            return False
        self.free = [block for block in self.free if block not in request.table]
        while not self.fits(request, self.running):
            self.preempt_last()
        self.waiting.remove(request)
        self.running.append(request)
        if BY_RANK in self.rules:
            self.running.sort()
        if request.table:
            request.num_computed = self.cached[request.id] = len(request.table) * self.block_size
        self.schedule(request, self.num_affordable(request))
        return True

    def find(self, request: Request) -> list[int]:
        """The blocks that hold the request's first tokens, as many as can be found; never all tokens, one is computed."""
        table = []
        for end in range(self.block_size, len(request.tokens), self.block_size):
            blocks = [block for block, content in self.contents.items() if content == request.tokens[:end]]
            if not blocks:
                break
            table.append(blocks[0])
        return table

    def awaits(self, request: Request, ahead: list[Request]) -> bool:
        """Whether a request ahead is yet to compute, for its prompt, the block that this one would find next."""
        end = (len(request.table) + 1) * self.block_size
        if ONCE_COMPUTED not in self.rules or not self.config["prefix_caching"] or end >= len(request.tokens):
            return False
        return any(other.num_computed < end <= other.num_prompt and other.tokens[:end] == request.tokens[:end] for other in ahead)

    def fits(self, request: Request, others: list[Request]) -> bool:
        """Whether a request can have a block for each of its tokens beside what these others hold; a block counts once."""
        held = {block for member in [request, *others] for block in member.table}
        num_blocks = len(held) + sum(self.num_missing(each, len(each.tokens)) for each in [request, *self.passed])
        if WHOLE_PROMPTS in self.rules:
            num_blocks += sum(self.num_missing(other, len(other.tokens)) for other in others)
        return len(others) + len(self.passed) < self.config["max_num_seqs"] and num_blocks <= self.config["num_blocks"]

    def num_affordable(self, request: Request) -> int:
        """The number of the request's tokens that the budget allows to feed."""
        return min(len(request.tokens) - request.num_computed, self.scheduled.get(request.id, 0) + self.budget)

    def num_missing(self, request: Request, num_tokens: int) -> int:
        """The number of blocks that a request does not have yet for its first num_tokens tokens."""
        return -(-num_tokens // self.block_size) - len(request.table)

    def schedule(self, request: Request, num_tokens: int) -> None:
        for _ in range(self.num_missing(request, request.num_computed + num_tokens)):
            block = self.free.pop(0)
            self.contents.pop(block, None)
            request.table.append(block)
        self.take(request, num_tokens)
        if ONCE_COMPUTED not in self.rules:
            self.publish(request, request.num_computed + num_tokens)

    def take(self, request: Request, num_tokens: int) -> None:
        """Let a request have this much of the budget, instead of what it has."""
        self.budget -= num_tokens - self.scheduled.get(request.id, 0)
        self.scheduled[request.id] = num_tokens

    def advance(self, request: Request) -> None:
        request.num_computed += self.scheduled[request.id]
        if request.num_computed == len(request.tokens):
            request.tokens += (token_at(request.id, len(request.tokens)),)

    def publish(self, request: Request, num_tokens: int) -> None:
        """Let the blocks that a request's first num_tokens tokens fill be found, each after all that were published before."""
        if self.config["prefix_caching"]:
            for i in range(num_tokens // self.block_size):
                self.contents.setdefault(request.table[i], request.tokens[: (i + 1) * self.block_size])

    def preempt_last(self) -> None:
        last = max(self.running)
        self.budget += self.scheduled.pop(last.id, 0)
        self.running.remove(last)
        self.give_back(last)
        last.num_computed = 0
        self.preempted.add(last.id)
        self.waiting.append(last)
        self.waiting.sort()

    def give_back(self, request: Request) -> None:
        """Free the blocks that no other request holds, the last one first: those that can be found are used last."""
        self.publish(request, request.num_computed)
        table, request.table = request.table, []
        held = {block for other in [*self.running, *self.waiting] for block in other.table}
        for block in reversed(table):
            if block not in held:
                self.free.insert(len(self.free) if block in self.contents else 0, block)


def explain(config: dict, requests: list[dict], rules: tuple[str, ...], ours: list[Decision]) -> tuple[str, ...]:
    """The fewest of these rules that lead to our first decisions; empty if vLLM's own do, or none of them."""
    for num_rules in range(len(rules) + 1):
        for subset in combinations(rules, num_rules):
            if all(decision == by_rules for decision, by_rules in zip(ours, Model(config, requests, subset).run())):
                return subset
    return ()
