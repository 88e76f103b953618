"""Chooses the sequences of the next step."""
from array import array
from bisect import bisect_left, insort
from collections import deque

from .cache import BlockPool, SwapSpace
from .sequence import Sequence


class Scheduler:
    """Starts requests in order of rank, and preempts them in reverse order."""

    def __init__(
        self,
        max_num_seqs: int,
        pool: BlockPool,
        reserve_tokens: int,
        swap: SwapSpace,
        enable_prefix_caching: bool,
        max_num_batched_tokens: int,
    ):
        self.waiting: deque[Sequence] = deque()
        self.passed: list[Sequence] = []  # the first waiting ones, which await a prefix while later ones start
        self.running: list[Sequence] = []
        self.max_num_seqs = max_num_seqs
        self.pool = pool
        self.reserve_tokens = reserve_tokens
        self.swap = swap
        self.num_preemptions = 0
        self.enable_prefix_caching = enable_prefix_caching
        self.max_num_batched_tokens = max_num_batched_tokens
        self.budget = 0  # tokens that the step being scheduled has left
        self.num_prompt_tokens = 0  # of all sequences that have run
        self.num_cached_tokens = 0  # of these, the ones found in the prefix cache
        self.waits_for: str | None = None  # why waiting sequences were left out: places, blocks, tokens or prefix

    def add(self, seq: Sequence) -> None:
        """Add a sequence to the queue, at its rank."""
        insort(self.waiting, seq, key=lambda seq: seq.rank)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step: running ones, as many as have blocks, and waiting ones while they fit."""
        for seq in self.running:
            self.publish(seq)
        self.budget = self.max_num_batched_tokens
        # However long the prompts are, each running sequence is certain of one token.
        for seq in self.running:
            seq.num_scheduled = 1
            self.budget -= 1
        num_grown = 0
        while num_grown < len(self.running):
            if self.grow(self.running[num_grown]):
                num_grown += 1
            else:
                self.preempt(self.running[-1])
        self.passed = []
        while len(self.passed) < len(self.waiting) and self.budget:
            num_passed = len(self.passed)
            seq = self.waiting[num_passed]
            if not self.admit(seq):
                if len(self.passed) == num_passed:
                    break
                continue
            del self.waiting[num_passed]
            insort(self.running, seq, key=lambda seq: seq.rank)
            seq.preempted = False
            self.swap.load(seq.swap_table, seq.block_table, seq.num_published)
        if not self.waiting:
            self.waits_for = None
        elif not self.budget:
            self.waits_for = "places" if len(self.running) == self.max_num_seqs else "tokens"
        return list(self.running)

    def admit(self, seq: Sequence) -> bool:
        """Allocate seq's first blocks, preempting sequences of a later rank if it then fits; else return False, with no block taken and nobody preempted."""
        ahead = self.running[: bisect_left(self.running, seq.rank, key=lambda other: other.rank)]
        if len(ahead) + len(self.passed) >= self.max_num_seqs:
            self.waits_for = "places"
            return False
        found = self.find(seq)
        if self.awaits(seq, len(found), ahead):
            self.waits_for = "prefix"
            self.passed.append(seq)
            return False
        if not self.fits(seq, found, ahead):
            self.waits_for = "blocks"
            return False
        while len(ahead) < len(self.running) and not self.fits(seq, found, self.running):
            self.preempt(self.running[-1])
        self.share(seq, found)
        return self.grow(seq)

    def most_cached(self, seq: Sequence) -> int:
        """The most blocks that seq may take from the prefix cache. Positions whose logits it needs are computed in any case."""
        if not self.enable_prefix_caching:
            return 0
        return (seq.first_draw - 1) // self.pool.block_size

    def find(self, seq: Sequence) -> list[int]:
        """The blocks that hold seq's first positions, as many as can be found."""
        return self.pool.find(seq.block_key(i, self.pool.block_size) for i in range(self.most_cached(seq)))

    def awaits(self, seq: Sequence, num_found: int, ahead: list[Sequence]) -> bool:
        """Whether a sequence ahead computes, for its prompt, the block after those that seq has found; seq can find it in a later step."""
        if seq.swap_table or num_found == self.most_cached(seq):
            return False
        block_size = self.pool.block_size
        key = seq.block_key(num_found, block_size)
        return any(
            other.num_computed // block_size <= num_found < other.num_prompt // block_size
            and other.block_key(num_found, block_size) == key
            for other in ahead
        )

    def share(self, seq: Sequence, found: list[int]) -> None:
        """Let seq begin with the blocks that it has found, whichever other sequences own them."""
        self.pool.share(found)
        seq.block_table.extend(found)
        seq.num_published = len(found)
        seq.num_computed = max(seq.num_computed, len(found) * self.pool.block_size)
        if seq.num_cached is None:
            seq.num_cached = seq.num_computed
            self.num_prompt_tokens += seq.num_prompt
            self.num_cached_tokens += seq.num_cached

    def publish(self, seq: Sequence) -> None:
        """Let other sequences find the blocks that seq has filled."""
        if not self.enable_prefix_caching:
            return
        # A sequence that is swapped out has computed positions, but no blocks.
        num_full = min(seq.num_computed // self.pool.block_size, len(seq.block_table))
        for i in range(seq.num_published, num_full):
            self.pool.publish(seq.block_table[i], seq.block_key(i, self.pool.block_size))
        seq.num_published = num_full

    def fits(self, seq: Sequence, found: list[int], others: list[Sequence]) -> bool:
        """Whether max_num_seqs allows seq beside the others, and the pool has blocks for all their reservations."""
        if len(others) + len(self.passed) >= self.max_num_seqs:
            return False
        # A block counts once, however many tables hold it.
        if len(others) == len(self.running):
            num_held = self.pool.num_blocks - self.pool.num_free + sum(block_id in self.pool.free_ids for block_id in found)
        else:
            num_held = len(set(found).union(*(other.block_table for other in others)))
        missing = self.reserved(seq) - len(found) + sum(self.reserved(other) - len(other.block_table) for other in [*others, *self.passed])
        return num_held + missing <= self.pool.num_blocks

    def reserved(self, seq: Sequence) -> int:
        """The number of blocks reserved for seq, including those it holds: for reserve_tokens more, at most max_len positions."""
        return self.pool.blocks_for(min(seq.num_tokens + self.reserve_tokens, seq.max_len))

    def grow(self, seq: Sequence) -> bool:
        """Allocate blocks for seq's new tokens; return False, with nothing allocated, if too few are free."""
        count = min(seq.num_tokens - seq.num_computed, seq.num_scheduled + self.budget)
        need = self.pool.blocks_for(seq.num_computed + count)
        if need > len(seq.block_table):
            blocks = self.pool.allocate(need - len(seq.block_table))
            if blocks is None:
                return False
            seq.block_table.extend(blocks)
        self.budget += seq.num_scheduled - count
        seq.num_scheduled = count
        return True

    def preempt(self, seq: Sequence) -> None:
        """Stop a running sequence, free its blocks, and let it wait at its rank. Keys and values are swapped out or lost."""
        self.swap.save(seq.block_table[: self.pool.blocks_for(seq.num_computed)], seq.swap_table)
        self.running.remove(seq)
        self.budget += seq.num_scheduled
        seq.num_scheduled = 0
        self.give_back(seq)
        if not seq.swap_table:
            seq.num_computed = 0
        self.add(seq)
        seq.preempted = True
        seq.num_preemptions += 1
        self.num_preemptions += 1

    def release(self, seq: Sequence) -> None:
        """Remove a sequence, running or waiting, and free its blocks."""
        if seq in self.running:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)
        self.give_back(seq)
        self.swap.free(seq.swap_table)

    def give_back(self, seq: Sequence) -> None:
        """Free the blocks that seq holds, if any. What it has computed can still be found, unless it failed."""
        if seq.finish_reason == "error" and not seq.is_stuck:
            self.pool.forget(seq.block_table)
        else:
            self.publish(seq)
        self.pool.free(seq.block_table)
        seq.block_table = array("i")
