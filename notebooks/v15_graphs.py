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
# # v15, followed along: record a step, and replay it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v15_graphs.ipynb)
#
# You watch the tensors of a step stay where they are, count what a step launches before and after, record two lines by hand, find
# out what a recording has frozen, pad a batch, write a key to slot -1, preempt a request behind the engine's back, and write
# memory that is still being copied. No GPU is needed: a simulated one stands in for it. Times differ from machine to machine;
# counts do not. Plan about twenty minutes. Before each run there is a question: write your answer down first. (Parts 2 to 6 need
# Triton, which exists for Linux only. Elsewhere, open this in Colab.)

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
# All of this runs on the CPU, even if there is a GPU, and Triton's kernels run in its interpreter.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# %%
import contextlib
import inspect
import io
import random
import warnings
from collections import Counter
from statistics import median

import matplotlib.pyplot as plt
import numpy as np
import torch

torch.set_num_threads(1)
torch.manual_seed(0)
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets

from milestones import v14_fused_step as v14
from milestones import v15_graphs as v15
from milestones.v14_fused_step.kernels import fused as v14_fused
from milestones.v15_graphs.batch import Rows
from milestones.v15_graphs.kernels import fused
from milestones.v15_graphs.kernels.paged_attention import choose_splits, paged_attention
from milestones.v15_graphs.runner import NO_SLOT, Runner, choose_sizes
from milestones.v15_graphs.scheduler import Scheduler
from shared.bench.overhead import SIZES, decode_steps
from shared.checkpoints import POCKET, checkpoint
from shared.verify.pretend_gpu import launches, pretend_gpu

# %% [markdown]
# ## 1. Rows that stay
#
# A has a prompt of 9 tokens and generates 4; B has 4 and generates 9; C has 2 and generates 9. Blocks have 4 tokens. Step 1 computes
# the prompts, and from step 2 on each request feeds one token. The next cell prints, for each of these steps, what the rows hold.
#
# **Predict.** Which rows' block tables are written in step 2, in step 3, and in step 4? A finishes in step 4. Which are written in
# step 5, although no request gets a block? And do the tensors that the model reads move in memory?

# %%
small = v15.Engine(POCKET, device="cpu", num_blocks=32, block_size=4, max_num_seqs=8, max_model_len=32, reserve_tokens=0, linear="plain", enable_prefix_caching=False)

# %%
def watch(engine, lengths):
    """Run requests {name: (prompt, output)}; print the rows after each step in which all feed one token. By step, the rows written."""
    rng, names, written, places = random.Random(1), {}, [], set()
    for name, (num_prompt, max_tokens) in lengths.items():
        prompt = rng.choices(range(8, engine.config.vocab_size), k=num_prompt)
        names[engine.add_request(prompt, v15.SamplingParams(max_tokens=max_tokens, ignore_eos=True))] = name
    update_tables = engine.runner.update_tables
    engine.runner.update_tables = lambda seqs: written.append(update_tables(seqs)) or written[-1]
    model = engine.model.register_forward_pre_hook(lambda _, inputs: places.add(inputs[0].token_ids.data_ptr()) if written else None)
    first_step = engine.num_steps
    while engine.has_unfinished_requests():
        count = len(written)
        engine.step()
        if len(written) > count:
            print(f"step {engine.num_steps - first_step}: rows {written[-1]} written")
            for row, seq in enumerate(engine.in_step):
                values = [getattr(engine.runner.arrays, name)[row] for name in ("positions", "slots", "context_lens")]
                print(f"  row {row}, {names[seq.seq_id]}: position {values[0]:2}, slot {values[1]:2}, context {values[2]:2}, table {engine.runner.arrays.block_tables[row].tolist()}")
    del engine.runner.update_tables
    model.remove()
    print("addresses from which the model read token ids:", len(places))
    return written, len(places)


