"""Who takes part in the next step."""
from collections import deque

from .sequence import Sequence


class Scheduler:
    """First come, first served."""

    def __init__(
        self,
        max_num_seqs: int,
    ):
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.max_num_seqs = max_num_seqs

    def add(self, seq: Sequence) -> None:
        """Queue a sequence behind those that wait."""
        self.waiting.append(seq)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step: a group, until the last of it ends."""
        if not self.running:
            while self.waiting and len(self.running) < self.max_num_seqs:
                self.running.append(self.waiting.popleft())
        return list(self.running)

    def release(self, seq: Sequence) -> None:
        """Take out a sequence that waits; one of the group rides along until the last of it ends."""
        if seq in self.running:
            if all(other.finished for other in self.running):
                self.running.clear()
        else:
            self.waiting.remove(seq)
