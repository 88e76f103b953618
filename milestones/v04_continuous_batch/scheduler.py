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
        self.free_rows = deque(range(max_num_seqs))

    def add(self, seq: Sequence) -> None:
        """Queue a sequence behind those that wait."""
        self.waiting.append(seq)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step: all that run, and newcomers while there are rows for them."""
        while self.waiting and self.free_rows:
            seq = self.waiting.popleft()
            seq.row = self.free_rows.popleft()
            self.running.append(seq)
        return list(self.running)

    def release(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it stands, and give its row back."""
        if seq in self.running:
            self.running.remove(seq)
            self.free_rows.append(seq.row)
        else:
            self.waiting.remove(seq)
