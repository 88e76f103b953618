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
# # v07, followed along: speak OpenAI
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v07_server.ipynb)
#
# You start the chapter's server on a free port of this machine, measure what a client feels, watch four clients share
# the engine, hang up in the middle of an answer, and fill the queue until the server says 429. About twenty minutes.
# Before each run there is a question: write your answer down first.

# %%
import subprocess
import sys
from pathlib import Path

root = next((path for path in (Path.cwd(), *Path.cwd().parents) if (path / "milestones").is_dir()), None)
if root is None:  # on Colab: fetch the repository and what it needs
    root = Path("stepserve").resolve()
    subprocess.run(["git", "clone", "--depth", "1", "https://github.com/stepserve/stepserve", str(root)], check=True)
    subprocess.run([sys.executable, str(root / "shared" / "install.py"), "here"], check=True)
sys.path.insert(0, str(root))

# %%
import io
import json
import threading
import time
import warnings
from contextlib import ExitStack, contextmanager, redirect_stderr

import httpx
import matplotlib.pyplot as plt
import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets

from milestones.v07_server import Engine, SamplingParams
from shared.chapters import find
from shared.checkpoints import POCKET
from shared.verify.serving import serving, wait_until

# %% [markdown]
# `serving` puts an engine behind the chapter's server, on a socket, in a thread of this process. Each experiment below
# has its server in a `with`, so that it is shut down when the cell ends, however it ends. (A started server prints its
# address, which is another one at every run; here it is swallowed.)

# %%
@contextmanager
def a_client(engine, **options):
    """A client of the chapter's server on a free port; both are there for as long as the block lasts."""
    with ExitStack() as stack:
        with redirect_stderr(io.StringIO()):
            server = stack.enter_context(serving(find("v07"), engine, **options))
        yield stack.enter_context(httpx.Client(base_url=server.url, timeout=60))


def body_of(prompt, max_tokens, **more):
    """What a client sends to /v1/completions."""
    return {"model": "pocket", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0} | more


engine = Engine(POCKET, device="cpu", max_num_seqs=4)
PROMPT = "Once upon a time"

# %% [markdown]
# ## 1. One answer, as a stream
#
# With `"stream": true` the answer comes as server-sent events, lines that begin with `data:`.
#
# **Predict.** `max_tokens` is 12, and the model is told not to stop before (`ignore_eos`, which is not OpenAI's). How
# many lines with `data:` arrive? What is in the last one?

# %%
with a_client(engine) as client:
    answer = client.post("/v1/completions", json=body_of(PROMPT, 12, stream=True, ignore_eos=True))
data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
pieces = [json.loads(each)["choices"][0] for each in data[:-1]]
print(answer.status_code, answer.headers["content-type"], "  lines with data:", len(data))
for each in (*pieces[:3], pieces[-1]):
    print(each)
print(data[-1])

# %% [markdown]
# A chunk for each token whose text is certain, the last one with a `finish_reason`, and `[DONE]`. A token that holds
# only a part of a character would wait for the rest of it, and there would be a chunk less. Put together, the chunks
# are what the engine says when it is called without a server:

# %%
[alone] = engine.generate([PROMPT], SamplingParams(max_tokens=12, ignore_eos=True))
assert "".join(each["text"] for each in pieces) == alone.text
assert data[-1] == "[DONE]" and pieces[-1]["finish_reason"] == "length" and len(pieces) <= 12
print(repr(alone.text))

# %% [markdown]
# ## 2. What a client feels
#
# The *time to the first token* (TTFT), and the times between tokens after it. The function below notes the moment at
# which each chunk arrives.
#
# **Predict.** First a prompt of a few words, then one of about eight hundred tokens. Which of the two times grows, and
# by how much?

# %%
def listen(client, prompt, max_tokens, arrivals, begin):
    """Stream an answer; note the seconds after begin at which its chunks arrive."""
    asked = body_of(prompt, max_tokens, stream=True, ignore_eos=True)
    with client.stream("POST", "/v1/completions", json=asked) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                arrivals.append(time.perf_counter() - begin)


