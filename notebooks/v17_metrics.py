# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---
# %% [markdown]
# # v17, followed along: count where it happens
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v17_metrics.ipynb)
#
# You follow two requests on a clock of your own, count the gaps of a step, fill a histogram and lose its percentiles, run an engine
# in a small cache and recount all that it has counted, read what a scraper reads, send a thousand invented paths, compare two servers
# with the same mean, and measure what recording costs. No GPU is needed. Plan about twenty minutes. Before each run there is a question:
# write your answer down first.

# %%
import subprocess
import sys
from pathlib import Path

root = next((path for path in (Path.cwd(), *Path.cwd().parents) if (path / "milestones").is_dir()), None)
if root is None:  # on Colab: fetch the repository and what it needs
    root = Path("stepserve").resolve()
    subprocess.run(["git", "clone", "--depth", "1", "https://github.com/stepserve/stepserve", str(root)], check=True)
    subprocess.run([sys.executable, str(root / "shared" / "commands" / "install.py"), "here"], check=True)
sys.path.insert(0, str(root))

# %% [markdown]
# All of this runs on the CPU, even if there is a GPU.

# %%
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""

# %%
import asyncio
import contextlib
import inspect
import io
import math
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from statistics import mean, median
from types import SimpleNamespace
from unittest.mock import patch

import httpx
import matplotlib.pyplot as plt
import torch
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as LibraryHistogram
from prometheus_client.parser import text_string_to_metric_families

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets

from milestones import v17_metrics as v17
from milestones.v17_metrics import records
from milestones.v17_metrics.access import AccessLog
from milestones.v17_metrics.metrics import LONG, SHORT, Goal, Histogram, Metrics, percentiles
from milestones.v17_metrics.records import PARTS, Ended, Recorder
from shared.checkpoints import POCKET


def make_engine(**options):
    """An engine with pocket, without its line on stderr."""
    with contextlib.redirect_stderr(io.StringIO()):
        return v17.Engine(POCKET, device="cpu", linear="plain", **options)


# %% [markdown]
# ## 1. The four moments of a request
#
# Real times differ from run to run. So `records.py` gets a clock of our own here, which moves on by 10 ms whenever somebody looks at
# it. A step looks six times: when it begins, and at the end of each of its five parts. So each step takes 50 ms,
# and 10 ms lie between two steps.
#
# The engine has one place. Requests A and B arrive together; A generates four tokens, and B two.
#
# **Predict.** What is B's time to first token: 50 ms, the length of the step that computes its prompt, or more? Which tokens does it wait for?

# %%
class Clock:
    """A clock that moves on by 10 ms whenever it is read."""

    def __init__(self):
        self.reads = 0

    def monotonic(self):
        self.reads += 1
        return self.reads / 100


def run_on(clock, engine, requests):
    """Run requests [(prompt, max_tokens)] that arrive at 0; return the report of the whole run."""
    with patch.object(records, "time", clock):
        for prompt, max_tokens in requests:
            engine.add_request(prompt, v17.SamplingParams(max_tokens=max_tokens, ignore_eos=True), arrived=0.0)
        while engine.has_unfinished_requests():
            engine.step()
        return engine.take_report()


def ms(seconds):
    return f"{1e3 * seconds:4.0f} ms"


report = run_on(Clock(), make_engine(max_num_seqs=1), [("Once upon a time", 4), ("The sun", 2)])
for name, ended in zip("AB", report.ended, strict=True):
    print(f"{name}: arrived {ms(ended.arrived)}, began {ms(ended.began)}, first token {ms(ended.first)}, ended {ms(ended.ended)}")
    print(f"   in the queue {ms(ended.began - ended.arrived)}, prompt {ms(ended.first - ended.began)}, answer {ms(ended.ended - ended.first)}")
    print(f"   time to first token {ms(ended.first - ended.arrived)}")
    assert math.isclose(ended.first - ended.arrived, (ended.began - ended.arrived) + (ended.first - ended.began))
