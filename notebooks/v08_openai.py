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
# # v08, followed along: an API is a promise
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v08_openai.ipynb)
#
# OpenAI's own client talks to the chapter's server on this machine. You look at the tokens of a chat, draw three
# answers from one seed, watch a stream hold back text that may be the beginning of a stop string, score a sentence
# token by token, and collect refusals: by name, for a full queue, for a missing key, and from a server that is shutting
# down. About twenty-five minutes. Before each run there is a question: write your answer down first.

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
import io
import signal
import threading
import time
import warnings
from contextlib import ExitStack, contextmanager, redirect_stderr

import httpx
import matplotlib.pyplot as plt
import openai
import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets

from milestones.v08_openai import Engine, SamplingParams
from milestones.v08_openai.params import choice_seed
from milestones.v08_openai.text import TextStream
from shared.chapters import find
from shared.checkpoints import POCKET
from shared.verify.serving import serving, wait_until

# %% [markdown]
# ## 1. A chat is a text with a template around it
#
# `a_server` runs the chapter's server on a free port for as long as its block lasts, with two clients: OpenAI's, and
# a plain HTTP client for endpoints that OpenAI's has no method for. The key is `"none"` because OpenAI's client
# requires one; the server needs no key until part 7.
#
# The engine knows no roles. It gets tokens, and the checkpoint's *chat template* determines which tokens a conversation
# becomes. The cell below sends one conversation as a chat, gets its tokens from `/tokenize` and their text from
# `/detokenize`, and then sends these tokens to `/v1/completions` as a prompt.
#
# **Predict.** "What is a KV cache?" is 6 tokens. How many prompt tokens does the chat's usage report: 6, or more? Does
# the completion return the same text as the chat?

# %%
@contextmanager
def a_server(engine, key="none", **options):
    """The chapter's server, OpenAI's client for it, and a plain one. (The address that it prints is discarded.)"""
    with ExitStack() as stack:
        with redirect_stderr(io.StringIO()):
            server = stack.enter_context(serving(find("v08"), engine, **options))
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        http = httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
        yield server, stack.enter_context(client), stack.enter_context(http)


engine = Engine(POCKET, device="cpu", max_num_seqs=4)
GREEDY = {"model": "pocket", "temperature": 0}
messages = [{"role": "user", "content": "What is a KV cache?"}]
with a_server(engine) as (server, client, http):
    chat = client.chat.completions.create(messages=messages, max_tokens=40, **GREEDY)
    alone = http.post("/tokenize", json={"prompt": messages[0]["content"], "add_special_tokens": False}).json()
    ids = http.post("/tokenize", json={"messages": messages, "return_token_strs": True}).json()
    text = http.post("/detokenize", json={"tokens": ids["tokens"]}).json()["prompt"]
    completion = client.completions.create(prompt=ids["tokens"], max_tokens=40, **GREEDY)
print("the question:    ", alone["count"], "tokens")
print("the conversation:", ids["count"], "tokens,", text)
print("its tokens:      ", ids["token_strs"])
print("the chat:        ", chat.choices[0].message.content)
print("the completion:  ", completion.choices[0].text)
assert chat.usage.prompt_tokens == ids["count"] == alone["count"] + 4
assert chat.choices[0].message.content == completion.choices[0].text and chat.usage == completion.usage

# %% [markdown]
# The template added four special tokens: the beginning of the text, the user's role, the end of the turn, and the
# assistant's role. Otherwise a chat is a completion. `/tokenize` is vLLM's, not OpenAI's; it lets a client count tokens
# before it sends a request.
#
# ## 2. Several answers to one prompt
#
# | request | `n` | `seed` | `temperature` |
# |---|---:|---:|---:|
# | A | 3 | 7 | 1 |
# | B, the same again | 3 | 7 | 1 |
# | C | 1 | 7 | 1 |
# | D | 1 | `choice_seed(7, 1)` | 1 |
#
# **Predict.** Are A's three answers equal? Does B repeat A? Which of A's answers does C return, and which does D?

# %%
draw = {"model": "pocket", "prompt": "A story:", "max_tokens": 10, "temperature": 1}
with a_server(engine) as (server, client, http):
    drawn = {
        name: [choice.text for choice in client.completions.create(**draw, n=n, seed=seed).choices]
        for name, n, seed in (("A", 3, 7), ("B", 3, 7), ("C", 1, 7), ("D", 1, choice_seed(7, 1)))
    }
for name, texts in drawn.items():
    print(name, *map(repr, texts), sep="\n    ")
