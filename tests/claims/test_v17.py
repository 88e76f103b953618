"""v17: what is counted is what happened, and a scraper, the page and a trace read the same records."""
import asyncio
import builtins
import errno
import fcntl
import gc
import http.client
import io
import json
import os
import pickle
import queue
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from math import inf
from types import SimpleNamespace

import httpx
import psutil
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from shared.chapters import ROOT
from shared.checkpoints import checkpoint
from shared.verify.serving import serving, wait_until
from shared.workloads import random_ids
from tests.claims.test_v06 import DEVICE, needs_triton
from tests.support.fake_engine import FakeEngine
from tests.support.http import HTTP, post
from tests.support.overflowing import BAD
from tests.support.stand_ins import quick_gpu

BS = 4


@pytest.fixture
def new_engine(chapter):
    """Engines of the test's own, with a small cache."""

    def new_engine(**options):
        limits = {"num_blocks": 60, "block_size": BS, "max_num_seqs": 7, "max_model_len": 64}
        return chapter.load().Engine(checkpoint("llama-two-layers"), **{"dtype": "float32"} | limits | options)

    return new_engine


@pytest.fixture
def ids(rng):
    """Random token ids of the random checkpoints' vocabulary."""
    return lambda length: random_ids(length, 401, rng)


@pytest.fixture(autouse=True)
def fresh(module, monkeypatch):
    """Each reader gets numbers of its own; test_readers_share_what_one_of_them_asked_for has the real thing."""
    monkeypatch.setattr(module("observe"), "SHARE_S", 0.0)


@pytest.fixture
def new_metrics(module):
    return lambda **goal: module("metrics").Metrics(module("metrics").Goal(**goal))


@pytest.fixture
def clock(module, monkeypatch):
    """The time that is recorded: it moves only if a test moves it."""
    clock = SimpleNamespace(now=1000.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now)
    monkeypatch.setattr(module("records"), "time", fake)
    monkeypatch.setattr(module("metrics"), "time", fake)
    return clock


def samples(text):
    """Each sample of a scrape, by its name and the values of its labels."""
    return {(sample.name.removeprefix("stepserve_"), *sample.labels.values()): sample.value for family in parse(text) for sample in family.samples}


def read(metrics):
    registry = CollectorRegistry()
    registry.register(metrics)
    return samples(generate_latest(registry).decode())


def deliver(engine, metrics):
    """What the server does with each message of the engine."""
    metrics.stats = engine.stats()
    report = engine.take_report()
    if report is not None:
        metrics.add(report)
    return report


def second_per_step(engine, clock, observer=lambda batch: None):
    """Let each forward pass take a second. observer is called with its batch, in the middle of it."""

    def forward(_model, args):
        clock.now += 0.5
        observer(args[0])
        clock.now += 0.5

    engine.model.register_forward_pre_hook(forward)


# ---- a run, and what its outputs say


class Run:
    """Random requests on a small cache, with steps that fail and requests that are aborted: told by the outputs alone.

    Each step takes a second, so all times are whole or half seconds, and sums are exact.
    """

    def __init__(self, engine, Params, metrics, clock, seed):
        self.engine, self.metrics, self.clock = engine, metrics, clock
        self.rng = random.Random(seed)
        self.arrived, self.prompts, self.reasons = {}, {}, {}
        self.began, self.tokens = {}, {}  # by request id: the time of its first step, of each of its tokens
        self.first_position = {}  # by request id: that of the first token that it fed, before which all was found
        self.fed = []  # of this step: the positions of each request
        self.num_prompt = self.num_fed = self.num_steps = self.num_failed = self.num_preemptions = 0
        self.queued = []
        self.longest_gaps = {}
        self.reports, self.scrapes = [], []
        second_per_step(engine, clock, self.see)
        preempt = engine.scheduler.preempt
        engine.scheduler.preempt = lambda seq: (self.count_preemption(), preempt(seq))
        self.fails = False
        beginnings = [random_ids(11, 401, self.rng) for _ in range(2)]
        for number in range(28):
            prompt = self.rng.choice((*beginnings, [])) + random_ids(self.rng.choice((1, 3, 8, 17)), 401, self.rng)
            request_id = engine.add_request(prompt, Params(max_tokens=self.rng.randint(1, 18), seed=number, ignore_eos=number % 3 > 0), clock.now - 2)
            self.arrived[request_id], self.prompts[request_id] = clock.now - 2, prompt
            for _ in range(self.rng.randint(0, 3)):
                self.step()
            if number % 4 == 3:
                self.abort(self.rng.choice([*self.arrived]))
            self.fails |= number in (9, 19)
        while engine.has_unfinished_requests():
            self.step()

    def count_preemption(self):
        self.num_preemptions += 1

    def see(self, batch):
        """What the model is given: the positions of the step's requests, one after the other."""
        positions, start = batch.positions.tolist(), 0
        for seq in self.engine.in_step:
            self.fed.append((seq.seq_id, positions[start : start + seq.num_scheduled]))
            start += seq.num_scheduled
        assert start == len(positions)
        for request_id, its in self.fed:
            self.first_position.setdefault(request_id, its[0])
        if self.fails:
            self.fails = False
            raise RuntimeError("this step fails")

    def step(self):
        self.fed, begins = [], self.clock.now
        try:
            outputs = self.engine.step()
        except RuntimeError:
            self.num_failed += 1
            for request_id in self.engine.fail_step():
                self.reasons[request_id] = "error"
        else:
            self.num_steps += bool(self.fed)
            for request_id, positions in self.fed:
                self.num_fed += len(positions)
                self.num_prompt += sum(position < len(self.prompts[request_id]) for position in positions)
                if request_id not in self.began:
                    self.began[request_id] = begins
                    self.queued.append(begins - self.arrived[request_id])
            for output in outputs:
                its = self.tokens.setdefault(output.request_id, [])
                if its:
                    self.longest_gaps[output.request_id] = max(self.longest_gaps.get(output.request_id, 0), self.clock.now - its[-1])
                its.append(self.clock.now)
                if output.finish_reason is not None:
                    self.reasons[output.request_id] = output.finish_reason
        self.deliver()

    def abort(self, request_id):
        if self.engine.abort_request(request_id):
            self.reasons[request_id] = "abort"
        assert not self.engine.abort_request(request_id)
        self.deliver()

    def deliver(self):
        report = deliver(self.engine, self.metrics)
        self.reports += [report] if report else []
        self.scrapes.append(read(self.metrics))

    @property
    def finished(self):
        """The ids of requests that were not cut short."""
        return [request_id for request_id, reason in self.reasons.items() if reason in ("stop", "length")]


@pytest.fixture
def new_run(new_engine, new_metrics, Params, clock):
    def new_run(seed, swap_bytes=0, **goal):
        engine = new_engine(num_blocks=14, max_num_batched_tokens=11, reserve_tokens=0, swap_bytes=swap_bytes)
        run = Run(engine, Params, new_metrics(**goal), clock, seed)
        assert run.num_preemptions and run.num_failed == 2 and any(run.first_position.values())
        assert {"length", "abort", "error"} <= {*run.reasons.values()}
        return run

    return new_run


@pytest.mark.whole
@pytest.mark.parametrize(("seed", "swap_bytes"), [(1, 0), (2, 0), (3, 2**20)])
def test_every_counter_is_a_recount_from_the_outputs_of_the_run(new_run, seed, swap_bytes):
    """Preempted, chunked, found, aborted, failed: tokens that were lost with their step are not counted."""
    run = new_run(seed, swap_bytes, first=9.0, gap=1.0)
    got = run.scrapes[-1]
    ran = run.first_position
    met = [i for i in run.finished if run.tokens[i][0] - run.arrived[i] <= 9 and run.longest_gaps.get(i, 0) <= 1]
    assert 0 < len(met) < len(run.finished)
    want = {
        "generation_tokens_total": sum(map(len, run.tokens.values())),
        "prompt_tokens_total": run.num_prompt,
        "preemptions_total": run.num_preemptions,
        "prefix_cache_queries_total": sum(len(run.prompts[request_id]) for request_id in ran),
        "prefix_cache_hits_total": sum(ran.values()),
        "goal_requests_total": len(run.finished),
        "goal_met_total": len(met),
        "goal_first_missed_total": sum(run.tokens[i][0] - run.arrived[i] > 9 for i in run.finished),
        "goal_gap_missed_total": sum(run.longest_gaps.get(i, 0) > 1 for i in run.finished),
        "step_seconds_count": run.num_steps,
        "step_tokens_sum": run.num_fed,
    }
    assert {name: got[name,] for name in want} == want
    reasons = Counter(run.reasons.values())
    assert {reason: got["requests_finished_total", reason] for reason in ("stop", "length", "abort", "error")} == {
        reason: reasons[reason] for reason in ("stop", "length", "abort", "error")
    }