a, b = report.ended
assert b.began > a.ended and b.first - b.arrived > 5 * (b.first - b.began)

# %% [markdown]
# B's prompt took 30 ms, but its first token came after 290 ms, because that is counted from the arrival. A user waits for the queue, too. `began` is the end of scheduling, and `first` the end of choosing, so the prompt's time is that of three parts: batch,
# model and choose.
#
# This is where time is counted:

# %%
print(inspect.getsource(Recorder.token))

# %% [markdown]
# ## 2. The gaps of a step
#
# Now the engine has four places, for six requests: two generate two tokens, two four, and two six.
#
# **Predict.** When four requests get a token in a step, how many different gaps between tokens are there? How many gaps do 24 tokens of six
# requests have?

# %%
report = run_on(Clock(), make_engine(max_num_seqs=4), [("Once upon a time", 2), ("The sun", 4), ("A dog", 6), ("Hello!", 2), ("Who are you?", 4), ("One day, Tom", 6)])
for number, step in enumerate(report.steps, 1):
    gaps = ", ".join(f"{count} x {ms(gap).strip()}" for gap, count in step.gaps) or "none"
    print(f"step {number}: {step.num_seqs} request(s), {step.num_prompt:2} prompt tokens, {step.num_output} new tokens, {len(step.first_times)} of them first; gaps: {gaps}")
    assert len(step.gaps) <= 1 and step.num_output == len(step.first_times) + sum(count for _, count in step.gaps)
num_gaps = sum(count for step in report.steps for _, count in step.gaps)
print("tokens:", sum(step.num_output for step in report.steps), " gaps:", num_gaps, " values that crossed for them:", sum(len(step.gaps) for step in report.steps))
assert num_gaps == sum(ended.num_output for ended in report.ended) - len(report.ended)

# %% [markdown]
# All tokens of a step have one time, so requests that got a token in the step before, too, have one gap: a pair of numbers, whether there
# are four of them or 64. It is 60 ms here, a step and the 10 ms before it. A first token
# has no gap. Only a request that was preempted, or whose last token is older for another reason, has a gap of its own. Part 4 has some.
#
# ## 3. Buckets
#
# A histogram does not keep values. It counts how many were at most as large as each of a few bounds, and adds up the values.
#
# **Predict.** Two servers report the 90th percentile of their times to first token: 0.1 s and 4.0 s. The first has served 900 requests, and the
# second 100. What is the 90th percentile of all 1,000: the mean of the two, the weighted mean (0.49 s), or something else?

