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
# # v07, followed along: one thread steps, messages cross
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v07_server.ipynb)
#
# You read the messages between the engine thread and the event loop, abort a request while its step is running, make a
# step fail, block an event loop on purpose, read a stream as bytes on the wire, and hang up in the middle of an answer.
# This takes about twenty-five minutes. Before each run there is a question: write down your answer first.

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

# %%
import asyncio
import io
import json
import logging
import queue
import socket
import threading
import time
import warnings
from contextlib import ExitStack, contextmanager, redirect_stderr
from itertools import count, groupby
from typing import NamedTuple

import httpx
import matplotlib.pyplot as plt
import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets
logging.getLogger("milestones").setLevel(logging.CRITICAL)  # part 3 fails a step on purpose, which logs a traceback

from milestones.v07_server import Engine, SamplingParams
from milestones.v07_server.engine_loop import Abort, Aborted, Add, EngineLoop, Failed, Refused, Stepped, Stop
from milestones.v07_server.outputs import Stats
from shared.chapters import find
from shared.checkpoints import POCKET
from shared.verify.serving import serving, wait_until

# %% [markdown]
# ## 1. Messages cross
#
# `EngineLoop` owns the engine and runs in a thread. Another thread puts messages into its inbox. The engine loop reads all
# of them, takes one step, and posts the results. These messages are in the inbox before the thread starts:
#
# | message | request | prompt | `max_tokens` |
# |---|---|---|---:|
# | `Add`, call 1 | 1.0 | Once upon a time | 3 |
# | `Add`, call 2 | 2.0 | Once upon a time | 5 |
# | | 2.1 | The fox | 5 |
#
# A *call* holds the engine requests of one HTTP request, numbered from 0. (This chapter's server always sends one; the
# next chapter's may send several.) In the server, the event loop receives what the thread posts. Here it is appended to a
# list for you to read. `replies` maps a number of `Stepped` to the messages to send once that many have arrived; part 2
# needs it.
#
# **Predict.** Three requests get 3 + 5 + 5 = 13 tokens. How many messages does the thread post for them, and how many
# outputs are in the last one? On which thread does `receive` run?

# %%
engine = Engine(POCKET, device="cpu", max_num_seqs=4)
STORY, FOX = engine.tokenizer("Once upon a time").input_ids, engine.tokenizer("The fox").input_ids


def tokens(number):
    """Parameters of a request that generates exactly this many tokens."""
    return SamplingParams(max_tokens=number, ignore_eos=True)


class Posted(NamedTuple):
    """A message from the engine thread, the engine's stats at that moment, and the thread that posted it."""

    message: tuple
    stats: Stats
    thread: str


@contextmanager
def an_engine_thread(engine, inbox, replies):
    """Run the chapter's EngineLoop in a thread; yields its inbox, and the growing list of what it posts."""
    posted, sent = [], queue.SimpleQueue()

    def receive(message, stats):
        posted.append(Posted(message, stats, threading.current_thread().name))
        if isinstance(message, Stepped):
            steps = sum(isinstance(each.message, Stepped) for each in posted)
            for reply in replies.get(steps, []):
                sent.put(reply)

    thread = threading.Thread(target=EngineLoop(engine, sent, receive).run, name="engine")
    for message in inbox:
        sent.put(message)
    thread.start()
    try:
        yield sent, posted
    finally:
        sent.put(Stop())
        thread.join(20)


def run_to_the_end(engine, inbox, replies=None):
    """Return what the thread posts until the engine is idle."""
    with an_engine_thread(engine, inbox, replies or {}) as (_, posted):
        wait_until(lambda: posted and posted[-1].stats.running + posted[-1].stats.waiting == 0)
    return posted


def show(posted):
    """Print a line per message."""
    for message, stats, _ in posted:
        if isinstance(message, Stepped):
            ends = ("" if output.finish_reason is None else "." for _, _, output in message.outputs)
            pairs = zip(message.outputs, ends)
            said = "  ".join(f"{call}.{i} {output.text!r}{end}" for (call, i, output), end in pairs)
        else:
            said = "  ".join(map(str, message))
        print(f"{type(message).__name__:8} {said:52} running {stats.running}, waiting {stats.waiting}")

