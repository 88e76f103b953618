"""What is counted, and how a scraper and the dashboard read it."""
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator
from heapq import merge
from math import inf
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .outputs import Stats
from .records import PARTS, Ended, Report, Step

PREFIX = "stepserve_"
# Upper bounds of buckets: seconds of a step or between tokens, of a request, and numbers of tokens.
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
# How long, and at most how many, steps and requests are kept for the dashboard and traces.
KEEP_S, KEEP_STEPS, KEEP_REQUESTS = 300.0, 30_000, 2_000
# The seconds of the page's plots, and how many tokens may wait for clients before the page says so.
SERIES_S, UNREAD = 120, 200
# The values that are sorted in one call of Python's, during which no other thread runs: about a millisecond.
SORT = 1_000
# Seconds without a message after which the page says so. An engine's process sends one each second.
SILENT_S = 3.0
REASONS = "stop", "length", "abort", "error"
# Why requests wait, and what would help. Nothing does if they wait for a prefix that another one computes.
LACKS = {
    "places": "because all places are taken. Raise --max-num-seqs.",
    "blocks": "for blocks of the cache. Raise --kv-bytes or --num-blocks.",
    "tokens": "because others' prompts fill the steps. A larger --max-num-batched-tokens lets them start earlier, and makes streams stutter more.",
}


