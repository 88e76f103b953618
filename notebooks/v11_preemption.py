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
# # v11, followed along: take the memory back
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v11_preemption.ipynb)
#
# You count blocks that are reserved and never used, follow three requests through a cache that is too small for them, preempt
# a request yourself at every step it has, bring it back from swap space, look for the best reservation, and let an urgent
# request push in. Only counts are printed, no times. Plan about twenty minutes. Before each run there is a question: write
# your answer down first.

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
import warnings

import matplotlib.pyplot as plt
import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets

from milestones import v10_engine_process as v10
from milestones import v11_preemption as v11
from milestones.v11_preemption.text import encode_chat
from shared.bench.recorder import record
from shared.chapters import find
from shared.checkpoints import POCKET
from shared.workloads import RACE, fixed

# %% [markdown]
# ## 1. The price of reserving everything
#
# Two engines with the same cache: 256 blocks of 16 tokens. v10 reserves all that a request may come to need. v11 reserves the
# blocks that a request needs now, and those for 16 tokens more.
#
# 24 chat questions arrive at once. They set no `max_tokens`, so each may generate until pocket's context of 2,048 tokens is
# full.
#
# **Predict.** How many requests does v10 run together, and how many does v11? How many blocks do a question and its answer
# really fill?

# %%
before = v10.Engine(POCKET, device="cpu", num_blocks=256, block_size=16)
engine = v11.Engine(POCKET, device="cpu", num_blocks=256, block_size=16)

# %%
def serve(package, engine, prompts):
    """Answer the chats without a limit; each one's tokens, and how many requests ran in each step."""
    params = package.SamplingParams(max_tokens=None, new_text=True)
    tokens = {engine.add_request(prompt, params): [] for prompt in prompts}
    running = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id].append(output.token_id)
        running.append(len(engine.in_step))
    return list(tokens.values()), running


chats = [encode_chat(engine.tokenizer, [{"role": "user", "content": question}]) for question in RACE]
answers_before, running_before = serve(v10, before, chats)
answers, running = serve(v11, engine, chats)
filled = [engine.pool.blocks_for(len(chat) + len(answer) - 1) for chat, answer in zip(chats, answers)]
print("reserved by v10 for each:", before.pool.blocks_for(before.max_model_len - 1), "blocks")
print("filled:                  ", sorted(filled), f" together {sum(filled)}")
print("steps:                   ", {"v10": len(running_before), "v11": len(running)})
print("run at most together:    ", {"v10": max(running_before), "v11": max(running)})
same = sum(x == y for x, y in zip(answers_before, answers))
print(f"the same answer in both:  {same} of {len(chats)}")
assert max(running_before) == 2 and max(running) == 24 and sum(filled) < 128
assert engine.stats().preemptions == 0

# %%
figure, axes = plt.subplots(figsize=(8, 2.5))
for name, each in (("v10", running_before), ("v11", running)):
    axes.step(range(1, len(each) + 1), each, where="mid", label=f"{name}: {len(each)} steps")
axes.set(title="Chat requests in each step, equal memory", xlabel="step", ylabel="requests", ylim=0)
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# All 24 conversations together fill fewer blocks than v10 reserves for one of them. v11 runs them all at once, and preempts
# none. But it has admitted more than fits in the worst case: if every answer were as long as it may be, the requests would need
# 24 times 128 blocks.
#
# ## 2. Three requests, six blocks
#
# Now a cache that is too small: six blocks of four tokens, and nothing is reserved. A has a prompt of 7 tokens and generates 6,
# B has 6 and 4, C has 6 and 5.
#
# **Predict.** In which step does a request need a block when none is free? Which one is preempted? In which step does it
# return, and how many tokens does it feed in that step?

# %%
LENGTHS = [(7, 6), (6, 4), (6, 5)]
small = v11.Engine(POCKET, device="cpu", num_blocks=6, block_size=4, reserve_tokens=0)
small_before = v10.Engine(POCKET, device="cpu", num_blocks=6, block_size=4)

