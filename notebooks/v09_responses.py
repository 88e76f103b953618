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
# # v09, followed along: an API that remembers
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v09_responses.ipynb)
#
# You hold a conversation and send only your own lines, look at every event of a stream, fetch an answer that was computed in
# the background, cancel another one halfway, try to read another client's response, and fill the store until it forgets.
# It takes about twenty minutes. Before each run there is a question: write your answer down first.

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
import threading
import time
import warnings
from contextlib import ExitStack, contextmanager, redirect_stderr

import matplotlib.pyplot as plt
import openai
import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets

from milestones.v09_responses import Engine
from milestones.v09_responses.responses_store import STORE_SIZE, Store
from shared.chapters import find
from shared.checkpoints import POCKET
from shared.verify.serving import serving, wait_until

# %% [markdown]
# ## 1. A response
#
# `a_server` runs the chapter's server on a free port until its block ends. `client_of(key)` makes an OpenAI client for it.
# `refusal` makes a call that the server should refuse, and returns the status, the parameter and the message.
#
# The first request asks a question. The second asks the same with `store=False`. Then both are fetched by their ids.
#
# **Predict.** Does a chat give the same answer as the response? Which of the two responses can be fetched? What does
# fetching the other return?

# %%
@contextmanager
def a_server(engine, **options):
    """Run the chapter's server; yield it and a function that makes a client for it. (The address that it prints is discarded.)"""
    with ExitStack() as stack:
        with redirect_stderr(io.StringIO()):
            server = stack.enter_context(serving(find("v09"), engine, **options))

        def client_of(key="none"):
            return stack.enter_context(openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0))

        yield server, client_of


def refusal(call, *args, **more):
    """Make a call that the server must refuse; return the status, the parameter and the message."""
    try:
        call(*args, **more)
    except openai.APIStatusError as error:
        return error.status_code, error.body["param"], error.body["message"]
    raise AssertionError("it was not refused")


engine = Engine(POCKET, device="cpu", max_num_seqs=4)
GREEDY = {"model": "pocket", "temperature": 0}
QUESTION = "What is a KV cache?"
with a_server(engine) as (server, client_of):
    client = client_of()
    stored = client.responses.create(input=QUESTION, **GREEDY)
    unstored = client.responses.create(input=QUESTION, store=False, **GREEDY)
    chat = client.chat.completions.create(messages=[{"role": "user", "content": QUESTION}], **GREEDY)
    fetched = client.responses.retrieve(stored.id)
    status, param, message = refusal(client.responses.retrieve, unstored.id)
for name in ("object", "status", "store", "previous_response_id", "instructions", "error", "incomplete_details"):
    print(f"{name:22}{getattr(stored, name)}")
print("output:", [(item.type, item.role, item.status, item.content[0].type) for item in stored.output])
print("text:  ", stored.output_text)
print("usage: ", stored.usage.input_tokens, "+", stored.usage.output_tokens, "=", stored.usage.total_tokens)
print("the one that was not stored:", status, message.replace(unstored.id, "resp_..."))
assert fetched == stored and status == 404
assert stored.output_text == unstored.output_text == chat.choices[0].message.content

# %% [markdown]
# A response is a chat completion in another format, and the server keeps it unless the client sets `store=False`. The
# default is true, as in OpenAI's API.
#
# ## 2. A conversation
#
# The client sends one line per turn, and the id of the previous response:
#
# | turn | `input` | `previous_response_id` | `instructions` |
# |---|---|---|---|
# | 1 | Tell me a story about a fox. | | Be brief. |
# | 2 | What is a KV cache? | of turn 1 | |
# | 3 | Tell me another one about an owl. | of turn 2 | |
#
# **Predict.** The client sends about ten tokens per turn. How many input tokens does the engine compute in each turn: about
# ten, or more and more? Is `Be brief.` still part of the conversation in turn 2?