assert drawn["A"] == drawn["B"] and len(set(drawn["A"])) == 3
assert drawn["C"] == drawn["A"][:1] and drawn["D"] == drawn["A"][1:2]

# %% [markdown]
# The first answer uses the request's own seed, so `n=1` returns the same text as the first of three. Each further
# answer's seed is a hash of the request's seed and the answer's index. To the engine these are three requests with
# three seeds, queued together.
#
# ## 3. Stop strings
#
# `stop` ends the answer before the first of its strings. That string must not appear in a stream. It need not be one
# token, nor begin where a token begins. `TextStream.split` decides which part of a text can go out now and which has to
# wait.
#
# **Predict.** The stop string is `END`. What goes out and what is held, for each of these?
#
# | text | goes out | held |
# |---|---|---|
# | `a friend` | ? | ? |
# | `a friEN` | ? | ? |
# | `a friENE` | ? | ? |
# | `a friENEND of mine` | ? | ? |

# %%
for text in ("a friend", "a friEN", "a friENE", "a friENEND of mine"):
    stream = TextStream(engine.tokenizer, stop=("END",))
    goes_out, held = stream.split(text, "", last=False)
    print(f"{text!r:22} goes out {goes_out!r:12} held {held!r:6} found {stream.stopped_by}")
assert TextStream(engine.tokenizer, stop=("END",)).split("a friEN", "", last=True) == ("a friEN", "")

# %% [markdown]
# `split` holds the longest suffix of the text that could begin a stop string. If nothing follows (`last`), what was held
# is text after all. Next, the tokens of an answer.
#
# **Predict.** The answer is `... called Rosa, who lived on a green hill. Rosa wanted to cross the river ...`, and the
# stop string is `Rosa wanted`. The token ` Rosa` appears twice before the end. What is held each time?

# %%
[whole] = engine.generate(["Once upon a time"], SamplingParams(max_tokens=30))
stream = TextStream(engine.tokenizer, stop=("Rosa wanted",))
with a_server(engine) as (server, client, http):
    asked = {"prompt": "Once upon a time", "max_tokens": 30, "stop": "Rosa wanted", "stream": True, **GREEDY}
    streamed = [chunk.choices[0] for chunk in client.completions.create(**asked)]
for token_id in whole.token_ids:
    goes_out = stream.push([token_id], last=False)
    print(f"{engine.tokenizer.decode([token_id])!r:12} goes out {goes_out!r:12} held {stream.held!r}")
    if stream.stopped_by:
        break
print("over HTTP:", [piece.text for piece in streamed], streamed[-1].finish_reason)
assert "".join(piece.text for piece in streamed) == stream.text == whole.text[: whole.text.index("Rosa wanted")]
assert streamed[-1].finish_reason == "stop"

# %% [markdown]
# `Rosa` waits for one more token each time. The comma shows that it was not the stop string, and both go out together;
# after ` wanted` nothing more goes out. The space before `Rosa` does not wait, because the stop string does not begin
# with a space. The price of a stop string: a stream is delayed wherever its text looks like the beginning of one.
#
# ## 4. How likely a text is
#
# With `echo`, `logprobs` and `max_tokens=0`, the answer is the prompt itself, with the logprob of each of its tokens:
# how likely the token was, given those before it. These two sentences differ in one word:
#
# | | |
# |---|---|
# | hare | Once upon a time there was a brave **hare** called Rosa, who lived on a green hill. |
# | server | Once upon a time there was a brave **server** called Rosa, who lived on a green hill. |
#
# **Predict.** How many tokens of the second sentence have a logprob that is lower than in the first by more than 1:
# only ` server`, or others too? What is the logprob of the very first token?

# %%
scores = {}
with a_server(engine) as (server, client, http):
    for name in ("hare", "server"):
        prompt = f"Once upon a time there was a brave {name} called Rosa, who lived on a green hill."
        echoed = client.completions.create(prompt=prompt, echo=True, logprobs=1, max_tokens=0, **GREEDY).choices[0]
        assert echoed.text == prompt
        scores[name] = echoed.logprobs
for name, found in scores.items():
    lowest = sorted(zip(found.token_logprobs[1:], found.tokens[1:]))[:3]
    told = "  ".join(f"{token!r} {score:.1f}" for score, token in lowest)
    print(f"{name:7} sum {sum(found.token_logprobs[1:]):.1f}   lowest: {told}")
print("the first:", scores["hare"].tokens[0], scores["hare"].token_logprobs[0])
assert scores["hare"].token_logprobs[0] is None and scores["hare"].text_offset[:3] == [0, 0, 4]
first, second = (found.token_logprobs[1:] for found in scores.values())
tokens = scores["server"].tokens[1:]
assert [token for token, a, b in zip(tokens, first, second) if b < a - 1] == [" server", " called"]