# %%
posted = run_to_the_end(engine, [Add(1, [(STORY, tokens(3))]), Add(2, [(STORY, tokens(5)), (FOX, tokens(5))])])
show(posted)
print("received on:", {each.thread for each in posted})
steps = [each.message for each in posted if isinstance(each.message, Stepped)]
assert len(posted) == 2 + 5 and [len(step.outputs) for step in steps] == [3, 3, 3, 2, 2]
assert {each.thread for each in posted} == {"engine"}

# %% [markdown]
# There are seven messages: one reply to each `Add`, and one `Stepped` per step, with the new tokens of every request that
# took part. A dot marks a request's last token; the last message has two outputs. One message per token would carry the same
# information and wake the event loop thirteen times.
#
# Both calls were added before the first step, because the thread reads its whole inbox before each step. `receive` runs
# on the engine thread, so whatever it does delays the next step. In the server, it only asks the event loop to call a
# function (`call_soon_threadsafe`).
#
# ## 2. A new request, and an abort
#
# | when | message |
# |---|---|
# | before the thread starts | `Add`, call 1: ten tokens |
# | | `Add`, call 2: six tokens |
# | when the second `Stepped` arrives | `Add`, call 3: four tokens |
# | when the fourth `Stepped` arrives | `Abort`, call 1 |
#
# **Predict.** Which `Stepped` is the first to contain a token of call 3? How many tokens does call 1 get? Between which two
# `Stepped` is `Aborted` posted?

# %%
inbox = [Add(1, [(STORY, tokens(10))]), Add(2, [(STORY, tokens(6))])]
posted = run_to_the_end(engine, inbox, replies={2: [Add(3, [(FOX, tokens(4))])], 4: [Abort(1)]})
show(posted)
calls = [[call for call, _, _ in each.message.outputs] for each in posted if isinstance(each.message, Stepped)]
assert calls == [[1, 2], [1, 2], [1, 2, 3], [1, 2, 3], [2, 3], [2, 3]]
assert posted[-1].stats.free_blocks == engine.pool.num_blocks

# %%
figure, axes = plt.subplots(figsize=(8, 2.4))
colors = {1: "tab:blue", 2: "tab:orange", 3: "tab:green"}
for place, (message, _, _) in enumerate(posted):
    if isinstance(message, Stepped):
        for call, _, _ in message.outputs:
            axes.plot(place, call, "o", color=colors[call])
    else:
        marker = "x" if isinstance(message, Aborted) else ">"
        axes.plot(place, message.call_id, marker, color=colors[message.call_id], markersize=10)
axes.set_xticks(range(len(posted)), [type(message).__name__ for message, _, _ in posted], rotation=40, fontsize=8)
axes.set(title="What the engine's thread posts, in order", ylabel="call")
axes.set_yticks([1, 2, 3])
axes.invert_yaxis()
plt.show()

# %% [markdown]
# A message that arrives during a step is read after it. So call 3 joins in the third step, and call 1 is aborted after four
# of its ten tokens. `Aborted` means that no token of that call will follow.
#
# In this run the abort arrived exactly between two steps. But a client can hang up at any moment. Below, a hook stops a
# step in its forward pass until the abort is in the inbox.
#
# **Predict.** The step is already running when the abort is sent. Does the thread post `Aborted` alone, or another
# message first?

# %%
begun, go_on = threading.Event(), threading.Event()


def hold(_model, _inputs):
    begun.set()
    go_on.wait(20)


hook = engine.model.register_forward_pre_hook(hold)
with an_engine_thread(engine, [Add(1, [(STORY, tokens(9))])], replies={}) as (sent, posted):
    begun.wait(20)
    sent.put(Abort(1))  # during the step
    go_on.set()
    wait_until(lambda: isinstance(posted[-1].message, Aborted))
hook.remove()
show(posted)
assert [type(each.message).__name__ for each in posted] == ["Added", "Stepped", "Aborted"]