# %%
trace, tokens = record(find("v11"), small, fixed(LENGTHS, small.config.vocab_size))
for number, step in enumerate(trace.passes, 1):
    said = {part.request: f"{'ABC'[part.request]} feeds {part.num_tokens}, has {part.rows}" for part in step.parts}
    waits = "".join("ABC"[request] for request in step.waiting if request not in said)
    free = 6 - sum(len(part.rows) for part in step.parts)
    print(f"step {number}", *(f"{said.get(i, ''):24}" for i in range(3)), f"free {free}  {waits and waits + ' waits'}".rstrip(), sep="   ")
print("preemptions:", small.stats().preemptions, "  positions:", small.num_positions, "  needed:", trace.num_needed)

# %%
owners = torch.full((6, len(trace.passes)), float("nan"))
for step, each in enumerate(trace.passes):
    for part in each.parts:
        owners[part.rows, step] = part.request

figure, axes = plt.subplots(figsize=(7, 3))
axes.imshow(owners, cmap="tab10", vmin=0, vmax=9, aspect="auto", alpha=0.6)
for block, step in (~owners.isnan()).nonzero().tolist():
    axes.text(step, block, "ABC"[int(owners[block, step])], ha="center", va="center", fontsize=9)
axes.set(title="Which request owns which block (white: free)", xlabel="step", ylabel="block")
axes.set_xticks(range(len(trace.passes)), range(1, len(trace.passes) + 1))
plt.show()

fed_by_c = [part.num_tokens for each in trace.passes for part in each.parts if part.request == 2]
assert fed_by_c == [6, 1, 8, 1, 1] and small.stats().preemptions == 1

# %% [markdown]
# In step 3, A needs a third block. C is the last in rank, so C's blocks 4 and 5 are freed, and A gets 5. One block would be
# enough for A, but a preempted request gives all of its blocks back. In step 4, B gets block 4 and finishes. In step 5, C
# returns: it feeds its prompt and the two tokens that it had generated. Seven of these eight positions had been computed before.
#
# **Predict.** v10 reserves three blocks for each of these requests. How many steps does it need? And are the tokens the same?

# %%
trace_before, tokens_before = record(find("v10"), small_before, fixed(LENGTHS, small.config.vocab_size))
print("steps:    ", {"v10": len(trace_before.passes), "v11": len(trace.passes)})
print("positions:", {"v10": trace_before.num_positions, "v11": trace.num_positions})
print("the same tokens:", tokens == tokens_before)
assert tokens == tokens_before
assert (len(trace_before.passes), len(trace.passes)) == (9, 7)
assert trace.num_positions == trace_before.num_positions + 7

# %% [markdown]
# ## 3. Preempt one yourself
#
# `preempt` may be called for any running request, at any time between two steps. Three requests with a temperature of 1, each
# with its own seed, run in a cache that is large enough. First each runs alone.

# %%
roomy = v11.Engine(POCKET, device="cpu", num_blocks=64, block_size=4)

# %%
stories = [
    (prompt, v11.SamplingParams(max_tokens=16, temperature=1.0, seed=seed, ignore_eos=True))
    for seed, prompt in enumerate(("Once upon a time", "Once upon a time there was a", "Once upon a time there was an old owl called"))
]
alone = [roomy.generate([prompt], params)[0].token_ids for prompt, params in stories]
for (prompt, _), token_ids in zip(stories, alone):
    print(repr(prompt + roomy.tokenizer.decode(token_ids)))

# %% [markdown]
# Then they run side by side. After five steps the second one is preempted, by this method:

# %%
print(inspect.getsource(type(roomy.scheduler).preempt))

# %% [markdown]
# **Predict.** Which of these change: its tokens, `num_computed`, its block table, its seed, its rank? How many steps does it
# miss? How many tokens does it feed when it returns?

# %%
def show(when):
    print(f"{when:14} {seq.num_tokens:2} tokens, {seq.num_computed} computed, blocks {list(seq.block_table)}, rank {seq.rank}, seed {seq.seed}")


ids = [roomy.add_request(*story) for story in stories]
for _ in range(5):
    roomy.step()
seq = roomy.scheduler.running[1]
num_computed = seq.num_computed
show("running:")
roomy.scheduler.preempt(seq)
show("preempted:")
print(f"{'':14}", roomy.stats())

