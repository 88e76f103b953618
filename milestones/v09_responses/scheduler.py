"""Chooses the sequences of the next step."""
from collections import deque

from .cache import BlockPool
from .sequence import Sequence


class Scheduler:
    """Starts requests in order of arrival."""

    def __init__(
        self,
        max_num_seqs: int,
        pool: BlockPool,
    ):
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.max_num_seqs = max_num_seqs
        self.pool = pool

    def add(self, seq: Sequence) -> None:
        """Add a sequence to the end of the queue."""
        self.waiting.append(seq)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step: all running ones, and waiting ones while they fit."""
        for seq in self.running:
            grown = self.grow(seq)
            assert grown, f"no block for request {seq.seq_id}: {self.pool.num_free} of {self.pool.num_blocks} are free"
        while self.waiting and self.admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        return list(self.running)

    def admit(self, seq: Sequence) -> bool:
        """Allocate seq's first blocks; return False, with nothing allocated, if it does not fit."""
        if not self.fits(seq, self.running):
            return False
        return self.grow(seq)

    def fits(self, seq: Sequence, others: list[Sequence]) -> bool:
        """Whether max_num_seqs allows seq beside the others, and the pool has blocks for all their reservations."""
        if len(others) == self.max_num_seqs:
            return False
        return sum(self.reserved(member) for member in [seq, *others]) <= self.pool.num_blocks

    def reserved(self, seq: Sequence) -> int:
        """The number of blocks reserved for seq, including those it holds: what its max_len positions need."""
        return self.pool.blocks_for(seq.max_len)

    def grow(self, seq: Sequence) -> bool:
        """Allocate blocks for seq's new tokens; return False, with nothing allocated, if too few are free."""
        need = self.pool.blocks_for(seq.num_computed + len(seq.new_ids))
        blocks = self.pool.allocate(need - len(seq.block_table))
        if blocks is None:
            return False
        seq.block_table.extend(blocks)
        return True

    def release(self, seq: Sequence) -> None:
        """Remove a sequence, running or waiting, and free its blocks."""
        if seq in self.running:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)
        self.give_back(seq)

    def give_back(self, seq: Sequence) -> None:
        """Free the blocks that seq holds, if any."""
        self.pool.free(seq.block_table)
        del seq.block_table[:]
