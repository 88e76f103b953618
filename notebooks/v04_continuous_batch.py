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
# # v04, followed along: join and leave at every step
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v04_continuous_batch.ipynb)
#
# The same requests run on v03 and on v04, side by side. You see who is in which step, let a request come late, look
# into a batch that has no pads, and find out who gained, and who paid. About 20 minutes; no GPU is needed. Each part
# first asks for a number, then measures it.

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
import difflib
import inspect
import random
import warnings
from statistics import median

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets

from milestones import v03_static_batch, v04_continuous_batch
from milestones.v03_static_batch import scheduler as scheduler_before
from milestones.v04_continuous_batch import Engine, scheduler
from milestones.v04_continuous_batch.text import encode_chat
from shared.bench.recorder import record
from shared.chapters import find
from shared.checkpoints import POCKET
from shared.workloads import TIMELINE, TIMELINE_PLACES, Request, fixed, random_ids, staircase

torch.set_num_threads(1)
before = v03_static_batch.Engine(POCKET, device="cpu", max_num_seqs=TIMELINE_PLACES)
engine = Engine(POCKET, device="cpu", max_num_seqs=TIMELINE_PLACES)

# %% [markdown]
# ## 1. What changed
#
# v03 looks at its queue when nobody runs any more. v04 looks before every step. That is the first half of the chapter,
# and it is these lines:

# %%
old = inspect.getsource(scheduler_before.Scheduler.schedule).splitlines()
new = inspect.getsource(scheduler.Scheduler.schedule).splitlines()
print("\n".join(difflib.unified_diff(old, new, "v03", "v04", lineterm="", n=1)))

# %% [markdown]
# A place is a row of the cache. v04 keeps a list of the free ones, and a request gives its row back when it ends. The
# loop knows nothing of that: `engine.py` is the same file, byte for byte.

# %%
milestones = root / "milestones"
for name in ("engine.py", "scheduler.py", "batch.py", "attention.py", "cache.py", "model.py", "layers.py"):
    old, new = (milestones / chapter / name for chapter in ("v03_static_batch", "v04_continuous_batch"))
    same = old.read_bytes() == new.read_bytes()
    print(f"{name:13} {'the same' if same else 'changed'}")
    if name == "engine.py":
        assert same

# %% [markdown]
# ## 2. The same ten requests
#
# In groups of four they took v03 39 passes and 200 positions.

# %%
names = "ABCDEFGHIJ"
for name, (prompt_len, output_len) in zip(names, TIMELINE):
    print(f"{name}: {prompt_len:2} tokens of prompt, {output_len:2} to say")

# %% [markdown]
# > **Predict.** A, who wants 19 tokens, takes at least 19 passes. All together want 71, and a pass has four places. How
# > many passes does v04 take? How many positions: the sum of prompt + output - 1? And which pass (from 1) is E's first?

# %%
requests = fixed(TIMELINE, engine.config.vocab_size)
trace_before, _ = record(find("v03"), before, requests)
trace, _ = record(find("v04"), engine, requests)
for each in (trace_before, trace):
    print(f"{each.chapter}: {len(each.passes)} passes, {each.num_positions} positions, {each.num_needed} of them needed")

assert (len(trace_before.passes), trace_before.num_positions) == (39, 200)
assert (len(trace.passes), trace.num_positions) == (19, 106)
assert trace.waits(4) == 3  # E comes in when D, who wants 3 tokens, has ended

# %% [markdown]
# Both as timelines, at the same scale: a line for each request, a column for each pass.


# %%
def grid(trace):
    """0: not there, 1: waits, 2: rides along, 3: gets a token, 4: its prompt and a token."""
    state = torch.zeros(len(trace.lengths), len(trace_before.passes))
    for number, each in enumerate(trace.passes):
        for request in each.waiting:
            state[request, number] = 1
        for part in each.parts:
            state[part.request, number] = 2 + part.got_token + (part.got_token and part.useful > 1)
    return state


figure, axes = plt.subplots(2, 1, figsize=(8, 4.8), sharex=True)
colors = ListedColormap(["white", "#eaeef2", "#8c959f", "#54aeff", "#0550ae"])
for axis, each in zip(axes, (trace_before, trace)):
    shown = (0.5, len(trace_before.passes) + 0.5, 9.5, -0.5)  # passes count from 1
    axis.imshow(grid(each), cmap=colors, vmin=0, vmax=4, aspect="auto", extent=shown)
    axis.set_yticks(range(10), names)
    axis.set_title(each.chapter)
axes[1].set_xlabel("forward pass   (dark: its prompt, blue: a token, pale: waits, grey: rides along)")
figure.tight_layout()
plt.show()

# %% [markdown]
# There is no grey in the lower one: who has ended is gone. A pale bar ends where some blue bar has ended in the column
# before.
#
# ## 3. Who ran in which step
#
# The same as a ledger: for each pass, who was in it and how many positions it brought.
#
# > **Predict.** In the fourth pass A, B and C are under way, and E comes in with a prompt of 4 tokens. How many
# > positions does the pass compute? How many would a rectangle have?

