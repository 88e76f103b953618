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
# # v06, followed along: read the blocks in place
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v06_triton_kernel.ipynb)
#
# You compute a softmax that forgets what it has seen, run the chapter's kernels on a CPU in Triton's interpreter,
# poison the memory that they must not read, and count the bytes that v05's gather moves needlessly. It takes about
# twenty minutes. There is a question before each run: write down your answer first. (Triton exists for Linux only;
# elsewhere, open this in Colab.)

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
# Triton decides at import whether it compiles or interprets, so set the environment before importing anything else. All
# of this runs on the CPU, even if there is a GPU.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"

# %%
import contextlib
import inspect
import math
import time
import warnings

import matplotlib.pyplot as plt
import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets

from triton.runtime.interpreter import InterpreterBuilder

from milestones.v05_paged_cache import Engine as GatheringEngine
from milestones.v06_triton_kernel import Engine
from milestones.v06_triton_kernel.attention import attend
from milestones.v06_triton_kernel.batch import Rectangle, causal_mask
from milestones.v06_triton_kernel.cache import KVCache
from milestones.v06_triton_kernel.config import load_config
from milestones.v06_triton_kernel.kernels.paged_attention import (
    TILE_KEYS,
    _attend_kernel,
    paged_attention,
    paged_attention_ref,
)
from shared.bench.recorder import record
from shared.chapters import find
from shared.checkpoints import POCKET
from shared.workloads import Request

# %% [markdown]
# ## 1. A softmax that forgets
#
# Take four keys with the scores 2, 3, 5 and 1 and the values 10, 20, 30 and 40. They arrive two at a time, and the
# first two are gone when the next two arrive. You keep three numbers: the largest score, the sum of the weights (each
# is `exp(score - largest)`), and the weighted sum of the values.
#
# **Predict.** What are the three numbers after the first two keys? When the 5 arrives, by what must you multiply the
# two sums? Can the sum of the weights become *smaller* as more keys are seen?

# %%
def online(scores, values, tile, rescaled=True):
    """The three numbers after each tile."""
    largest, total, weighted = -math.inf, 0.0, 0.0
    for start in range(0, len(scores), tile):
        part = scores[start : start + tile]
        new = max(largest, part.max().item())
        rescale = math.exp(largest - new) if rescaled else 1.0
        weights = (part - new).exp()
        total = total * rescale + weights.sum().item()
        weighted = weighted * rescale + (weights * values[start : start + tile]).sum().item()
        largest = new
        yield largest, total, weighted


scores, values = torch.tensor([2.0, 3.0, 5.0, 1.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])
for largest, total, weighted in online(scores, values, tile=2):
    print(f"largest {largest:.0f}   sum of weights {total:.3f}   weighted sum {weighted:.2f}", end="   ")
    print(f"divided {weighted / total:.2f}")
want = (scores.softmax(0) * values).sum().item()
print(f"torch.softmax over all four: {want:.2f}")
assert abs(weighted / total - want) < 1e-5

# %% [markdown]
# The sum fell: everything seen before counts less now, because a larger score arrived. The division at the end cancels
# that, since both sums were multiplied by the same number.
#
# Now take 256 scores in tiles of 16, with two large ones in the second half. The plots show the largest score, the
# sum of the weights, and the weighted mean so far.
#
# **Predict.** At which tiles does the sum of the weights fall? And if you forget the rescale, do the early values or
# the late ones get too much weight in the result?

# %%
torch.manual_seed(0)
scores = torch.randn(256)
scores[150], scores[215] = 5.0, 6.5  # in tiles 10 and 14
values = torch.linspace(0, 100, 256) + 10 * torch.randn(256)
want = (scores.softmax(0) * values).sum().item()
right = list(online(scores, values, tile=16))
wrong = list(online(scores, values, tile=16, rescaled=False))

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 3))
for panel, column, title in ((axes[0], 0, "largest score"), (axes[1], 1, "sum of the weights")):
    panel.step(range(1, 17), [numbers[column] for numbers in right], where="mid")
    panel.set(title=title, xlabel="tiles seen")
for numbers, style, label in ((right, ".-", "rescaled"), (wrong, "x--", "rescale forgotten")):
    axes[2].plot(range(1, 17), [weighted / total for _, total, weighted in numbers], style, markersize=4, label=label)
axes[2].axhline(want, color="grey", linewidth=0.8, label="torch.softmax")
axes[2].set(title="weighted mean so far", xlabel="tiles seen")
axes[2].legend(fontsize=7)
figure.tight_layout()
plt.show()

# %%
at_end = [numbers[-1][2] / numbers[-1][1] for numbers in (right, wrong)]
print(f"torch {want:.4f}   rescaled {at_end[0]:.4f}   forgotten {at_end[1]:.4f}")
assert abs(at_end[0] - want) < 1e-3
assert abs(at_end[1] - want) > 1e-3