felt = {}
with a_client(engine) as client:
    listen(client, PROMPT, 8, [], 0.0)  # the first request pays for what is made once, a connection among others
    for name, prompt in (("a few words", PROMPT), ("a long prompt", PROMPT + " there was a fox" * 200)):
        felt[name] = []
        listen(client, prompt, 32, felt[name], time.perf_counter())
        gaps = [late - early for early, late in zip(felt[name], felt[name][1:])]
        median_ms = 1000 * sorted(gaps)[len(gaps) // 2]
        print(f"{name:14} {len(engine.tokenizer.encode(prompt)):5} tokens: "
              f"TTFT {1000 * felt[name][0]:6.1f} ms, then {median_ms:.1f} ms a token (median)")

# %%
figure, axes = plt.subplots(figsize=(8, 3))
for name, arrivals in felt.items():
    axes.plot([1000 * each for each in arrivals], range(1, len(arrivals) + 1), ".-", label=name)
axes.set(title="When the chunks of one answer arrive", xlabel="ms after the request was sent", ylabel="chunks so far")
axes.set_xlim(0)
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# The distance from the left edge to the first dot is the TTFT: tokenizing, the queue, and one pass over the whole
# prompt. It grows with the prompt. After it a step brings one token, whatever the prompt was; that each of them attends
# over more keys costs this small model little. (Dots on top of each other: the reader was busy, and found several
# chunks at once.)
#
# ## 3. Four clients at once
#
# Each client is a thread with a connection of its own. A hook before the model counts the sequences in each forward
# pass.
#
# **Predict.** Four answers of 60 tokens. How many passes does an engine with four places need for all of them? And one
# with two? When does the third client get its first token there?

# %%
def four_clients(engine):
    """When the chunks of four streams arrive, and how many sequences were in each pass."""
    sizes, arrivals = [], [[] for _ in range(4)]
    hook = engine.model.register_forward_pre_hook(lambda model, args: sizes.append(len(args[0].draws)))
    with a_client(engine) as client:
        begin = time.perf_counter()
        threads = [threading.Thread(target=listen, args=(client, PROMPT, 60, each, begin)) for each in arrivals]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    hook.remove()
    return arrivals, sizes


# %% tags=["varies"]
two_places = Engine(POCKET, device="cpu", max_num_seqs=2)
figure, panels = plt.subplots(2, 1, figsize=(8, 4), sharex=True)
for panel, places, each in zip(panels, (4, 2), (engine, two_places)):
    arrivals, sizes = four_clients(each)
    print(f"{places} places: {len(sizes)} passes, together in a pass: {max(sizes)}, tokens: {sum(sizes)}")
    assert sum(sizes) == 4 * 60 and max(sizes) <= places
    arrivals.sort()
    panel.eventplot([[1000 * moment for moment in line] for line in arrivals], linelengths=0.7, colors="tab:blue")
    panel.set(title=f"{places} places", ylabel="client")
    panel.set_yticks(range(4), range(1, 5))
panel.set(xlabel="ms after the first request was sent; a line is a chunk", xlim=0)
figure.tight_layout()
plt.show()

# %% [markdown]
# With four places all four advance together: a pass gives each of them a token, so 60 are enough, and one more if they
# were not all there for the first. With two, the other two wait until the
# first have ended, and then run as the first did; all of their delay is in the TTFT. The connections of those who wait
# are open all the time: the event loop keeps them, and the engine's thread knows nothing of connections.
#
# ## 4. Somebody hangs up
#
# A client asks for 1,500 tokens, reads five chunks, and leaves. `/health` says how busy the engine is.
#
# **Predict.** How many of the 1,500 tokens does the engine compute: five, some more, or all?

# %% tags=["varies"]
def health(client):
    return client.get("/health").json()


steps_before = engine.num_steps
with a_client(engine) as client:
    asked = body_of(PROMPT, 1500, stream=True, ignore_eos=True)
    with client.stream("POST", "/v1/completions", json=asked) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        for _ in range(5):
            next(lines)
        print("five chunks read:", health(client))
        steps_at_exit = engine.num_steps
    wait_until(lambda: health(client)["running"] == 0)
    print("hung up:         ", health(client))
    assert health(client)["free_blocks"] == engine.pool.num_blocks
print(f"computed: {steps_at_exit - steps_before} tokens before it left, {engine.num_steps - steps_at_exit} after")
assert engine.num_steps - steps_before < 1500

# %% [markdown]
# Some more than five, as a rule: the engine does not wait for readers, and went on while `/health` was asked. The
# closed connection is noticed on the event loop, which puts an abort into the queue of calls; the engine's thread takes
# it between two steps, and the blocks are free again. Nothing is sent to the client in all this: there is nobody there.
#
# ## 5. A full queue
#
# The engine has four places. The server is told that at most two may wait (`max_waiting=2`). Six clients take long
# answers.
#
# **Predict.** What does the seventh get, and how soon: when a place is free, or at once?

# %%
with a_client(engine, max_waiting=2) as client, ExitStack() as open_streams:
    asked = body_of(PROMPT, 1500, stream=True, ignore_eos=True)
    readers = []  # kept: a reader that is thrown away closes its connection
    for number in range(6):
        response = open_streams.enter_context(client.stream("POST", "/v1/completions", json=asked))
        readers.append(response.iter_raw())
        if number < 4:
            next(readers[number])  # it has said something, so it runs and does not wait
    wait_until(lambda: health(client)["waiting"] == 2)
    print("six are in:  ", {key: health(client)[key] for key in ("running", "waiting")})
    refused = client.post("/v1/completions", json=body_of(PROMPT, 1))
    print("the seventh: ", refused.status_code, "Retry-After:", refused.headers["retry-after"])
    print("             ", refused.json()["error"]["message"])
    open_streams.close()  # all six hang up
    wait_until(lambda: health(client)["running"] + health(client)["waiting"] == 0)
    again = client.post("/v1/completions", json=body_of(PROMPT, 4))
    print("and now:     ", again.status_code, repr(again.json()["choices"][0]["text"]))
assert (refused.status_code, again.status_code) == (429, 200)

# %% [markdown]
# At once: a queue with an end can say no while the client still has time to go elsewhere. All six streams got their
# `200` when they were queued; the two that waited had heard nothing else yet.
#
# ## 6. What is wrong with a request
#
# **Predict.** Six requests, each with one mistake. Which status does each get, and does the answer name the parameter?
# One of them is answered as if nothing were wrong: which?

# %%
mistakes = {
    "temperature 3": body_of(PROMPT, 4, temperature=3),
    "a penalty of 0.5": body_of(PROMPT, 4, presence_penalty=0.5),
    "a misspelt parameter": body_of(PROMPT, 4, temprature=1),
    "more tokens than the context has": body_of(PROMPT, 5000),
    "another model": body_of(PROMPT, 4) | {"model": "gpt-4"},
    "an empty stop string": body_of(PROMPT, 4, stop=[""]),
}
got = {}
with a_client(engine) as client:
    for name, body in mistakes.items():
        answer = client.post("/v1/completions", json=body)
        error = answer.json().get("error", {"param": None, "message": "(an answer)"})
        got[name] = answer.status_code, error["param"]
        print(f"{name}: {answer.status_code}, param {error['param']}\n    {error['message']}")

# %%
assert got["temperature 3"] == (400, "temperature") and got["a penalty of 0.5"] == (400, "presence_penalty")
assert got["another model"] == (404, "model") and got["a misspelt parameter"] == (200, None)
assert got["more tokens than the context has"][0] == got["an empty stop string"][0] == 400

# %% [markdown]
# Each refusal names what is wrong and what would be right, and no refused request reached a step. A parameter that
# OpenAI documents and this server does not compute is refused, unless its value changes nothing. A name that nobody
# documents is ignored: clients send fields of their own, and a misspelt one cannot be told from them.
#
# All servers are gone by now. The last cell makes sure of it.

# %%
left = [thread.name for thread in threading.enumerate() if thread.name == "engine"]
assert not left, "an engine's thread is still alive"
assert engine.stats().running == engine.stats().waiting == 0
print(engine.stats())

# %% [markdown]
# ## To try
#
# 1. In part 2, make the long prompt twice as long (`* 400`), and predict both times. Then send `* 600` with
#    `client.post` and without `stream`: what is the answer to a prompt that is too long for the context?
# 2. In part 3, give the second engine three places (and the loop a 3). Sketch the picture first: who waits for whom?
# 3. In part 4, ask without a stream: `client.post` with `body_of(PROMPT, 1500, ignore_eos=True)` and `timeout=0.2`, and
#    catch `httpx.ReadTimeout`. Does the engine notice that this client has gone? (`unless_gone` in `server.py` says
#    how.)
#
# The chapter's text is [milestones/v07_server/README.md](../milestones/v07_server/README.md), and `make serve` starts
# this server for any client of OpenAI's. `make test-v07` tests it over a real socket, `make traps-v07` plants its
# seeded bugs, `make diff-v07` shows all that the chapter changed.
