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
# # v16, followed along: the same bits, whatever else runs
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v16_same_bits.ipynb)
#
# You add the same numbers in three orders, count how many results a product has for one row, look at the bits of one request's
# logprobs alone and in company, put a softmax together from tiles, find a function that computes an element differently at the end
# of a row, test an engine for exactness, and look for a text that changes because of its neighbors. Which bits come out, and how often they
# differ, depends on the processor; that an exact engine's never differ does not. No GPU is needed. Plan about twenty minutes. Before
# each run there is a question: write your answer down first.

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
# All of this runs on the CPU, even if there is a GPU.

# %%
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""

# %%
import contextlib
import inspect
import io
import math
import random
import struct
import warnings
from functools import partial
from statistics import median

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
torch.manual_seed(0)
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets

from milestones import v15_graphs as v15
from milestones import v16_same_bits as v16
from milestones.v15_graphs import attention as v15_attention
from milestones.v16_same_bits import exact, trial
from milestones.v16_same_bits.backends import TORCH
from milestones.v16_same_bits.batch import Rectangle
from milestones.v16_same_bits.storage import groups_of, use
from shared.bench.overhead import SIZES, decode_steps
from shared.checkpoints import POCKET


def bits_of(value):
    """The 32 bits of a float32 number, in hexadecimal."""
    return struct.pack(">f", value).hex()


def make_engine(package, **options):
    """An engine with pocket, without its line on stderr."""
    with contextlib.redirect_stderr(io.StringIO()):
        return package.Engine(POCKET, device="cpu", **options)


# %% [markdown]
# ## 1. The same numbers in three orders
#
# A float32 number has 24 significant bits, and every addition rounds to them.
#
# **Predict.** What are `(1e8 + 1) - 1e8` and `(1e8 - 1e8) + 1` in float32? And of 4,096 numbers between -1 and 1, added from the left,
# from the right, and in pairs: how many decimal digits do the three sums have in common?

# %%
big, one = np.float32(1e8), np.float32(1)
print("(1e8 + 1) - 1e8 =", (big + one) - big)
print("(1e8 - 1e8) + 1 =", (big - big) + one)

rng = random.Random(0)
numbers = [np.float32(rng.uniform(-1, 1)) for _ in range(4096)]


def in_turn(values):
    """Add one number after another."""
    total = np.float32(0)
    for value in values:
        total += value
    return total


def in_pairs(values):
    """Add neighbors, then neighboring sums, until one is left."""
    while len(values) > 1:
        values = [a + b for a, b in zip(values[0::2], values[1::2])]
    return values[0]


sums = {"from the left": in_turn(numbers), "from the right": in_turn(numbers[::-1]), "in pairs": in_pairs(numbers)}
for name, total in sums.items():
    print(f"{name:15} {total:.9f}  bits {bits_of(total)}")
print(f"{'correctly':15} {math.fsum(numbers):.9f}  bits {bits_of(np.float32(math.fsum(numbers)))}")
assert len({bits_of(total) for total in sums.values()}) == 3

# %% [markdown]
# None of these orders is wrong. Their results differ by up to 19 units in the last place, and no library promises an order.
#
# ## 2. How many results has a row?
#
# `F.linear(x, weight)` multiplies each row of `x` by the weights. In mathematics, row 0 of the result depends on row 0 of `x` only.
# The next cell multiplies the same row beside 0 to 63 other rows, and groups the numbers of rows by the bits that row 0 gets.
#
# **Predict.** How many groups are there? Do they depend on the number of inputs?

# %% tags=["varies"]
def ranges(numbers):
    """Sorted numbers as text, neighbors joined.

    >>> ranges([1, 2, 3, 5])
    '1-3, 5'
    """
    parts = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in parts)


def kinds(product, x):
    """The numbers of rows, grouped by the bits of row 0 of the product."""
    found = {}
    for count in range(1, len(x) + 1):
        found.setdefault(product(x[:count])[0].numpy().tobytes(), []).append(count)
    return list(found.values())


