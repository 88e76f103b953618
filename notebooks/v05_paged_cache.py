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
# # v05, followed along: memory in blocks
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v05_paged_cache.ipynb)
#
# You watch a block table grow, compute slots by hand, follow the sixteen blocks of a pool from owner to owner, and
# count how many requests run together in the memory in which v04 runs eight. Before each run there is a question: write
# your number down, then run the cell. About 20 minutes.

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

from milestones.v04_continuous_batch import Engine as SlabEngine
from milestones.v05_paged_cache import Engine, SamplingParams
from milestones.v05_paged_cache.cache import BlockPool
from shared.bench.recorder import record
from shared.chapters import find
from shared.checkpoints import POCKET
from shared.workloads import TIMELINE, fixed, ragged

# %% [markdown]
# ## 1. A table grows
#
# An engine has 16 blocks of 4 tokens: 64 positions in all. Two requests run side by side. The first has a prompt of 7
# tokens and generates 12, the second has a prompt of 5 and generates 9. A token's key and value are stored when the
# token is *fed*, and the last token is never fed.
#
# **Predict.** How many blocks does the first request hold at its end? In which step does it get its third block? Which
# ids are in its table?

# %%
engine = Engine(POCKET, device="cpu", num_blocks=16, block_size=4)
first, second = [each.prompt_ids for each in fixed([(7, 12), (5, 9)], engine.config.vocab_size)]
seen = []


def watch(model, args):
    """Keep each step's batch, and a copy of its tables."""
    batch = args[0]
    seen.append((batch, {draw.seq.seq_id: (list(draw.seq.block_table), draw.position) for draw in batch.draws}))


hook = engine.model.register_forward_pre_hook(watch)
a = engine.add_request(first, SamplingParams(max_tokens=12, ignore_eos=True))
b = engine.add_request(second, SamplingParams(max_tokens=9, ignore_eos=True))
while engine.has_unfinished_requests():
    engine.step()
hook.remove()
for step, (_, tables) in enumerate(seen, 1):
    said = [f"{'AB'[i - a]}: {held:2} positions in {table}" for i, (table, held) in tables.items()]
    print(f"step {step:2}", *said, sep="   ")

# %% [markdown]
# A table gets a new id in the step whose token does not fit into the last block, and not earlier. The ids of the two
# tables interleave, because each request gets the next free block when it needs one. A table's order is the order of
# its own tokens; its ids need not be consecutive.

# %%
table_of_a = seen[-1][1][a][0]
assert len(table_of_a) == engine.pool.blocks_for(7 + 12 - 1) == 5
grew = [step for step in range(1, len(seen)) if len(seen[step][1][a][0]) > len(seen[step - 1][1][a][0])]
print("A's table:", table_of_a, " it grew in steps", [step + 1 for step in grew])
assert all((seen[step][1][a][1] - 1) % 4 == 0 for step in grew), "a block is taken for the first token that needs it"

figure, axes = plt.subplots(figsize=(8, 3))
for name, request, colour in (("A", a, "tab:blue"), ("B", b, "tab:orange")):
    held = [tables[request][1] for _, tables in seen if request in tables]
    room = [4 * len(tables[request][0]) for _, tables in seen if request in tables]
    axes.step(range(1, len(held) + 1), room, where="mid", color=colour, label=f"{name}: room in its blocks")
    axes.plot(range(1, len(held) + 1), held, "o", color=colour, label=f"{name}: positions that hold a token")
axes.set(title="Room follows the tokens, one block at a time", xlabel="step", ylabel="positions", ylim=0)
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## 2. The slot of a token, by hand
#
# Position `p` is in block `table[p // 4]`, at offset `p % 4`; its *slot* is `block * 4 + offset`.
#
# **Predict.** A's table is printed above. In which slot is its position 9, and in which its position 14?

# %%
for p in (9, 14):
    print(f"position {p:2}: block {table_of_a[p // 4]}, offset {p % 4}, slot {table_of_a[p // 4] * 4 + p % 4}")