# %%
def percentile(values, share):
    """The value that this share of all values does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


fast = [0.05] * 500 + [0.1] * 380 + [0.2] * 20
slow = [0.5] * 50 + [2.0] * 30 + [4.0] * 20
each = [percentile(values, 0.9) for values in (fast, slow)]
weighted = (each[0] * len(fast) + each[1] * len(slow)) / len(fast + slow)
print("of each server:", each, "  their mean:", mean(each), "  weighted:", round(weighted, 3), "  of all requests:", percentile(fast + slow, 0.9))
assert percentile(fast + slow, 0.9) not in (mean(each), weighted)

# %% [markdown]
# Nothing computes the third number from the first two: it depends on how many requests of the second server were faster than the slow ones of
# the first. Histograms can be added, bucket by bucket. From the sum one gets the bucket that has the 90th percentile.
#
# **Predict.** How exact is a percentile from buckets with the bounds 0.1, 0.25, 0.5, ...?

# %%
def filled(values):
    histogram = Histogram(LONG)
    for value in values:
        histogram.add(value)
    return histogram


def from_buckets(buckets, share):
    """A percentile as Prometheus computes it: in its bucket, values are assumed to be spread evenly."""
    wanted = share * buckets[-1][1]
    for (low, below), (high, until) in pairwise([("0", 0), *buckets]):
        if until >= wanted:
            return float(low) if high == "+Inf" else float(low) + (float(high) - float(low)) * (wanted - below) / (until - below)


print("bound     " + "".join(f"{bound:>7}" for bound, _ in filled([]).buckets()))
for name, values in {"fast": fast, "slow": slow, "all": fast + slow}.items():
    print(f"{name:10}" + "".join(f"{count:7}" for _, count in filled(values).buckets()) + f"   sum {filled(values).sum:.1f}")
added = [(bound, count + other) for (bound, count), (_, other) in zip(filled(fast).buckets(), filled(slow).buckets(), strict=True)]
assert added == filled(fast + slow).buckets()
for share in (0.5, 0.9, 0.99):
    print(f"p{100 * share:.0f}: from buckets {from_buckets(added, share):.3f}, exactly {percentile(fast + slow, share):.3f}; the mean, from sum and count, is exact: {filled(fast + slow).sum / added[-1][1]:.3f}")

# %% [markdown]
# A percentile is as exact as its bucket is narrow; sums, counts and means are exact. Bounds have to be fixed before anybody knows what will be
# measured, and to be the same on all servers. `le` means "less than or equal": a value on a bound belongs below it.
#
# ## 4. Count, and count again
#
# Twelve requests run in a small cache: 40 blocks of 8 tokens, at most 24 tokens in a step, and nothing reserved. Half of the prompts
# begin alike. After each step, the report goes into `Metrics`, as in the server.
#
# **Predict.** Each request generates 40 tokens. What is the counter of generated tokens: 480, or more, since preempted requests compute some of
# their tokens twice? Is the counter of computed prompt tokens the number of prompt tokens, less, or more?

# %%
SYSTEM = "You are a helpful assistant, and you answer every question in a few words. "
QUESTIONS = ("What is a block table?", "Why is the sky blue?", "Who are you?", "What is a token?", "Tell me a story.", "What do you like?")
prompts = [SYSTEM + question for question in QUESTIONS] + list(QUESTIONS)

engine = make_engine(max_model_len=128, num_blocks=40, block_size=8, max_num_seqs=12, max_num_batched_tokens=24, reserve_tokens=0)
metrics = Metrics(Goal(first=60.0))
steps, ended, tokens, cached = [], [], {}, {}
clock = Clock()
with patch.object(records, "time", clock):
    for prompt in prompts:
        engine.add_request(prompt, v17.SamplingParams(max_tokens=40, ignore_eos=True), arrived=0.0)
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens.setdefault(output.request_id, []).append(output.token_id)
            cached.setdefault(output.request_id, output.num_cached)
        if report := engine.take_report():
            metrics.add(report)
            steps += report.steps
            ended += report.ended
metrics.stats = engine.stats()

lengths = [len(engine.tokenizer.encode(prompt)) for prompt in prompts]
recounts = {
    "generated tokens": (metrics.counters["generation_tokens"], sum(map(len, tokens.values()))),
    "first tokens": (metrics.first_times.buckets()[-1][1], len(tokens)),
    "gaps": (metrics.gaps.buckets()[-1][1], sum(len(its) - 1 for its in tokens.values())),
    "finished, length": (metrics.finished["length"], len(tokens)),
    "looked up in the prefix cache": (metrics.stats.prompt_tokens, sum(lengths)),
    "found there": (metrics.stats.cached_tokens, sum(cached.values())),
    "positions fed": (sum(step.num_fed for step in steps), engine.num_positions),
    "steps": (metrics.step_tokens.buckets()[-1][1], engine.num_steps),
    "preemptions": (metrics.stats.preemptions, sum(each.num_preemptions for each in ended)),
}
print(f"{'':30} counted  recounted")
for name, (count, recount) in recounts.items():
    print(f"{name:30} {count:7,}  {recount:9,}")
    assert count == recount, name

# %% [markdown]
# A token is counted where it is appended, so it is counted once, however often its key and value are computed. "Looked up" and "found" also count
# each request once. (If each readmission counted, a hit rate would rise with every preemption: a request finds its own blocks again.)
# Computed prompt tokens are work, and are counted each time:

# %%
computed, looked_up, found = metrics.counters["prompt_tokens"], metrics.stats.prompt_tokens, metrics.stats.cached_tokens
print(f"prompt tokens: {looked_up} in the prompts, {found} found, {looked_up - found} to compute; {computed} computed")
print(f"positions: {engine.num_positions} fed, of which {looked_up - found + sum(len(its) - 1 for its in tokens.values())} would have been needed without preemptions")
several = [step for step in steps if len(step.gaps) > 1]
print(f"steps with more than one gap: {len(several)} of {len(steps)}; in one of them:", ", ".join(f"{count} x {ms(gap).strip()}" for gap, count in sorted(several[0].gaps)))
assert several and engine.num_positions > looked_up - found + sum(len(its) - 1 for its in tokens.values())
assert math.isclose(metrics.first_times.sum, sum(each.first - each.arrived for each in ended))
assert math.isclose(sum(metrics.part_seconds.values()), metrics.step_seconds.sum)

# %% [markdown]
# The sum of the histogram is that of the requests' own times, and the parts of all steps add up to the steps. The same events draw the page and
# the trace. The next cell draws the requests as the page does.
#
# **Predict.** In which order do requests finish, if all have arrived at once and generate equally many tokens? Which of them has the longest gap?

# %%
figure, axes = plt.subplots(figsize=(8, 3))
for row, each in enumerate(sorted(ended, key=lambda each: each.request_id)):
    marks = (each.arrived, each.began, each.first, each.ended)
    for (start, stop), color in zip(pairwise(marks), ("#d29922", "#bf3989", "#0969da"), strict=True):
        axes.barh(row, stop - start, left=start, color=color, height=0.7)
    axes.text(each.ended + 0.05, row, f"preempted {each.num_preemptions} time(s), longest gap {each.longest_gap:.1f} s", va="center", fontsize=7)
axes.set(xlabel="seconds of our clock: waits, computes its prompt, generates", ylabel="request", xlim=(0, 1.5 * max(each.ended for each in ended)))
axes.invert_yaxis()
plt.show()
print("finished in the order", [each.request_id for each in ended], " preempted", [each.num_preemptions for each in ended], "times")

# %% [markdown]
# ## 5. What a scraper reads
#
# `collect` makes metrics of these numbers when somebody asks, and the library writes them as text.
#
# **Predict.** What ends in `_total`? How many lines does one histogram have? If the scraper reads twice, does anything change?

# %%
def exposed(metrics):
    """The text of /metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics)
    return generate_latest(registry).decode()