# %%
lines = ["Tell me a story about a fox.", QUESTION, "Tell me another one about an owl."]
turns, whole = [], []
with a_server(engine) as (server, client_of):
    client = client_of()
    for line in lines:
        previous = {"previous_response_id": turns[-1].id} if turns else {"instructions": "Be brief."}
        turns.append(client.responses.create(input=line, **previous, **GREEDY))
    # The same conversation, as a client must send it to /v1/chat/completions.
    for line, turn in zip(lines, turns):
        whole.append({"role": "user", "content": line})
        said = client.chat.completions.create(messages=whole, **GREEDY)
        print(f"> {line}\n  {turn.output_text}")
        print(f"  response: {turn.usage.input_tokens} input tokens; chat: {said.usage.prompt_tokens}")
        whole.append({"role": "assistant", "content": turn.output_text})
        if turn is not turns[0]:
            assert said.choices[0].message.content == turn.output_text
            assert said.usage.prompt_tokens == turn.usage.input_tokens

# %%
sent = [len(engine.tokenizer(line, add_special_tokens=False).input_ids) for line in lines]
figure, axes = plt.subplots(figsize=(7, 2.8))
places = range(1, 4)
axes.bar([place - 0.2 for place in places], sent, 0.4, label="in the client's line")
axes.bar([place + 0.2 for place in places], [turn.usage.input_tokens for turn in turns], 0.4, label="computed as input")
axes.set(title="Tokens per turn", xlabel="turn")
axes.set_xticks(places)
axes.legend()
plt.show()

# %% [markdown]
# The server builds the whole conversation from what it stored, and the engine computes all of it again in every turn,
# because the server stores texts, not keys and values. The client sends less, but the same tokens are computed.
# `instructions` belong to one request: turn 1 has more input tokens than the chat beside it, turns 2 and 3 have the same
# number.
#
# ## 3. A tree
#
# Three responses continue from the same one, a story that `max_output_tokens` has cut off.
#
# **Predict.** Do the three see each other? The story breaks off after `there was`. Does the model finish the sentence if the
# next input is `Go on.`?

# %%
with a_server(engine) as (server, client_of):
    client = client_of()
    cut = client.responses.create(input="Tell me a story about a fox.", max_output_tokens=6, **GREEDY)
    after = {
        line: client.responses.create(input=line, previous_response_id=cut.id, **GREEDY)
        for line in ("Hello!", QUESTION, "Go on.")
    }
    kept = {run.id: run.messages for run in server.config.app.state.responses.runs.values()}
print(f"{cut.status}, because of {cut.incomplete_details.reason}: {cut.output_text!r}")
for line, response in after.items():
    print(f"> {line}  ({response.usage.input_tokens} input tokens)\n  {response.output_text}")
print("kept for the last one:", *kept[after["Go on."].id], sep="\n    ")
assert [[turn["content"] for turn in kept[response.id]][-1] for response in after.values()] == list(after)
assert all(kept[response.id][0] is kept[cut.id][0] for response in after.values())
assert len({id(kept[response.id][1]["content"]) for response in after.values()}) == 1

# %% [markdown]
# They do not see each other: each has its own list of turns, which begins with those of `cut`. The lists share the texts, so
# each text is stored once, no matter how many responses continue from it. In the next prompt, the broken-off answer is a
# complete turn of the assistant, and the model begins a new one.
#
# ## 4. The events of a stream
#
# A chat streams chunks of one kind. A response streams events of several types.
#
# **Predict.** How many events does an answer of four tokens have? Which are the first and the last? Is there a `[DONE]`?

# %%
with a_server(engine) as (server, client_of):
    client = client_of()
    asked = {"input": QUESTION, "max_output_tokens": 4, **GREEDY}
    events = list(client.responses.create(**asked, stream=True))
    with client.responses.with_streaming_response.create(**asked, stream=True) as raw:
        wire = [line for line in raw.iter_lines() if line]
for event in events:
    fields = event.to_dict()
    what = fields.get("delta") or fields.get("text") or fields.get("response", {}).get("status", "")
    print(f"{event.sequence_number:3}  {event.type:31}{what}")
print("\non the wire:", wire[8], wire[9][:62] + "...", "last:", wire[-2], sep="\n    ")

# %%
kinds = [event.type.removeprefix("response.") for event in events]
assert kinds == [
    "created", "in_progress", "output_item.added", "content_part.added",
    *["output_text.delta"] * 4,
    "output_text.done", "content_part.done", "output_item.done", "incomplete",
]  # fmt: skip
assert [event.sequence_number for event in events] == list(range(12))
assert [line for line in wire if line.startswith("event: ")] == [f"event: {event.type}" for event in events]
assert "".join(event.delta for event in events if event.type.endswith("delta")) == events[-1].response.output_text
assert not any("[DONE]" in line for line in wire)