for batch, tables in seen:
    by_hand = []
    for draw in batch.draws:
        table, end = tables[draw.seq.seq_id]
        begin = 0 if batch is seen[0][0] else end - 1  # the first step feeds the prompt, later ones a token
        by_hand += [table[p // 4] * 4 + p % 4 for p in range(begin, end)]
    assert by_hand == batch.slot_mapping.tolist()
print("first step:", seen[0][0].slot_mapping.tolist())
print("step 8:    ", seen[7][0].slot_mapping.tolist())

# %% [markdown]
# In every step the list computed by hand equals the one from `build_batch`. In the first step it has two runs of slots,
# the prompts; later it has one slot per sequence. Writing needs only this list; reading uses the tables. Look at both:

# %%
print(inspect.getsource(type(engine.cache).write))
print(inspect.getsource(type(engine.cache).read))

# %% [markdown]
# What is read is what was written, in the order of the positions, wherever the blocks are. The cell takes layer 0 and
# step 8, when A had four blocks and B three, and compares the gathered keys with those in B's slots.

# %%
batch, tables = seen[7]
table, num_held = tables[b]
rectangle = batch.view[0]
keys, values = engine.cache.read(0, rectangle)  # [S, n, KV, D]
row = [draw.seq.seq_id for draw in batch.draws].index(b)
slots = [table[p // 4] * 4 + p % 4 for p in range(num_held)]
print("tables of the step:", rectangle.block_tables.tolist(), "   B's slots:", slots)
assert torch.equal(keys[row, :num_held], engine.cache.k[0].flatten(0, 1)[slots])
assert torch.equal(keys[row, num_held], engine.cache.k[0, table[0], 0]), "past B's end: its own first key"

# %% [markdown]
# B's table is shorter, so it is padded with its own first block: past B's end its first keys are read again, and the
# mask gives them weight 0.
#
# ## 3. Allocate and free
#
# The pool knows ids, and nothing about tensors.
#
# **Predict.** Six blocks are free, 0 to 5. A takes three, B takes two, and A gives its blocks back. What does
# `allocate(5)` return? And `allocate(4)` after it?

# %%
pool = BlockPool(num_blocks=6, block_size=4)
of_a, of_b = pool.allocate(3), pool.allocate(2)
print("A holds", of_a, "  B holds", of_b, "  free", list(pool.free_ids))
pool.free(of_a)
print("A gives its blocks back:             free", list(pool.free_ids))
print("allocate(5):", pool.allocate(5), "                   free", list(pool.free_ids))
print("allocate(4):", pool.allocate(4), "          free", list(pool.free_ids))
assert pool.num_free == 0

# %% [markdown]
# `allocate(5)` returned `None` and took nothing: the four free blocks stayed free. A pool that returned what it had
# would leave a request with only some of its blocks. A's blocks came back after block 5, the last of its table first:
# `5, 2, 1, 0`. The head of a prompt is what another request is most likely to share, so it is handed out again last.
#
# ## 4. Sixteen blocks, ten requests
#
# This is the small workload of the chapter's picture, recorded from a run. `record` steps the engine and notes which
# request held which blocks.
#
# **Predict.** All ten requests are present at the start, and four may run together. Is there a step in which fewer than
# four requests run, at least a quarter of the blocks is free, and a request still waits? If so, what is it waiting for?

# %%
num_blocks = 16
engine = Engine(POCKET, device="cpu", max_num_seqs=4, num_blocks=num_blocks, block_size=4)
trace, _ = record(find("v05"), engine, fixed(TIMELINE, engine.config.vocab_size))
owners = torch.full((num_blocks, len(trace.passes)), float("nan"))
for step, each in enumerate(trace.passes):
    for part in each.parts:
        owners[part.rows, step] = part.request

figure, axes = plt.subplots(figsize=(8, 4))
axes.imshow(owners, cmap="tab10", vmin=0, vmax=9, aspect="auto", alpha=0.6)
for block, step in (~owners.isnan()).nonzero().tolist():
    axes.text(step, block, "ABCDEFGHIJ"[int(owners[block, step])], ha="center", va="center", fontsize=8)
axes.set(title="Which request owns which block (white: free)", xlabel="step", ylabel="block")
axes.set_xticks(range(0, len(trace.passes), 2), range(1, len(trace.passes) + 1, 2))
axes.set_yticks(range(0, num_blocks, 5))
plt.show()

# %% [markdown]
# Follow A in the picture: it gets whichever block is free. Now count. Before a new request is admitted, the scheduler
# adds up what the running requests may *come* to need, in blocks (`Scheduler.reserved`). The cell computes it from the
# lengths of the workload.

# %%
reservation = [engine.pool.blocks_for(prompt + output - 1) for prompt, output in trace.lengths]
held = [sum(len(part.rows) for part in each.parts) for each in trace.passes]
reserved = [sum(reservation[part.request] for part in each.parts) for each in trace.passes]
first_run = {}  # request to the step in which it ran first
for step, each in enumerate(trace.passes):
    for part in each.parts:
        first_run.setdefault(part.request, step)
waits = [sum(first > step for first in first_run.values()) for step in range(len(trace.passes))]
passes = range(1, len(trace.passes) + 1)

figure, axes = plt.subplots(figsize=(8, 3))
axes.step(passes, reserved, where="mid", label="reserved")
axes.fill_between(passes, held, step="mid", alpha=0.3, label="held")
axes.bar(passes, waits, width=0.3, color="grey", label="requests that wait")
axes.set(title="Reservations fill the pool before tokens do", xlabel="step", ylabel="blocks, requests")
axes.set_ylim(0, num_blocks + 1)
axes.legend(fontsize=8, loc="upper right")
plt.show()

# %%
running = [len(each.parts) for each in trace.passes]
idle = [
    p for p, r, h, w in zip(passes, running, held, waits)
    if w and r < 4 and num_blocks - h >= num_blocks / 4
]
print("fewer than four run, at least a quarter of the blocks is free, and a request waits, in steps", idle)
assert idle and all(h <= p <= num_blocks for h, p in zip(held, reserved))

# %% [markdown]
# The request waits because blocks are reserved for others. The sum of the reservations never exceeds the pool, so a
# running request is never refused a block later. The price is that blocks that are reserved, but not yet held, keep
# new requests out.
#
# ## 5. The same bytes, v04 and v05
#
# Take 4,096 positions of memory. A request may have 512 tokens, so v04 makes 8 rows of them. 72 requests arrive at
# once, with prompts of 4 to 60 tokens and outputs of 1 to 120, all lengths equally likely.
#
# **Predict.** How many run together in v05, while others wait?

# %%
rows, longest = 8, 512
slab = SlabEngine(POCKET, device="cpu", max_num_seqs=rows, max_model_len=longest)
paged = Engine(POCKET, device="cpu", max_num_seqs=64, max_model_len=longest, num_blocks=256, block_size=16)
requests = ragged(72, paged.config.vocab_size, prompt_len=(4, 60), output_len=(1, 120))
before, ids_before = record(find("v04"), slab, requests)
after, ids_after = record(find("v05"), paged, requests)

assert before.kv_bytes <= after.kv_bytes
same = sum(x == y for x, y in zip(ids_before, ids_after))
print(f"{before.kv_bytes / 2**20:.1f} and {after.kv_bytes / 2**20:.1f} MiB of keys and values")
print(f"the same answer in both: {same} of {len(requests)}")
print(f"forward passes: v04 {len(before.passes)}, v05 {len(after.passes)}")

# %%
figure, axes = plt.subplots(figsize=(8, 3))
together = {}
for name, run in (("v04", before), ("v05", after)):
    together[name] = [len(each.parts) for each in run.passes]
    while_waiting = [len(each.parts) for each in run.passes[1:] if each.waiting]
    mean = sum(while_waiting) / len(while_waiting)
    axes.step(range(1, len(run.passes) + 1), together[name], where="mid", label=f"{name}: {mean:.1f} while others wait")
axes.set(title="Requests in each step, equal memory", xlabel="step", ylabel="requests")
axes.legend(fontsize=8)
plt.show()
assert max(together["v04"]) == rows < max(together["v05"])
assert len(after.passes) < len(before.passes)

# %% [markdown]
# The ratio is not 512 divided by the mean reservation of all requests. A long request is in many steps and a short one
# in few, so a step contains mostly long ones. The chapter's text works this out under *What it costs*. Now the bytes
# themselves: v04 reserves a whole row for each running request; v05 hands out blocks.

# %%
per_position = after.kv_bytes / 4096


def bytes_of(run, size_of):
    """MiB in each step: handed out, and filled with tokens; size_of returns the positions that a part was given."""
    reached, given, full = {}, [], []
    for each in run.passes:
        for part in each.parts:
            reached[part.request] = reached.get(part.request, 0) + part.useful
        given.append(sum(map(size_of, each.parts)) * per_position / 2**20)
        full.append(sum(reached[part.request] for part in each.parts) * per_position / 2**20)
    return given, full


# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharex=True, sharey=True)
runs = ("v04", before, lambda part: longest), ("v05", after, lambda part: 16 * len(part.rows))
for panel, (name, run, size_of) in zip(axes, runs):
    given, full = bytes_of(run, size_of)
    panel.fill_between(range(len(given)), given, color="lightgrey", label="handed out")
    panel.fill_between(range(len(full)), full, color="tab:blue", label="holds tokens")
    panel.set(title=f"{name}: {sum(full) / sum(given):.0%} of what is handed out is used", xlabel="step")
    panel.title.set_fontsize(10)
axes[0].set_ylabel("MiB of keys and values")
axes[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# In v04 nearly all of what is handed out is gray: rows are reserved to their full length. In v05 only a thin edge is
# gray, the empty part of each sequence's last block. The white area above it is reserved and not held, or free for any
# request.
#
# ## 6. How large should a block be?
#
# **Predict.** Take blocks of 1, 4, 16 and 64 tokens, always 1,024 positions. How many positions of its last block does
# a sequence leave empty, on average, for each size?

# %%
sizes, empty, unheld = (1, 4, 16, 64), {}, {}
few = ragged(24, paged.config.vocab_size, prompt_len=(4, 60), output_len=(1, 60), seed=3)
for size in sizes:
    engine = Engine(POCKET, device="cpu", max_model_len=128, num_blocks=1024 // size, block_size=size)
    run, _ = record(find("v05"), engine, few)
    reached, lost, later, count = {}, 0, 0, 0
    for each in run.passes:
        for part in each.parts:
            reached[part.request] = reached.get(part.request, 0) + part.useful
            lost += len(part.rows) * size - reached[part.request]
            later += (engine.pool.blocks_for(sum(run.lengths[part.request]) - 1) - len(part.rows)) * size
            count += 1
    empty[size], unheld[size] = lost / count, later / count
    print(f"blocks of {size:2}: {len(run.passes)} steps, {empty[size]:5.1f} positions per sequence held and empty, "
          f"{unheld[size]:5.1f} reserved and not held")
    assert empty[size] <= size - 1

# %%
figure, axes = plt.subplots(figsize=(8, 3))
places = range(len(sizes))
axes.bar(places, empty.values(), label="held and empty")
axes.bar(places, unheld.values(), bottom=list(empty.values()), color="lightgrey", label="reserved and not held")
axes.plot(places, [(size - 1) / 2 for size in sizes], "k.--", label="(block size - 1) / 2")
axes.set_xticks(places, sizes)
axes.set(title="Positions per sequence that hold no token", xlabel="tokens in a block", ylabel="positions")
axes.legend(fontsize=8)
plt.show()
assert empty[1] == 0 < empty[4] < empty[16] < empty[64]

# %% [markdown]
# With blocks of one token nothing is held and empty. The larger the block, the more of the last one is empty: about
# half a block where lengths are many times the block, while for shorter lengths it varies with them. The other kind of
# waste, reserved and not held, hardly depends on the block size: admission determines it. Why not use blocks of one
# token, then? A table has an entry for each block, and reads are split into smaller pieces.
#
# ## To try
#
# 1. In part 3, let B give its blocks back before A does. Write down the order in which `allocate(6)` returns
#    them, then run.
# 2. In part 4, make `num_blocks` 12. How many steps will it take? Which request waits longest?
# 3. In part 5, assume that no request is longer than 180 tokens: `rows, longest = 22, 180`, as many rows as fit into
#    4,096 positions. How much of the difference is left? What did v04 have to know in advance?
#
# The chapter's text is [milestones/v05_paged_cache/README.md](../milestones/v05_paged_cache/README.md). `make test-v05`
# tests the chapter against Hugging Face, `make traps-v05` plants its seeded bugs one by one, and `make diff-v05` shows
# all of its changes.
