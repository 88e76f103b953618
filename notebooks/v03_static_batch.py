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
# # v03, followed along: a rectangle of requests
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v03_static_batch.ipynb)
#
# Several requests share a forward pass. You draw the rectangle that this takes, time steps with more and more requests,
# and count what it costs: pads, finished rows, and waiting. It takes about 20 minutes and no GPU. Each part first asks
# you to predict a result, then measures it.

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
import inspect
import random
import time
import warnings

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets

from milestones.v03_static_batch import Engine, SamplingParams
from milestones.v03_static_batch.scheduler import Scheduler
from milestones.v03_static_batch.text import encode_chat
from shared.bench.recorder import record, summary
from shared.chapters import find
from shared.checkpoints import POCKET
from shared.workloads import TIMELINE, TIMELINE_PLACES, fixed, random_ids

torch.set_num_threads(1)
engine = Engine(POCKET, device="cpu", max_num_seqs=TIMELINE_PLACES)

# %% [markdown]
# ## 1. Why share a forward pass
#
# A forward pass reads every weight of the model once, and runs every line of its Python once, however many requests
# share it. Here you time decode steps, in which each request feeds one token, with 1 to 16 requests per step.
#
# > **Predict.** How many times as long does a step for 8 requests take as a step for 1? And how many times as many
# > tokens per second does it generate? Two numbers.


# %%
def ms_per_step(engine, together):
    rng = random.Random(0)
    for _ in range(together):
        prompt_ids = random_ids(8, engine.config.vocab_size, rng)
        engine.add_request(prompt_ids, SamplingParams(max_tokens=31, ignore_eos=True))
    engine.step()  # the prompts
    runs = []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        engine.step()
        runs.append(1000 * (time.perf_counter() - start))
    return min(runs)


# %% tags=["varies"]
wide = Engine(POCKET, device="cpu", max_num_seqs=16)
counts = (1, 2, 4, 8, 16)
step_ms = [ms_per_step(wide, together) for together in counts]
for together, each in zip(counts, step_ms):
    rate = 1000 * together / each
    print(f"{together:2} in a step: {each:5.2f} ms, {each / step_ms[0]:4.1f} times one; {rate:6,.0f} tokens per second")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
left.plot(counts, step_ms, "o-", color="#0969da", label="measured")
left.plot(counts, [step_ms[0] * together for together in counts], "--", color="#8c959f", label="one after the other")
left.set(xlabel="requests in a step", ylabel="ms", title="Time of a step", xticks=counts, ylim=0)
left.legend()
right.plot(counts, [1000 * together / each for together, each in zip(counts, step_ms)], "o-", color="#0969da")
right.set(xlabel="requests in a step", ylabel="tokens per second", title="Tokens for all together", xticks=counts, ylim=0)
figure.tight_layout()
plt.show()

# %% [markdown]
# The dashed line is the time that the same tokens would take one after the other; the distance to it is the gain. For a
# single request in the step, the rise of the left curve is a cost: the step takes longer because others share it.
#
# ## 2. The rectangle
#
# Here are ten requests with their prompt and output lengths. At most four run at once:

# %%
names = "ABCDEFGHIJ"
for name, (prompt_len, output_len) in zip(names, TIMELINE):
    print(f"{name}: {prompt_len:2} prompt tokens, {output_len:2} output tokens")

# %% [markdown]
# The first group is A to D. Libraries multiply rectangular arrays, so every row is as wide as the widest.
#
# > **Predict.** How many positions does the first forward pass of this group compute, and how many of them are pads?
# > Two numbers.
#
# A hook on the model records the batches; look at the first.

# %%
requests = fixed(TIMELINE, engine.config.vocab_size)
batches = []
hook = engine.model.register_forward_pre_hook(lambda model, args: batches.append(args[0]))
params = [SamplingParams(max_tokens=request.max_tokens, ignore_eos=True) for request in requests[:4]]
engine.generate([request.prompt_ids for request in requests[:4]], params)
hook.remove()

first = batches[0]
rectangle = first.token_ids.view(first.num_seqs, -1)
print(rectangle)
assert rectangle.shape == (4, 7)

# %% [markdown]
# To the model these are 28 tokens, end to end; only attention knows that they form rows. The zeros at the right are
# pads (`PAD_ID`, which is the BOS here; any token would do). In the picture, `logit_rows` marks the positions whose
# logits are needed: each row's last real token, never a pad.