@pytest.mark.whole
@pytest.mark.parametrize("seed", [1, 2])
def test_the_latencies_are_those_of_the_outputs(new_run, seed):
    """Counts and sums, exactly: from a request's arrival, which is before its queue, and across preemptions."""
    run = new_run(seed)
    got = run.scrapes[-1]
    tokens, finished = run.tokens, run.finished
    gaps = [later - earlier for its in tokens.values() for earlier, later in pairwise(its)]
    lengths = {request_id: len(tokens[request_id]) for request_id in finished}
    values = {
        "time_to_first_token_seconds": [its[0] - run.arrived[request_id] for request_id, its in tokens.items()],
        "inter_token_latency_seconds": gaps,
        "queue_seconds": run.queued,
        "prefill_seconds": [tokens[i][0] - run.began[i] for i in finished],
        "decode_seconds": [tokens[i][-1] - tokens[i][0] for i in finished],
        "request_seconds": [tokens[i][-1] - run.arrived[i] for i in finished],
        "request_prompt_tokens": [len(run.prompts[i]) for i in finished],
        "request_output_tokens": [*lengths.values()],
        "time_per_output_token_seconds": [(tokens[i][-1] - tokens[i][0]) / (lengths[i] - 1) for i in finished if lengths[i] > 1],
        "step_seconds": [1.0] * run.num_steps,
    }
    assert max(gaps) > 2  # a preempted request's
    for name, want in values.items():
        assert (got[f"{name}_count",], got[f"{name}_sum",]) == (len(want), pytest.approx(sum(want), rel=1e-12)), name
        for key, count in got.items():
            if key[0] == f"{name}_bucket":
                assert count == sum(value <= float(key[1]) for value in want), key
    assert sum(value for (name, *_), value in got.items() if name == "step_part_seconds_total") == run.num_steps


@pytest.mark.whole
def test_counters_never_decrease_and_each_request_ends_once(new_run):
    run = new_run(4)
    for earlier, later in pairwise(run.scrapes):
        falling = {key for key, value in earlier.items() if key[0].endswith(("_total", "_count", "_sum", "_bucket")) and later[key] < value}
        assert not falling
    ended = [each for report in run.reports for each in report.ended]
    assert sorted(each.request_id for each in ended) == sorted(run.arrived)
    assert {each.request_id: each.reason for each in ended} == run.reasons
    for each in ended:
        assert each.num_output == len(run.tokens.get(each.request_id, ()))
        assert each.longest_gap == run.longest_gaps.get(each.request_id, 0)
    assert sum(each.num_preemptions for each in ended) == run.num_preemptions
    assert sum(step.num_preemptions for report in run.reports for step in report.steps) <= run.num_preemptions


# ---- the recorder


def test_the_first_tokens_time_includes_the_queue(new_engine, new_metrics, Params, ids, clock):
    engine, metrics = new_engine(max_num_seqs=1), new_metrics()
    second_per_step(engine, clock)
    for _ in range(2):
        engine.add_request(ids(5), Params(max_tokens=3, ignore_eos=True), arrived=997.0)
    while engine.has_unfinished_requests():
        engine.step()
    steps, ended, *_ = deliver(engine, metrics)
    assert [step.queue_times for step in steps] == [[3.0], [], [], [6.0], [], []]
    assert [step.first_times for step in steps] == [[4.0], [], [], [7.0], [], []]
    assert [each[:6] for each in ended] == [(1, "length", 997.0, 1000.0, 1001.0, 1003.0), (2, "length", 997.0, 1003.0, 1004.0, 1006.0)]


def test_the_gaps_of_a_step_are_one_pair_however_many_run(new_engine, Params, ids, clock):
    engine = new_engine(max_num_seqs=64, num_blocks=200, max_num_batched_tokens=200)
    second_per_step(engine, clock)
    for _ in range(64):
        engine.add_request(ids(3), Params(max_tokens=3, ignore_eos=True), clock.now)
    while engine.has_unfinished_requests():
        engine.step()
    steps, ended, *_ = engine.take_report()
    assert [step.gaps for step in steps] == [[], [(1.0, 64)], [(1.0, 64)]]
    assert [step.num_output for step in steps] == [64] * 3 and len(ended) == 64


@pytest.mark.whole
def test_the_gap_over_a_preemption_counts_and_the_hits_do_not(new_engine, new_metrics, Params, ids, clock):
    """What a preempted request computes again is computed, and what it finds again was not found by a prompt."""
    engine, metrics = new_engine(num_blocks=6, reserve_tokens=0), new_metrics()
    second_per_step(engine, clock)
    for _ in range(2):
        engine.add_request(ids(9), Params(max_tokens=12, ignore_eos=True), clock.now)
    times = {1: [], 2: []}
    while engine.has_unfinished_requests():
        for output in engine.step():
            times[output.request_id].append(clock.now)
    steps, ended, *_ = deliver(engine, metrics)
    gaps = [later - earlier for its in times.values() for earlier, later in pairwise(its)]
    assert max(gaps) > 3 and max(each.longest_gap for each in ended) == max(gaps)
    assert sum(count * gap for step in steps for gap, count in step.gaps) == sum(gaps)
    got = read(metrics)
    assert got["preemptions_total",] == sum(step.num_preemptions for step in steps) == 1
    assert got["prefix_cache_queries_total",] == 18 and got["prefix_cache_hits_total",] == 0
    assert got["time_to_first_token_seconds_count",] == got["queue_seconds_count",] == 2


def test_a_request_that_is_aborted_before_its_first_token_is_only_finished(new_engine, new_metrics, Params, ids):
    engine, metrics = new_engine(max_num_batched_tokens=7), new_metrics()
    engine.abort_request(engine.add_request(ids(5), Params()))
    half_read = engine.add_request(ids(30), Params())
    engine.step()
    engine.abort_request(half_read)
    deliver(engine, metrics)
    got = read(metrics)
    assert got["requests_finished_total", "abort"] == 2
    assert got["queue_seconds_count",] == 1 and got["prompt_tokens_total",] == 7
    for name in ("time_to_first_token", "inter_token_latency", "prefill", "decode", "request", "time_per_output_token"):
        assert got[f"{name}_seconds_count",] == 0, name
    assert got["goal_requests_total",] == got["generation_tokens_total",] == 0