# %% [markdown]
# There are twelve: eight around the four tokens. The answer is an item of the response's output, and the text is a part of
# that item. Each is opened, filled and closed, and every `done` event repeats the whole content. The last event says how the
# response ended, here `incomplete` because of the limit of four tokens, so no `[DONE]` is needed.
#
# ## 5. In the background
#
# With `background=True` the client gets an id at once, can hang up, and fetches the answer later. To make each state
# visible, the engine gets a brake: every forward pass waits for a permit.
#
# **Predict.** The brake gives permits for three forward passes, then for three more. Then the response is cancelled. What
# are its status and its text each time? What is left of it after the cancel, and can another response continue from it?

# %%
class Brake:
    """A hook that makes each forward pass wait for a permit."""

    def __init__(self, engine):
        self.permits = threading.Semaphore(0)
        self.hook = engine.model.register_forward_pre_hook(self)

    def __call__(self, _model, _inputs):
        self.permits.acquire(timeout=20)

    def release(self):
        self.hook.remove()
        self.permits.release()  # for the forward pass that is waiting


def state_of(response):
    return f"{response.status:12}{response.output_text!r}"


with a_server(engine) as (server, client_of):
    client = client_of()
    brake = Brake(engine)
    begun = client.responses.create(input="Tell me a story about a fox.", background=True, **GREEDY)
    run = server.config.app.state.responses.runs[begun.id]  # the server's own record of it
    print("at once:            ", state_of(begun))
    for passes in (3, 6):
        brake.permits.release(3)
        while run.answer.num_tokens < passes:
            time.sleep(0.005)
        print(f"after {passes} passes:     ", state_of(client.responses.retrieve(begun.id)))
    cancelled = client.responses.cancel(begun.id)
    print("cancelled:          ", state_of(cancelled))
    brake.release()
    wait_until(lambda: server.service.async_engine.stats.running == 0)
    later = client.responses.retrieve(begun.id)
    print("later:              ", state_of(later), "usage:", later.usage.output_tokens, "tokens")
    go_on = {"input": "Go on.", "previous_response_id": begun.id}
    print("go on from it:      ", refusal(client.responses.create, **go_on, **GREEDY)[:2])
    # Another one runs to its end.
    second = client.responses.create(input=QUESTION, background=True, **GREEDY)
    while client.responses.retrieve(second.id).status in ("queued", "in_progress"):
        time.sleep(0.02)
    second = client.responses.retrieve(second.id)
    print("another, polled:    ", state_of(second))
    print("cancelled too late: ", client.responses.cancel(second.id).status)
    print("not in background:  ", refusal(client.responses.cancel, client.responses.create(input="Hi", **GREEDY).id)[2])
assert begun.status == "queued" and cancelled.status == later.status == "cancelled" and second.status == "completed"
assert later.output_text == cancelled.output_text == "Once upon a time there was" and later.usage.output_tokens == 6
assert engine.pool.num_free == engine.pool.num_blocks

# %% [markdown]
# A cancelled response keeps its id, its text so far, and the number of its tokens. No response can continue from it. The
# engine gets an `Abort`, as for a client that has hung up, and frees the blocks. A cancel that arrives too late changes
# nothing and returns the response as it ended.
#
# ## 6. A client that hangs up
#
# Now a stream, with the same brake. The client reads up to the second `delta` and closes the connection. The response is
# stored, but does not run in the background.
#
# **Predict.** Does the response run to its end? What does the client get when it fetches it?

# %%
with a_server(engine) as (server, client_of):
    client = client_of()
    brake = Brake(engine)
    brake.permits.release(2)
    stream = client.responses.create(input="Tell me a story about a fox.", stream=True, **GREEDY)
    events = [next(stream) for _ in range(6)]
    stream.close()
    wait_until(lambda: not server.service.async_engine.active_generations)
    brake.release()
    wait_until(lambda: client.responses.retrieve(events[0].response.id).status != "in_progress")
    left = client.responses.retrieve(events[0].response.id)
print("read:   ", [event.delta for event in events if event.type == "response.output_text.delta"])
print("fetched:", state_of(left))
assert left.status == "cancelled" and left.output_text == "Once upon"