# %%
wanted = torch.zeros(28, dtype=torch.bool)
wanted[first.logit_rows] = True
state = torch.zeros(4, 7)  # 0: pad
for row, request in enumerate(requests[:4]):
    state[row, : len(request.prompt_ids)] = 1
state[wanted.view(4, 7)] = 2

plt.figure(figsize=(8, 2.8))
plt.imshow(state, cmap=ListedColormap(["#d0d7de", "#54aeff", "#0550ae"]), aspect="auto")
plt.yticks(range(4), names[:4])
plt.xlabel("column of the rectangle")
plt.title("The first forward pass: positions of four prompts")
handles = [Patch(color="#0550ae", label="its logits are needed"), Patch(color="#54aeff", label="prompt")]
plt.legend(handles=[*handles, Patch(color="#d0d7de", label="pad")], loc="center left", bbox_to_anchor=(1, 0.5))
plt.tight_layout()
plt.show()

assert int((state == 0).sum()) == 11  # 28 positions, 17 tokens of prompts

# %% [markdown]
# ## 3. The whole run
#
# A finished request rides along until the last of its group has finished. No request is admitted before that, because
# `schedule` looks at the queue only when no request is running.

# %%
print(inspect.getsource(Scheduler.schedule))

# %% [markdown]
# > **Predict.** A to D generate 19, 5, 8 and 3 tokens; E to H generate 4, 11, 2 and 7; I and J generate 9 and 3. How
# > many steps, of one forward pass each, do they take? Each step has room for four rows. How many rows is that over
# > all steps, and how many of them yield a token?

# %%
trace, _ = record(find("v03"), engine, requests)
got = sum(part.got_token for each in trace.passes for part in each.parts)
places = len(trace.passes) * trace.places
print(f"{len(trace.passes)} steps, {places} rows, {got} tokens: {got / places:.0%} of the rows yielded one")

assert len(trace.passes) == 19 + 11 + 9  # the longest of each group
assert got == sum(output_len for _, output_len in TIMELINE) == 71

# %% [markdown]
# In the picture, each line is one of the four rows, and each column is one step.

# %%
state = torch.zeros(trace.places, len(trace.passes))  # 0: empty, 1: rides along, 2: one token, 3: its prompt
letters = {}
for number, each in enumerate(trace.passes):
    for part in each.parts:
        [row] = part.rows
        state[row, number] = 1 + part.got_token + (part.got_token and part.useful > 1)
        letters.setdefault(part.request, (number, row))

plt.figure(figsize=(8, 2.6))
colors = ListedColormap(["white", "#d0d7de", "#54aeff", "#0550ae"])
plt.imshow(state, cmap=colors, aspect="auto", extent=(0.5, state.shape[1] + 0.5, 3.5, -0.5))  # steps count from 1
for request, (number, row) in letters.items():
    plt.text(number + 1, row, names[request], ha="center", va="center", color="white", weight="bold")
plt.yticks(range(trace.places))
plt.xlabel("step")
plt.ylabel("row")
plt.title("Dark: its prompt.  Blue: a token.  Gray: rides along.  White: empty")
plt.tight_layout()
plt.show()

# %% [markdown]
# There are three blocks, each as long as its longest row. Gray is the cost of waiting for a group's longest request.
# White rows are empty because no request is left. The book measures the loss as the *useful share*: of the rows in
# steps that began while a request waited, the share that yielded a token. (An unused row is a loss only if a request
# was waiting for it.)

# %%
print(f"useful share: {trace.useful_share():.0%}")
print(summary(trace))

# %% [markdown]
# ## 4. Which positions were needed
#
# > **Predict.** A group computes rows x (longest prompt + longest output - 1) positions. The prompts are in part 2. How
# > many positions do the three groups compute together? How many were needed: the sum of prompt + output - 1?

# %%
needed, pads, rides = [], [], []
for each in trace.passes:
    needed.append(sum(part.useful for part in each.parts))
    pads.append(sum(part.num_tokens - part.useful for part in each.parts if part.got_token))
    rides.append(sum(part.num_tokens for part in each.parts if not part.got_token))