# %%
figure, panels = plt.subplots(2, 1, figsize=(9, 4.4), sharey=True)
for panel, (name, found) in zip(panels, scores.items()):
    panel.bar(range(1, len(found.tokens)), found.token_logprobs[1:], color="tab:blue")
    panel.set_xticks(range(len(found.tokens)), found.tokens, rotation=45, fontsize=8)
    panel.set(title=name, ylabel="logprob")
figure.tight_layout()
plt.show()

# %% [markdown]
# Two: ` server`, and ` called`, which is unlikely after it. After that, the model is back in a sentence that it knows.
# The first token, `<|begin|>`, has nothing before it, so it has no logprob. It adds nothing to the text either: both it
# and `Once` are at offset 0. Evaluation programs use `echo` to score a text that they already have.
#
# ## 5. Refused by name
#
# **Predict.** Here are thirteen chat requests, each with one thing added or changed. Which status does each get, and
# which parameter does the error name? Three of them are answered as if nothing were wrong: which?

# %%
changes = {
    "temperature=3": {"temperature": 3},
    "temperature='0'": {"temperature": "0"},
    "a tool": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "an empty list of tools": {"tools": []},
    "JSON wanted": {"response_format": {"type": "json_object"}},
    "a penalty of 0.5": {"presence_penalty": 0.5},
    "a penalty of 0": {"presence_penalty": 0},
    "a misspelled parameter": {"temprature": 1},
    "top_logprobs without logprobs": {"top_logprobs": 2},
    "two different limits": {"max_completion_tokens": 9},
    "an image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}]},
    "another model": {"model": "gpt-4"},
    "too many tokens": {"max_tokens": 5000},
}
got = {}
with a_server(engine) as (server, client, http):
    for name, change in changes.items():
        answer = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4, **GREEDY} | change)
        error = answer.json().get("error", {"param": None, "code": None, "message": "(an answer)"})
        got[name] = answer.status_code, error["param"]
        print(f"{name:31}{answer.status_code}  param {error['param']}, code {error['code']}")
        print(f"    {error['message'][:110]}")

# %%
assert [name for name, (status, _) in got.items() if status == 200] == [
    "an empty list of tools", "a penalty of 0", "a misspelled parameter"
]  # fmt: skip
assert got["another model"] == (404, "model") and got["a tool"] == (400, "tools")
assert got["temperature='0'"] == (400, "temperature") and got["an image"][1].startswith("messages[0].content")

# %% [markdown]
# A parameter that OpenAI documents either works or is refused by name. Otherwise, a client that requested JSON and got
# prose would notice much later. An unsupported parameter is still accepted with a value that has no effect (an
# empty list of tools, a penalty of 0). An undocumented name is ignored, because real clients send fields of their own;
# the price is that a misspelled name goes unnoticed. (v07 refuses every field that it does not list.)
#
# ## 6. A full queue
#
# The engine runs at most two requests at once, and the server lets at most two more wait (`max_waiting=2`). Two streams
# run and two wait. Then three more requests arrive, one after the other:
#
# | request | client |
# |---|---|
# | one answer | without retries |
# | `n=3` | without retries |
# | one answer, while the four streams hang up after 0.3 s | with two retries, the client's default |
#
# **Predict.** What does each get, and after how long?

# %%
small = Engine(POCKET, device="cpu", max_num_seqs=2)
LONG = {"prompt": "Once upon a time", "max_tokens": 1500, "stream": True, "extra_body": {"ignore_eos": True}, **GREEDY}


def health(http):
    return http.get("/health").json()


with a_server(small, max_waiting=2) as (server, client, http):
    streams = [client.completions.create(**LONG) for _ in range(2)]
    wait_until(lambda: health(http)["running"] == 2)
    streams += [client.completions.create(**LONG) for _ in range(2)]
    wait_until(lambda: health(http)["waiting"] == 2)
    one = {"prompt": "Once", "max_tokens": 1, **GREEDY}
    refused = []
    for more in ({}, {"n": 3}):
        begin = time.perf_counter()
        try:
            client.completions.create(**one, **more)
        except openai.APIStatusError as error:
            refused.append(error)
            print(f"{error.status_code} after {time.perf_counter() - begin:.3f} s: {error.body['message']}")
    print("Retry-After:", refused[0].response.headers["retry-after"])
    hang_up = threading.Timer(0.3, lambda: [stream.close() for stream in streams])
    hang_up.start()
    begin = time.perf_counter()
    done = client.with_options(max_retries=2).completions.create(**one)
    waited = time.perf_counter() - begin
    print(f"with retries, after {waited:.3f} s: {done.choices[0].text!r}")
    hang_up.join()