page = exposed(metrics)
wanted = ("requests_running", "kv_blocks", "preemptions", "generation_tokens", "requests_finished", "request_output_tokens")
for line in page.splitlines():
    if any(f"stepserve_{name}" in line for name in wanted) and not line.startswith("# HELP"):
        print(line)
assert page == exposed(metrics), "reading must not change what is read"
assert "stepserve_generation_tokens_total 480.0" in page

# %%
families = list(text_string_to_metric_families(page))
kinds = {kind: sum(family.type == kind for family in families) for kind in sorted({family.type for family in families})}
print(kinds, " lines with a number:", sum(len(family.samples) for family in families))
for family in families:
    if family.type == "histogram":
        assert [sample.name for sample in family.samples][-2:] == [f"{family.name}_count", f"{family.name}_sum"]

# %% [markdown]
# (One of the gauges is an *info*: it is always 1, and its labels are the settings.)
#
# A counter's value says little; how fast it grows is what one looks at. If it becomes smaller, the server has been restarted, and
# Prometheus counts on from 0. The next cell does so by hand, for a server that was restarted after the third scrape.
#
# **Predict.** How many tokens were generated between the first and the last scrape? What would one get from the last minus the first? And
# if the number were a gauge?

# %%
scrapes = [100, 250, 400, 30, 180]


