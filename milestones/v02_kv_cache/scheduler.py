"""Chooses the sequences of the next step."""
from collections import deque

from .sequence import Sequence


class Scheduler:
    """Starts requests in order of arrival."""

    def __init__(self):
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        """Add a sequence to the end of the queue."""
        self.waiting.append(seq)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step: the oldest request, until it finishes."""
        if not self.running and self.waiting:
            self.running.append(self.waiting.popleft())
        return list(self.running)

    def release(self, seq: Sequence) -> None:
        """Remove a sequence, running or waiting."""
        if seq in self.running:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)