def test_a_failed_step_is_forgotten(new_engine, new_metrics, Params, ids, monkeypatch):
    """Wherever it failed: a token whose output is lost is not counted."""
    engine, metrics = new_engine(), new_metrics()
    accept, calls = engine.accept, []

    def fail_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("the second token")
        return accept(*args)

    monkeypatch.setattr(engine, "accept", fail_at_the_second)
    for _ in range(3):
        engine.add_request(ids(5), Params(max_tokens=2, ignore_eos=True))
    with pytest.raises(RuntimeError):
        engine.step()
    assert len(engine.fail_step()) == 3
    assert deliver(engine, metrics).steps == []
    engine.add_request(ids(6), Params(max_tokens=2, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    deliver(engine, metrics)
    got = read(metrics)
    assert got["generation_tokens_total",] == 2 and got["prompt_tokens_total",] == 6 and got["step_seconds_count",] == 2
    assert got["requests_finished_total", "error"] == 3 and got["requests_finished_total", "length"] == 1
    assert got["time_to_first_token_seconds_count",] == 1


def test_a_stop_string_ends_the_count(make_engine, new_metrics, Params):
    """The tokens counted are those that were returned, the one that completes the string included."""
    engine, metrics = make_engine("pocket", max_num_seqs=16, max_model_len=256), new_metrics()
    engine.take_report()
    [free] = engine.generate(["Once upon a time"], Params(max_tokens=30, ignore_eos=True))
    engine.take_report()
    [cut] = engine.generate(["Once upon a time"], Params(max_tokens=30, ignore_eos=True, stop=(free.text[10:14],)))
    deliver(engine, metrics)
    got = read(metrics)
    assert cut.finish_reason == "stop" and 1 < len(cut.token_ids) < 30
    assert got["generation_tokens_total",] == got["request_output_tokens_sum",] == len(cut.token_ids)
    assert got["requests_finished_total", "stop"] == 1


def test_a_token_that_is_none_is_not_counted(chapter, overflowing, new_metrics, Params):
    """Logits that are not finite end a request; it has no first token, and meets no goal."""
    engine, metrics = chapter.load().Engine(overflowing, dtype="float16"), new_metrics()
    for prompt in ([9, 10, 11], [9, BAD, 11]):
        engine.add_request(prompt, Params(max_tokens=4, ignore_eos=True))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    deliver(engine, metrics)
    got = read(metrics)
    assert len(outputs) == 5 and got["generation_tokens_total",] == got["request_output_tokens_sum",] == 4
    assert got["requests_finished_total", "error"] == got["requests_finished_total", "length"] == 1
    assert got["time_to_first_token_seconds_count",] == got["goal_requests_total",] == 1


def test_what_ends_in_the_step_in_which_its_call_fails_has_failed(chapter, module, overflowing, Params):
    """The client gets an error and not its last token, so it may meet no goal. Another call's request has nothing to do with it."""
    engine, sent = chapter.load().Engine(overflowing, dtype="float16"), []
    engine_loop = module("engine_loop").EngineLoop(engine, queue.SimpleQueue(), lambda message, stats: sent.append(stats.report))
    params = [Params(max_tokens=most, ignore_eos=True) for most in (1, 4)]
    engine_loop.add(1, [([9, 10, 11], params[0]), ([9, BAD, 11], params[1]), ([9, 10, 12], params[1])], None)
    engine_loop.add(2, [([9, 10, 13], params[0])], None)
    engine_loop.step()
    ended = {each.request_id: each.reason for report in sent if report for each in report.ended}
    assert ended == {1: "error", 2: "error", 3: "abort", 4: "length"}


@pytest.mark.whole
@pytest.mark.gpu
@needs_triton
def test_an_engine_on_a_gpu_starts_although_its_log_cannot_be_written(chapter, monkeypatch):
    """Neither the line that describes it nor those of its recordings."""
    class Full(io.TextIOBase):
        """As a file on a full disk."""

        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Full())
    with nullcontext() if DEVICE.type == "cuda" else quick_gpu():
        engine = chapter.load().Engine(checkpoint("llama-two-layers"), dtype="float32", num_blocks=60, block_size=BS, max_num_seqs=3, max_model_len=64)
        engine.warm_up()
        assert engine.runner.recorded


def test_more_refusals_than_are_kept_are_said_to_be_more(new_metrics, module):
    metrics, most = new_metrics(), module("metrics").KEEP_REQUESTS
    for count, said in ((most - 1, f"{most - 1} requests"), (1, f"at least {most} requests"), (5, f"at least {most} requests")):
        metrics.refused.extend([time.monotonic()] * count)
        [advice] = metrics.advice([], num_unread=0, silent_s=0.0)
        assert advice.startswith(f"{said} in the last minute got a 429")


def test_a_refused_call_has_not_ended_since_it_never_began(new_engine, module, Params, ids):
    """Its client gets a 400, and nobody gave up: not for a prompt that was queued before the one that is too long."""
    engine, sent = new_engine(), []
    engine_loop = module("engine_loop").EngineLoop(engine, queue.SimpleQueue(), lambda message, stats: sent.append((message, stats.report)))
    params = Params(max_tokens=5, ignore_eos=True)
    engine_loop.add(1, [(ids(4), params)], None)
    engine_loop.add(2, [(ids(4), params), (ids(10**4), params)], None)
    engine_loop.add(3, [(ids(4), params), None], None)
    assert [type(message).__name__ for message, _ in sent] == ["Added", "Refused", "Failed"]
    engine_loop.remove(1)
    assert [each.request_id for each in engine.take_report().ended] == [1]
    assert not any(report for _, report in sent)


def test_an_engine_that_dies_in_a_step_has_ended_nobody(new_engine, module, Params, ids, monkeypatch):
    """The server counts all requests without a last token itself, also one that the step had already finished."""
    class Panic(BaseException):
        """As of a library in Rust."""

    engine, sent, inbox = new_engine(), [], queue.SimpleQueue()
    accept = engine.accept

    def panic(seq, *args):
        if seq.max_tokens == 6 and seq.num_output == 2:
            raise Panic
        return accept(seq, *args)

    monkeypatch.setattr(engine, "accept", panic)
    for call_id, most in ((1, 1), (2, 3), (3, 6)):
        inbox.put(module("engine_loop").Add(call_id, [(ids(4), Params(max_tokens=most, ignore_eos=True))]))
    module("engine_loop").EngineLoop(engine, inbox, lambda message, stats: sent.append((message, stats.report))).run()
    assert type(sent[-1][0]).__name__ == "Died"
    assert [each.request_id for _, report in sent if report for each in report.ended] == [1]


def test_reports_that_nobody_takes_are_bounded(new_engine, module, Params, ids, monkeypatch):
    """A script calls generate for days, and never asks."""
    records = module("records")
    assert (records.Recorder().steps.maxlen, records.Recorder().ended.maxlen) == (1_000, 10_000)
    monkeypatch.setattr(records, "MOST_STEPS", 4)
    monkeypatch.setattr(records, "MOST_ENDED", 3)
    engine = new_engine()
    assert engine.num_steps == 0
    for _ in range(2):
        engine.generate([ids(3) for _ in range(5)], Params(max_tokens=6, ignore_eos=True))
    steps, ended, *_ = engine.take_report()
    assert [each.request_id for each in ended] == [8, 9, 10] and len(steps) == 4
    assert engine.take_report() is None


def test_a_report_crosses_once_with_the_message_of_its_step(new_engine, module, Params, ids):
    """Also if the step's outputs are several messages: no step costs one more."""
    loop, sent = module("engine_loop"), []
    engine = new_engine()
    engine_loop = loop.EngineLoop(engine, queue.SimpleQueue(), lambda message, stats: sent.append(pickle.loads(pickle.dumps((message, stats)))))
    params = Params(max_tokens=5, ignore_eos=True)
    engine_loop.add(1, [(ids(4), params)] * 3, 900.0)
    engine_loop.add(2, [(ids(4), Params(max_tokens=5, ignore_eos=True, prompt_logprobs=True, logprobs=1))], 901.0)
    assert [stats.report for _, stats in sent] == [None, None]
    for number in range(1, 6):
        sent.clear()
        engine_loop.step()
        assert len(sent) == (2 if number == 1 else 1)
        assert len(sent[0][1].report.steps) == 1
        assert all(stats.report is None for _, stats in sent[1:])
    ended = sorted(sent[0][1].report.ended)
    assert [(each.request_id, each.arrived) for each in ended] == [(1, 900.0), (2, 900.0), (3, 900.0), (4, 901.0)]
    assert engine.take_report() is None


# ---- what is made of the records


def test_histograms_goals_and_percentiles(module):
    metrics, records = module("metrics"), module("records")
    histogram = metrics.Histogram((1, 2.5))
    for value, count in ((1, 1), (0.5, 2), (2.5, 4), (2.6, 8), (9, 16)):
        histogram.add(value, count)
    assert histogram.buckets() == [("1.0", 3), ("2.5", 7), ("+Inf", 31)]
    assert histogram.sum == 1 + 1 + 10 + 8 * 2.6 + 144
    ended = records.Ended(1, "length", 10.0, 11.0, 12.0, 20.0, 5, 0, 7, 0, 0.5)
    for goal, is_met in (((), True), ((2.0, 0.5), True), ((1.9, inf), False), ((inf, 0.4), False)):
        assert metrics.Goal(*goal).is_met(ended) is is_met
    assert not metrics.Goal().is_met(ended._replace(first=None))
    values = [random.Random(5).randrange(1, 50) for _ in range(1000)]
    ordered = sorted(values)
    assert metrics.percentiles([*Counter(values).items()]) == [ordered[499], ordered[899], ordered[989]]
    assert metrics.percentiles([(7, 1)]) == [7, 7, 7] and metrics.percentiles([]) == [None] * 3


def test_no_call_of_sorted_takes_long(module, new_metrics, monkeypatch):
    """It is one call, and no other thread runs meanwhile: all streams would stop."""
    metrics, lengths = module("metrics"), []
    really_sorted = sorted
    monkeypatch.setattr(builtins, "sorted", lambda values, **how: (lengths.append(len(values)), really_sorted(values, **how))[1])
    values = [random.Random(5).random() for _ in range(3 * metrics.SORT + 7)]
    ordered = really_sorted(values)
    assert metrics.percentiles([(value, 1) for value in values]) == [ordered[(len(values) * share - 1) // 100] for share in (50, 90, 99)]
    assert sum(lengths) == len(values)
    full = new_metrics()
    steps = [step_of(module, time.monotonic(), num_prompt=number % 2, num_output=2) for number in range(2 * metrics.SORT + 20)]
    full.add(module("records").Report(steps, []))
    assert "a step" in full.picture(0)["latency"]
    assert max(lengths) <= metrics.SORT <= 1_000


def step_of(module, began, num_prompt=0, num_output=1, seconds=0.01):
    """A step of one request."""
    numbers = {"num_seqs": 1, "num_fed": 1, "num_prompt": num_prompt, "num_output": num_output, "num_waiting": 0, "num_preemptions": 0}
    return module("records").Step(began=began, seconds=[seconds / 5] * 5, queue_times=[], first_times=[], gaps=[], **numbers)


def test_what_is_kept_is_bounded_in_time_and_number(module, new_metrics, clock):
    metrics, records = new_metrics(), module("records")
    keep_s = module("metrics").KEEP_S
    for _ in range(4):
        ended = records.Ended(1, "abort", clock.now, None, None, clock.now, 5, 0, 0, 0, 0.0)
        metrics.add(records.Report([step_of(module, clock.now)], [ended]))
        clock.now += keep_s / 2.5
    assert [step.began for step in metrics.steps] == [each.ended for each in metrics.requests] == [clock.now - keep_s / 2.5 * n for n in (3, 2, 1)]
    assert metrics.steps.maxlen == module("metrics").KEEP_STEPS and metrics.requests.maxlen == module("metrics").KEEP_REQUESTS
    assert read(metrics)["generation_tokens_total",] == 4
    metrics.add(records.Report([step_of(module, clock.now, num_output=3, num_prompt=2)], []))
    clock.now += 2
    series = metrics.picture(0)["series"]
    assert len(series) == module("metrics").SERIES_S and series[-2] == [3, 2, 1, 0]
    assert sum(sum(row) for row in series) == 6


def test_advice_names_the_flag(module, new_engine, new_metrics, Params, ids):
    """Staged: more requests than places; a cache that is too small, or full; prompts that fill the steps; clients that do not read."""
    for options, prompts, flag, others in (
        ({"max_num_seqs": 2}, [ids(5)] * 5, "--max-num-seqs", ("--kv-bytes", "--max-num-batched")),
        ({"num_blocks": 6, "reserve_tokens": 0}, [ids(9)] * 2, "1 preemption in the last minute: the cache is too small for what runs. Raise --kv-bytes", ("--max-num-",)),
        ({"num_blocks": 6, "reserve_tokens": 16}, [ids(9)] * 2, "1 request waits for blocks of the cache. Raise --kv-bytes", ("--max-num-", "preempt")),
        ({"max_num_batched_tokens": 8, "num_blocks": 200}, [ids(50) for _ in range(6)], "--max-num-batched-tokens", ("--kv-bytes", "--max-num-seqs", "Lower")),
    ):
        engine, metrics = new_engine(**options, enable_prefix_caching=False), new_metrics()
        for prompt in prompts:
            engine.add_request(prompt, Params(max_tokens=12, ignore_eos=True))
        for _ in range(11):
            engine.step()
        deliver(engine, metrics)
        [advice] = metrics.picture(0)["advice"]
        assert flag in advice and not any(other in advice for other in others)
        engine.close()
    metrics, now = new_metrics(), time.monotonic()
    assert metrics.picture(200)["advice"] == ["Nothing that a flag would change."]
    [advice] = metrics.picture(201)["advice"]
    assert "clients" in advice and "no flag" in advice and "--" not in advice
    # Streams that wait for pieces of prompts; not those of a minute ago.
    for began, num_found in ((now - 61, 0), (now - 1, 1)):
        steps = [step_of(module, began, num_prompt=500, num_output=2, seconds=0.041)] * 4 + [step_of(module, began)] * 4
        metrics.add(module("records").Report(steps, []))
        assert sum("Lower --max-num-batched-tokens" in advice for advice in metrics.picture(0)["advice"]) == num_found
    # While prompts wait for tokens, it would contradict the other line about this flag.
    metrics.stats = metrics.stats._replace(waiting=3, waits_for="tokens")
    [advice] = metrics.picture(0)["advice"]
    assert advice.startswith("3 requests wait") and "Lower" not in advice


def test_the_scheduler_says_why_the_first_of_the_queue_waits(new_engine, Params, ids):
    prompt = ids(40)
    for options, prompts, why in (
        ({}, [ids(5), ids(5)], None),
        ({"max_num_seqs": 2}, [ids(5) for _ in range(3)], "places"),
        # Both are short: with more tokens, the third would still have no place.
        ({"max_num_seqs": 2, "max_num_batched_tokens": 2}, [[7], [8], [9]], "places"),
        ({"max_num_batched_tokens": 8}, [ids(9), ids(5)], "tokens"),
        ({"num_blocks": 6}, [ids(9), ids(9)], "blocks"),
        ({"max_num_batched_tokens": 16, "num_blocks": 12}, [ids(9), ids(30)], "blocks"),
        ({"max_num_batched_tokens": 50}, [prompt, prompt], "prefix"),
    ):
        engine = new_engine(**options)
        for token_ids in prompts:
            engine.add_request(token_ids, Params(max_tokens=9, ignore_eos=True))
        engine.step()
        assert engine.stats().waits_for == why, options
        while engine.has_unfinished_requests():
            engine.step()
        engine.step()
        assert engine.stats().waits_for is None


def test_a_request_that_could_take_anothers_place_waits_for_blocks(new_engine, Params, ids):
    """More places would not help it."""
    engine = new_engine(num_blocks=12, block_size=4, max_num_seqs=2, reserve_tokens=0)
    engine.add_request(ids(30), Params(max_tokens=8, priority=-1, ignore_eos=True))
    engine.add_request(ids(3), Params(max_tokens=6, priority=5, ignore_eos=True))
    engine.step()
    engine.add_request(ids(30), Params(max_tokens=2, ignore_eos=True))
    engine.step()
    assert len(engine.scheduler.running) == 2 and engine.stats().waits_for == "blocks"


def test_the_page_says_when_the_engine_is_silent_or_dead(new_metrics):
    metrics = new_metrics()
    assert metrics.picture(0, 2.9)["advice"] == ["Nothing that a flag would change."]
    [advice] = metrics.picture(0, 3.0)["advice"]
    assert "said nothing for 3 s" in advice and "--" not in advice
    metrics.end(0)
    [advice] = metrics.picture(0, 3.0)["advice"]
    assert "has died" in advice


def test_a_preempted_requests_gap_is_on_the_page(module, new_engine, new_metrics, Params, ids, clock):
    """Percentiles over tokens hide one long gap among many short ones."""
    engine, metrics = new_engine(num_blocks=6, reserve_tokens=0), new_metrics(gap=2.0)
    second_per_step(engine, clock)
    for _ in range(2):
        engine.add_request(ids(9), Params(max_tokens=12, ignore_eos=True), clock.now)
    while engine.has_unfinished_requests():
        engine.step()
    ended = deliver(engine, metrics).ended
    picture = metrics.picture(0)
    shortest, longest = sorted(request.longest_gap for request in ended)
    assert picture["latency"]["longest gap of a request"] == [shortest, longest, longest] and longest > 3 * shortest
    assert picture["latency"]["between tokens"][0] == 1.0
    assert (picture["counters"]["goal_gap_missed"], picture["counters"]["goal_first_missed"]) == (1, 0)
    assert sorted((request["num_preemptions"], request["num_early_preemptions"]) for request in picture["requests"]) == [(0, 0), (1, 0)]
    clock.now += 61
    assert metrics.picture(0)["latency"]["longest gap of a request"] == [None] * 3


def test_a_preemption_before_the_first_token_makes_no_gap(new_engine, new_metrics, Params, ids, clock):
    """On the page, a request that generates in red has a gap. This one is preempted while its prompt is computed."""
    engine, metrics = new_engine(num_blocks=6, reserve_tokens=0, max_num_seqs=2, max_num_batched_tokens=2), new_metrics()
    second_per_step(engine, clock)
    for _ in range(2):
        engine.add_request(ids(9), Params(max_tokens=12, ignore_eos=True), clock.now)
    while engine.has_unfinished_requests():
        engine.step()
    first, second = deliver(engine, metrics).ended
    assert (first.num_preemptions, first.longest_gap, second.longest_gap) == (0, 1.0, 1.0)
    assert second.num_preemptions == second.num_early_preemptions == metrics.picture(0)["requests"][1]["num_early_preemptions"] > 0


def test_refused_requests_are_on_the_page(new_metrics, clock):
    metrics = new_metrics()
    for status, count in ((200, 3), (401, 2), (429, 4)):
        for number in range(count):
            metrics.add_answer(f"/{number}", status)
    picture = metrics.picture(0)
    assert picture["answers"] == {"200": 3, "401": 2, "429": 4}
    [advice] = picture["advice"]
    assert advice.startswith("4 requests in") and "--max-waiting" in advice
    clock.now += 61
    metrics.add_answer("/4", 429)
    assert metrics.picture(0)["advice"][0].startswith("1 request in")
    clock.now += 61
    assert metrics.picture(0)["advice"] == ["Nothing that a flag would change."]


def test_the_gauges_and_the_map_are_the_caches(new_engine, new_metrics, Params, ids):
    """Each block is free, free and findable, shared, or a request's: what a recount of the tables gives."""
    engine, metrics, prompt = new_engine(num_blocks=14, max_num_seqs=2, max_num_batched_tokens=11), new_metrics(), ids(9)
    for number in range(4):
        engine.add_request(prompt + ids(number + 1), Params(max_tokens=6, ignore_eos=True))
    kinds = Counter()
    while engine.has_unfinished_requests():
        engine.step()
        deliver(engine, metrics)
        owners = {}
        for seq in engine.scheduler.running:
            for block_id in seq.block_table:
                owners.setdefault(block_id, []).append(3 + seq.seq_id % 8)
        states = engine.block_states()
        for block_id, state in enumerate(states):
            free = 1 if block_id in engine.pool.key_of else 0
            its = owners.get(block_id, [free])
            assert state == (its[0] if len(its) == 1 else 2)
            kinds["own" if state > 2 else state] += 1
        got = read(metrics)
        assert (got["requests_running",], got["requests_waiting",]) == (len(engine.scheduler.running), len(engine.scheduler.waiting))
        assert (got["kv_blocks", "used"], got["kv_blocks", "free"]) == (len(owners), 14 - len(owners))
        assert got["kv_blocks_findable",] == len(engine.pool.key_of)
    assert {*kinds} == {0, 1, 2, "own"}


def test_a_picture_is_json_whatever_happened(new_run, new_metrics):
    """Browsers read no NaN and no Infinity."""
    for metrics in (new_metrics(), new_run(5).metrics):
        picture = metrics.picture(0)
        assert json.loads(json.dumps(picture, allow_nan=False)) == picture
        assert all(None in values or values == sorted(values) for values in picture["latency"].values())
    assert sum(row[0] for row in picture["series"]) == picture["counters"]["generation_tokens"]
    assert sum(share for _, share in picture["parts"].values()) == pytest.approx(1)


def test_the_cost_is_small(module, new_metrics):
    """At most 300 microseconds of CPU time per step at 64 sequences: the recorder's part, the message's and the server's."""
    recorder, metrics, records = module("records").Recorder(), new_metrics(), module("records")
    seqs = [
        SimpleNamespace(seq_id=i, began=None, arrived=0.0, first=None, last=None, longest_gap=0.0, num_computed=9, num_prompt=5, num_scheduled=1, num_preemptions=0)
        for i in range(64)
    ]
    times = []
    for _ in range(600):
        begun = time.process_time()
        recorder.begin()
        recorder.end_part()
        recorder.feed(seqs)
        for _ in range(3):
            recorder.end_part()
        for seq in seqs:
            recorder.token(seq)
        recorder.end_step(seqs, 0, 0)
        metrics.add(pickle.loads(pickle.dumps(recorder.take())))
        times.append(time.process_time() - begun)
    assert sorted(times)[300] < 300e-6
    assert isinstance(metrics.steps[-1], records.Step) and metrics.counters["generation_tokens"] == 600 * 64


# ---- over HTTP


class Fake(FakeEngine):
    """The fake engine, with what a server of this chapter asks for."""

    def __init__(self, chapter, tokenizer, records, **options):
        super().__init__(chapter, tokenizer, **options)
        self.recorder = records.Recorder()

    def add_request(self, prompt, params, arrived):
        return super().add_request(prompt, params)

    def take_report(self):
        return self.recorder.take()

    def block_states(self):
        return bytes(self.places)

    def stats(self):
        return super().stats()._replace(preemptions=3, prompt_tokens=50, cached_tokens=20)


@pytest.fixture
def fake(chapter, module, make_engine):
    return Fake(chapter, make_engine("pocket").tokenizer, module("records"), places=64)


@pytest.fixture
def pocket(chapter, make_engine):
    engine = make_engine("pocket", max_num_seqs=16, max_model_len=256)
    engine.take_report()  # other tests may have used it
    return engine


def wait_for_answers(server, count):
    """Wait until so many responses are counted, which is a moment after they have been sent."""
    wait_until(lambda: server.service.async_engine.metrics.answers.total() >= count)


def scrape(server, **options):
    response = HTTP.get(f"{server.url}/metrics", timeout=5, **options)
    assert response.status_code == 200
    return response.text


def test_metrics_are_what_a_scraper_reads(chapter, pocket):
    with serving(chapter, pocket, log_format="none") as server:
        post(server, "/v1/completions", {"model": "pocket", "prompt": "Once", "max_tokens": 5, "ignore_eos": True}).raise_for_status()
        wait_for_answers(server, 1)
        scrape(server)
        wait_for_answers(server, 2)
        text = scrape(server)
        open_text = scrape(server, headers={"accept": "application/openmetrics-text; version=1.0.0"})
        with httpx.Client() as client:
            del client.headers["accept"]
            assert client.get(f"{server.url}/metrics").headers["content-type"].startswith("text/plain")
    got = samples(text)
    assert got["generation_tokens_total",] == 5 and got["inter_token_latency_seconds_count",] == 4
    # The server's clock is the engine's: a difference of two clocks would be years.
    assert 0 < got["time_to_first_token_seconds_sum",] <= got["request_seconds_sum",] < 20
    families = [*parse(text)]
    of_open_text = {sample.name for family in parse_openmetrics(open_text) for sample in family.samples}
    assert {sample.name for family in families for sample in family.samples} == of_open_text
    names = [family.name for family in families]
    assert len(set(names)) == len(names) and all(re.fullmatch("stepserve_[a-z_]+", name) for name in names)
    for family in families:
        assert family.documentation.endswith(".") and family.type in ("counter", "gauge", "histogram")
        assert (family.type == "counter") == all(sample.name.endswith("_total") for sample in family.samples), family.name
    kinds = {family.name.removeprefix("stepserve_"): family.type for family in families}
    assert [kinds[name] for name in ("generation_tokens", "preemptions", "prefix_cache_hits", "requests_finished")] == ["counter"] * 4
    assert [kinds[name] for name in ("requests_running", "kv_blocks", "engine_up")] == ["gauge"] * 3
    if shutil.which("promtool"):
        done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_two_servers_in_a_process_and_many_scrapes(chapter, module, fake, make_engine):
    """No registry is shared, and none is filled twice."""
    other = Fake(chapter, make_engine("pocket").tokenizer, module("records"))
    with serving(chapter, fake, log_format="none") as first, serving(chapter, other, log_format="none") as second:
        post(first, "/v1/completions", {"model": "pocket", "prompt": [20, 21], "max_tokens": 2}).raise_for_status()
        wait_for_answers(first, 1)
        path = "/v1/completions"
        for _ in range(2):
            assert ("http_responses_total", path, "200") in samples(scrape(first))
            assert ("http_responses_total", path, "200") not in samples(scrape(second))


def test_reading_does_not_wait_for_a_step(chapter, fake):
    with serving(chapter, fake, log_format="none") as server:
        fake.gate.clear()
        try:
            with httpx.stream("POST", f"{server.url}/v1/completions", json={"model": "pocket", "prompt": [20], "max_tokens": 2, "stream": True}):
                wait_until(lambda: fake.requests)
                for path in ("/metrics", "/dashboard", "/dashboard/data", "/trace", "/dashboard/data"):
                    assert HTTP.get(f"{server.url}{path}", timeout=3).status_code == 200
        finally:
            fake.gate.set()


@pytest.mark.whole
def test_tokens_that_clients_have_not_read_are_seen(chapter, fake, Params):
    """A generation's outputs wait in the server, not in the engine; when nobody holds it any more, they are gone."""
    with serving(chapter, fake, log_format="none") as server:
        async_engine = server.service.async_engine
        asked = async_engine.generate([([20] * 300, Params(max_tokens=300))])
        held = [asyncio.run_coroutine_threadsafe(asked, async_engine.loop).result(5)]
        wait_until(lambda: held[0].outputs.qsize() >= 300)
        [advice] = HTTP.get(f"{server.url}/dashboard/data").json()["advice"]
        assert re.match(r"30[01] tokens wait for clients", advice)
        held.clear()
        gc.collect()
        assert HTTP.get(f"{server.url}/dashboard/data").json()["advice"] == ["Nothing that a flag would change."]


def test_a_client_that_reads_nothing_is_seen(chapter, module, make_engine):
    """After some hundred tokens: the system's own buffer would take thousands."""
    fake = Fake(chapter, make_engine("pocket").tokenizer, module("records"), max_model_len=2000)
    with serving(chapter, fake, log_format="none") as server:
        body = json.dumps({"model": "pocket", "prompt": [20] * 1500, "max_tokens": 1500, "stream": True})
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            wait_until(lambda: fake.num_requests and not fake.requests)
            wait_until(lambda: samples(scrape(server))["tokens_unread",] > 200)
            [advice] = HTTP.get(f"{server.url}/dashboard/data").json()["advice"]
            assert "tokens wait for clients" in advice
        wait_until(lambda: samples(scrape(server))["tokens_unread",] == 0)


def test_the_tokenizers_queue_is_waiting_too(chapter, pocket):
    """A request arrives when the server begins to receive it, and its time includes that queue."""
    asked = {"/v1/completions": {"prompt": "Once"}, "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]}, "/v1/responses": {"input": "a"}}
    limits = {"/v1/responses": "max_output_tokens"}
    with serving(chapter, pocket, log_format="none") as server:
        async_engine, gate = server.service.async_engine, threading.Event()
        async_engine.tokenizing.submit(gate.wait)
        threads = [
            threading.Thread(target=post, args=(server, path, {"model": "pocket", limits.get(path, "max_tokens"): 16} | body)) for path, body in asked.items()
        ]
        try:
            for thread in threads:
                thread.start()
            wait_until(lambda: len(async_engine.encoding) == 3)
            got = samples(scrape(server))
            assert got["requests_waiting",] == got["requests_tokenizing",] == 3
            assert HTTP.get(f"{server.url}/health").json()["waiting"] == HTTP.get(f"{server.url}/dashboard/data").json()["stats"]["waiting"] == 3
            time.sleep(0.4)
        finally:
            gate.set()
            for thread in threads:
                thread.join(20)
        times = [request.first - request.arrived for request in async_engine.metrics.requests]
        assert len(times) == 3 and min(times) >= 0.4 and max(times) < 20
        assert samples(scrape(server))["requests_waiting",] == 0


def test_requests_that_the_engine_has_not_read_are_waiting_on_the_page(chapter, fake):
    with serving(chapter, fake, log_format="none") as server:
        fake.gate.clear()
        threads = [threading.Thread(target=post, args=(server, "/v1/completions", {"model": "pocket", "prompt": [20, 21], "max_tokens": 2})) for _ in range(4)]
        try:
            threads[0].start()
            wait_until(lambda: fake.requests and not server.service.async_engine.unanswered)
            for thread in threads[1:]:
                thread.start()
            wait_until(lambda: len(server.service.async_engine.unanswered) == 3)
            stats = HTTP.get(f"{server.url}/dashboard/data").json()["stats"]
            assert stats["waiting"] == HTTP.get(f"{server.url}/health").json()["waiting"] == samples(scrape(server))["requests_waiting",] == 3
            assert "report" not in stats
        finally:
            fake.gate.set()
            for thread in threads:
                thread.join(20)


@pytest.mark.parametrize("version", ["abc", "1.0.0rc1", "1!2.0", "", "0.0.1", "9" * 6000, "1.0.0; escaping=allow-utf-8; q=0.6, text/plain;version=0.0.4;q=0.3"])
def test_whatever_version_a_scraper_asks_for_there_is_one(chapter, fake, version):
    with serving(chapter, fake, log_format="none") as server:
        response = HTTP.get(f"{server.url}/metrics", headers={"accept": f"application/openmetrics-text; version={version}"})
        assert response.status_code == 200 and response.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
        assert [*parse_openmetrics(response.text)]
        response = HTTP.get(f"{server.url}/metrics", headers={"accept": f"text/plain; version={version}"})
        assert response.status_code == 200 and response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert samples(response.text)["engine_up",] == 1


def test_readers_share_what_one_of_them_asked_for(chapter, module, fake, monkeypatch):
    """A loop of scrapes, or a hundred open pages, would take the time of the streams."""
    monkeypatch.setattr(module("observe"), "SHARE_S", 60.0)
    open_format = {"accept": "application/openmetrics-text"}
    with serving(chapter, fake, log_format="none") as server:
        metrics, made = server.service.async_engine.metrics, Counter()
        for name in ("collect", "picture"):
            monkeypatch.setattr(metrics, name, lambda *args, name=name, own=getattr(metrics, name): (made.update([name]), own(*args))[1])
        asked = [("/metrics", {}), ("/metrics", open_format), ("/dashboard/data", {})]
        threads = [threading.Thread(target=HTTP.get, args=(server.url + path,), kwargs={"headers": headers}) for path, headers in 5 * asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for path, headers in asked:
            response = HTTP.get(server.url + path, headers=headers)
            assert response.status_code == 200 and len(response.content) > 500
        assert made == {"collect": 2, "picture": 1}
        # The time is over.
        monkeypatch.setattr(module("observe"), "SHARE_S", 0.0)
        assert HTTP.get(f"{server.url}/dashboard/data").status_code == 200 and made["picture"] == 2


def test_no_second_picture_is_begun_beside_a_slow_one(chapter, fake, monkeypatch):
    with serving(chapter, fake, log_format="none") as server:
        metrics, made, may_end = server.service.async_engine.metrics, [], threading.Event()
        picture = metrics.picture
        monkeypatch.setattr(metrics, "picture", lambda *args: (made.append(args), may_end.wait(10), picture(*args))[2])
        with ThreadPoolExecutor() as readers:
            asked = [readers.submit(HTTP.get, f"{server.url}/dashboard/data") for _ in range(3)]
            wait_until(lambda: made)
            asked.append(readers.submit(HTTP.get, f"{server.url}/dashboard/data"))
            time.sleep(0.3)
            may_end.set()
            assert [response.result().status_code for response in asked] == [200] * 4
        assert len(made) == 1
        assert HTTP.get(f"{server.url}/dashboard/data").status_code == 200 and len(made) == 2


@pytest.mark.whole
def test_the_number_of_series_does_not_depend_on_what_clients_send(chapter, fake):
    """300 paths, methods, models and ids: labels are the routes' own paths, and statuses."""
    rng = random.Random(7)

    def word():
        return "fuzz" + "".join(rng.choices("abcdefgh", k=8))

    with serving(chapter, fake, log_format="none") as server:
        routes = {*server.config.app.openapi()["paths"], "/docs", "/openapi.json", "-"}
        for number in range(300):
            kind = number % 6
            method, path = rng.choice(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", word().upper())), f"/{word()}/{word()}?{word()}={word()}"
            if kind == 1:
                method, path = "GET", f"/v1/models/{word()}/{word()}"
            elif kind == 2:
                path = rng.choice(("/v1/responses/resp_", "/metrics/", "/trace?seconds=", "/v1/")) + word()
            elif kind == 3:
                path = rng.choice(("/metrics", "/health", "/v1/completions", "/dashboard/data"))
            body = {"model": word(), "prompt": word()} if kind == 4 else None
            if kind == 4:
                method, path = "POST", rng.choice(("/v1/completions", "/v1/chat/completions", "/v1/responses"))
            HTTP.request(method, f"{server.url}{path}", json=body, headers={"x-request-id": word(), "user-agent": word()})
        text = scrape(server)
    assert "fuzz" not in text.lower()
    labels = {tuple(key[1:]) for key in samples(text) if key[0] == "http_responses_total"}
    assert {path.replace(":path}", "}") for path, _ in labels} <= routes
    assert {status for _, status in labels} <= {"200", "400", "404", "405", "307"}
    assert len(labels) <= 40 and len(samples(text)) < 300


def test_who_may_see_what(chapter, fake):
    """/metrics and the empty page are open; data and traces need the API key; metrics_key closes /metrics alone."""

    def statuses(server, key=None):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return [HTTP.get(f"{server.url}{path}", headers=headers).status_code for path in ("/health", "/metrics", "/dashboard", "/dashboard/data", "/trace")]

    with serving(chapter, fake, api_keys=("key-a",), log_format="none") as server:
        assert statuses(server) == [200, 200, 200, 401, 401]
        assert statuses(server, "key-a") == [200] * 5
        page = HTTP.get(f"{server.url}/dashboard").text
        assert "pocket" not in page and "key-a" not in page
        # Everything that it needs is in it.
        assert not re.search(r"https?://|src=|@import|url\(", page)


def test_without_an_api_key_the_metrics_key_closes_the_data_too(chapter, fake):
    with serving(chapter, fake, metrics_key="key-m", log_format="none") as server:
        for path in ("/metrics", "/dashboard/data", "/trace"):
            assert HTTP.get(f"{server.url}{path}").status_code == 401, path
            assert HTTP.get(f"{server.url}{path}", headers={"authorization": "Bearer key-m"}).status_code == 200, path
        assert HTTP.get(f"{server.url}/v1/models").status_code == 200


def test_a_metrics_key_closes_the_metrics(chapter, fake):
    with serving(chapter, fake, api_keys=("key-a",), metrics_key="key-m", log_format="none") as server:
        for sent, status in ((None, 401), ("Bearer key-a", 401), ("Basic key-m", 401), ("Bearer", 401), ("Bearer key-m", 200), ("bearer  key-m", 200)):
            response = HTTP.get(f"{server.url}/metrics", headers={"authorization": sent} if sent else {})
            assert response.status_code == status and (response.headers.get("www-authenticate") == "Bearer") == (status == 401), sent
        assert "--metrics-key" in HTTP.get(f"{server.url}/metrics").json()["error"]["message"]
        assert HTTP.get(f"{server.url}/dashboard/data", headers={"authorization": "Bearer key-m"}).status_code == 401
        assert HTTP.get(f"{server.url}/health").status_code == 200


def test_a_trace_is_chromes_and_holds_no_text(chapter, pocket, module):
    keep_s = module("metrics").KEEP_S
    with serving(chapter, pocket, log_format="none") as server:
        sent = {"model": "pocket", "prompt": "Once upon a time", "max_tokens": 9, "ignore_eos": True, "n": 2, "user": "somebody"}
        answer = post(server, "/v1/completions", sent, headers={"x-request-id": "my-own-id"})
        answer.raise_for_status()
        wait_until(lambda: len(server.service.async_engine.metrics.requests) >= 2)
        trace = HTTP.get(f"{server.url}/trace?seconds=60")
        for seconds in ("0", "-1", "nan", "inf", str(keep_s + 1), "soon", "1e999"):
            error = HTTP.get(f"{server.url}/trace?seconds={seconds}")
            assert error.status_code == 400 and error.json()["error"]["param"] == "seconds", seconds
        assert f"more than 0 and at most {keep_s:.0f}" in HTTP.get(f"{server.url}/trace?seconds=0").json()["error"]["message"]
        wait_until(lambda: HTTP.get(f"{server.url}/dashboard/data").json()["blocks"] is not None)
        shown = HTTP.get(f"{server.url}/dashboard/data").text
    events = trace.json()["traceEvents"]
    for event in events:
        assert event["ph"] in "XM" and isinstance(event["pid"], int)
        assert event["ph"] == "M" or (event["dur"] >= 0 and event["ts"] > 0 and isinstance(event["tid"], int))
    steps = [event for event in events if event["name"].startswith("step of")]
    parts = [event for event in events if event["name"] in module("records").PARTS]
    assert len(steps) >= 9 and len(parts) == 5 * len(steps)
    for number, step in enumerate(steps):
        its = parts[5 * number : 5 * number + 5]
        assert sum(part["dur"] for part in its) == pytest.approx(step["dur"], abs=1)
        assert its[0]["ts"] == step["ts"] and its[-1]["ts"] + its[-1]["dur"] == pytest.approx(step["ts"] + step["dur"], abs=1)
    last = [event for event in events if event["pid"] == 2 and event["ph"] == "X"][-6:]
    assert [event["name"] for event in last] == ["waits", "prompt", "answer"] * 2
    assert all(event["args"]["output"] == 9 and event["args"]["reason"] == "length" for event in last)
    for text in ("Once", "upon", "my-own-id", "somebody", *(choice["text"] for choice in answer.json()["choices"])):
        assert text not in trace.text and text not in shown


@pytest.mark.whole
def test_a_long_trace_stops_nobody(chapter, fake, module):
    """Five minutes of steps of 10 ms are 20 MB of JSON."""
    with serving(chapter, fake, log_format="none") as server:
        now, kept = time.monotonic(), server.service.async_engine.metrics.steps
        kept.extend(step_of(module, now - 290 + number / 100) for number in range(29_000))
        slowest, chunks = 0.0, []
        with httpx.stream("GET", f"{server.url}/trace", timeout=60) as trace:
            pieces = threading.Thread(target=lambda: chunks.extend(trace.iter_text()))
            pieces.start()
            while pieces.is_alive():
                begun = time.monotonic()
                assert HTTP.get(f"{server.url}/health").status_code == 200
                slowest = max(slowest, time.monotonic() - begun)
    assert slowest < 0.3 and len(json.loads("".join(chunks))["traceEvents"]) == 2 + 6 * 29_000


def test_a_request_id_is_taken_or_made(chapter, fake):
    """On errors too, of the gate, the router, the checks and our own; nothing else of a client reaches a header."""
    with serving(chapter, fake, api_keys=("key-a",), log_format="none") as server:

        def ask(sent, path="/v1/models", key="key-a", method="GET", **options):
            headers = [("authorization", f"Bearer {key}")] + ([(b"x-request-id", sent)] if sent is not None else [])
            response = HTTP.request(method, f"{server.url}{path}", headers=headers, **options)
            [request_id] = response.headers.get_list("x-request-id")
            return response.status_code, request_id

        for sent in (b"a", b"A-z_0.9", b"x" * 64):
            assert ask(sent) == (200, sent.decode())
        for sent in (None, b"", b"x" * 65, b"a b", b"a;b", b"a\xc3\xa9", b"<b>", b"a,b", b'"', b"a\tb", b"%0d%0aset-cookie:x"):
            status, made = ask(sent)
            assert status == 200 and re.fullmatch("[0-9a-f]{32}", made), sent
        assert len({ask(None)[1] for _ in range(20)}) == 20
        assert ask(b"mine", key="no") == (401, "mine")
        assert ask(b"mine", "/nowhere") == (404, "mine") and ask(b"mine", "/v1/models", method="PUT") == (405, "mine")
        assert ask(b"mine", "/v1/completions", method="POST", json={"model": "pocket", "prompt": 5}) == (400, "mine")
        assert ask(b"mine", "/v1/completions", method="POST", json={"model": "other", "prompt": "a"}) == (404, "mine")
        assert ask(b"mine", "/v1/completions", method="POST", json={"model": "pocket", "prompt": [20], "max_tokens": 1}) == (200, "mine")


def test_a_fault_of_the_server_has_an_id_too(chapter, fake, monkeypatch):
    with serving(chapter, fake, log_format="none") as server:
        monkeypatch.setattr(server.service, "check_model", lambda name: 1 / 0)
        response = HTTP.get(f"{server.url}/v1/models/pocket", headers={"x-request-id": "mine", "connection": "close"})
        assert response.status_code == 500 and response.headers.get_list("x-request-id") == ["mine"]
        wait_for_answers(server, 1)
        assert samples(scrape(server))["http_responses_total", "/v1/models/{name:path}", "500"] == 1


@pytest.mark.parametrize("log_format", ["text", "json", "none"])
def test_the_access_log_has_a_line_and_no_content(chapter, fake, capsys, log_format):
    with serving(chapter, fake, api_keys=("key-a",), log_format=log_format) as server:
        headers = {"authorization": "Bearer key-a", "x-request-id": "mine"}
        wait_until(lambda: "curl" in capsys.readouterr().err)  # it is ready
        body = {"model": "pocket", "prompt": "SECRET-PROMPT", "max_tokens": 3, "user": "somebody"}
        answer = post(server, "/v1/completions?secret=query", body, headers=headers)
        for number, path in enumerate(("/v1/models/secret-name", "/secret-path", "/v1/models"), 1):
            wait_for_answers(server, number)  # a line is written after the client has its answer
            HTTP.get(f"{server.url}{path}", headers={} if number == 3 else headers)
        wait_for_answers(server, 4)
    # At its end, the server has printed every line.
    written = capsys.readouterr().err
    assert answer.status_code == 200
    # A text as short as "1" may be in a line by chance.
    text = answer.json()["choices"][0]["text"]
    for secret in ("SECRET", "secret", "key-a", "somebody", *([text] if len(text) > 3 else [])):
        assert secret not in written
    lines = written.splitlines()
    if log_format == "none":
        assert not lines
        return
    names = ["time", "request_id", "method", "path", "status", "seconds"]
    lines = [[*json.loads(line).values()] if log_format == "json" else line.split(" ") for line in lines]
    assert log_format == "text" or [*json.loads(written.splitlines()[0])] == names
    want = [["mine", "POST", "/v1/completions", "200"], ["mine", "GET", "/v1/models/{name:path}", "404"], ["mine", "GET", "-", "404"]]
    assert [[str(each) for each in line[1:5]] for line in lines[:3]] == want
    assert [str(each) for each in lines[3][2:5]][::2] == ["GET", "401"]
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line[0]) and 0 <= float(line[5]) < 10


def test_a_client_that_leaves_in_the_middle_of_its_body_has_gone(chapter, fake):
    """As one that leaves later: it has made no mistake that a 400 would tell."""
    with serving(chapter, fake, log_format="none") as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
            connection.sendall(f'{head}{{"model": "po'.encode())
            time.sleep(0.2)
        wait_for_answers(server, 1)
        assert server.service.async_engine.metrics.answers == {("/v1/completions", "499"): 1}


class Reader:
    """In place of stderr. Its reader has gone, or stops reading until `reads` is set."""

    def __init__(self, gone=False):
        self.gone, self.reads, self.text, self.asked = gone, threading.Event(), "", False

    def write(self, text):
        if self.gone:
            raise BrokenPipeError("its reader has gone")
        self.asked = True
        self.reads.wait()
        self.text += text

    def flush(self):
        pass


def test_a_log_whose_reader_has_gone_costs_no_answer(chapter, fake, monkeypatch):
    with serving(chapter, fake, log_format="text") as server:
        monkeypatch.setattr(sys, "stderr", Reader(gone=True))
        client = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=5)
        # One connection, which the server must not close.
        for number in range(4):
            client.request("GET", "/v1/models")
            response = client.getresponse()
            assert response.status == 200 and response.read()
            wait_for_answers(server, number + 1)
            time.sleep(0.05)
        client.close()


def test_a_log_that_nobody_reads_loses_lines_and_stops_nobody(chapter, module, fake, monkeypatch, capsys):
    monkeypatch.setattr(module("log"), "MOST_LINES", 5)
    with serving(chapter, fake, log_format="text") as server:
        wait_until(lambda: "curl" in capsys.readouterr().err)  # it is ready
        reader = Reader()
        monkeypatch.setattr(sys, "stderr", reader)
        for number in range(20):
            assert HTTP.get(f"{server.url}/v1/models", headers={"x-request-id": f"id-{number}"}, timeout=5).status_code == 200
            wait_for_answers(server, number + 1)
            wait_until(lambda: reader.asked)
        reader.reads.set()
        wait_until(lambda: reader.text.count("\n") == 6)
        HTTP.get(f"{server.url}/version", headers={"x-request-id": "last"})
        wait_until(lambda: reader.text.endswith("\n") and "last" in reader.text)
    *printed, missing, last = reader.text.splitlines()
    assert [line.split()[1] for line in (*printed, last)] == [*(f"id-{number}" for number in range(6)), "last"]
    assert missing.startswith("14 lines of the log are missing here")


def test_what_the_garbage_collector_logs_in_the_middle_of_a_put_stops_nobody(module):
    """asyncio logs what has become of a task when it is collected, wherever Python is then: here, in each call of a put."""
    log = module("log").Log()

    def put():
        sys.setprofile(lambda _frame, event, _arg: log.put("collected") if event == "c_call" else None)
        log.put("a line")
        sys.setprofile(None)

    thread = threading.Thread(target=put, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    log.close()


def buffered():
    """The environment of a process whose stderr has a buffer. Without one, it has no lock for which anything could wait."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@contextmanager
def running_server(chapter, setup="pass"):
    """The real server, and its address. setup: what Python does before it."""
    package = f"milestones.{chapter.name}"
    code = f"import sys\nfrom {package} import __main__, process\n{setup}\nsys.exit(__main__.main(['serve', '--port', '0', '--linear', 'plain']))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=buffered(), stderr=subprocess.PIPE)
    try:
        yield process, next(re.search(rb"http://[^/]+", line) for line in process.stderr if b"curl" in line).group().decode()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def send_garbage(url):
    """A request that is not HTTP, which uvicorn logs; returns the status line."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"garbage\r\n\r\n")
        return connection.recv(100).partition(b"\r\n")[0]


def fill_log(process, url):
    """Let the log's pipe be full, and the thread that prints wait for somebody who reads it."""
    fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
    for _ in range(100):
        assert HTTP.get(f"{url}/version", timeout=5).status_code == 200


@pytest.mark.whole
def test_a_server_whose_log_nobody_reads_answers_and_can_be_stopped(chapter):
    """Not even a warning of uvicorn, or a flush of stderr, may wait for the reader: the thread that prints may hold its lock."""
    with running_server(chapter) as (process, url):
        fill_log(process, url)
        assert send_garbage(url) == b"HTTP/1.1 400 Bad Request"
        assert HTTP.get(f"{url}/version", timeout=5).status_code == 200
        process.terminate()
        assert process.wait(20) == 0


# Of the process that serves: only the thread of the log may print to stderr.
GUARD = """
import builtins, threading
really_print = print
def guarded(*args, file=None, **how):
    assert file is not sys.stderr or threading.current_thread().name == "log", args
    really_print(*args, file=file, **how)
builtins.print = guarded
"""


@pytest.mark.whole
def test_the_server_says_through_its_log_that_it_is_ready(chapter):
    with running_server(chapter, GUARD) as (process, url):
        assert HTTP.get(f"{url}/version", timeout=5).status_code == 200


@pytest.mark.whole
def test_the_log_says_why_the_server_has_ended(chapter):
    with running_server(chapter) as (process, url):
        assert HTTP.get(f"{url}/version").status_code == 200
        assert send_garbage(url) == b"HTTP/1.1 400 Bad Request"
        for child in psutil.Process(process.pid).children():
            # The other one is multiprocessing's resource tracker.
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()
        first, second, *_, last = process.stderr.read().decode().splitlines()
        assert process.wait(20) == 1
    assert " GET /version 200 " in first and "Invalid HTTP request" in second
    assert last.endswith("the engine's process has ended (SIGKILL)")


# Of the server, as soon as somebody wants to stop it.
BUG = """
async def on_tick(server, counter):
    return server.service.draining and 1 / 0
process.Server.on_tick = on_tick
"""


@pytest.mark.whole
def test_a_server_that_fails_ends_although_nobody_reads_its_log(chapter):
    with running_server(chapter, BUG) as (process, url):
        fill_log(process, url)
        process.terminate()
        assert process.wait(20) == 1


@pytest.mark.whole
@pytest.mark.parametrize("is_full", [False, True])
def test_an_engines_process_does_not_wait_for_who_reads_the_log(chapter, is_full):
    code = f"""
from functools import partial
from operator import truediv
from milestones.{chapter.name}.engine_process import EngineProcess
try:
    EngineProcess(partial(truediv, 1, 0)).wait_until_ready()
except ValueError as error:
    print(error)
"""
    ours, its = os.pipe()
    with open(ours, "rb") as log, open(its, "wb", buffering=0) as pipe:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
        pipe.write(bytes(4096 if is_full else 1))
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=buffered(), stdout=subprocess.PIPE, stderr=pipe, text=True, timeout=30, check=True)
        pipe.close()
        written = log.read()
    assert done.stdout == "the engine's process has ended (exit code 1) before it was ready\n"
    assert is_full or written.endswith(b"ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--slo-ttft-ms", "0", "slo_ttft_ms must be a number of milliseconds above 0, got 0.0"),
        ("--slo-itl-ms", "-3", "slo_itl_ms must be a number of milliseconds above 0, got -3.0"),
        ("--slo-itl-ms", "nan", "slo_itl_ms must be a number of milliseconds above 0, got nan"),
        ("--slo-ttft-ms", "inf", "slo_ttft_ms must be a number of milliseconds above 0, got inf"),
        ("--metrics-key", "a b", "metrics_key must be non-empty ASCII without spaces"),
        ("--metrics-key", "", "metrics_key must be non-empty ASCII without spaces"),
        ("--log-format", "xml", "--log-format"),
    ],
)
def test_wrong_flags_are_refused_by_name(module, capsys, flag, value, said):
    try:
        code = module("__main__").main(["serve", "--model", "nowhere", f"{flag}={value}"])
    except SystemExit as exit:
        code = exit.code
    assert code == 2 and said in capsys.readouterr().err


def test_models_tell_their_length_and_health_no_report(chapter, fake):
    with serving(chapter, fake, log_format="none") as server:
        [card] = HTTP.get(f"{server.url}/v1/models").json()["data"]
        assert card["max_model_len"] == fake.max_model_len == HTTP.get(f"{server.url}/v1/models/pocket").json()["max_model_len"]
        health = HTTP.get(f"{server.url}/health").json()
        assert HTTP.head(f"{server.url}/health").status_code == 200
        wait_for_answers(server, 4)
        assert samples(scrape(server))["http_responses_total", "/health", "200"] == 2
        assert "report" not in health and health["status"] == "ok" and health["total_blocks"] == 64


@pytest.mark.parametrize("end", ["it raises", "its process is killed"])
def test_counters_stay_when_the_engine_dies(chapter, module, fake, monkeypatch, end):
    """A counter that falls is read as a restart: what follows would be counted from 0."""
    monkeypatch.setattr(module("engine_process"), "ALIVE_S", 0.05)
    body = {"model": "pocket", "prompt": [20, 21, 22], "max_tokens": 3}
    with serving(chapter, fake, log_format="none") as server:
        post(server, "/v1/completions", body).raise_for_status()
        before = samples(scrape(server))
        assert before["engine_up",] == 1 and before["prefix_cache_hits_total",] == 20
        if end == "it raises":
            fake.fail_step = list
            fake.fault = RuntimeError("broken")
            assert post(server, "/v1/completions", body).status_code == 500
        else:
            server.service.async_engine.runner.process.kill()
        wait_until(lambda: server.service.async_engine.died, 5)
        after = samples(scrape(server))
    # What the engine's process would end with it: a thread that notices a closed socket.
    wait_until(lambda: not any(thread.name == "reader" for thread in threading.enumerate()), 5)
    assert after["engine_up",] == 0
    fallen = {key: after[key] for key, value in before.items() if key[0].endswith(("_total", "_count", "_sum")) and after[key] < value}
    assert not fallen