layers = {size: (torch.randn(64, size), torch.randn(192, size)) for size in (64, 192, 576, 2048)}
for size, (x, weight) in layers.items():
    found = kinds(partial(F.linear, weight=weight), x)
    print(f"{size:4} inputs: {len(found)} kinds of bits, for {'; '.join(map(ranges, found))} rows")

# %% [markdown]
# A library has several ways to multiply, each of which is fast for some number of rows, and they add in different orders. A server's
# number of rows is the number of tokens in its step, which depends on who else is there.
#
# The remedy that needs no knowledge of the library: let it see the same number of rows each time. These are the products that v16
# falls back to.
#
# **Predict.** How many kinds of bits does a row have with them? What does it cost for a single row, and for 64?

# %%
print(inspect.getsource(exact.RowTiles))
for size, (x, weight) in layers.items():
    found = kinds(exact.RowTiles(weight, None), x)
    print(f"{size:4} inputs: kinds of bits: {len(found)}")
    assert len(found) == 1

# %% [markdown]
# A single row is multiplied as 16, and for 64 rows the weights are read four times. If the processor has a product that is faster and
# just as exact, v16 finds it by an experiment, which is part 6.
#
# ## 3. One request, alone and in company
#
# The next cell runs one request with up to 31 others, and prints the bits of its first eight logprobs, in v15 and in an engine of v16
# with `exact=True`.
#
# **Predict.** In v15, do all logprobs differ? Which hexadecimal digits do? Are v16's bits those of v15, of the request alone?

# %% tags=["varies"]
def beside(package, engine, num_others):
    """The bits of the logprobs of one request's tokens beside others."""
    rng = random.Random(num_others)
    others = [rng.choices(range(8, engine.config.vocab_size), k=rng.randint(2, 40)) for _ in range(num_others)]
    mine = engine.generate(["Once upon a time", *others], package.SamplingParams(max_tokens=8, ignore_eos=True, logprobs=0))[0]
    return [bits_of(value) for logprob in mine.logprobs for value in logprob.values()]


COMPANY = (0, 1, 2, 3, 7, 15, 31)
engines = {"v15": (v15, make_engine(v15, enable_prefix_caching=False)), "v16": (v16, make_engine(v16, exact=True, enable_prefix_caching=False))}
seen = {}
for name, (package, engine) in engines.items():
    print(f"{name}, linear layers {engine.linear}")
    for num_others in COMPANY:
        seen[name, num_others] = beside(package, engine, num_others)
        print(f"  beside {num_others:2}:", *seen[name, num_others])

# %%
print("kinds of bits in v16:", len({tuple(seen["v16", num_others]) for num_others in COMPANY}))
assert all(seen["v16", num_others] == seen["v16", 0] for num_others in COMPANY)

# %% [markdown]
# The digits that differ are the last ones. (A logprob near 0 is the logarithm of a number just above 1. There float32's steps are coarse, so
# it often has the same bits although the logits do not.) v16's bits may be others than v15's: they are the same each time, not better.
#
# Company is only one of the things that change a batch. In the next cell, 12 requests run alone in an exact engine. Then they run together in
# one that has too few blocks, feeds at most 24 tokens in a step, and finds the beginnings that the prompts share.
#
# **Predict.** Are the logprobs the same, compared with `==`? What if `exact` is left out?

# %%
SYSTEM = "You are a helpful assistant, and you answer every question in a few words. "
QUESTIONS = ("What is a block table?", "Why is the sky blue?", "Who are you?", "What is a token?", "Tell me a story.", "What do you like?")
prompts = [SYSTEM + question for question in QUESTIONS] + list(QUESTIONS)