# %%
num_positions = roomy.num_positions
assert ids[1] in [output.request_id for output in roomy.step()]
show("after step 6:")
print(f"{'':14} positions in step 6: {roomy.num_positions - num_positions}")
assert roomy.num_positions - num_positions == 13 + 1 + 1 and num_computed == 12
while roomy.has_unfinished_requests():
    roomy.step()
assert seq.output_ids == alone[1]

# %% [markdown]
# The request lost its keys and values and kept everything else. There was room for it at once, so it missed no step. In step 6
# it fed all 13 of its tokens, and the two others fed one each. Its tokens are the same as alone, although they are sampled:
# each random number depends only on the seed and the position.
#
# That was one request at one step. The next cell preempts each of the three before each step from 2 to 16, 45 runs in all, and
# counts the positions that are computed more than once.

# %%
def together(engine, step=None, victim=None):
    """Run the three side by side, and preempt one of them before a step; the tokens of each, and the number of positions."""
    tokens = {engine.add_request(*story): [] for story in stories}
    start, number = engine.num_positions, 0
    while engine.has_unfinished_requests():
        number += 1
        if number == step:
            engine.scheduler.preempt(engine.scheduler.running[victim])
        for output in engine.step():
            tokens[output.request_id].append(output.token_id)
    return list(tokens.values()), engine.num_positions - start


def extra_positions(engine, victim):
    """For each step before which the victim is preempted, the number of positions that this adds. The tokens must not change."""
    tokens, undisturbed = together(engine)
    assert tokens == alone
    extra = {}
    for step in range(2, 17):
        tokens, positions = together(engine, step, victim)
        assert tokens == alone, f"preempting {victim} before step {step} changed a token"
        extra[step] = positions - undisturbed
    return extra


recomputed = [extra_positions(roomy, victim) for victim in range(3)]
prompt_lens = [len(roomy.tokenizer(prompt).input_ids) for prompt, _ in stories]
print("extra positions, if preempted before step 2, 3, ... 16:")
for (prompt, _), extra in zip(stories, recomputed):
    print(f"{prompt!r:45} {list(extra.values())}")
for num_prompt, extra in zip(prompt_lens, recomputed):
    assert extra == {step: num_prompt + step - 2 for step in range(2, 17)}

# %% [markdown]
# The later a request is preempted, the more it has to compute again: its whole prompt, and all that it has generated except the
# last token, which had not been fed yet.
#
# ## 4. Swap instead
#
# With `swap_bytes`, the keys and values are copied to another part of the CPU's memory before the blocks are freed. One engine
# has a swap space that is large enough, and another has one of exactly three blocks, 12 positions.
#
# **Predict.** How many extra positions does the first engine compute? With three blocks, from which step on does a preemption of
# the second request cost extra positions?

# %%
block_bytes = roomy.cache.kv_bytes // roomy.pool.num_blocks
swapping = v11.Engine(POCKET, device="cpu", num_blocks=64, block_size=4, swap_bytes=2**20)
scarce = v11.Engine(POCKET, device="cpu", num_blocks=64, block_size=4, swap_bytes=3 * block_bytes)

# %%
for story in stories:
    swapping.add_request(*story)
for _ in range(5):
    swapping.step()
seq = swapping.scheduler.running[1]
show("running:")
swapping.scheduler.preempt(seq)
show("preempted:")
print(f"{'':14} swap blocks {list(seq.swap_table)}, {swapping.stats().swapped_blocks} in use")
assert swapping.stats().swapped_blocks == swapping.pool.blocks_for(seq.num_computed) == 3

# %%
num_positions = swapping.num_positions
swapping.step()
show("after step 6:")
print(f"{'':14} swap blocks {list(seq.swap_table)}, {swapping.stats().swapped_blocks} in use")
print(f"{'':14} positions in step 6: {swapping.num_positions - num_positions}")
assert swapping.num_positions - num_positions == 3 and swapping.stats().swapped_blocks == 0
swapping.close()

# %%
ways = {"no swap space": recomputed[1], "3 blocks": extra_positions(scarce, 1), "enough": extra_positions(swapping, 1)}
for name, extra in ways.items():
    print(f"{name:14} {list(extra.values())}")