assert [error.status_code for error in refused] == [429, 400] and refused[1].param == "n"
assert waited > 0.9

# %% [markdown]
# The 429 is sent at once, while the client still has time to go elsewhere. OpenAI's client waits for the second that
# `Retry-After: 1` names, then retries by itself. `n=3` is a 400: three requests never fit into a queue of two, so
# retrying cannot help. (Each of the four streams got its 200 when its request was queued, whether it ran or waited.)
#
# ## 7. Keys
#
# This server starts with two keys, `for-alice` and `for-bob`. Requests to `/health` and to `/tokenize` are sent with
# each of these keys, with `for-carol`, and with no key.
#
# **Predict.** Which of these eight requests get a 200?

# %%
tried = {}
with a_server(engine, key="for-bob", api_keys=("for-alice", "for-bob")) as (server, client, http):
    for key in ("for-alice", "for-bob", "for-carol", None):
        for method, path in (("GET", "/health"), ("POST", "/tokenize")):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            body = {"json": {"prompt": "x"}} if method == "POST" else {}
            answer = httpx.request(method, server.url + path, headers=headers, **body)
            tried[key, path] = answer.status_code
            told = answer.json().get("error", {}).get("message", "")
            print(f"key {key!s:10} {method:4} {path:10} {answer.status_code}", told)
    print("OpenAI's client:", [model.id for model in client.models.list()])
assert [pair for pair, status in tried.items() if status == 401] == [("for-carol", "/tokenize"), (None, "/tokenize")]

# %% [markdown]
# `/health` is open, because a load balancer calls it without a key; so are `/version` and the documentation at
# `/docs`. Everything else needs one of the keys. In this chapter all keys have the same rights; v09 uses them to tell
# clients apart.
#
# ## 8. A server that is shutting down
#
# SIGTERM asks a process to end. A stream of 200 tokens is running when it arrives. (The cell calls `handle_exit`,
# as the signal would.) While the stream continues, a client requests `/health`, the models, and a completion. The
# second time, the server has five seconds to drain, the minimum, and the stream has 1,500 tokens.
#
# **Predict.** What do the three requests get? How does the stream end, each time?

# %%
ends = []
for drain_seconds, max_tokens in ((30, 200), (5, 1500)):
    with a_server(engine, drain_seconds=drain_seconds) as (server, client, http):
        chunks = iter(client.completions.create(**LONG | {"max_tokens": max_tokens}))
        next(chunks)
        server.handle_exit(signal.SIGTERM, None)
        asked = [http.get("/health"), http.get("/v1/models")]
        asked.append(http.post("/v1/completions", json={"prompt": "Once", **GREEDY}))
        try:
            ends.append([chunk.choices[0].finish_reason for chunk in chunks][-1])
        except openai.APIError as error:
            ends.append(error.message)
        wait_until(lambda: server.should_exit)
    print(f"{drain_seconds} s to drain:", [answer.status_code for answer in asked], "the stream ends with:", ends[-1])
print("health:", asked[0].json()["status"], "  the completion:", asked[2].json()["error"]["message"])
print({name: asked[2].headers[name] for name in ("retry-after", "connection")})
assert [answer.status_code for answer in asked] == [503, 200, 503]
assert ends == ["length", "the server was shut down before this request was done"]

# %% [markdown]
# Running requests may finish; new work is refused with a 503, and `/health` returns 503 so that a load balancer sends
# nothing more. A stream that has not finished shortly before the time is up gets an error as its last event. A stream
# that just broke off would look like a network fault.
#
# ## To try
#
# 1. In part 3, make the stop string ` Rosa wanted`, with a space. What is held now? Then give two, `hill` and `hi`.
#    Which is `stopped_by`?
# 2. In part 4, set `logprobs=3` and look at `top_logprobs`. What did the model expect where it got ` server`?
# 3. In part 6, let four requests wait (`max_waiting=4`), and send only the one with `n=3`. Is it a 400 or a 429 now?
#
# The chapter's text is [milestones/v08_openai/README.md](../milestones/v08_openai/README.md), and `make chat` talks to
# `make serve`. `make test-v08` tests this server over a real socket, `make traps-v08` plants its seeded bugs and shows
# the test that catches each, and `make diff-v08` shows everything that the chapter changed.