written, num_places = watch(small, {"A": (9, 4), "B": (4, 9), "C": (2, 9)})
assert written[:4] == [[0, 1, 2], [], [2], [0, 1]] and num_places == 1

# %% [markdown]
# In step 2 every row is new. In step 4, position 4 of C needs a second block, so its row is written. In step 5, B and C move up
# because A has left, and both rows are written again. A table's unused entries repeat its first block.
#
# These lines fill the rows:

# %%
print(inspect.getsource(Rows.__init__))
print(inspect.getsource(Runner.build))
print(inspect.getsource(Runner.update_tables))

# %% [markdown]
# ## 2. What a step launches
#
# `pretend_gpu` simulates a GPU on the CPU, counts what a GPU would have been asked to run, and has a stand-in for recordings. The next
# cell runs five greedy requests on a model with two layers, and lists what their fourth step launches.
#
# **Predict.** v14 launches 10 operations per layer and a dozen others. What is left of them in v15? And how often does Python wait for
# the GPU, if the requests are greedy, and if they are sampled?

# %%
def step_launches(package, params, **options):
    """What the fourth step of five requests launches on the simulated GPU, and how often it moves data between the devices."""
    with pretend_gpu() as crossings, contextlib.redirect_stderr(io.StringIO()):
        engine = package.Engine(checkpoint("llama-two-layers"), dtype="float32", max_model_len=64, max_num_seqs=8, **options)
        for i in range(5):
            engine.add_request([5, 6, 7 + i], package.SamplingParams(max_tokens=9, ignore_eos=True, **params))
        for _ in range(3):
            engine.step()
        before = len(launches), len(crossings)
        engine.step()
        ran, moved = launches[before[0] :], crossings[before[1] :]
    return [launch.removeprefix("aten::") for launch in ran], Counter(name.removeprefix("aten::") for name in moved)


for package, options in ((v14, {}), (v15, {"graphs": False}), (v15, {})):
    ran, moved = step_launches(package, {}, **options)
    print(f"{package.__name__.rpartition('.')[2]} {options}: {len(ran)} launches; between the devices {dict(moved)}")
print(*ran)
assert "replay" in ran and len(ran) == 7 and moved["tolist"] == 1

# %%
ran, moved = step_launches(v15, {"temperature": 0.8, "top_p": 0.9, "seed": 1})
print(f"sampled: {len(ran)} launches, after the replay:", *ran[ran.index("replay") + 1 :])
print("between the devices:", dict(moved))
assert moved["tolist"] == 1

# %% [markdown]
# One upload, one replay, then the head and the choice of tokens, which are not recorded. `tolist` is the only operation for which
# Python waits. (`to` counts uploads through pinned memory, most of which hold a few numbers or none.)
#
# Are the results the same? The next cell runs six requests, greedy and sampled, in v14 and in v15 with recordings.
#
# **Predict.** With at most 5 requests at a time, which batch sizes are recorded? Are all tokens the same, and all logprobs?

# %%
def run_all(package, **options):
    """Token ids and logprobs of six requests on the simulated GPU, and the engine."""
    rng = random.Random(3)
    prompts = [rng.choices(range(2, 390), k=rng.randint(1, 9)) for _ in range(6)]
    params = [dict(max_tokens=2 + i, temperature=(0.0, 0.9)[i % 2], seed=i, ignore_eos=True, logprobs=0) for i in range(6)]
    with pretend_gpu(), contextlib.redirect_stderr(io.StringIO()):
        engine = package.Engine(checkpoint("llama-two-layers"), dtype="float32", max_model_len=64, max_num_seqs=5, **options)
        outputs = engine.generate(prompts, [package.SamplingParams(**each) for each in params])
    return [(done.token_ids, [value for logprob in done.logprobs for value in logprob.values()]) for done in outputs], engine