# %% [markdown]
# A stream ends with its connection, whether it is stored or not. A response that must outlive its connection has to run in
# the background.
#
# ## 7. Whose response it is
#
# The server has two API keys. Alice has a response, and Bob has learned its id.
#
# **Predict.** Bob tries to fetch it, to cancel it, and to continue from it. What does he get, and can he tell that the
# response exists?

# %%
with a_server(engine, api_keys=("for-alice", "for-bob")) as (server, client_of):
    alice, bob = client_of("for-alice"), client_of("for-bob")
    hers = alice.responses.create(input=QUESTION, background=True, **GREEDY)
    nobodys = "resp_" + 32 * "0"
    for name, call in (
        ("fetch", bob.responses.retrieve),
        ("cancel", bob.responses.cancel),
        ("go on", lambda id: bob.responses.create(input="Go on.", previous_response_id=id, **GREEDY)),
    ):
        answers = [refusal(call, id) for id in (hers.id, nobodys)]
        (status, param, message), (_, _, of_nobodys) = answers
        print(f"{name:7}{status}  {message.replace(hers.id, 'resp_...')}")
        assert message.replace(hers.id, nobodys) == of_nobodys and answers[0][:2] == answers[1][:2]
    wait_until(lambda: alice.responses.retrieve(hers.id).status == "completed")
    print("alice: ", alice.responses.retrieve(hers.id).output_text)

# %% [markdown]
# Bob gets the same errors as for an id that never existed. Knowing an id is not enough: a response belongs to the API key
# that created it. A server without keys cannot tell clients apart, so any client can fetch any response.
#
# ## 8. Forgetting
#
# The store keeps the last 1,000 responses, in memory. Here it keeps three. A conversation of four turns fills it. Then turn
# 2 is fetched, and a fifth response is created.
#
# **Predict.** Which turns can still be fetched after turn 4? Can turn 5 continue from turn 4, although the first turn is
# forgotten, and does the model still see that turn? Is turn 2 kept because it was fetched?

# %%
assert STORE_SIZE == 1000
with a_server(engine) as (server, client_of):
    client = client_of()
    server.config.app.state.responses = Store(size=3)

    def remembered():
        """The numbers of the turns that can still be fetched, counted from 1."""
        return [number for number, turn in enumerate(turns, 1) if turn.id in server.config.app.state.responses.runs]

    turns = []
    for line in ("Hello!", *lines):
        previous = {"previous_response_id": turns[-1].id} if turns else {}
        turns.append(client.responses.create(input=line, **previous, **GREEDY))
        print(f"after turn {len(turns)}, remembered: {remembered()}   input tokens: {turns[-1].usage.input_tokens}")
    print("turn 1:", refusal(client.responses.retrieve, turns[0].id)[0])
    client.responses.retrieve(turns[1].id)
    turns.append(client.responses.create(input=QUESTION, previous_response_id=turns[3].id, **GREEDY))
    print(f"after turn 5, remembered: {remembered()}   input tokens: {turns[-1].usage.input_tokens}")
    first = server.config.app.state.responses.runs[turns[4].id].messages[0]
    print("the first turn, as turn 5 has it:", first)
    status, param, message = refusal(client.responses.create, input="Hi", previous_response_id=turns[1].id, **GREEDY)
    print(status, param, "-", message.replace(turns[1].id, "resp_..."))
assert remembered() == [3, 4, 5] and first == {"role": "user", "content": "Hello!"}
assert turns[4].usage.input_tokens > turns[3].usage.input_tokens and status == 400

# %% [markdown]
# The store forgets responses in the order in which they were created; fetching one does not keep it. A forgotten response
# cannot be fetched or continued, but its text is still part of every response that continued from it, because each stores
# the whole conversation. When the process ends, everything is forgotten.
#
# ## To try
#
# 1. In part 2, send `Be brief.` in every turn. Where in the prompt is it in turn 3? (`/tokenize` shows what a
#    conversation with a system message looks like.)
# 2. In part 5, cancel before any permit is given. What is in `output` then, and why?
# 3. In part 8, request the story of the fox in the background, and right after it three responses with
#    `max_output_tokens=1`. Can the story still be fetched or cancelled? What does `server.service.async_engine.stats`
#    show?
#
# The chapter's text is [milestones/v09_responses/README.md](../milestones/v09_responses/README.md). `make test-v09` tests
# this server over a real socket, `make traps-v09` plants the chapter's seeded bugs, and `make diff-v09` shows everything
# that the chapter changed.
