"""Who takes part in the next step."""
from collections import deque

from .sequence import Sequence


class Scheduler:
    """First come, first served."""

    def __init__(self):
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        """Queue a sequence behind those that wait."""
        self.waiting.append(seq)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step: the oldest request, until it ends."""
        if not self.running and self.waiting:
            self.running.append(self.waiting.popleft())
        return list(self.running)

    def release(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        if seq in self.running:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)