def increase(values):
    """How much a counter has grown; where it is smaller than before, it began again at 0."""
    return sum(after - before if after >= before else after for before, after in pairwise(values))


print("increase:", increase(scrapes), "  last minus first:", scrapes[-1] - scrapes[0])
assert increase(scrapes) == 150 + 150 + 30 + 150
print("two servers, the second restarted: first each increase, then the sum:", increase([100, 200, 300]) + increase([500, 10, 60]))
print("first the sum, then the increase:", increase([600, 210, 360]))

# %% [markdown]
# The order matters: `sum(rate(...))`, never `rate(sum(...))`. A sum of counters hides which of them began again.
#
# ## 6. Labels
#
# Each combination of a metric's labels is a time series, which Prometheus keeps for weeks. The next cell sends 1,000 invented paths, with
# and without a route, through the server's own `AccessLog`. It counts series by the route's path, then by the path as the client sent it.
#
# **Predict.** How many series are there in either case?

# %%
app = FastAPI()


@app.get("/v1/responses/{response_id}")
async def retrieve(response_id: str):
    return {"id": response_id}


counted, as_sent, ids = Metrics(Goal()), set(), []
logged = AccessLog(app, SimpleNamespace(async_engine=SimpleNamespace(metrics=counted), log_format="none"), None)


async def send_all():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(logged), base_url="http://server") as client:
        for number in range(500):
            for path in (f"/v1/responses/resp_{number}", f"/wp-admin/{number}.php"):
                answer = await client.get(path)
                as_sent.add((path, str(answer.status_code)))
        for sent in ("order-17", "a" * 65, "two words", "<script>"):
            answer = await client.get("/v1/responses/a", headers={"x-request-id": sent})
            ids.append((sent, answer.headers["x-request-id"]))


# A notebook's own thread has an event loop that runs already.
ThreadPoolExecutor(1).submit(asyncio.run, send_all()).result()
for labels, count in sorted(counted.answers.items()):
    print(labels, count)
print("series by the path as sent:", len(as_sent))
assert set(counted.answers) == {("/v1/responses/{response_id}", "200"), ("-", "404")} and len(as_sent) == 1000

# %% [markdown]
# A scanner that tries paths would fill the memory of the server and of Prometheus. The same holds for model names, user names and
# request ids: what a client can invent is no label. It belongs in the log, where each line stands alone. That is what `x-request-id` is for.
#
# **Predict.** The last requests above brought ids of their own: `order-17`, 65 letters, two words, and a tag. Which are kept?

# %%
for sent, got in ids:
    print(f"{sent[:12]:14}", "kept" if got == sent else f"replaced by {len(got)} hexadecimal digits")
assert [sent == got for sent, got in ids] == [True, False, False, False]

# %% [markdown]
# ## 7. Two servers with the same mean
#
# Server A gives each of 100 requests its first token after 400 ms. Server B gives it to 90 of them after 200 ms, and to ten after 2.2 s.
#
# **Predict.** What are the means? Which server is better if a user waits 500 ms at most? And if a user waits 250 ms at most?

# %%
def life(first, longest_gap=0.05):
    """A request of 40 tokens that arrives at 0."""
    return Ended(0, "stop", 0.0, 0.01, first, first + 2.0, 10, 0, 40, 0, longest_gap)


servers = {"A": [life(0.4)] * 100, "B": [life(0.2)] * 90 + [life(2.2)] * 10}
goodput = {}
for name, requests in servers.items():
    times = [(each.first, 1) for each in requests]
    for limit in (0.5, 0.25):
        judged = Metrics(Goal(first=limit))
        for each in requests:
            judged.add_request(each)
        goodput[name, limit] = judged.counters["goal_met"] / judged.counters["goal_requests"]
    print(f"{name}: mean {ms(mean(each.first for each in requests))}, p50, p90, p99 {[ms(value).strip() for value in percentiles(times)]}, goodput at 500 ms {goodput[name, 0.5]:.0%}, at 250 ms {goodput[name, 0.25]:.0%}")
