"""Chooses the sequences of the next step."""
from collections import deque

from .sequence import Sequence


class Scheduler:
    """Starts requests in order of arrival."""

    def __init__(
        self,
        max_num_seqs: int,
    ):
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.free_rows = deque(range(max_num_seqs))

    def add(self, seq: Sequence) -> None:
        """Add a sequence to the end of the queue."""
        self.waiting.append(seq)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step: all running ones, and waiting ones while rows are free."""
        while self.waiting and self.free_rows:
            seq = self.waiting.popleft()
            seq.row = self.free_rows.popleft()
            self.running.append(seq)
        return list(self.running)

    def release(self, seq: Sequence) -> None:
        """Remove a sequence, running or waiting, and free its row."""
        if seq in self.running:
            self.running.remove(seq)
            self.free_rows.append(seq.row)
        else:
            self.waiting.remove(seq)