class Histogram:
    """How many values were at most as large as each bound, and their sum."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = (*bounds, inf)
        self.counts = [0] * len(self.bounds)
        self.sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Count a value as often as it occurred."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def buckets(self) -> list[tuple[str, int]]:
        """Each bound with the number of values up to it.

        >>> histogram = Histogram((1, 2))
        >>> histogram.add(1.5, count=3)
        >>> histogram.buckets()
        [('1.0', 0), ('2.0', 3), ('+Inf', 3)]
        """
        total, pairs = 0, []
        for bound, count in zip(self.bounds, self.counts):
            total += count
            pairs.append((floatToGoString(bound), total))
        return pairs


class Goal(NamedTuple):
    """What a request should not exceed, in seconds; infinite if nothing was asked for."""

    first: float = inf  # to its first token
    gap: float = inf  # between two of its tokens

    def is_met(self, ended: Ended) -> bool:
        return ended.first is not None and ended.first - ended.arrived <= self.first and ended.longest_gap <= self.gap


class Metrics(Collector):
    """Counts what engines report. Reading it never waits for a step."""

    def __init__(self, goal: Goal):
        self.goal = goal
        self.about: dict[str, str] = {}  # settings that do not change, by name
        self.counters = Counter()
        self.answers: Counter[tuple[str, str]] = Counter()  # HTTP responses, by the route's path and the status
        self.finished = Counter(dict.fromkeys(REASONS, 0))
        self.part_seconds = dict.fromkeys(PARTS, 0.0)
        self.step_seconds, self.step_tokens = Histogram(SHORT), Histogram(TOKENS)
        self.first_times, self.gaps, self.token_times = Histogram(LONG), Histogram(SHORT), Histogram(SHORT)
        self.queue_times, self.prefill_times, self.decode_times, self.request_times = (Histogram(LONG) for _ in range(4))
        self.prompt_lengths, self.output_lengths = Histogram(TOKENS), Histogram(TOKENS)
        self.steps: deque[Step] = deque(maxlen=KEEP_STEPS)
        self.requests: deque[Ended] = deque(maxlen=KEEP_REQUESTS)
        self.refused: deque[float] = deque(maxlen=KEEP_REQUESTS)  # when responses with 429 ended
        self.rows: dict[int, list[int]] = {}  # by second: tokens generated, prompt tokens, most requests running, most waiting
        self.stats = Stats(running=0, waiting=0, free_blocks=0, total_blocks=0)
        self.is_alive = True
        # Those of the AsyncEngine.
        self.unanswered: dict[int, int] = {}  # by call: requests that the engine has not acknowledged
        self.encoding = set()  # calls that wait for the tokenizer
        self.unread = set()  # generations that clients may still read
        self.started = time.time()
        self.blocks: str | None = None  # the state of each block, a byte each, in base64

    @property
    def num_waiting(self) -> int:
        """Requests in the engine's queue or on their way to it, and calls that wait for the tokenizer."""
        return self.stats.waiting + sum(self.unanswered.values()) + len(self.encoding)

    @property
    def num_unread(self) -> int:
        """The number of tokens that wait for their clients. Only for the event loop's thread."""
        return sum(generation.outputs.qsize() for generation in self.unread)

    def add_answer(self, path: str, status: int) -> None:
        """Count an HTTP response. path: the route's own."""
        self.answers[path, str(status)] += 1
        if status == 429:
            self.refused.append(time.monotonic())

    def add(self, report: Report) -> None:
        """Count what an engine has reported."""
        for step in report.steps:
            self.add_step(step)
        for ended in report.ended:
            self.add_request(ended)
        oldest = time.monotonic() - KEEP_S
        while self.steps and self.steps[0].began < oldest:
            self.steps.popleft()
        while self.requests and self.requests[0].ended < oldest:
            self.requests.popleft()

    def end(self, num_lost: int) -> None:
        """The engine has died, and num_lost requests with it: nothing runs any more, and what was counted stays."""
        self.is_alive = False
        self.finished["error"] += num_lost
        self.blocks = None
        self.stats = self.stats._replace(running=0, waiting=0, preempted=0, free_blocks=0, total_blocks=0, swapped_blocks=0, findable_blocks=0)

    def add_step(self, step: Step) -> None:
        self.counters["prompt_tokens"] += step.num_prompt
        self.counters["generation_tokens"] += step.num_output
        self.step_seconds.add(sum(step.seconds))
        self.step_tokens.add(step.num_fed)
        for part, seconds in zip(PARTS, step.seconds, strict=True):
            self.part_seconds[part] += seconds
        for seconds in step.queue_times:
            self.queue_times.add(seconds)
        for seconds in step.first_times:
            self.first_times.add(seconds)
        for seconds, count in step.gaps:
            self.gaps.add(seconds, count)
        self.add_to_rows(step)
        self.steps.append(step)

    def add_to_rows(self, step: Step) -> None:
        """Count a step's tokens in the second in which it began, and its requests in each second in which it ran."""
        first, last = int(step.began), int(step.began + sum(step.seconds))
        for second in range(first, last + 1):
            row = self.rows.setdefault(second, [0, 0, 0, 0])
            row[2], row[3] = max(row[2], step.num_seqs), max(row[3], step.num_waiting)
        self.rows[first][0] += step.num_output
        self.rows[first][1] += step.num_prompt
        while len(self.rows) > SERIES_S + 1:
            del self.rows[next(iter(self.rows))]

    def add_request(self, ended: Ended) -> None:
        self.finished[ended.reason] += 1
        self.requests.append(ended)
        # The times of a request that was cut short would be too short.
        if ended.reason not in ("stop", "length"):
            return
        self.counters["goal_requests"] += 1
        self.counters["goal_met"] += self.goal.is_met(ended)
        self.counters["goal_first_missed"] += ended.first - ended.arrived > self.goal.first
        self.counters["goal_gap_missed"] += ended.longest_gap > self.goal.gap
        self.prefill_times.add(ended.first - ended.began)
        self.decode_times.add(ended.ended - ended.first)
        self.request_times.add(ended.ended - ended.arrived)
        self.prompt_lengths.add(ended.num_prompt)
        self.output_lengths.add(ended.num_output)
        if ended.num_output > 1:
            self.token_times.add((ended.ended - ended.first) / (ended.num_output - 1))

    # ---- read by the page

    def picture(self, num_unread: int, silent_s: float = 0.0) -> dict:
        """What the page draws, as JSON: numbers, percentiles of the last minute, two minutes by the second, the last requests.

        num_unread: tokens that wait for their clients; silent_s: seconds since the engine's last message. Any thread may call this.
        """
        now = time.monotonic()
        # Another thread may add steps meanwhile; a copy is made in one go.
        minute = [step for step in list(self.steps) if step.began >= now - 60]
        ended = [request for request in list(self.requests) if request.ended >= now - 60]
        stats, statuses = self.stats._replace(waiting=self.num_waiting)._asdict(), Counter()
        del stats["report"]
        for (_, status), count in list(self.answers.items()):
            statuses[status] += count
        spent = [sum(step.seconds[index] for step in minute) for index in range(len(PARTS))]
        total = sum(spent)
        return {
            "now": now,
            "started": self.started,
            "alive": self.is_alive,
            "about": self.about,
            "stats": stats,
            "answers": dict(sorted(statuses.items())),
            "counters": dict(self.counters),
            "finished": dict(self.finished),
            "goal": {name: None if value == inf else value for name, value in self.goal._asdict().items()},
            "series": self.series(now),
            "latency": {
                "first token": percentiles([(seconds, 1) for step in minute for seconds in step.first_times]),
                "between tokens": percentiles([pair for step in minute for pair in step.gaps]),
                "longest gap of a request": percentiles([(request.longest_gap, 1) for request in ended if request.num_output > 1]),
                "in the queue": percentiles([(seconds, 1) for step in minute for seconds in step.queue_times]),
                "a step": percentiles([(sum(step.seconds), 1) for step in minute]),
            },
            "parts": {part: [seconds / max(1, len(minute)), seconds / total if total else 0.0] for part, seconds in zip(PARTS, spent)},
            "requests": [{name: getattr(each, name) for name in ("request_id", "arrived", "began", "first", "ended", "reason", "num_preemptions", "num_early_preemptions")} for each in list(self.requests)[-40:] if each.ended >= now - SERIES_S],
            "blocks": self.blocks,
            "advice": self.advice(minute, num_unread, silent_s),
        }

    def series(self, now: float) -> list[list[float]]:
        """For each of the last SERIES_S whole seconds: tokens generated, prompt tokens, most requests running, most waiting."""
        return [self.rows.get(second, [0, 0, 0, 0]) for second in range(int(now) - SERIES_S, int(now))]

    def advice(self, minute: list[Step], num_unread: int, silent_s: float) -> list[str]:
        """What is wrong, and which flag would help."""
        if not self.is_alive:
            return ["The engine has died, and the log says why. The server ends, too; start it again."]
        stats, lines = self.stats, []
        if silent_s >= SILENT_S:
            lines.append(f"The engine's process has said nothing for {silent_s:.0f} s. If it stays silent, the server kills it.")
        preempted = sum(step.num_preemptions for step in minute)
        if preempted:
            lines.append(f"{number_of(preempted, 'preemption', 'preemptions')} in the last minute: the cache is too small for what runs. Raise --kv-bytes or --num-blocks, or --reserve-tokens.")
        if stats.waiting and stats.waits_for in LACKS and not (stats.waits_for == "blocks" and preempted):
            lines.append(f"{number_of(stats.waiting, 'request waits', 'requests wait')} {LACKS[stats.waits_for]}")
        mixed = [(sum(step.seconds), 1) for step in minute if step.num_prompt and step.num_output > 1]
        plain = [(sum(step.seconds), 1) for step in minute if not step.num_prompt]
        if stats.waits_for != "tokens" and len(mixed) > 3 and len(plain) > 3 and percentiles(mixed)[0] > 4 * percentiles(plain)[0]:
            lines.append("Streams wait for pieces of prompts: steps with prompts take more than four times as long. Lower --max-num-batched-tokens; prompts then take longer.")
        refused = sum(at >= time.monotonic() - 60 for at in list(self.refused))
        if refused:
            least = "at least " if refused == KEEP_REQUESTS else ""
            lines.append(f"{least}{number_of(refused, 'request', 'requests')} in the last minute got a 429, since too many waited. If they waited to run, raise --max-waiting, or add a server.")
        if num_unread > UNREAD:
            lines.append(f"{num_unread} tokens wait for clients to read them. The clients or the network are slow; no flag of the server helps.")
        return lines or ["Nothing that a flag would change."]

    # ---- read by a scraper

    def collect(self) -> Iterator[Metric]:
        """All metrics, for prometheus_client."""
        stats = self.stats
        yield InfoMetricFamily(PREFIX + "engine", "The engine's settings.", self.about)
        yield gauge("engine_up", "1 while the engine runs, 0 once it has died.", int(self.is_alive))
        yield gauge("requests_running", "Requests that take part in steps.", stats.running)
        yield gauge("requests_waiting", "Requests that have not started.", self.num_waiting)
        yield gauge("requests_tokenizing", "Of these, calls that wait for the tokenizer.", len(self.encoding))
        yield gauge("requests_preempted", "Requests that have started and wait again.", stats.preempted)
        blocks = GaugeMetricFamily(PREFIX + "kv_blocks", "Blocks of the cache, by whether a request holds them.", labels=["state"])
        blocks.add_metric(["used"], stats.total_blocks - stats.free_blocks)
        blocks.add_metric(["free"], stats.free_blocks)
        yield blocks
        yield gauge("kv_blocks_findable", "Blocks whose content later prompts can find.", stats.findable_blocks)
        yield gauge("swap_blocks_used", "Blocks of the swap space in use.", stats.swapped_blocks)
        yield gauge("tokens_unread", "Tokens that wait for their clients to read them.", self.num_unread)
        yield counter("preemptions", "Requests that had to give their blocks back.", stats.preemptions)
        yield counter("prefix_cache_queries", "Prompt tokens of the requests that have begun to run.", stats.prompt_tokens)
        yield counter("prefix_cache_hits", "Of these, tokens that were found.", stats.cached_tokens)
        yield counter("prompt_tokens", "Prompt tokens computed.", self.counters["prompt_tokens"])
        yield counter("generation_tokens", "Tokens generated.", self.counters["generation_tokens"])
        finished = CounterMetricFamily(PREFIX + "requests_finished", "Requests that have left the engine.", labels=["reason"])
        for reason, count in self.finished.items():
            finished.add_metric([reason], count)
        yield finished
        answers = CounterMetricFamily(PREFIX + "http_responses", "HTTP responses.", labels=["path", "status"])
        for labels, count in self.answers.items():
            answers.add_metric(labels, count)
        yield answers
        parts = CounterMetricFamily(PREFIX + "step_part_seconds", "Time of all steps, by part.", labels=["part"])
        for part, seconds in self.part_seconds.items():
            parts.add_metric([part], seconds)
        yield parts
        yield counter("goal_requests", "Finished requests, each of which could meet the goals.", self.counters["goal_requests"])
        yield counter("goal_met", "Of these, requests that met the goals for first token and gaps.", self.counters["goal_met"])
        yield counter("goal_first_missed", "Of these, requests whose first token took too long.", self.counters["goal_first_missed"])
        yield counter("goal_gap_missed", "Of these, requests with a gap that was too long.", self.counters["goal_gap_missed"])
        yield histogram("step_seconds", "Time of a step.", self.step_seconds)
        yield histogram("step_tokens", "Tokens fed in a step.", self.step_tokens)
        yield histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", self.first_times)
        yield histogram("inter_token_latency_seconds", "Between two tokens of a request.", self.gaps)
        yield histogram("time_per_output_token_seconds", "Mean time between the tokens of a finished request.", self.token_times)
        yield histogram("queue_seconds", "From a request's arrival to its first step.", self.queue_times)
        yield histogram("prefill_seconds", "From a finished request's first step to its first token.", self.prefill_times)
        yield histogram("decode_seconds", "From a finished request's first token to its last.", self.decode_times)
        yield histogram("request_seconds", "From a finished request's arrival to its end.", self.request_times)
        yield histogram("request_prompt_tokens", "Prompt tokens of finished requests.", self.prompt_lengths)
        yield histogram("request_output_tokens", "Generated tokens of finished requests.", self.output_lengths)


def number_of(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, value)


def counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, value)


def histogram(name: str, text: str, counted: Histogram) -> HistogramMetricFamily:
    return HistogramMetricFamily(PREFIX + name, text, counted.buckets(), counted.sum)


def percentiles(pairs: list[tuple[float, int]]) -> list[float | None]:
    """The 50th, 90th and 99th percentile of values that each occurred so many times.

    >>> percentiles([(1.0, 98), (2.0, 1), (3.0, 1)]), percentiles([])
    ([1.0, 1.0, 2.0], [None, None, None])
    """
    if not pairs:
        return [None, None, None]
    pieces = [sorted(pairs[start : start + SORT]) for start in range(0, len(pairs), SORT)]
    total = sum(count for _, count in pairs)
    found, seen, wanted = [], 0, [0.5, 0.9, 0.99]
    for value, count in merge(*pieces):
        seen += count
        while wanted and seen >= wanted[0] * total:
            found.append(value)
            wanted.pop(0)
    return found