figure, axes = plt.subplots(figsize=(8, 3))
for (name, extra), style, size in zip(ways.items(), ("o-", "s--", "^:"), (4, 8, 4)):
    axes.plot(extra.keys(), extra.values(), style, markersize=size, markerfacecolor="none" if size == 8 else None, label=name)
axes.set(title="One preemption of the second request", xlabel="preempted before step", ylabel="extra positions")
axes.set_xticks(range(2, 17, 2))
axes.legend(title="swap space", fontsize=8)
plt.show()
assert set(ways["enough"].values()) == {0}
assert all(ways["3 blocks"][step] == (0 if held <= 12 else held) for step, held in recomputed[1].items())

# %% [markdown]
# `num_computed` stays as it was. When the request returns, the copies are loaded into blocks that are free then, and it feeds
# one token as if nothing had happened. `save` copies all of a request's blocks or none. Before step 7 the request has 13
# positions, four blocks, so with three swap blocks nothing is saved, and all 13 are computed again. All of these runs generated
# the same tokens.
#
# ## 5. The dial
#
# How much should be reserved? Every question of part 1 is asked three times, at a temperature of 1 with different seeds. `max_tokens` is 192,
# far above what the answers need. The cache has 80 blocks of 16 tokens.
#
# **Predict.** `reserve_tokens` is 0, 8, 16, 32 or 192. Which value needs the fewest steps? Which ones compute no position
# twice? Which would you choose?

# %%
DIAL = (0, 8, 16, 32, 192)
engine = v11.Engine(POCKET, device="cpu", num_blocks=80, block_size=16)

# %%
def turned_to(reserve_tokens):
    """Answer every question three times with this reservation; the counts."""
    engine.scheduler.reserve_tokens = reserve_tokens
    start = engine.num_steps, engine.num_positions, engine.stats().preemptions
    for seed, chat in enumerate(chats * 3):
        engine.add_request(chat, v11.SamplingParams(max_tokens=192, temperature=1.0, seed=seed, new_text=True))
    num_tokens, most, reasons = 0, 0, set()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        num_tokens += len(outputs)
        most = max(most, len(outputs))
        reasons |= {output.finish_reason for output in outputs}
    assert reasons == {None, "stop"}, "no answer is cut off"
    needed = sum(map(len, chats * 3)) + num_tokens - 3 * len(chats)
    ends = engine.num_steps, engine.num_positions, engine.stats().preemptions
    steps, positions, preemptions = (end - begin for begin, end in zip(start, ends))
    return {
        "tokens": num_tokens,
        "most": most,
        "steps": steps,
        "positions": positions,
        "preemptions": preemptions,
        "useful": needed / positions,
    }


found = {reserve_tokens: turned_to(reserve_tokens) for reserve_tokens in DIAL}
print(f"{3 * len(chats)} answers of {found[0]['tokens'] / 3 / len(chats):.0f} tokens on average")
for reserve_tokens, counts in found.items():
    print(
        f"reserve {reserve_tokens:3}: at most {counts['most']:2} at once, {counts['steps']:3} steps, "
        f"{counts['preemptions']:2} preemptions, {counts['positions']} positions, {counts['useful']:4.0%} of them useful"
    )
assert len({counts["tokens"] for counts in found.values()}) == 1, "every run generates the same number of tokens"
assert found[192]["most"] == 6 and found[192]["steps"] > 3 * found[16]["steps"]
assert found[32]["preemptions"] == 0 < found[16]["preemptions"] < found[0]["preemptions"] / 10
assert found[32]["useful"] == 1 and found[0]["useful"] < 0.8

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 2.6))
for panel, name in zip(axes, ("steps", "preemptions", "useful")):
    panel.plot(range(len(DIAL)), [found[reserve_tokens][name] for reserve_tokens in DIAL], "o-")
    panel.set_xticks(range(len(DIAL)), DIAL, fontsize=8)
    panel.set(title=name if name != "useful" else "useful share of the positions", xlabel="reserve_tokens")
    panel.title.set_fontsize(10)
axes[0].set_ylim(0)
axes[2].set_ylim(0, 1.05)
figure.tight_layout()
plt.show()