# %% [markdown]
# A step cannot be interrupted: its token is posted although the client is gone. So the event loop's side drops outputs of
# a call that it has aborted (`AsyncEngine.deliver`), and never reuses a call's number.
#
# ## 3. Refused, and failed
#
# This engine runs at most two requests at once. Call 4 has two requests; token 100,000 is not in the vocabulary.
#
# | message | requests |
# |---|---|
# | `Add`, calls 1, 2 and 3 | one each, four tokens: two run, one waits |
# | `Add`, call 4 | one valid, one with the token 100,000 |
#
# The second forward pass raises an exception.
#
# **Predict.** What happens to call 4's first request? Which calls fail with the step, and what text does call 3 get in
# the end?

# %%
two_places = Engine(POCKET, device="cpu", max_num_seqs=2)
passes = count(1)


def fail_the_second(_model, _inputs):
    if next(passes) == 2:
        raise RuntimeError("injected")


hook = two_places.model.register_forward_pre_hook(fail_the_second)
one_each = [Add(call_id, [(STORY, tokens(4))]) for call_id in (1, 2, 3)]
posted = run_to_the_end(two_places, [*one_each, Add(4, [(FOX, tokens(4)), ([100_000], tokens(4))])])
hook.remove()
show(posted)
[refused] = [each.message for each in posted if isinstance(each.message, Refused)]
[failed] = [each.message for each in posted if isinstance(each.message, Failed)]
assert refused.call_id == 4 and refused.param == "prompt" and failed.call_ids == [1, 2]
[alone] = two_places.generate([STORY], tokens(4))
said = {call: "" for call in (1, 2, 3, 4)}
for message in (each.message for each in posted if isinstance(each.message, Stepped)):
    for call, _, output in message.outputs:
        said[call] += output.text
print(said)
assert said[3] == alone.text and said[4] == ""
assert posted[-1].stats.free_blocks == two_places.pool.num_blocks

# %% [markdown]
# A call is queued as a whole or not at all: call 4's first request was added, then aborted. The failed step ended calls 1
# and 2, which took part in it: their first token was delivered, and no second one. Call 3 was waiting, and generates the
# same text as when it runs alone. In the server, calls 1 and 2 would get a 500, or an error as the last event if their
# stream has begun.
#
# ## 4. A blocked event loop
#
# Now the whole server. `serving` runs it around an engine, on a free port, in a thread of this process. A coroutine called
# `tick` runs on the server's own event loop: it sleeps for 10 ms again and again, and records how late it wakes up.
# Meanwhile the server gets four kinds of work:
#
# | work | where it runs |
# |---|---|
# | a request with a prompt of 1,800 tokens: one long step | the engine's thread, as in the chapter |
# | the same step, on another engine | the event loop |
# | a text of half a million characters, which is tokenized and refused | the tokenizer's thread, as in the chapter |
# | the same text | the event loop |
#
# **Predict.** How late is the worst tick in each of the four cases: about 0, or about as long as the work takes?

# %%
async def tick(late_by, stop):
    """Until stop is set, sleep for 10 ms at a time; append when each sleep ended and how late, in seconds."""
    first = time.perf_counter()
    while not stop.is_set():
        begin = time.perf_counter()
        await asyncio.sleep(0.01)
        late_by.append((time.perf_counter() - first, time.perf_counter() - begin - 0.01))


def ticks_during(loop, work):
    """Run work in this thread while `tick` runs on an event loop; return what it appended."""
    late_by, stop = [], threading.Event()
    ticking = asyncio.run_coroutine_threadsafe(tick(late_by, stop), loop)
    work()
    stop.set()
    ticking.result(60)
    return late_by


@contextmanager
def a_server(engine):
    """The chapter's server on a free port, and a client of it. What the server prints is discarded."""
    with ExitStack() as stack:
        with redirect_stderr(io.StringIO()):
            server = stack.enter_context(serving(find("v07"), engine))
        yield server, stack.enter_context(httpx.Client(base_url=server.url, timeout=60))