before, _ = run_all(v14)
after, engine = run_all(v15)
print("recorded sizes:", sorted(engine.runner.recorded), "of", engine.runner.sizes)
print("same tokens:", [a[0] == b[0] for a, b in zip(before, after)])
print("largest difference of a logprob:", max(abs(x - y) for a, b in zip(before, after) for x, y in zip(a[1], b[1])))
assert all(a[0] == b[0] for a, b in zip(before, after))

# %% [markdown]
# The tokens are the same. Logprobs may differ in their last digits: three requests are computed as four rows, and a product may sum
# in another order if it has another number of rows.
#
# ## 3. A recording by hand
#
# The next cell records one line, on the simulated GPU, with the calls that you would use on a real one.
#
# **Predict.** What does `y` hold after each of the four prints?

# %%
with pretend_gpu():
    graph = torch.cuda.CUDAGraph()
    x = torch.zeros(3, device="cuda")
    number = 2
    with torch.cuda.graph(graph):
        y = x + number
    print("while recording, nothing ran:", y.tolist())
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    graph.replay()
    print("new numbers in x:            ", y.tolist())
    number = 10
    graph.replay()
    print("another Python number:       ", y.tolist())
    x = torch.tensor([7.0, 8.0, 9.0], device="cuda")
    graph.replay()
    print("another tensor named x:      ", y.tolist())
    assert y.tolist() == [3.0, 4.0, 5.0]

# %% [markdown]
# A replay reads whatever the recorded memory holds now. It sees neither Python's variables nor other tensors. (On a GPU, the memory of
# a tensor that no one holds any more may belong to another one, and the replay reads that.)
#
# ## 4. What Python computed
#
# In attention, Python computes the number of splits from the batch and from `max_context_len`, which is the longest context of the step
# or, in a recording, `max_model_len`. The next cell prints both, for Qwen3 0.6B (8 KV heads) on an H100 (132 SMs).
#
# **Predict.** One sequence at 512 positions: how many splits has its step in v14, and how many has a recording with a `max_model_len` of
# 4,096? From which batch size on are they equal?

# %%
def splits(num_seqs, max_context_len):
    return choose_splits(num_seqs * 8, max_context_len, 132)


batches = range(1, 25)
eager = [splits(num_seqs, 512) for num_seqs in batches]
recorded = [splits(num_seqs, 4096) for num_seqs in batches]
print("sequences", *(f"{num_seqs:3}" for num_seqs in batches))
print("eager    ", *(f"{count:3}" for count in eager))
print("recorded ", *(f"{count:3}" for count in recorded))
assert (eager[0], recorded[0], eager[3], recorded[3], eager[15], recorded[15]) == (2, 16, 2, 8, 2, 2)

# %%
figure, axes = plt.subplots(figsize=(7, 2.6))
axes.step(batches, eager, where="mid", label="eager, at 512 positions")
axes.step(batches, recorded, where="mid", label="recorded, max_model_len 4,096")
axes.set(title="Splits of each context", xlabel="sequences", ylabel="splits")
axes.set_yticks((1, 2, 4, 8, 16))
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# The number of splits is frozen, but how many keys each split takes is not: the kernel divides the context length, which it reads from
# memory. Here is one sequence at four contexts, attended with 1, 2 and 16 splits.
#
# **Predict.** With 16 splits and a context of 100, how many of the splits have any keys (a tile is 64)? How much do the results differ?

# %%
def attend_with(num_splits, context_len, q, k_cache, v_cache):
    tables = torch.arange(len(k_cache), dtype=torch.int32)[None]
    starts, lens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([context_len], dtype=torch.int32)
    return paged_attention(q, k_cache, v_cache, tables, starts, lens, 1, context_len, num_splits)