# %% [markdown]
# With everything reserved, six requests run at once, which is v10's rule. With less reserved, more run at once, and the work is done
# in fewer steps. But below 16 hardly any steps are saved, and more and more positions are computed twice: with 0, a quarter of
# them. With 32 nothing is preempted, and some of what is reserved is not used. The default is 16: four preemptions, and nearly
# the fewest steps. Which value is best depends on the lengths, and on what a position costs compared with a step.
#
# ## 6. An urgent request
#
# Eight long requests use all eight rows of an engine. They generate 30, 32, ... 44 tokens. After ten steps a ninth request
# arrives, which generates 5.
#
# **Predict.** In which step does it get its first token if all priorities are 0? In which if its own is -1? Which of the eight
# pays for it, and how many steps later does that one finish?

# %%
full = v11.Engine(POCKET, device="cpu", max_num_seqs=8)
LONG = [(4, length) for length in range(30, 46, 2)]

# %%
def beside_eight(priority):
    """Add a ninth request after ten steps; for each step, the requests that got a token, and the number of positions."""
    start, steps, number_of = full.num_positions, [], {}
    for number, request in enumerate(fixed(LONG, full.config.vocab_size)):
        params = v11.SamplingParams(max_tokens=request.max_tokens, ignore_eos=True)
        number_of[full.add_request(request.prompt_ids, params)] = number
    while full.has_unfinished_requests():
        if len(steps) == 10:
            params = v11.SamplingParams(max_tokens=5, ignore_eos=True, priority=priority)
            number_of[full.add_request("Hello", params)] = 8
        steps.append([number_of[output.request_id] for output in full.step()])
    return steps, full.num_positions - start


def steps_of(request, steps):
    return [number for number, each in enumerate(steps, 1) if request in each]


runs = {priority: beside_eight(priority) for priority in (0, -1)}
for priority, (steps, positions) in runs.items():
    ends = [steps_of(request, steps)[-1] for request in range(8)]
    urgent = steps_of(8, steps)
    print(f"priority {priority:2}: first token in step {urgent[0]}, last in {urgent[-1]}; the eight finish in steps {ends}; {positions} positions")
assert steps_of(8, runs[0][0])[0] == 31 and steps_of(8, runs[-1][0])[0] == 11
assert steps_of(7, runs[-1][0]) == [*range(1, 11), *range(16, 50)] and runs[-1][1] == runs[0][1] + 4 + 9
assert all(steps_of(request, runs[-1][0]) == steps_of(request, runs[0][0]) for request in range(7))

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True)
for panel, (priority, (steps, _)) in zip(axes, runs.items()):
    for request in range(9):
        at = steps_of(request, steps)
        panel.plot(at, [request + 1] * len(at), "s", markersize=3, color="tab:red" if request == 8 else "tab:blue")
    panel.axvline(10.5, color="grey", linewidth=0.8, linestyle=":")
    panel.set(title=f"priority {priority}", xlabel="step")
axes[0].set_ylabel("request")
axes[0].set_yticks(range(1, 10))
axes[0].invert_yaxis()
figure.suptitle("A mark is a token; the ninth request arrives at the dotted line", fontsize=10)
figure.tight_layout()
plt.show()

# %% [markdown]
# With equal priorities the request waits for a row: the first of the eight finishes in step 30. With priority -1 it ranks first.
# In the next step it takes the row of the last in rank, the eighth request. That one waits for five steps, and finishes five
# steps later. It computes 13 positions again: its prompt of 4 tokens and nine of the ten that it had generated. The other seven
# requests are not affected.
#
# ## To try
#
# 1. In part 2, give the cache 7 blocks, then 8, then 9. In which of them is a request preempted, which one, and in which step?
# 2. In part 5, create the engine with `swap_bytes=2**20`. What becomes of the useful share at 0? And what if the same bytes
#    were blocks of the cache?
# 3. In part 6, let three urgent requests arrive, after 10, 12 and 14 steps. Which requests are preempted, and which finishes
#    last?
#
# The chapter's text is [milestones/v11_preemption/README.md](../milestones/v11_preemption/README.md). `make soak ARGS=v11` runs
# thousands of requests in tiny caches, `make traps-v11` plants the chapter's seeded bugs, and `make diff-v11` shows everything
# that the chapter changed.