def body_of(prompt, max_tokens, **more):
    """What a client sends to /v1/completions."""
    return {"model": "pocket", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0} | more


# %%
long_prompt = "Once upon a time there was a fox. " * 200
too_long = "Once upon a time there was a fox. " * 15_000
statuses = {}
with a_server(engine) as (server, client):
    async_engine = server.service.async_engine

    def ask(prompt):
        statuses[len(prompt)] = client.post("/v1/completions", json=body_of(prompt, 1)).status_code

    async def step_here():
        two_places.add_request(long_prompt, tokens(1))
        while two_places.has_unfinished_requests():
            two_places.step()

    async def tokenize_here(function, *args):
        return function(async_engine.tokenizer, *args)

    loop = async_engine.loop
    late = {"a step, on the engine's thread": ticks_during(loop, lambda: ask(long_prompt))}
    late["a step, on the event loop"] = ticks_during(
        loop, lambda: asyncio.run_coroutine_threadsafe(step_here(), loop).result(60)
    )
    late["half a million characters, on the tokenizer's thread"] = ticks_during(loop, lambda: ask(too_long))
    async_engine.tokenize = tokenize_here
    late["half a million characters, on the event loop"] = ticks_during(loop, lambda: ask(too_long))
worst = [max(by for _, by in late_by) for late_by in late.values()]
for name, seconds in zip(late, worst):
    print(f"{name:52} the worst tick was late by {1000 * seconds:.1f} ms")
assert statuses == {len(long_prompt): 200, len(too_long): 400}
assert worst[1] > 2 * worst[0] and worst[3] > 2 * worst[2]

# %%
figure, panels = plt.subplots(2, 2, figsize=(9, 4), sharey=True, sharex="row")
for panel, (name, late_by) in zip(panels.flat, late.items()):
    panel.plot([1000 * moment for moment, _ in late_by], [1000 * by for _, by in late_by], ".-", linewidth=0.8)
    panel.set_title(name, fontsize=9)
panels[0, 0].set(ylabel="late by, ms")
panels[1, 0].set(ylabel="late by, ms", xlabel="ms since the work began")
panels[1, 1].set(xlabel="ms since the work began")
figure.tight_layout()
plt.show()

# %% [markdown]
# On the right, one tick waits for as long as the work takes, and so does everything else on the event loop: every other
# stream stops, `/health` does not answer, no new request is read. On the left, the ticks are almost on time. All threads
# share Python's global interpreter lock (GIL), but PyTorch and the tokenizer release it while they compute. (Other requests
# still have to wait for the busy tokenizer thread. The next chapter refuses a text of this size before it is tokenized.)
#
# ## 5. Bytes on the wire
#
# This client is only a socket. It requests three tokens as a stream, with usage, and prints whatever arrives.
#
# **Predict.** The text is about twelve bytes long. How many lines begin with `data:`? How many bytes arrive in all:
# about 100, 1,000 or 10,000?

# %% tags=["varies"]
def raw_answer(url, body):
    """Return all bytes that a server sends in response to a body."""
    raw = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":")[-1]))) as connection:
        connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        return b"".join(iter(lambda: connection.recv(65536), b""))


asked = body_of("Once upon a time", 3, ignore_eos=True, stream=True, stream_options={"include_usage": True})
with a_server(engine) as (server, client):
    answer = raw_answer(server.url, asked)
print(answer.decode())

# %%
data = [line.removeprefix("data: ") for line in answer.decode().split("\n") if line.startswith("data: ")]
chunks = [json.loads(each) for each in data[:-1]]
pieces = [piece for chunk in chunks for piece in chunk["choices"]]
text = "".join(piece["text"] for piece in pieces)
print(f"lines with data: {len(data)}; the text: {text!r}; usage: {chunks[-1]['usage']}")
print(f"{len(answer) / len(text):.1f} bytes for each byte of text")
assert [piece["finish_reason"] for piece in pieces] == [None, None, "length"] and data[-1] == "[DONE]"
assert len(data) == 5 and len({chunk["id"] for chunk in chunks}) == 1
assert text == engine.generate([STORY], tokens(3))[0].text