def alone_and_crowded(**options):
    """The requests' outputs one by one; then all together where memory is short, and that engine."""
    params = v16.SamplingParams(max_tokens=40, ignore_eos=True, logprobs=2)
    roomy = make_engine(v16, max_model_len=128, enable_prefix_caching=False, **options)
    tight = make_engine(v16, max_model_len=128, num_blocks=40, block_size=8, max_num_seqs=12, max_num_batched_tokens=24, reserve_tokens=0, **options)
    return [roomy.generate([prompt], params)[0] for prompt in prompts], tight.generate(prompts, params), tight


alone, crowded, tight = alone_and_crowded(exact=True)
print("preemptions:", tight.scheduler.num_preemptions > 0, "  found in the prefix cache:", tight.scheduler.num_cached_tokens > 0)
print("the same logprobs, all bits:", [a.logprobs == b.logprobs for a, b in zip(alone, crowded)])
assert tight.scheduler.num_preemptions and tight.scheduler.num_cached_tokens
assert all(a.logprobs == b.logprobs for a, b in zip(alone, crowded))

# %% tags=["varies"]
alone, crowded, _ = alone_and_crowded()
pairs = [(a.get(token), b.get(token)) for one, other in zip(alone, crowded) for a, b in zip(one.logprobs, other.logprobs) for token in a]
print("not exact:", sum(a != b for a, b in pairs), "of", len(pairs), "logprobs differ")

# %% [markdown]
# ## 4. A softmax in tiles
#
# Attention averages values, weighted by a softmax over all keys of a request. How a library divides that sum depends on how many
# keys there are, and in a batch on the longest context. v16 divides it itself: tiles of 128 keys, counted from position 0. Each tile gives an average
# of its own, and the logarithm of its sum of exponentials (`lse`). The next cell combines three tiles by hand.
#
# **Predict.** Which weight does a tile's average get? Is the result that of a softmax over all keys, bit by bit?

# %%
NUM_KEYS, TILE = 300, exact.TILE_KEYS
scores, values = 3 * torch.randn(NUM_KEYS), torch.randn(NUM_KEYS, 32)


def tile(start):
    """A tile's average of the values, and its lse."""
    part = scores[start : start + TILE]
    return part.softmax(-1) @ values[start : start + TILE], part.logsumexp(-1)


def combine(tiles):
    """Put tiles together, one after another."""
    (out, top), total = tiles[0], torch.tensor(1.0)
    for part, lse in tiles[1:]:
        new_top = torch.maximum(top, lse)
        old_weight, weight = (top - new_top).exp(), (lse - new_top).exp()
        out, total, top = out * old_weight + part * weight, total * old_weight + weight, new_top
    return out / total


tiles = [tile(start) for start in range(0, NUM_KEYS, TILE)]
whole = scores.softmax(-1) @ values
print("tiles of", [min(TILE, NUM_KEYS - start) for start in range(0, NUM_KEYS, TILE)], "keys; their lse:", *(f"{lse:.3f}" for _, lse in tiles))
print(f"largest difference from a softmax over all keys: {(combine(tiles) - whole).abs().max():.1e}")
assert torch.allclose(combine(tiles), whole, atol=1e-5)

# %% [markdown]
# The results agree up to rounding: this, too, is another order. So the tiles have to be the same each time, and combined in the same
# order. In a batch, a short context gets as many tiles as the longest one, and does not attend to the last of them.
#
# **Predict.** What are the lse and the weight of a tile that is masked altogether? Does combining it change any bit? And would it if the
# tiles came in another order?

# %%
masked = torch.full((32,), 7.0), torch.tensor(-torch.inf)
print("weight of a masked tile:", (masked[1] - tiles[0][1]).exp().item())
print("one masked tile more changes nothing:", torch.equal(combine(tiles), combine([*tiles, masked])))
assert trial.is_same(combine(tiles), combine([*tiles, masked])) and trial.is_same(combine(tiles), combine([*tiles, masked, masked]))

# %% tags=["varies"]
orders = {order: combine([tiles[i] for i in order]) for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0))}
for order, out in orders.items():
    print("tiles", *order, " bits of the first three elements:", *(bits_of(value) for value in out[:3].tolist()))

