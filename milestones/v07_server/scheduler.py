"""Who takes part in the next step."""
from collections import deque

from .cache import BlockPool
from .sequence import Sequence


class Scheduler:
    """First come, first served."""

    def __init__(self, max_num_seqs: int, pool: BlockPool):
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.max_num_seqs = max_num_seqs
        self.pool = pool
        self.num_promised = 0  # blocks that those who run may come to need, the ones they hold included

    def add(self, seq: Sequence) -> None:
        """Queue a sequence behind those that wait."""
        self.waiting.append(seq)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step: all that run, and newcomers while there is room for them to the end."""
        for seq in self.running:
            grown = self.grow(seq)
            assert grown, f"{self.pool.num_free} blocks are free; {self.num_promised} of {self.pool.num_blocks} promised"
        while self.waiting and self.admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        return list(self.running)

    def admit(self, seq: Sequence) -> bool:
        """Give seq its first blocks, if all who run can then reach their ends; False, and nothing taken, if not."""
        worst = self.num_promised + self.pool.blocks_for(seq.max_len)
        if len(self.running) == self.max_num_seqs or worst > self.pool.num_blocks or not self.grow(seq):
            return False
        self.num_promised = worst
        return True

    def grow(self, seq: Sequence) -> bool:
        """Give seq blocks for the tokens it brings; False, and nothing taken, when the pool is short."""
        need = self.pool.blocks_for(seq.num_computed + len(seq.new_ids))
        blocks = self.pool.allocate(need - len(seq.block_table))
        if blocks is None:
            return False
        seq.block_table += blocks
        return True

    def release(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it stands, and give its blocks back."""
        if seq in self.running:
            self.running.remove(seq)
            self.num_promised -= self.pool.blocks_for(seq.max_len)
            self.pool.free(seq.block_table)
            seq.block_table = []
        else:
            self.waiting.remove(seq)