assert math.isclose(*(mean(each.first for each in requests) for requests in servers.values()))
assert list(goodput.values()) == [1.0, 0.0, 0.9, 0.9]

# %% [markdown]
# The means are equal, and even p90 prefers B. Which server is better depends on what users need, so goodput needs a goal, and a goal has to
# be chosen before one looks.
#
# A mean within one request hides things, too. Two requests of 40 tokens end at the same time, but one stood still for a second.
#
# **Predict.** Do their means of the time between tokens differ? Which metric shows the difference?

# %%
even, stalled = life(0.4, longest_gap=2.0 / 39), life(0.4, longest_gap=1.0)
for name, each in {"even": even, "stalled": stalled}.items():
    per_token = (each.ended - each.first) / (each.num_output - 1)
    print(f"{name:8} time per output token {1e3 * per_token:.1f} ms, longest gap {ms(each.longest_gap)}, within a goal of 100 ms between tokens: {Goal(gap=0.1).is_met(each)}")
assert Goal(gap=0.1).is_met(even) and not Goal(gap=0.1).is_met(stalled)

# %% [markdown]
# ## 8. What recording costs
#
# The next cell times what the recorder does in a step with 64 requests, which each get a token, and what the server's process does with the
# step's report. Beside it is the obvious way: `observe` of `prometheus_client` for each gap.
#
# **Predict.** How many microseconds does each take? The chapter's limit is 300 for a step.

# %% tags=["varies"]
def microseconds(function, repeats=200):
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(1e6 * (time.perf_counter() - began))
    return median(times)


recorder = Recorder()
seqs = [SimpleNamespace(seq_id=i, began=0.0, arrived=0.0, first=0.0, last=time.monotonic(), longest_gap=0.0, num_computed=20, num_prompt=10, num_scheduled=1) for i in range(64)]


def record_step():
    recorder.begin()
    recorder.end_part()
    recorder.feed(seqs)
    for _ in PARTS[1:4]:
        recorder.end_part()
    for seq in seqs:
        recorder.token(seq)
    recorder.end_step(seqs, 0, 0)


recording = microseconds(record_step)
step = recorder.steps[-1]
counting = microseconds(lambda: metrics.add_step(step))
library = LibraryHistogram("gap_seconds", "Gaps.", buckets=SHORT, registry=None)
observing = microseconds(lambda: [library.observe(gap) for gap, count in step.gaps for _ in range(count)])
print(f"recording a step {recording:.0f} us, counting it in the server {counting:.0f} us; 64 calls of observe {observing:.0f} us")
print("the limit of 300 us a step is kept:", recording + counting < 300)
assert step.num_seqs == 64 and sum(count for _, count in step.gaps) == 64
assert recording + counting < 3000, "this would be ten times the limit"

# %% [markdown]
# Recording writes plain numbers into lists, in the engine's process. The server's process counts a step's gaps at once rather than token by
# token, while the engine is in its next step. And a metric is made only when somebody scrapes.
#
# ## To try
#
# 1. In part 1, count the time to first token from `began` instead of `arrived`. What would the engine report while a thousand requests wait?
# 2. In part 3, choose bounds such that the 90th percentile from buckets is within 1% of the true one. How many do you need if you do not know it beforehand?
# 3. In part 4, abort a request in the middle (`engine.abort_request`). Which counters change, and in which histograms does it not appear?
# 4. In part 7, find two servers of which one has the better p99 and the other the better goodput.
#
# The chapter's text is [milestones/v17_metrics/README.md](../milestones/v17_metrics/README.md). `make test-v17` runs its tests, `make traps-v17`
# plants its seeded bugs, and `make diff-v17` shows everything that the chapter changed.