# %% [markdown]
# (Tiles 0 and 1 may change places: addition is commutative, only not associative.) A weight of exactly 0 adds exactly 0, and the old
# weight is then `exp(0)`, exactly 1. The next cell does the same with the engines' own `attend`: one request with a context of 40, alone
# and in a rectangle with one of 300.
#
# **Predict.** How many keys does v16 attend to in the two calls? Does each engine give the same bits?

# %%
HEADS, KV_HEADS, SIZE = 4, 2, 32
q, keys, its_values = torch.randn(2, HEADS, SIZE), torch.randn(2, 384, KV_HEADS, SIZE), torch.randn(2, 384, KV_HEADS, SIZE)


def rectangle_of(context_lens):
    """Sequences with one query each."""
    mask = torch.arange(max(context_lens)) < torch.tensor(context_lens)[:, None]
    tables = torch.zeros(len(context_lens), -(-max(context_lens) // 16), dtype=torch.int32)
    return Rectangle(torch.arange(len(context_lens)), tables, max(context_lens), mask)


def attend_exactly(context_lens):
    """Attention as in v16, of one query of each sequence."""
    tiles = exact.fill_tiles(rectangle_of(context_lens), HEADS // KV_HEADS, 16, exact.TILE_ROWS, torch.float32)
    num_seqs, num_keys = len(context_lens), tiles.context_len
    return exact.attend(q[:num_seqs], keys[:num_seqs, :num_keys], its_values[:num_seqs, :num_keys], tiles), num_keys


def attend_before(context_lens):
    """The same as in v15."""
    num_seqs, num_keys = len(context_lens), max(context_lens)
    return v15_attention.attend(q[:num_seqs], keys[:num_seqs, :num_keys], its_values[:num_seqs, :num_keys], rectangle_of(context_lens).mask)


(single, its_keys), (both, their_keys) = attend_exactly([40]), attend_exactly([40, 300])
print(f"v16 attends to {its_keys} and to {their_keys} keys; the same bits: {trial.is_same(single[0], both[0])}")
assert trial.is_same(single[0], both[0]) and torch.allclose(single[0], attend_before([40])[0], atol=1e-5)

# %% tags=["varies"]
before = attend_before([40])[0], attend_before([40, 300])[0]
print(f"v15: {(before[0] != before[1]).sum()} of {before[0].numel()} elements have other bits, by at most {(before[0] - before[1]).abs().max():.1e}")

# %% [markdown]
# ## 5. The end of a row
#
# What about functions of a single number? They add nothing up. The MLP's gate is `silu(x) = x / (1 + exp(-x))`. The next cell computes it for
# 64 rows, then for the first few of them, with one and with two threads, and counts the elements whose bits differ.
#
# **Predict.** Can the bits of `F.silu(x)` depend on the shape of `x`? If so, for which of these widths: 1,000, 1,001, 1,536?

# %% tags=["varies"]
def differing(function, width, num_threads):
    """How many elements of the first 1, 3, 33 and 63 rows have other bits than in all 64 rows."""
    rows = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(num_threads)
    everything = function(rows)
    counts = [int((function(rows[:count]) != everything[:count]).sum()) for count in (1, 3, 33, 63)]
    torch.set_num_threads(1)
    return counts


WIDTHS = (1000, 1001, 1536)
for width in WIDTHS:
    for num_threads in (1, 2):
        print(f"width {width:,}, {num_threads} thread(s): {differing(F.silu, width, num_threads)} elements have other bits")

# %% [markdown]
# A processor computes 8 or 16 elements at a time. What is left over is computed one by one, with another exponential. Which elements
# that are depends on the number of rows and, as each thread has a share of its own, on the number of threads.
#
# This is the gate of v16. Its operations give an element the same bits wherever it is:

# %%
print(inspect.getsource(exact.silu_times))
counts = [differing(lambda x: exact.silu_times(x, x), width, num_threads) for width in WIDTHS for num_threads in (1, 2)]
print("elements with other bits:", sum(map(sum, counts)))
assert not sum(map(sum, counts))

# %% [markdown]
# ## 6. The experiment
#
# No library documents all this. So an exact engine tries: it feeds one sequence whole and alone, then in pieces and in company,
# through one layer and the head, and compares all bits. The next cell does this for the form and the attention that an
# exact engine has chosen here, and for what an engine may have without `exact`.
#
# **Predict.** Which of the four pass? Is an exact product enough, with PyTorch's attention?

# %% tags=["varies"]
@torch.inference_mode()
def tried(engine, backend):
    """Whether the engine's model is exact with a backend."""
    return trial.is_exact(engine.model, engine.config, backend, block_size=16)


plain, chosen = make_engine(v16, linear="plain"), make_engine(v16, exact=True)
print(f"plain products,  PyTorch's attention: {tried(plain, TORCH)}")
print(f"plain products,  attention in tiles:  {tried(plain, chosen.backend)}")
print(f"{chosen.linear + ',':16} PyTorch's attention: {tried(chosen, TORCH)}")
print(f"{chosen.linear + ',':16} attention in tiles:  {tried(chosen, chosen.backend)}")

# %%
print("what the engine has chosen is exact:", tried(chosen, chosen.backend))
assert tried(chosen, chosen.backend)

# %% [markdown]
# Now plant a product that varies: for some numbers of rows, it adds the two halves of each sum separately. The next cell first lists how
# many rows the experiment multiplies at a time, then tries three such products.
#
# **Predict.** Which of the three are found out? What does the engine do if it has no other?

# %%
def planted(row_counts):
    """The products of the exact engine, except that they add in another order for these numbers of rows."""
    form = type(chosen.model.lm_head.form)

    class Planted(form):
        def __init__(self, weight, bias):
            super().__init__(weight, bias)
            self.plain = weight

        def __call__(self, x):
            if len(x) not in row_counts:
                return super().__call__(x)
            half = x.shape[1] // 2
            return x[:, :half] @ self.plain[:, :half].T + x[:, half:] @ self.plain[:, half:].T

    return Planted


@torch.inference_mode()
def tried_with(form):
    """Whether a model with all weights in a form is exact."""
    for group in groups_of(plain.model):
        use(form, group)
    return tried(plain, chosen.backend)


rows = [count + sum(others) for count, others in zip(trial.PIECES, trial.COMPANY, strict=True)]
print("rows at a time:", sum(trial.PIECES), "at once, then", *rows)
found = {name: tried_with(planted(row_counts)) for name, row_counts in {"1": {1}, "32": {32}, "3": {3}}.items()}
for name, is_exact in found.items():
    print(f"a product that varies for {name:2} row(s): exact {is_exact}")
assert list(found.values()) == [False, False, True]

# %%
candidates = exact.candidates
exact.candidates = lambda *_: [exact.Candidate("planted", planted({1}), chosen.backend, chosen.backend)]
try:
    make_engine(v16, exact=True)
    raise AssertionError("an engine that is not exact has started")
except ValueError as error:
    print(error)
finally:
    exact.candidates = candidates

# %% [markdown]
# An experiment can refute, but not prove: a product that varies only for 3 rows would go unnoticed. The numbers of rows are chosen
# where real libraries change their ways. And if nothing passes, the engine refuses by name: it does not promise what this machine does
# not do.
#
# ## 7. When a text changes
#
# In float32 the last bits hardly ever decide a token. In bfloat16 a number has 8 significant bits, and two tokens are often equally
# likely up to rounding. The next cell generates 24 texts one by one, then all at once.
#
# **Predict.** How many of the 24 texts are others in company, in v15, and in v16 with `exact=True`?

# %%
PROMPTS = (
    "Once upon a time", "The sun", "A dog", "What is a block table?", "Why is the sky blue?", "One day, Tom", "Lily and Ben", "Tell me a story",
    "Hello!", "The red ball", "She said", "In the park", "Who are you?", "What is a token?", "A cat and a mouse", "My name is",
    "It was raining", "There was a king", "The little bird", "He ran to", "Mia had", "What do you like?", "The old tree", "Two friends",
)  # fmt: skip


def one_by_one_and_all(package, **options):
    """The texts of all prompts in bfloat16, each alone, and all together."""
    engine = make_engine(package, dtype="bfloat16", enable_prefix_caching=False, **options)
    params = package.SamplingParams(max_tokens=60)
    alone = [engine.generate([prompt], params)[0].text for prompt in PROMPTS]
    return alone, [output.text for output in engine.generate(list(PROMPTS), params)]


alone, together = one_by_one_and_all(v16, exact=True)
print("v16: texts that differ:", sum(a != b for a, b in zip(alone, together)))
assert alone == together

# %% tags=["varies"]
alone, together = one_by_one_and_all(v15)
print("v15: texts that differ:", sum(a != b for a, b in zip(alone, together)))
for prompt, a, b in zip(PROMPTS, alone, together):
    if a != b:
        print(f"{prompt!r}\n  alone:      {a}\n  in company: {b}")

# %% [markdown]
# If there are any, they differ from some word on, at temperature 0, because of requests that have nothing to do with them. Whoever
# searches for a bug, compares two models, or trains on what an engine generates would like to exclude this.
#
# ## 8. What it costs
#
# The next cell times decode steps of pocket: v15, v16 with PyTorch's own products, and v16 with `exact=True`. They take turns, and the
# fastest of five turns counts.
#
# **Predict.** How much longer is an exact step than v15's, for 1, 16 and 64 requests? Is it longer than one with plain weights?

# %% tags=["varies"]
timed = {
    "v15": (v15, make_engine(v15, max_model_len=256, max_num_batched_tokens=8192)),
    "v16, plain": (v16, make_engine(v16, max_model_len=256, max_num_batched_tokens=8192, linear="plain")),
    "v16, exact": (v16, make_engine(v16, max_model_len=256, max_num_batched_tokens=8192, exact=True)),
}
measured = {}
for size in SIZES:
    for _ in range(5):
        for name, (package, engine) in timed.items():
            steps = [1e3 * step["step"] for step in decode_steps(package, engine, size, {})]
            measured[name, size] = min(measured.get((name, size), math.inf), median(steps))
    times = "   ".join(f"{name} {measured[name, size]:6.2f} ms" for name in timed)
    print(f"{size:2} requests: {times}   exact to v15 {measured['v16, exact', size] / measured['v15', size]:.2f}")

# %%
figure, axes = plt.subplots(figsize=(7, 2.6))
for offset, name in enumerate(timed):
    places = [place + 0.27 * offset for place in range(len(SIZES))]
    axes.bar(places, [measured[name, size] / measured["v15", size] for size in SIZES], width=0.25, label=name)
axes.set(title="A decode step, relative to v15's", xlabel="requests", ylabel="time")
axes.set_xticks([place + 0.27 for place in range(len(SIZES))], SIZES)
axes.set_ylim(0, 1.7)
axes.legend(fontsize=8, loc="upper center", ncols=3)
plt.show()

# %% [markdown]
# ## To try
#
# 1. In part 1, sort the numbers by size before you add them. Is the result nearer to the correct one?
# 2. In part 2, give `RowTiles` tiles of 4 rows (`exact.TILE_ROWS`). Is it still exact here, and must it be on another machine?
# 3. In part 4, let the tiles begin at the end of the context instead of position 0. What goes wrong when the context grows by one token?
# 4. In part 6, add a piece to `trial.PIECES`, and company to `trial.COMPANY`, so that the third product is found out.
#
# The chapter's text is [milestones/v16_same_bits/README.md](../milestones/v16_same_bits/README.md). `make test-v16` runs its tests, `make traps-v16`
# plants its seeded bugs, and `make diff-v16` shows everything that the chapter changed.