q, k_cache, v_cache = torch.randn(1, 4, 32), torch.randn(64, 16, 2, 32), torch.randn(64, 16, 2, 32)
for context_len in (1, 100, 512, 1000):
    one, two, sixteen = (attend_with(count, context_len, q, k_cache, v_cache) for count in (1, 2, 16))
    tiles_a_split = -(-context_len // (16 * 64))
    working = -(-context_len // (tiles_a_split * 64))
    print(f"context {context_len:4}: {working:2} of 16 splits have keys; largest difference from 1 split: {max((x - one).abs().max().item() for x in (two, sixteen)):.1e}")
    assert torch.allclose(one, two, atol=1e-5) and torch.allclose(one, sixteen, atol=1e-5)

# %% [markdown]
# Any number of splits gives the right result. Too many cost a little time, and too few would leave most of the GPU idle at a long context.
# So a recording assumes the longest context there can be.
#
# ## 5. Padding
#
# These are the sizes that are recorded. A batch is padded to the next one.
#
# **Predict.** How many sizes are there for at most 64 requests, and for at most 256? For which batch size is the share of padding largest?

# %%
for max_num_seqs in (21, 64, 256, 400):
    print(f"{max_num_seqs:3}: {len(choose_sizes(max_num_seqs)):2} sizes, {choose_sizes(max_num_seqs)[:8]} ... {choose_sizes(max_num_seqs)[-2:]}")
sizes = choose_sizes(256)
padded = [next(size for size in sizes if size >= num_seqs) for num_seqs in range(1, 257)]
shares = [1 - num_seqs / size for num_seqs, size in zip(range(1, 257), padded)]
print(f"most padding: {max(shares):.0%}, with {shares.index(max(shares)) + 1} requests; on average over 1 to 256: {sum(shares) / 256:.1%}")
assert len(choose_sizes(64)) == 11 and len(sizes) == 35

# %%
figure, axes = plt.subplots(figsize=(7, 2.6))
axes.step(range(1, 65), padded[:64], where="mid", label="rows computed")
axes.plot(range(1, 65), range(1, 65), color="grey", linestyle=":", label="requests")
axes.set(title="Rows of a recorded step", xlabel="requests", ylabel="rows")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# A padding row has a context of 0 and the slot -1. Attention has no keys for it.
#
# **Predict.** What does attention return for a context of 0, with one split, and with two? (To combine two splits, the kernel subtracts
# the largest of their logarithms from each. Here both are minus infinity.) And if a padding row were NaN, would it matter?

# %%
with np.errstate(invalid="ignore"):
    for num_splits in (1, 2):
        print(f"splits: {num_splits}, result: {attend_with(num_splits, 0, q, k_cache, v_cache)[0, 0, :4].tolist()}")

hidden = torch.randn(3, 16)
weight = torch.randn(16, 16)
broken = hidden.clone()
broken[2] = torch.nan
print("rows of a product that are NaN:", (broken @ weight).isnan().any(-1).tolist())
assert torch.equal((broken @ weight)[:2], (hidden @ weight)[:2])

# %% [markdown]
# Both are 0: where all logarithms are minus infinity, the kernel subtracts 0, because the difference of two infinities is NaN.
# A NaN would stay in its row through all layers. No other row would see it: between attention and attention, everything is computed
# row by row, and nothing is stored for a padding row, so no sequence attends to it.
#
# ## 6. Slot -1
#
# To a kernel, a slot is a number to compute an address with. The next cell stores the keys of two tokens in layer 1 of a cache with two
# layers, at slots 5 and -1. It does so with v14's kernel, which knows no padding, then with v15's.
#
# **Predict.** Where does v14's kernel put the second key? Where would PyTorch put it, with `cache[-1] = key`?

# %%
def stored(rotate_and_write):
    """The (layer, slot) pairs that are written when two tokens are stored at slots 5 and NO_SLOT of layer 1."""
    k_caches, v_caches = torch.zeros(2, 4, 4, 1, 16), torch.zeros(2, 4, 4, 1, 16)  # [L, P, BS, KV, D]
    q, k, v = torch.randn(2, 2, 16), torch.randn(2, 1, 16), torch.randn(2, 1, 16)
    cos, sin = torch.ones(2, 1, 8), torch.zeros(2, 1, 8)
    slots = torch.tensor([5, NO_SLOT])
    rotate_and_write(q, k, v, cos, sin, None, 0.0, k_caches[1], v_caches[1], slots)
    return k_caches.flatten(1, 2).flatten(2).any(-1).nonzero().tolist()


print("v14 writes (layer, slot):", stored(v14_fused.rotate_and_write))
print("v15 writes (layer, slot):", stored(fused.rotate_and_write))
by_index = torch.zeros(16)
by_index[torch.tensor([5, NO_SLOT])] = 1.0
print("PyTorch writes to slots: ", by_index.nonzero().flatten().tolist())
assert stored(fused.rotate_and_write) == [[1, 5]] and stored(v14_fused.rotate_and_write) == [[0, 15], [1, 5]]

# %% [markdown]
# As an address, slot -1 of layer 1 is the last slot of layer 0. For layer 0 it would be memory that belongs to something else. As an
# index of PyTorch, it is the last slot of the same layer. Either way someone's last position is overwritten, perhaps, and only when a
# batch is padded.
#
# ## 7. A table that looks the same
#
# The rows know which table they hold by its identity. Until v14, a sequence that was preempted emptied its table, and filled it again
# later: the same object with other blocks. Now it gets a new one. The next cell goes back to the old way. A, B and C are running when an
# urgent request for one token arrives, and preempts C. It prints C's blocks, and what C's row holds.
#
# **Predict.** When C has been computed again, which of its blocks does the row hold? Does anything raise an error?

# %%
def old_give_back(self, seq):
    """As in v14: the table stays the same object."""
    self.publish(seq)
    self.pool.free(seq.block_table)
    del seq.block_table[:]


def urgent(package):
    """The tokens of A, B and C, as lists, with an urgent request before step 4."""
    engine = package.Engine(POCKET, device="cpu", num_blocks=12, block_size=4, max_num_seqs=3, max_model_len=48, reserve_tokens=0, linear="plain", enable_prefix_caching=False)
    rng, tokens = random.Random(1), {}

    def add(num_prompt, max_tokens, priority):
        prompt = rng.choices(range(8, engine.config.vocab_size), k=num_prompt)
        return engine.add_request(prompt, package.SamplingParams(max_tokens=max_tokens, ignore_eos=True, priority=priority))

    ids = [add(5, 13, 0), add(4, 12, 0), add(4, 11, 1)]
    c = engine.seqs[ids[2]]
    while engine.has_unfinished_requests():
        if engine.num_steps == 3:
            add(5, 1, 0)
        for output in engine.step():
            tokens.setdefault(output.request_id, []).append(output.token_id)
        if package is v15 and engine.num_steps in (3, 4, 5, 6):
            state = "waits" if c.preempted else f"feeds {c.num_scheduled}"
            print(f"  step {engine.num_steps}: C {state}, has blocks {list(c.block_table)}; its row holds {engine.runner.arrays.block_tables[2, : len(c.block_table)].tolist()}")
    return [tokens[request_id] for request_id in ids]


# %%
with contextlib.redirect_stderr(io.StringIO()):
    want = urgent(v14)
    print("a new table:")
    got = urgent(v15)
    print("the old way:")
    new_give_back, Scheduler.give_back = Scheduler.give_back, old_give_back
    broken = urgent(v15)
    Scheduler.give_back = new_give_back
print("right with a new table:", [a == b for a, b in zip(got, want)])
print("right the old way:     ", [a == b for a, b in zip(broken, want)])
assert got == want and [a == b for a, b in zip(broken, want)] == [True, True, False]

# %% [markdown]
# In step 6, C feeds one token again, from row 2. The row remembers this table and two blocks, so it writes only what comes after
# these. C reads keys from blocks that are no longer its own, and there is no error. It needs some coincidence: while C was out, no other
# request has used row 2 in a step of this kind, and someone has taken one of C's blocks. Of 400 random workloads like this one, 14 went wrong.
#
# ## 8. Memory that is still being copied
#
# A GPU does its work in its own time. Uploads and kernels wait in a queue, and Python goes on. The next cell plays this: `Queue` collects
# what the GPU is asked to do, and does it when Python waits. In each of three steps, Python writes a number into the pinned
# memory, asks for a copy, then for a kernel that reads the copy.
#
# **Predict.** Which numbers do the kernels of three steps see if Python waits after each step? And if it waits only at the end?

# %%
class Queue(list):
    """What a GPU has been asked to do; done when someone waits for it."""

    def wait(self):
        for work in self:
            work()
        self.clear()


def three_steps(wait_each_time):
    queue, seen = Queue(), []
    pinned, on_gpu = np.zeros(1, dtype=int), np.zeros(1, dtype=int)
    for step in (1, 2, 3):
        pinned[0] = step
        queue.append(lambda: np.copyto(on_gpu, pinned))
        queue.append(lambda: seen.append(int(on_gpu[0])))
        if wait_each_time:
            queue.wait()
    queue.wait()
    return seen


print("waits in each step:", three_steps(True))
print("waits at the end:  ", three_steps(False))
assert three_steps(True) == [1, 2, 3] and three_steps(False) == [3, 3, 3]

# %% [markdown]
# The engine waits for each step's tokens, so when it writes the rows again, the last upload is done. An engine that begins the next
# step earlier has to wait for the upload, or to have two pieces of memory and use them in turns.
#
# ## 9. The engine's own share
#
# On a CPU nothing is recorded, but the rows are used there, too. The next cell times decode steps of pocket in v14 and v15. What is not
# the model or its head is the engine's own: it schedules, builds the batch, chooses tokens, and reports them.
#
# **Predict.** Whose share grows with the number of requests, the model's or the engine's? By how much is the engine's own time shorter?

# %% tags=["varies"]
def own_time(package, size):
    """Medians over the steps of three runs, in microseconds: a whole greedy step, and the engine's own part of it."""
    steps = [step for _ in range(3) for step in decode_steps(package, engines[package], size, {})]
    own = [step["step"] - step["model"] - step["head"] for step in steps]
    return 1e6 * median(step["step"] for step in steps), 1e6 * median(own)


with contextlib.redirect_stderr(io.StringIO()):
    engines = {package: package.Engine(POCKET, device="cpu", max_model_len=256, max_num_batched_tokens=8192, linear="plain") for package in (v14, v15)}
measured = {}
for size in SIZES:
    for name, package in (("v14", v14), ("v15", v15)):
        step, own = measured[name, size] = own_time(package, size)
        print(f"{name}, {size:2} requests: step {step:8,.0f} us, of which the engine's own {own:7,.0f} us, {own / step:.0%}")

# %%
figure, axes = plt.subplots(figsize=(7, 2.6))
for offset, name in enumerate(("v14", "v15")):
    axes.bar([place + 0.35 * offset for place in range(len(SIZES))], [measured[name, size][1] for size in SIZES], width=0.33, label=name)
axes.set(title="The engine's own time in a greedy step", xlabel="requests", ylabel="us")
axes.set_xticks([place + 0.17 for place in range(len(SIZES))], SIZES)
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## To try
#
# 1. In part 1, let A generate 9 tokens and C 4. Which rows are written when C finishes, and why fewer than before?
# 2. In part 3, put `y.tolist()` into the recording. What does the simulated GPU say, and why must it?
# 3. In part 4, which `max_model_len` gives one sequence the same number of splits as an eager step at 512 positions?
# 4. In part 8, let `three_steps` alternate between two pieces of pinned memory, and wait only before it writes a piece again.
#
# The chapter's text is [milestones/v15_graphs/README.md](../milestones/v15_graphs/README.md). `make test-v15` runs its tests, `make traps-v15`
# plants its seeded bugs, and `make diff-v15` shows everything that the chapter changed.
