"""Chooses the sequences of the next step."""
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
    ):
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.max_num_seqs = max_num_seqs
        self.pool = pool
        self.reserve_tokens = reserve_tokens
        self.swap = swap
        self.num_preemptions = 0

    def add(self, seq: Sequence) -> None:
        """Add a sequence to the queue, at its rank."""
        insort(self.waiting, seq, key=lambda seq: seq.rank)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step: running ones, as many as have blocks, and waiting ones while they fit."""
        num_grown = 0
        while num_grown < len(self.running):
            if self.grow(self.running[num_grown]):
                num_grown += 1
            else:
                self.preempt(self.running[-1])
        while self.waiting and self.admit(self.waiting[0]):
            seq = self.waiting.popleft()
            insort(self.running, seq, key=lambda seq: seq.rank)
            seq.preempted = False
            self.swap.load(seq.swap_table, seq.block_table)
        return list(self.running)

    def admit(self, seq: Sequence) -> bool:
        """Allocate seq's first blocks, preempting sequences of a later rank if it then fits; else return False, with no block taken and nobody preempted."""
        ahead = self.running[: bisect_left(self.running, seq.rank, key=lambda other: other.rank)]
        if not self.fits(seq, ahead):
            return False
        while len(ahead) < len(self.running) and not self.fits(seq, self.running):
            self.preempt(self.running[-1])
        return self.grow(seq)

    def fits(self, seq: Sequence, others: list[Sequence]) -> bool:
        """Whether max_num_seqs allows seq beside the others, and the pool has blocks for all their reservations."""
        if len(others) == self.max_num_seqs:
            return False
        return sum(self.reserved(member) for member in [seq, *others]) <= self.pool.num_blocks

    def reserved(self, seq: Sequence) -> int:
        """The number of blocks reserved for seq, including those it holds: for reserve_tokens more, at most max_len positions."""
        return self.pool.blocks_for(min(seq.num_tokens + self.reserve_tokens, seq.max_len))

    def grow(self, seq: Sequence) -> bool:
        """Allocate blocks for seq's new tokens; return False, with nothing allocated, if too few are free."""
        need = self.pool.blocks_for(seq.num_computed + len(seq.new_ids))
        blocks = self.pool.allocate(need - len(seq.block_table))
        if blocks is None:
            return False
        seq.block_table.extend(blocks)
        return True

    def preempt(self, seq: Sequence) -> None:
        """Stop a running sequence, free its blocks, and let it wait at its rank. Keys and values are swapped out or lost."""
        self.swap.save(seq.block_table[: self.pool.blocks_for(seq.num_computed)], seq.swap_table)
        self.running.remove(seq)
        self.give_back(seq)
        if not seq.swap_table:
            seq.num_computed = 0
        self.add(seq)
        seq.preempted = True
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
        """Free the blocks that seq holds, if any."""
        self.pool.free(seq.block_table)
        del seq.block_table[:]
