"""What an engine records of its steps and requests, for metrics, the dashboard and traces. Nothing here imports torch.

All times are seconds of time.monotonic(), which is one clock for all processes of a machine.
"""
from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .sequence import Sequence

# Kept until they are taken, or forgotten if nobody takes them.
MOST_STEPS, MOST_ENDED = 1_000, 10_000

# The parts of a step, in order. On a GPU, Python waits for the model's result in `choose`.
PARTS = ("schedule", "batch", "model", "choose", "commit")


class Step(NamedTuple):
    """One step of the engine."""

    began: float
    seconds: list[float]  # of each of PARTS
    num_seqs: int
    num_fed: int  # tokens
    num_prompt: int  # of these, tokens of prompts
    num_output: int  # tokens generated
    queue_times: list[float]  # seconds from arrival, for each request whose first step this is
    first_times: list[float]  # seconds from arrival, for each request whose first token this step generated
    gaps: list[tuple[float, int]]  # seconds since a request's last token, and how many requests waited so long
    num_waiting: int  # requests in the queue after it, preempted ones included
    num_preemptions: int  # since the last step that did not fail


class Ended(NamedTuple):
    """The life of a request."""

    request_id: int
    reason: str  # stop, length, abort or error
    arrived: float
    began: float | None  # its first step
    first: float | None  # its first token
    ended: float
    num_prompt: int
    num_cached: int
    num_output: int
    num_preemptions: int
    longest_gap: float  # between two of its tokens
    num_early_preemptions: int = 0  # before its first token; no gap is due to them


class Compilation(NamedTuple):
    """A grammar has been compiled, or refused."""

    backend: str  # own or llguidance, or none if it was refused
    seconds: float


class Report(NamedTuple):
    """What has happened in an engine since its last report."""

    steps: list[Step]
    ended: list[Ended]
    compiled: list[Compilation] = []


class Recorder:
    """Collects a report. An engine has one, and calls it where things happen."""

    def __init__(self):
        self.steps: deque[Step] = deque(maxlen=MOST_STEPS)
        self.ended: deque[Ended] = deque(maxlen=MOST_ENDED)
        self.compiled: deque[Compilation] = deque(maxlen=MOST_ENDED)  # threads that compile add to it
        self.num_preemptions = 0
        self.begin()

    def begin(self) -> None:
        """A step begins. One that was begun before, and has not ended, has failed and is forgotten."""
        self.began = self.now = time.monotonic()
        self.seconds: list[float] = []
        self.num_prompt = self.num_output = 0
        self.queue_times: list[float] = []
        self.first_times: list[float] = []
        self.gaps: dict[float, int] = {}

    def end_part(self) -> None:
        """The next of PARTS has ended."""
        now = time.monotonic()
        self.seconds.append(now - self.now)
        self.now = now

    def feed(self, seqs: list[Sequence]) -> None:
        """These sequences take part in the step."""
        for seq in seqs:
            if seq.began is None:
                seq.began = self.now
                self.queue_times.append(seq.began - seq.arrived)
            if seq.num_computed < seq.num_prompt:
                self.num_prompt += min(seq.num_scheduled, seq.num_prompt - seq.num_computed)

    def token(self, seq: Sequence) -> None:
        """A sequence has a new token. All tokens of a step have the same time, so most gaps of a step are equal."""
        self.num_output += 1
        if seq.last is None:
            seq.first = self.now
            seq.num_early_preemptions = seq.num_preemptions
            self.first_times.append(seq.first - seq.arrived)
        else:
            gap = self.now - seq.last
            self.gaps[gap] = self.gaps.get(gap, 0) + 1
            seq.longest_gap = max(seq.longest_gap, gap)
        seq.last = self.now

    def end_step(self, seqs: list[Sequence], num_waiting: int, num_preemptions: int) -> None:
        """The step with these sequences has ended; num_preemptions: of the engine, since it was created."""
        self.end_part()
        num_fed = sum(seq.num_scheduled for seq in seqs)
        numbers = self.num_prompt, self.num_output, self.queue_times, self.first_times, list(self.gaps.items())
        self.steps.append(Step(self.began, self.seconds, len(seqs), num_fed, *numbers, num_waiting, num_preemptions - self.num_preemptions))
        self.num_preemptions = num_preemptions

    def end(self, seq: Sequence) -> None:
        """A sequence has left the engine."""
        self.ended.append(
            Ended(
                request_id=seq.seq_id,
                reason=seq.finish_reason,
                arrived=seq.arrived,
                began=seq.began,
                first=seq.first,
                # A text ends with its last token.
                ended=seq.last if seq.finish_reason in ("stop", "length") else time.monotonic(),
                num_prompt=seq.num_prompt,
                num_cached=seq.num_cached or 0,
                num_output=seq.num_output,
                num_preemptions=seq.num_preemptions,
                longest_gap=seq.longest_gap,
                num_early_preemptions=seq.num_early_preemptions,
            )
        )

    def fail(self, request_ids: list[int]) -> None:
        """What these requests got in the last step is lost; some may have ended in it, but nobody gets their last token."""
        for index, ended in enumerate(self.ended):
            if ended.request_id in request_ids:
                self.ended[index] = ended._replace(reason="error")

    def forget(self, request_ids: list[int]) -> None:
        """These requests have not ended, whatever was recorded since the last report."""
        kept = [ended for ended in self.ended if ended.request_id not in request_ids]
        self.ended.clear()
        self.ended.extend(kept)

    def take(self) -> Report | None:
        """What was recorded since the last call; None if nothing was."""
        if not self.steps and not self.ended and not self.compiled:
            return None
        compiled = [self.compiled.popleft() for _ in range(len(self.compiled))]
        report = Report(list(self.steps), list(self.ended), compiled)
        self.steps.clear()
        self.ended.clear()
        return report