# %% [markdown]
# The numbers on lines of their own belong to HTTP: the length of the next chunk in hexadecimal, and 0 at the end. The
# chunks contain *server-sent events*: a line `data: ...`, then an empty line. Three tokens are three events here; the
# fourth event has the usage and no choices, and the fifth is `[DONE]`, which is not JSON. (A token that completes
# no character gets no event of its own.) The status 200 is sent before the first token, so a later error can only be one
# more event.
#
# ## 6. A client hangs up
#
# Below, every message between the server's two threads is recorded. The first client reads five events of a stream of
# 1,500 tokens and closes its connection. The second makes a non-streaming request for 1,500 tokens, and gives up after
# 300 ms.
#
# **Predict.** Which messages cross for each of them? The second client has received nothing yet: how can the server
# know that it is gone?

# %% tags=["varies"]
def crossings(server):
    """A list of the messages that cross from now on, in both directions."""
    thread, crossed = server.service.async_engine.runner, []
    send, receive = thread.send, thread.receive

    def sent(message):
        crossed.append(("to the engine's thread  ", message))
        send(message)

    def received(message, stats):
        crossed.append(("from the engine's thread", message))
        receive(message, stats)

    thread.send, thread.receive = sent, received
    return crossed


def leave(server, client, stream):
    """Request 1,500 tokens, hang up early, and print which messages crossed."""
    crossed, before = crossings(server), engine.num_steps
    asked = body_of("Once upon a time", 1500, ignore_eos=True, stream=stream)
    if stream:
        with client.stream("POST", "/v1/completions", json=asked) as response:
            lines = (line for line in response.iter_lines() if line.startswith("data: {"))
            for _ in range(5):
                next(lines)
    else:
        try:
            client.post("/v1/completions", json=asked, timeout=0.3)
        except httpx.ReadTimeout:
            pass
    wait_until(lambda: isinstance(crossed[-1][1], Aborted))
    print(f"a stream: {stream}; {engine.num_steps - before} of 1500 tokens were computed")
    for (direction, name), group in groupby(crossed, lambda pair: (pair[0], type(pair[1]).__name__)):
        print(f"    {direction} {name} x {len(list(group))}")
    names = [type(message).__name__ for _, message in crossed]
    assert [name for name in names if name != "Stepped"] == ["Add", "Added", "Abort", "Aborted"]
    assert engine.num_steps - before < 1500 and engine.pool.num_free == engine.pool.num_blocks


with a_server(engine) as (server, client):
    leave(server, client, stream=True)
    leave(server, client, stream=False)

# %% [markdown]
# Both clients cause the same four messages, besides one `Stepped` per step until the abort is read. For a non-streaming
# request, the server waits for two things at once: the answer, and the end of the connection (`unless_gone` in
# `streaming.py`). Whichever happens first cancels the other. (The status 499 is never delivered: the connection is
# closed.)
#
# The last cell checks that no engine thread is left and that both engines are idle.

# %%
assert not [thread.name for thread in threading.enumerate() if thread.name == "engine"]
for each in (engine, two_places):
    print(each.stats())
    assert each.stats().running == each.stats().waiting == 0

# %% [markdown]
# ## To try
#
# 1. In part 2, send `Abort(3)` together with its `Add`: `2: [Add(3, ...), Abort(3)]`. Which messages come back, and
#    does the engine compute a token for call 3?
# 2. In part 3, make every forward pass fail. How many `Failed` messages are posted, and which calls does each name?
# 3. In part 5, request 40 tokens after the prompt `🙂`, with `temperature=2` and `seed=8`, and count the lines that begin
#    with `data:`. Why are there fewer than 42?
#
# The chapter's text is [milestones/v07_server/README.md](../milestones/v07_server/README.md), and `make serve` starts
# the newest chapter's server. `make test-v07` tests this one over a real socket, `make traps-v07` plants its seeded bugs,
# and `make diff-v07` shows everything that the chapter changed.