print(f"{trace.num_positions} positions: {sum(needed)} needed, {sum(pads)} pads, {sum(rides)} in finished rows")
assert trace.num_positions == 4 * (7 + 19 - 1) + 4 * (9 + 11 - 1) + 2 * (4 + 9 - 1) == 200
assert sum(needed) == trace.num_needed == 106

# %%
x = range(1, len(trace.passes) + 1)
plt.figure(figsize=(8, 3))
plt.bar(x, needed, color="#0969da", label="needed")
plt.bar(x, pads, bottom=needed, color="#d4a72c", label="pads")
plt.bar(x, rides, bottom=[a + b for a, b in zip(needed, pads)], color="#d0d7de", label="riding along")
plt.xlabel("step")
plt.ylabel("positions computed")
plt.title("The positions that each step computes")
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# The three tall bars are the prefills of the groups, which have all the pads. In the steps after a prefill every row
# feeds one token, so there are no pads, but more and more rows ride along.
#
# ## 5. Head-of-line blocking
#
# > **Predict.** E generates 4 tokens, and is queued from the start. How many steps does it wait before its first one?
# > After how many steps does it have its last token?

# %%
waits = [trace.waits(request) for request in range(10)]
ends = trace.ends()
for name, (_, output_len), wait, end in zip(names, TIMELINE, waits, ends):
    print(f"{name} generates {output_len:2} tokens, waits {wait:2} steps, has its last token after {end:2}")

assert (waits[4], ends[4]) == (19, 19 + 4)

# %%
runs = [end - wait for end, wait in zip(ends, waits)]
rode = [sum(part.request == i and not part.got_token for each in trace.passes for part in each.parts) for i in range(10)]
plt.figure(figsize=(8, 3))
plt.barh(list(names), waits, color="#eaeef2", label="waits")
plt.barh(list(names), runs, left=waits, color="#0969da", label="gets tokens")
plt.barh(list(names), rode, left=ends, color="#8c959f", label="finished, rides along")
plt.gca().invert_yaxis()
plt.xlabel("steps since the start")
plt.title("The life of each request")
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# B, C and D had finished long before E was admitted. It waited for A alone: this is *head-of-line blocking*. The next
# chapter is about the gray bars above pale ones: rows of finished requests, kept while other requests wait.
#
# ## 6. Is it still the same answer?
#
# The other requests, and their pads, are in the same rectangle. A row must not see them.
#
# > **Predict.** You ask three questions together, then one by one. Are the texts the same? And how many forward passes
# > do they take together, if the answers have different lengths?

# %%
questions = ("What is static batching?", "Explain KV cache in one sentence.", "Tell me a story about a fox.")
prompts = [encode_chat(engine.tokenizer, [{"role": "user", "content": text}]) for text in questions]
params = SamplingParams(max_tokens=40)
alone = [engine.generate([prompt], params)[0] for prompt in prompts]
steps_before = engine.num_steps
together = engine.generate(prompts, params)
passes = engine.num_steps - steps_before

for completion in together:
    print(f"{len(completion.token_ids):2} tokens: {completion.text}")
print(f"{passes} forward passes together, {sum(len(completion.token_ids) for completion in alone)} one by one")
assert [completion.token_ids for completion in together] == [completion.token_ids for completion in alone]
assert passes == max(len(completion.token_ids) for completion in alone)

# %% [markdown]
# ## Things to try
#
# Change a line, predict what will happen, then run it.
#
# All three change the call to `record` in part 3. The asserts after it hold only for the old call, so take them out.
#
# 1. Sort the requests: `sorted(requests, key=lambda request: request.max_tokens)`. What happens to the useful share,
#    and to the request that arrived first? (The letters then stand for other requests.)
# 2. Pass it `Engine(POCKET, device="cpu", max_num_seqs=2)`, then an engine with `max_num_seqs=10`. Work out steps and
#    positions for both before you run it. They move in opposite directions; which matters more?
# 3. Make one prompt long: `fixed([(60, 19), *TIMELINE[1:]], engine.config.vocab_size)`. How many pads does that cost
#    A's three neighbors?
#
# The chapter's text is
# [milestones/v03_static_batch/README.md](https://github.com/stepserve/stepserve/blob/main/milestones/v03_static_batch/README.md).
# In a terminal, `make diff-v03` prints what the chapter changes, `make test-v03` tests it against Hugging Face and v02,
# and `make traps-v03` plants its seeded bugs and names the test that catches each.