# %%
for number, each in enumerate(trace.ledger()[:9], 1):
    print(f"pass {number}: " + ", ".join(f"{names[request]} {positions}" for request, positions in each.items()))

assert trace.ledger()[3] == {0: 1, 1: 1, 2: 1, 4: 4}

# %% [markdown]
# 7 and not 16. That is the second half of the chapter. If the pass were a rectangle, A, B and C would be padded to the
# four tokens that E brings. So the tokens are laid end to end, with nothing between:

# %%
batches = []
hook = engine.model.register_forward_pre_hook(lambda model, args: batches.append(args[0]))
again, _ = record(find("v04"), engine, requests)
hook.remove()

batch = batches[3]
print("cache rows:", batch.cache_rows.tolist())
print("positions: ", batch.positions.tolist())
for rectangle in batch.view:
    print(f"attention takes tokens {rectangle.tokens.tolist()} together, and reads {rectangle.context_len} positions back")

rows = {part.request: part.rows for each in again.passes[:4] for part in each.parts}
assert [len(rectangle.tokens) for rectangle in batch.view] == [3, 4]
assert rows[4] == rows[3]  # E lies where D lay

# %% [markdown]
# Seven tokens. Norms, projections, MLP and head take each of them by itself, and never knew about rows. Attention alone
# has to know who is with whom: it takes those that bring equally many tokens in one call. E, the last four of the
# seven, lies in the row of the cache that D gave back. (Row numbers are in the order
# in which earlier runs gave them back.)
#
# How wide is each pass?

# %%
figure, axes = plt.subplots(2, 1, figsize=(8, 4), sharex=True, sharey=True)
for axis, each in zip(axes, (trace_before, trace)):
    useful = [sum(part.useful for part in one.parts) for one in each.passes]
    wasted = [sum(part.num_tokens - part.useful for part in one.parts) for one in each.passes]
    axis.bar(range(1, len(useful) + 1), useful, color="#0969da", label="needed")
    axis.bar(range(1, len(useful) + 1), wasted, bottom=useful, color="#d0d7de", label="for nothing")
    axis.set(title=f"{each.chapter}: {sum(useful)} needed, {sum(wasted)} for nothing", ylabel="positions")
axes[0].legend()
axes[1].set_xlabel("forward pass")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 4. Coming late
#
# A story is under way. After five steps somebody asks a question.
#
# > **Predict.** The story has 40 tokens. After which step does the question have its first token, in v04 and in v03?


# %%
def interrupt(engine, params):
    """A story, a question five steps later: the texts of each step by request."""
    story, question = (
        encode_chat(engine.tokenizer, [{"role": "user", "content": text}])
        for text in ("Tell me a story about a fox.", "What is a block table?")
    )
    ids, steps = [engine.add_request(story, params(max_tokens=40))], []
    while engine.has_unfinished_requests():
        if len(steps) == 5:
            ids.append(engine.add_request(question, params(max_tokens=30)))
        outputs = {output.request_id: output.text for output in engine.step()}
        steps.append([outputs.get(request_id) for request_id in ids])
    return steps


# %%
first = {}
for each, package in ((before, v03_static_batch), (engine, v04_continuous_batch)):
    chapter = package.__name__.split(".")[-1]
    steps = interrupt(each, package.SamplingParams)
    first[chapter] = next(i for i, texts in enumerate(steps, 1) if len(texts) == 2 and texts[1] is not None)
    print(f"{chapter}: {len(steps)} steps, the question's first token after step {first[chapter]}")

assert first == {"v03_static_batch": 41, "v04_continuous_batch": 6}

# %% [markdown]
# Here are v04's steps, as the two people saw them:

# %%
for number, texts in enumerate(steps[:14], 1):
    print(f"step {number:2}   " + "   ".join(f"{text!r:12}" for text in texts))
print("...")
for column in (0, 1):
    print("".join(texts[column] or "" for texts in steps if len(texts) > column))

# %% [markdown]
# The story goes on as if nothing had happened. Nobody asked whether the newcomer was a prompt: a prompt is a sequence
# that brings many tokens.
#
# ## 5. More requests, and more of them short
#
# This is the book's own workload: 32 requests, all there at the start, of 1 to 120 tokens each, and 8 places.
#
# > **Predict.** In v03 57% of the places gave a token while somebody waited. In v04? And who gains most, the requests
# > that want many tokens or those that want few?

# %% tags=["varies"]
before, engine = (each.Engine(POCKET, device="cpu", max_num_seqs=8) for each in (v03_static_batch, v04_continuous_batch))
workload = staircase(engine.config.vocab_size)
trace_before, tokens_before = record(find("v03"), before, workload)
trace, tokens = record(find("v04"), engine, workload)
assert tokens == tokens_before  # the same answers, in another order of work

