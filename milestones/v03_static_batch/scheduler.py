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
        self.max_num_seqs = max_num_seqs

    def add(self, seq: Sequence) -> None:
        """Add a sequence to the end of the queue."""
        self.waiting.append(seq)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step: a group, until its last one finishes."""
        if not self.running:
            while self.waiting and len(self.running) < self.max_num_seqs:
                self.running.append(self.waiting.popleft())
        return list(self.running)

    def release(self, seq: Sequence) -> None:
        """Remove a waiting sequence; one in the group stays until the whole group has finished."""
        if seq in self.running:
            if all(other.finished for other in self.running):
                self.running.clear()
        else:
            self.waiting.remove(seq)
