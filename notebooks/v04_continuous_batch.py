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
# The same requests run on v03 and on v04, side by side. You see which request runs in which step, let a request arrive
# late, look into a batch without pads, and find out which requests gain and which pay for it. About 20 minutes; no GPU
# is needed. Each part first asks you for a number, then measures it.

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
# v03 looks at its queue only when no request is running. v04 looks before every step. That is the first half of the
# chapter, and it is these lines:

# %%
old = inspect.getsource(scheduler_before.Scheduler.schedule).splitlines()
new = inspect.getsource(scheduler.Scheduler.schedule).splitlines()
print("\n".join(difflib.unified_diff(old, new, "v03", "v04", lineterm="", n=1)))

# %% [markdown]
# Each running request has a row of the cache. v04 keeps a list of the free rows, and a request gives its row back when
# it finishes. The engine loop is not affected: `engine.py` is the same file, byte for byte.

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
# In groups of four, v03 needed 39 steps and 200 positions for them.

# %%
names = "ABCDEFGHIJ"
for name, (prompt_len, output_len) in zip(names, TIMELINE):
    print(f"{name}: {prompt_len:2} prompt tokens, {output_len:2} output tokens")

# %% [markdown]
# > **Predict.** A generates 19 tokens, so it takes at least 19 steps. Together the requests generate 71, and at most
# > four requests run in a step. How many steps does v04 take? How many positions does it compute (the sum of prompt +
# > output - 1)? And which step (counted from 1) is E's first?

# %%
requests = fixed(TIMELINE, engine.config.vocab_size)
trace_before, _ = record(find("v03"), before, requests)
trace, _ = record(find("v04"), engine, requests)
for each in (trace_before, trace):
    print(f"{each.chapter}: {len(each.passes)} steps, {each.num_positions} positions, {each.num_needed} of them needed")

assert (len(trace_before.passes), trace_before.num_positions) == (39, 200)
assert (len(trace.passes), trace.num_positions) == (19, 106)
assert trace.waits(4) == 3  # E is admitted when D, which generates 3 tokens, has finished

# %% [markdown]
# Both runs as timelines, at the same scale: one line per request, one column per step.


# %%
def grid(trace):
    """0: absent, 1: waits, 2: rides along, 3: gets a token, 4: its prompt and a token."""
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
    shown = (0.5, len(trace_before.passes) + 0.5, 9.5, -0.5)  # steps count from 1
    axis.imshow(grid(each), cmap=colors, vmin=0, vmax=4, aspect="auto", extent=shown)
    axis.set_yticks(range(10), names)
    axis.set_title(each.chapter)
axes[1].set_xlabel("step   (dark: its prompt, blue: a token, pale: waits, gray: rides along)")
figure.tight_layout()
plt.show()

# %% [markdown]
# The lower timeline has no gray, because finished requests leave at once. A pale bar turns dark in the column right
# after another request's bar has ended.
#
# ## 3. Which request ran in which step
#
# The same run as a ledger: for each step, the requests in it and how many positions each of them fed.
#
# > **Predict.** In the fourth step A, B and C are under way, and E is admitted with a prompt of 4 tokens. How many
# > positions does the step compute? How many would a rectangle compute?

# %%
for number, each in enumerate(trace.ledger()[:9], 1):
    print(f"step {number}: " + ", ".join(f"{names[request]} {positions}" for request, positions in each.items()))

assert trace.ledger()[3] == {0: 1, 1: 1, 2: 1, 4: 4}

# %% [markdown]
# 7, not 16. That is the second half of the chapter. If the step were a rectangle, A, B and C would be padded to the
# four tokens that E feeds. So the tokens are laid end to end, with nothing between them:

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
assert rows[4] == rows[3]  # E has D's old row

# %% [markdown]
# Norms, projections, MLP and head process each of the seven tokens by itself, and know nothing about rows. Only
# attention has to know which tokens belong together: one call takes all sequences that feed the same number of tokens.
# E's tokens, the last four of the seven, go to the cache row that D gave back. (The row numbers depend on the order in
# which earlier runs gave rows back.)
#
# How wide is each step?

# %%
figure, axes = plt.subplots(2, 1, figsize=(8, 4), sharex=True, sharey=True)
for axis, each in zip(axes, (trace_before, trace)):
    useful = [sum(part.useful for part in one.parts) for one in each.passes]
    wasted = [sum(part.num_tokens - part.useful for part in one.parts) for one in each.passes]
    axis.bar(range(1, len(useful) + 1), useful, color="#0969da", label="needed")
    axis.bar(range(1, len(useful) + 1), wasted, bottom=useful, color="#d0d7de", label="not needed")
    axis.set(title=f"{each.chapter}: {sum(useful)} needed, {sum(wasted)} not needed", ylabel="positions")
axes[0].legend()
axes[1].set_xlabel("step")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 4. Arriving late
#
# A story is under way. After five steps another user asks a question.
#
# > **Predict.** The story has 40 tokens. After which step does the question have its first token, in v04 and in v03?


# %%
def interrupt(engine, params):
    """Run a story, and a question five steps later; return the text that each step gave each request."""
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
# Here are v04's steps, as the two users saw them:

# %%
for number, texts in enumerate(steps[:14], 1):
    print(f"step {number:2}   " + "   ".join(f"{text!r:12}" for text in texts))
print("...")
for column in (0, 1):
    print("".join(texts[column] or "" for texts in steps if len(texts) > column))

# %% [markdown]
# The story continues as if nothing had happened. The engine never asked whether the new request was a prefill: a prompt
# is a sequence that feeds many tokens.
#
# ## 5. More requests, and more of them short
#
# This is the workload of the chapter's card: 32 requests, all present at the start, with outputs of 1 to 120 tokens,
# and at most 8 running at once.
#
# > **Predict.** In the steps that began while a request waited, 57% of v03's rows yielded a token. How many of v04's
# > do? And which requests gain most, those with long outputs or those with short ones?

# %% tags=["varies"]
before, engine = (each.Engine(POCKET, device="cpu", max_num_seqs=8) for each in (v03_static_batch, v04_continuous_batch))
workload = staircase(engine.config.vocab_size)
trace_before, tokens_before = record(find("v03"), before, workload)
trace, tokens = record(find("v04"), engine, workload)
assert tokens == tokens_before  # the same answers, computed in another order

for each in (trace_before, trace):
    seconds = sum(one.wall_s for one in each.passes)
    rate = each.num_tokens / seconds
    print(f"{each.chapter}: {len(each.passes)} steps, useful share {each.useful_share():.0%}, {rate:,.0f} tokens per second")

assert round(trace_before.useful_share(), 2) == 0.57
assert trace.useful_share() == 1  # while a request waits, every row yields a token
assert trace.num_positions == trace.num_needed

# %% [markdown]
# Every dot below is a request: how many tokens it generates, and after how many steps it has the last one. No dot can
# be below the dashed line, which is one token per step without any wait.

# %%
wanted = [output_len for _, output_len in trace.lengths]
plt.figure(figsize=(8, 3.2))
plt.scatter(wanted, trace_before.ends(), color="#8c959f", label="v03")
plt.scatter(wanted, trace.ends(), color="#0969da", label="v04")
plt.plot([0, 120], [0, 120], "--", color="#d0d7de")
plt.xlabel("tokens it generates")
plt.ylabel("steps until its last token")
plt.title("When each request finishes")
plt.legend()
plt.tight_layout()
plt.show()

# %%
short = [request for request, output_len in enumerate(wanted) if output_len <= 20]
long = [request for request, output_len in enumerate(wanted) if output_len >= 80]
for label, group in (("at most 20", short), ("at least 80", long)):
    a, b = (median(each.ends()[request] for request in group) for each in (trace_before, trace))
    print(f"{len(group):2} with {label} output tokens: finished after {a:.0f} steps in v03, {b:.0f} in v04: {a / b:.1f} times")

assert median(trace.ends()[request] for request in short) < median(trace_before.ends()[request] for request in short)

# %% [markdown]
# Steps are not seconds: v04's steps are fuller, so they may take longer. The same comparison by the clock:


# %% tags=["varies"]
def seconds_to_last(trace, request):
    return sum(each.wall_s for each in trace.passes[: trace.ends()[request]])


for label, group in (("at most 20", short), ("at least 80", long)):
    a, b = (median(seconds_to_last(each, request) for request in group) for each in (trace_before, trace))
    print(f"{label} output tokens: {1000 * a:,.0f} ms in v03, {1000 * b:,.0f} ms in v04: {a / b:.1f} times")

# %% [markdown]
# ## 6. Which requests pay
#
# Three requests are under way, with one token each per step. Before the 16th step another request arrives, with a
# prompt of 400 tokens.
#
# > **Predict.** How many positions does the 16th step compute? The other three requests get their tokens in it too, but
# > when? How many times as long as their other steps does this one take?

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
plt.xlabel("step")
plt.ylabel("ms")
plt.title("A new prompt delays every request in its step")
plt.tight_layout()
plt.show()

# %% [markdown]
# All three outputs pause for that moment. In v03 they would not: the new request would have waited until all three had
# finished. v04 trades the wait of the new request for a pause of the other three.
#
# ## Things to try
#
# Change a line, predict what will happen, and run it.
#
# 1. In part 2, put A last: `requests = requests[1:] + requests[:1]`, and take the asserts out. (A then stands for the
#    old B, and so on.) Are 19 steps still enough? The engine does not know in advance which request will be long.
# 2. In part 4, abort the story when the question arrives: `engine.abort_request(ids[0])`. In which step does the question
#    now get its first token in v03, and why? (Take the assert out.)
# 3. In part 6, let four new requests arrive at steps 15, 16, 17 and 18, with 100 tokens each. Are four short pauses better
#    than one long one, and for which requests? (Take the assert out.)
#
# The chapter's text is
# [milestones/v04_continuous_batch/README.md](https://github.com/stepserve/stepserve/blob/main/milestones/v04_continuous_batch/README.md).
# In a terminal, `make diff-v04` prints what the chapter changes, `make test-v04` tests it against Hugging Face and
# v03, and `make traps-v04` plants its seeded bugs and names the test that catches each. `make trace ARGS="v03 v04"`
# draws the timelines of part 2 in the terminal.