# %% [markdown]
# The sum can fall only where a new largest score arrives; elsewhere it rises. The values grow along the sequence
# here, so without the rescale the result is too small: early keys keep the weight they had before a larger score was
# known.
#
# ## 2. The same in the kernel
#
# Here is the loop of `_attend_kernel`. Find the three numbers (`score_max`, `exp_sum`, `acc`), the rescale, and the
# lines that look up a key's block and compute its slot. Those two lines are all that paging adds.

# %%
source = inspect.getsource(_attend_kernel.fn)
print(source[source.index("    # running softmax") : source.index("    # a row that has seen no key")])

# %% [markdown]
# A program takes one sequence and one KV head, with all query heads that share it. Its tile has `TILE_KEYS` keys,
# whatever the size of a block. To call the kernel you need some memory: a cache in pocket's shape (6 query heads, 2
# KV heads, 32 elements) with blocks of 16, and sequences with one query each, as in a decode step. Blocks are handed
# out in random order, and every slot that holds no token is NaN.

# %%
config = load_config(POCKET)
BLOCK_SIZE = 16


# %%
def memory(contexts, seed=1):
    """One query of each sequence, a cache of which only the contexts are filled, and the tables."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-n // BLOCK_SIZE) for n in contexts]
    cache = KVCache(config, sum(needed) + 1, BLOCK_SIZE, torch.device("cpu"), torch.float32)
    for kept in (cache.k, cache.v):
        kept.fill_(math.nan)
    free = (torch.randperm(sum(needed), generator=generator) + 1).tolist()  # block 0 belongs to no sequence
    tables = torch.zeros(len(contexts), max(needed), dtype=torch.int32)
    for s, n in enumerate(contexts):
        for p in range(n):
            if p % BLOCK_SIZE == 0:
                tables[s, p // BLOCK_SIZE] = free.pop()
            for kept in (cache.k, cache.v):
                kept[0, tables[s, p // BLOCK_SIZE], p % BLOCK_SIZE] = torch.randn(2, 32, generator=generator)
    q = torch.randn(len(contexts), 6, 32, generator=generator)
    return q, cache, tables


# %% [markdown]
# **Predict.** With contexts of 9, 64, 65 and 130 tokens, how many turns of the loop do their programs take? And how far
# will the result be from plain torch, `paged_attention_ref`: 0, about 1e-7, or about 1e-3?

# %%
contexts = [9, 64, 65, 130]
q, cache, tables = memory(contexts)
starts = torch.arange(len(contexts) + 1, dtype=torch.int32)  # one query per sequence
lens = torch.tensor(contexts, dtype=torch.int32)
args = q, cache.k[0], cache.v[0], tables, starts, lens
got = paged_attention(*args, max_query_len=1, max_context_len=max(contexts))
want = paged_attention_ref(*args)
print("turns:", [-(-n // TILE_KEYS) for n in contexts])
print(f"largest difference {(got - want).abs().max():.1e}; NaN in the result: {int(got.isnan().sum())}")
torch.testing.assert_close(got, want, rtol=0, atol=1e-5)

# %% [markdown]
# It is not 0: the sums were taken in another order, and each float32 sum rounds its last bits. It is not 1e-3 either:
# the online softmax is exact except for that rounding. And there is no NaN, although every slot past the end of a
# context holds one.
#
# ## 3. What must not be read
#
# v05 gathers whole blocks into a rectangle as wide as the longest context, and lets the mask hide the rest. Whatever is
# past the end of a shorter sequence gets the weight 0.
#
# **Predict.** On this poisoned memory, for which of the four sequences does v05's path return NaN?

# %%
rectangle = Rectangle(
    tokens=torch.arange(len(contexts)),
    block_tables=tables,
    context_len=max(contexts),
    mask=causal_mask(lens - 1, max(contexts)),
)
keys, gathered_values = cache.read(0, rectangle)  # [S, n, KV, D]
gathered = attend(q, keys, gathered_values, rectangle.mask)
for name, out in (("gathered, as in v05", gathered), ("in place, by the kernel", got)):
    spoilt = ["NaN" if each.isnan().any() else "fine" for each in out]
    print(f"{name:24}", *(f"{n:3}: {state:4}" for n, state in zip(contexts, spoilt)), sep="   ")
assert gathered.isnan().flatten(1).any(1).tolist() == [n < max(contexts) for n in contexts]
assert not got.isnan().any()
torch.testing.assert_close(gathered[3], got[3], rtol=0, atol=1e-5)

# %% [markdown]
# A weight of 0 times NaN is NaN. Only the longest context, which fills the rectangle to its edge, is safe. The kernel
# masks the load: what `key_mask` hides is never read, so it may be anything. Otherwise, both paths multiply the same
# numbers. (The engine of v05 avoids the NaN by clearing each block before its first use.)
#
# To see it, record the loads. The interpreter runs every `tl.load` through its `create_masked_load`, with the
# addresses and the mask. A wrapper around it notes which bytes of the keys were loaded.

# %%
@contextlib.contextmanager
def watching_loads(tensor):
    """Where kernels load from in this tensor: a list of offsets in bytes, one array for each load."""
    offsets, load = [], InterpreterBuilder.create_masked_load

    def watched(self, pointers, mask, *rest):
        offset = pointers.data.astype("int64") - tensor.data_ptr()
        offsets.append(torch.from_numpy(offset[mask.data & (offset >= 0) & (offset < tensor.nbytes)]))
        return load(self, pointers, mask, *rest)

    InterpreterBuilder.create_masked_load = watched
    try:
        yield offsets
    finally:
        InterpreterBuilder.create_masked_load = load


# %%
with watching_loads(cache.k[0]) as offsets:
    paged_attention(*args, max_query_len=1, max_context_len=max(contexts))
slots_loaded = torch.cat(offsets) // (2 * 32 * 4)  # a slot has 2 heads of 32 floats
positions = torch.arange(max(contexts))
slots = tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE  # [S, n]
in_place = torch.isin(slots, slots_loaded)
assert in_place.sum(1).tolist() == contexts

# %%
figure, axes = plt.subplots(2, 1, figsize=(8, 3), sharex=True)
style = dict(aspect="auto", cmap="coolwarm", vmin=1, vmax=2, interpolation="nearest")
axes[0].imshow(1.0 + keys[:, :, 0, 0].isnan(), **style)
axes[0].set(title="gathered: a rectangle; red is NaN, copied along", ylabel="context")
axes[1].imshow(torch.where(in_place, 1.0, math.nan), **style)
axes[1].set(title="loaded in place; white was not touched", xlabel="position", ylabel="context")
for panel in axes:
    panel.set_yticks(range(len(contexts)), contexts)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 4. Bytes
#
# The gather reads blocks from the cache and writes them to a copy, then attention reads the copy. The kernel reads keys
# and values once. The wrapper counts the kernel's bytes; the shapes of the tables and of the copy give the gather's.
#
# **Predict.** Four sequences have 360 positions in total. How many times as many bytes as the kernel does v05 move if
# each has 90? And if one has 300 and three have 20?

# %%
moved = {}
for contexts in ([90, 90, 90, 90], [300, 20, 20, 20]):
    q, cache, tables = memory(contexts)
    lens = torch.tensor(contexts, dtype=torch.int32)
    with watching_loads(cache.k[0]) as of_keys, watching_loads(cache.v[0]) as of_values:
        paged_attention(q, cache.k[0], cache.v[0], tables, starts, lens, 1, max(contexts))
    loaded = 4 * sum(map(len, of_keys + of_values))  # float32
    assert loaded == 2 * sum(contexts) * 2 * 32 * 4, "each key and value once, and nothing else"
    keys, gathered_values = cache.read(0, rectangle._replace(block_tables=tables, context_len=max(contexts)))
    copied = 2 * tables.numel() * BLOCK_SIZE * 2 * 32 * 4  # keys and values of whole blocks
    by_v05 = [copied, copied, keys.nbytes + gathered_values.nbytes]
    moved[str(contexts)] = dict(zip(("v05 reads", "v05 writes", "v05 reads the copy", "v06 reads"), (*by_v05, loaded)))
    print(f"{contexts}: v05 {sum(by_v05) / 2**20:.2f} MiB, v06 {loaded / 2**20:.2f} MiB", end=", ")
    print(f"{sum(by_v05) / loaded:.1f} times as many")
    assert sum(by_v05) >= 3 * loaded

# %%
figure, axes = plt.subplots(figsize=(8, 3))
for row, parts in enumerate(moved.values()):
    left = 0
    for colour, (name, size) in zip(("tab:blue", "tab:cyan", "tab:purple"), list(parts.items())[:3]):
        axes.barh(3 * row, size / 2**20, left=left, color=colour, label=name if row == 0 else None)
        left += size / 2**20
    axes.barh(3 * row + 1, parts["v06 reads"] / 2**20, color="tab:orange", label="v06 reads" if row == 0 else None)
axes.set_yticks([0.5, 3.5], ["90 each", "300, 20, 20, 20"])
axes.set(title="Keys and values moved by one layer of one decode step", xlabel="MiB")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# If all are equally long, v05 moves three times as many bytes, and a little more because it copies whole blocks. The
# rest is padding: every sequence is gathered up to the length of the longest. (Queries and results are left out; they
# are small, and the same in both.)
#
# ## 5. Splits
#
# With a small batch and a long context, most of a GPU would be idle. So several programs each take a *split* of the
# keys, and a second kernel combines their results. With its result, each program stores `lse`, the logarithm of the
# sum of its `exp(score)`.
#
# **Predict.** With the four keys of part 1 in two splits, the first finds 17.31 and the second 30.18. Is the mean of
# the two close to 28.2? What is missing?

# %%
scores, values = torch.tensor([2.0, 3.0, 5.0, 1.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])
found, lse = [], []
for part in (slice(0, 2), slice(2, 4)):
    found.append((scores[part].softmax(0) * values[part]).sum())
    lse.append(scores[part].logsumexp(0))
weights = torch.stack(lse).softmax(0)
for name, numbers in (("found", found), ("lse", lse), ("weights", weights)):
    print(f"{name:8}", *(f"{each:6.3f}" for each in numbers))
print(f"weighed {(weights * torch.stack(found)).sum():.2f}   the mean would be {torch.stack(found).mean():.2f}")

# %% [markdown]
# The logarithms tell how much of the whole softmax each split has seen. Now the kernels, with one context of 300
# positions in 1, 2 and 5 splits.

# %%
q, cache, tables = memory([300])
args = q, cache.k[0], cache.v[0], tables, starts[:2], torch.tensor([300], dtype=torch.int32)
for num_splits in (1, 2, 5):
    out = paged_attention(*args, 1, 300, num_splits=num_splits)
    print(f"{num_splits} splits: {(out - paged_attention_ref(*args)).abs().max():.1e} from plain torch")
    torch.testing.assert_close(out, paged_attention_ref(*args), rtol=0, atol=1e-5)

# %% [markdown]
# ## 6. An engine on these kernels
#
# `attention="triton"` makes every layer call `attend_in_place`; the model does not change. On a CPU, the interpreter runs
# the programs in numpy, one after the other, so three tokens are enough. `record` counts what `cache.read` returns:
# keys and values up to the longest context, without the rest of the last block, which is gathered too.
#
# **Predict.** The prompt has 7 tokens, the engine 5 layers and 2 KV heads. How many programs of `_attend_kernel` does
# the run need? (A step launches it once per layer; its grid is sequences x KV heads x tiles of queries.) How many bytes
# does `cache.read` return in v05?

# %%
@contextlib.contextmanager
def counting_programs(axis):
    """A list with one entry per `tl.program_id` call: True if it was for this axis."""
    asked, program_id = [], InterpreterBuilder.create_get_program_id

    def counted(self, which):
        asked.append(which == axis)
        return program_id(self, which)

    InterpreterBuilder.create_get_program_id = counted
    try:
        yield asked
    finally:
        InterpreterBuilder.create_get_program_id = program_id


# %%
engines = {
    "v05": GatheringEngine(POCKET, device="cpu", num_blocks=8),
    "v06": Engine(POCKET, device="cpu", num_blocks=8, attention="triton"),
}
prompt = engines["v06"].tokenizer.encode("Who are you? Tell me more.")[:7]
tokens = {}
for name, engine in engines.items():
    start = time.perf_counter()
    with counting_programs(axis=1) as num_programs:  # _write_kernel has no axis 1
        trace, [tokens[name]] = record(find(name), engine, [Request(prompt, 3)])
    print(f"{name}: tokens {tokens[name]}, {len(trace.passes)} steps, {trace.kv_read_bytes / 2**10:.0f} KiB read, "
          f"{sum(num_programs)} programs, {time.perf_counter() - start:.2f} s here")
assert len(prompt) == 7 and tokens["v05"] == tokens["v06"]
assert trace.kv_read_bytes == 0 and sum(num_programs) == 3 * 5 * 2

# %% [markdown]
# The tokens are the same, and nothing was gathered. As for the programs, 7 queries of 3 heads are 21 rows, which fit
# into one tile. So a step has 1 x 2 x 1 programs per layer, and three steps of five layers have 30. The interpreter's
# time says nothing about a GPU's.
#
# ## To try
#
# 1. In part 1, add `scores = scores.sort(descending=True).values` before the line that sets the 256 values. How
#    often is the sum rescaled by less than 1? One of the asserts will fail: which, and why is that correct?
# 2. In part 2, make the contexts `[130, 130, 129, 130]`. For which sequence does v05's path return NaN in part 3 now?
# 3. In part 2, set `BLOCK_SIZE` to 1, then to 64. Which of the four bars of part 4 change, and which cannot?
#
# The chapter's text is [milestones/v06_triton_kernel/README.md](../milestones/v06_triton_kernel/README.md).
# `make test-v06` compares every kernel with plain torch, `make traps-v06` plants the chapter's seeded bugs (a forgotten
# rescale is one), and `make diff-v06` shows everything that the chapter changed.