for each in (trace_before, trace):
    seconds = sum(one.wall_s for one in each.passes)
    rate = each.num_tokens / seconds
    print(f"{each.chapter}: {len(each.passes)} passes, useful share {each.useful_share():.0%}, {rate:,.0f} tokens a second")

assert round(trace_before.useful_share(), 2) == 0.57
assert trace.useful_share() == 1  # while somebody waits, every place gives somebody a token
assert trace.num_positions == trace.num_needed

# %% [markdown]
# Every dot below is a request: how many tokens it wants, and after how many passes it has its last one. Nothing can lie
# below the dashed line, which is one token a pass and no wait at all.

# %%
wanted = [output_len for _, output_len in trace.lengths]
plt.figure(figsize=(8, 3.2))
plt.scatter(wanted, trace_before.ends(), color="#8c959f", label="v03")
plt.scatter(wanted, trace.ends(), color="#0969da", label="v04")
plt.plot([0, 120], [0, 120], "--", color="#d0d7de")
plt.xlabel("tokens it wants")
plt.ylabel("passes until its last token")
plt.title("When each request is done")
plt.legend()
plt.tight_layout()
plt.show()

# %%
short = [request for request, output_len in enumerate(wanted) if output_len <= 20]
long = [request for request, output_len in enumerate(wanted) if output_len >= 80]
for label, group in (("at most 20", short), ("at least 80", long)):
    a, b = (median(each.ends()[request] for request in group) for each in (trace_before, trace))
    print(f"{len(group):2} that want {label} tokens: done after {a:.0f} passes in v03, {b:.0f} in v04: {a / b:.1f} times")

assert median(trace.ends()[request] for request in short) < median(trace_before.ends()[request] for request in short)

# %% [markdown]
# Passes are not seconds: v04's are fuller, and so they may take longer. The same for the clock:


# %% tags=["varies"]
def seconds_to_last(trace, request):
    return sum(each.wall_s for each in trace.passes[: trace.ends()[request]])


for label, group in (("at most 20", short), ("at least 80", long)):
    a, b = (median(seconds_to_last(each, request) for request in group) for each in (trace_before, trace))
    print(f"{label} tokens: {1000 * a:,.0f} ms in v03, {1000 * b:,.0f} ms in v04: {a / b:.1f} times")

# %% [markdown]
# ## 6. Who pays
#
# Three requests are under way, a token each at every step. Before the 16th step somebody comes with a prompt of 400
# tokens.
#
# > **Predict.** How many positions has the 16th pass? The three others get their token in it too, but when? How many
# > times as long as their other steps is this one?

# %% tags=["varies"]
vocab_size = engine.config.vocab_size
crowd = fixed([(8, 40)] * 3, vocab_size)
crowd.append(Request(random_ids(400, vocab_size, random.Random(1)), max_tokens=4, arrival_step=15))
trace, _ = record(find("v04"), engine, crowd)
step_ms = [1000 * each.wall_s for each in trace.passes]
print(f"the 16th: {step_ms[15]:.1f} ms, the median: {median(step_ms):.1f} ms, {step_ms[15] / median(step_ms):.0f} times")

assert trace.ledger()[15] == {0: 1, 1: 1, 2: 1, 3: 400}

# %%
plt.figure(figsize=(8, 2.8))
colors = ["#bf3989" if number == 15 else "#0969da" for number in range(len(step_ms))]
plt.bar(range(1, len(step_ms) + 1), step_ms, color=colors)
plt.xlabel("forward pass")
plt.ylabel("ms")
plt.title("A newcomer's prompt holds up everybody in its pass")
plt.tight_layout()
plt.show()

# %% [markdown]
# All three texts stop for that moment. In v03 they would not have: the newcomer would have waited until all three had
# ended. Its wait was traded for a pause of theirs.
#
# ## Things to try
#
# Change a line, say what you expect, run it.
#
# 1. In part 2, put A last: `requests = requests[1:] + requests[:1]`, and take the asserts out. (The letters then stand
#    one place further on.) Is 19 passes still enough? The engine does not know who will be long.
# 2. In part 4, abort the story when the question comes: `engine.abort_request(ids[0])`. In which step does the question
#    have its first token in v03 now, and why? (Take the assert out.)
# 3. In part 6, let four newcomers come at steps 15, 16, 17 and 18, with 100 tokens each. Are four short pauses better
#    than one long one, and for whom? (Take the assert out.)
#
# The chapter's text is
# [milestones/v04_continuous_batch/README.md](https://github.com/stepserve/stepserve/blob/main/milestones/v04_continuous_batch/README.md).
# In a terminal, `make diff-v04` prints what the chapter changes, `make test-v04` holds it against Hugging Face and
# against v03, and `make traps-v04` plants its seeded bugs and names the test that catches each.
# `make trace ARGS="v03 v04"` draws the timelines of part 2 in the terminal.
