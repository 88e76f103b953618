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
# # v14, followed along: read fewer bytes, launch fewer kernels
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v14_fused_step.ipynb)
#
# You time products of few rows against the memory's speed, join three products into one, try all 65,536 bfloat16 numbers in
# float16, let this machine choose a form for its weights, count the kernels of a layer on a simulated GPU, round once too
# little, and read a tensor with gaps as if it had none. Times differ from machine to machine; counts do not. Plan about twenty
# minutes. Before each run there is a question: write your answer down first. (Parts 5 to 7 need Triton, which exists for Linux
# only. Elsewhere, open this in Colab.)

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
# All of this runs on the CPU, even if there is a GPU, and Triton's kernels run in its interpreter. The engine keeps its choice of a
# form in the user's cache folder; here, that is a temporary one.

# %%
import os
import tempfile

os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
cache_folder = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = cache_folder.name

# %%
import contextlib
import inspect
import io
import time
import warnings
from array import array
from collections import Counter
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
torch.manual_seed(0)
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets

from milestones import v13_chunked_prefill as v13
from milestones import v14_fused_step as v14
from milestones.v13_chunked_prefill import batch as v13_batch
from milestones.v14_fused_step import batch as v14_batch
from milestones.v14_fused_step import layers, storage
from milestones.v14_fused_step.kernels import fused
from shared.checkpoints import POCKET, checkpoint
from shared.verify.pretend_gpu import launches, pretend_gpu

# %% [markdown]
# ## 1. A step is a read
#
# These are the products of ten layers of SmolLM2-135M, with random weights: 142 MB, more than most caches hold. The next cell
# multiplies 1, 2, 4, ... rows with all of them.
#
# **Predict.** The products of 16 rows have 16 times as many multiplications as those of one row. How many times as long do they
# take? And of one row: how close is that to the time in which this thread can read 142 MB?

# %%
HIDDEN, Q, KV, INNER, LAYERS = 576, 576, 192, 1536, 10
SHAPES = {
    "qkv": [(Q, HIDDEN), (KV, HIDDEN), (KV, HIDDEN)],
    "o": [(HIDDEN, Q)],
    "gate_up": [(INNER, HIDDEN), (INNER, HIDDEN)],
    "down": [(HIDDEN, INNER)],
}


def random_layer(out_features, in_features):
    """A layer whose weights are bfloat16 numbers, in float32, as after loading."""
    layer = layers.Linear(in_features, out_features, bias=False).requires_grad_(False)
    layer.weight.copy_((0.02 * torch.randn(out_features, in_features)).bfloat16())
    return layer


groups = [[random_layer(*shape) for shape in shapes] for _ in range(LAYERS) for shapes in SHAPES.values()]
nbytes = sum(layer.nbytes for group in groups for layer in group)
print(f"{nbytes / 1e6:.0f} MB in {sum(map(len, groups))} weights")
assert nbytes == 4 * LAYERS * (HIDDEN * (Q + 2 * KV) + Q * HIDDEN + 3 * HIDDEN * INNER)


def multiply(products, num_rows):
    """Milliseconds for all products of num_rows rows; products are (function, size of its input)."""
    inputs = {size: torch.randn(num_rows, size) for size in (HIDDEN, INNER)}
    start = time.perf_counter()
    for product, size in products:
        product(inputs[size])
    return 1000 * (time.perf_counter() - start)


def quickest(contestants, num_rows, repeats):
    """The shortest time of each contestant in several rounds; they take turns."""
    times = [[multiply(products, num_rows) for products in contestants.values()] for _ in range(repeats)]
    return dict(zip(contestants, map(min, zip(*times))))


@torch.inference_mode()
def time_all(contestants, rows):
    """By name, milliseconds for each number of rows."""
    by_rows = [quickest(contestants, num_rows, 7 if num_rows < 64 else 3) for num_rows in rows]
    return {name: [times[name] for times in by_rows] for name in contestants}


# %% tags=["varies"]
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
plain = [(layer, layer.in_features) for group in groups for layer in group]
contestants = {"plain": plain}
measured = time_all(contestants, ROWS)
print("plain, ms:", *(f"{rows} rows {ms:.1f}" for rows, ms in zip(ROWS, measured["plain"])), sep="   ")

big = torch.rand(8192, 8192)
vector = torch.rand(8192)
seconds = []
for _ in range(9):
    start = time.perf_counter()
    big @ vector
    seconds.append(time.perf_counter() - start)
rate = big.nbytes / min(seconds)
del big
print(f"one thread reads {rate / 1e9:.1f} GB/s, so {nbytes / 1e6:.0f} MB take {1000 * nbytes / rate:.1f} ms")

# %%
figure, axes = plt.subplots(figsize=(7, 3))
axes.plot(ROWS, measured["plain"], "o-", label="all products, plain")
axes.axhline(1000 * nbytes / rate, color="grey", linestyle=":", label="reading the weights once")
axes.set(title="Products of ten layers", xlabel="rows", ylabel="ms")
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks(ROWS, ROWS)
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# The curve rises slowly at first, because few rows take as long as reading the weights, and faster where multiplying takes longer. It
# does not begin at the bound: plain's product of one row reads more slowly than this thread can. So there are two things to win:
# fewer bytes, and a better order.
#
# ## 2. Three products in one
#
# The engine below stores pocket's weights joined. `q_proj` has 192 outputs, `k_proj` and `v_proj` have 64 each.
#
# **Predict.** What is the shape of the joined weight? The product of three tokens is split into q, k and v. How far apart are the
# keys of two tokens in memory, in elements? And where are the parameters now?

# %%
joined = v14.Engine(POCKET, device="cpu", num_blocks=64, linear="joined")

# %%
attention = joined.model.model.layers[0].self_attn
hidden = torch.randn(3, joined.config.hidden_size)
with torch.inference_mode():
    q, k, v = attention.project(hidden)
print("joined weight", list(attention.q_proj.form.weight.shape))
for name, x in (("q", q), ("k", k), ("v", v)):
    print(f"{name}: shape {list(x.shape)}, strides {list(x.stride())}, contiguous {x.is_contiguous()}")
for name, parameter in list(joined.model.named_parameters())[:5]:
    print(f"{name:44} {list(parameter.shape)}  {parameter.device}")
assert q.stride() == k.stride() == v.stride() == (320, 32, 1)
names = {name for name, _ in joined.model.named_parameters()}
assert names >= {name for name, _ in v13.Engine(POCKET, device="cpu", num_blocks=8).model.named_parameters()}

# %% [markdown]
# From one token's keys to the next, there are 320 elements, the width of the joined product. All names of v13 are still there, with
# their shapes. These lines join and split:

# %%
for each in (storage.groups_of, storage.join, storage.store, layers.products):
    print(inspect.getsource(each))

# %% [markdown]
# ## 3. What float16 can hold
#
# bfloat16 has 16 bits, so there are 65,536 of its numbers, and you can try them all.
#
# **Predict.** Which of them does float16 not hold exactly? By how much does the worst of them move, of those that do not overflow?

# %%
every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
every = every[every.isfinite()]
moved = (every.half().float() - every).abs()
size = every.abs()
exact = (size >= 2**-17) & (size <= 65504)
print(f"{len(every):,} finite numbers; {int((moved == 0).sum()):,} stay, {int(moved.isinf().sum()):,} overflow, {int(((moved > 0) & moved.isfinite()).sum()):,} are rounded")
print("those from 2**-17 to 65,504 move by at most", moved[exact].max().item())
print("smaller ones move by at most 2**-25:", moved[size < 2**-17].max().item() == 2**-25)
assert moved[exact].max() == 0 and moved[size < 2**-17].max() == 2**-25 == storage.MAX_LOSS

# %%
figure, axes = plt.subplots(figsize=(7, 3))
inside = (size > 2**-30) & (size < 2**17)
axes.plot(size[inside], moved[inside].clamp(2**-40, 2**10), ".", markersize=3, label="bfloat16")
wide = 2 ** torch.linspace(-30, 16, 4000)
axes.plot(wide, (wide.half().float() - wide).abs().clamp(2**-40), ",", label="float32")
axes.axhline(storage.MAX_LOSS, color="grey", linestyle=":", label="2**-25")
axes.set(title="Numbers in float16 (bottom: exact, top: overflow)", xlabel="size", ylabel="moves by")
axes.set_xscale("log", base=2)
axes.set_yscale("log", base=2)
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# Only one in eight bfloat16 numbers lies between 2**-17 and 65,504, but nearly all weights do. Numbers that need float32 move far
# more than the limit, unless they are tiny.
#
# **Predict.** Of pocket's 2,752,512 weights, how many move? And may the second checkpoint below, whose weights are random float32
# numbers, be stored in halves?

# %%
loaded = v13.Engine(POCKET, device="cpu", num_blocks=8)

# %%
weights = torch.cat([parameter.flatten() for parameter in loaded.model.parameters() if parameter.ndim == 2])
moving = int((weights.half().float() != weights).sum())
print(f"pocket: {moving} of {len(weights):,} weights move, by at most {(weights.half().float() - weights).abs().max().item() / 2**-25} x 2**-25")
assert 0 < moving < len(weights) / 10_000 and storage.loss(weights) <= storage.MAX_LOSS
try:
    v14.Engine(checkpoint("llama-two-layers"), device="cpu", linear="halves")
    raise AssertionError("weights that float16 cannot hold were accepted")
except ValueError as error:
    print(error if storage.HAS_HALVES else "this PyTorch has no halves")

# %% [markdown]
# Float16 is only the form in which weights are stored. The next cell compares the product of Halves with the exact one, and with a
# product in which the inputs have 16 bits, too.
#
# **Predict.** Which error is larger, and how many times?

# %%
weight = (0.02 * torch.randn(64, 192)).bfloat16().float()
x = torch.randn(5, 192)
exact = x.double() @ weight.double().T
ways = {"float32": x @ weight.T, "float16 inputs, weights and results": (x.half() @ weight.half().T).float()}
if storage.HAS_HALVES:
    ways["Halves"] = storage.Halves(weight, None)(x)
errors = {name: (result - exact).abs().max().item() for name, result in ways.items()}
for name, error in errors.items():
    print(f"{name:36} largest error {error:.9f}")
assert errors["float16 inputs, weights and results"] > 100 * errors.get("Halves", errors["float32"])

# %% [markdown]
# Halves is as exact as float32, since these weights fit into float16 and everything else is float32.
#
# ## 4. Which form is fastest here?
#
# The weights of part 1 again, in each form that this machine has.
#
# **Predict.** Sketch a curve for each form: its time divided by plain's, for 1 to 128 rows. Which one wins at one row, and where is
# there nothing to win?

# %% tags=["varies"]
forms = {"joined": storage.Joined}
forms |= {"blocks": storage.Blocks} if storage.HAS_BLOCKS else {}
forms |= {"halves": storage.Halves} if storage.HAS_HALVES else {}
contestants = {"plain": plain} | {name: [(form(*storage.join(group)), group[0].in_features) for group in groups] for name, form in forms.items()}
measured = time_all(contestants, ROWS)
print(f"{'rows':8}", *(f"{rows:7}" for rows in ROWS))
for name, times in measured.items():
    print(f"{name:8}", *(f"{ms:7.1f}" for ms in times))

# %%
figure, axes = plt.subplots(figsize=(7, 3))
for name, times in measured.items():
    axes.plot(ROWS, [ms / before for ms, before in zip(times, measured["plain"])], "o-", label=name)
axes.set(title="Time of all products, relative to plain", xlabel="rows", ylabel="plain is 1")
axes.set_ylim(0, 1.5)
axes.set_xscale("log", base=2)
axes.set_xticks(ROWS, ROWS)
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# With many rows, a product takes as long as its multiplications. Every form has as many, but libraries differ in how fast they multiply.
#
# The engine measures in the same way, for 1, 8, 32 and 128 rows, and lets `fastest` choose. You can give `fastest` any numbers.
#
# **Predict.** Which form does it choose in each of these four cases?

# %%
cases = {
    "wins at one row, loses at the other": {"plain": [2.0, 4.0], "blocks": [1.5, 3.0], "halves": [0.5, 5.0]},
    "a little slower at the other": {"plain": [2.0, 4.0], "blocks": [1.5, 3.0], "halves": [0.5, 4.1]},
    "hardly faster": {"plain": [2.0, 4.0], "joined": [1.95, 3.9]},
    "twice as fast and half as fast": {"plain": [2.0, 4.0], "blocks": [1.0, 8.0]},
}
for name, seconds in cases.items():
    print(f"{name:36} {storage.fastest(seconds)}")
assert [storage.fastest(seconds) for seconds in cases.values()] == ["blocks", "halves", "plain", "plain"]

# %% [markdown]
# Plain stays unless another form is faster by more than noise, and nowhere slower by more than noise. Now let the engine choose, twice.
#
# **Predict.** How much longer does the first start take than the second?

# %% tags=["varies"]
for start_number in (1, 2):
    start = time.perf_counter()
    engine = v14.Engine(POCKET, device="cpu", num_blocks=64)
    print(f"start {start_number}: {engine.linear} after {time.perf_counter() - start:.2f} s")
print(storage.choices_path().relative_to(cache_folder.name), storage.choices_path().read_text(), sep="\n")

# %% [markdown]
# ## 5. The launches of a layer
#
# `pretend_gpu` simulates a GPU on the CPU, and counts what a GPU would have been asked to run. The next cell lists the operations of one
# layer, in a step of two requests, for a tiny model of Llama's kind and one of Qwen3's. (Conversions between dtypes are not counted.
# In float32 there are none.)
#
# **Predict.** How many operations does a layer of v13 have? Of which kind are most? And how many does v14 have, for each family?

# %%
def layer_launches(package, name):
    """The operations of the first layer in the engine's third step on a simulated GPU."""
    with pretend_gpu(), contextlib.redirect_stderr(io.StringIO()):
        engine = package.Engine(checkpoint(name), dtype="float32", max_model_len=64)
        for prompt in ([5, 6, 7], [5]):
            engine.add_request(prompt, package.SamplingParams(max_tokens=8))
        engine.step()
        engine.step()
        marks, layer = [], engine.model.model.layers[0]
        layer.register_forward_pre_hook(lambda *_: marks.append(len(launches)))
        layer.register_forward_hook(lambda *_: marks.append(len(launches)))
        engine.step()
        return [launch.removeprefix("aten::") for launch in launches[slice(*marks)]]


counts = {}
for name in ("llama-two-layers", "qwen3-two-layers"):
    for package, chapter in ((v13, "v13"), (v14, "v14")):
        ran = layer_launches(package, name)
        counts[chapter, name] = len(ran)
        print(f"{chapter}, {name}: {len(ran)}", dict(Counter(ran).most_common()), sep="\n  ")
print("in order:", *ran)
assert list(counts.values()) == [39, 10, 51, 10]

# %% [markdown]
# Most of v13's operations are multiplications and sums of a few numbers each, for norms and rotation. In v14 each family has four
# products, an addition, and five kernels.
#
# ## 6. Rounding
#
# A layer adds its result to `hidden`, and norms the sum. In float16, 2,048 and 2,050 are neighbors. (The text's example is in bfloat16.
# Here it is float16, because Triton's interpreter converts to bfloat16 by cutting digits off. A GPU rounds.)
#
# **Predict.** `hidden` is [2048, 1000] and the result [1, 3], so the sum is [2049, 1003]. What is stored? One kernel norms what it has
# stored, another one the sum before it is rounded. Do their results differ?

# %%
def normed(hidden):
    """RMSNorm in float32 of whatever hidden holds."""
    wide = hidden.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)


hidden = torch.tensor([[2048.0, 1000.0]], dtype=torch.float16)
result = torch.tensor([[1.0, 3.0]], dtype=torch.float16)
ones = torch.ones(2, dtype=torch.float16)
kernel_hidden, parts_hidden = hidden.clone(), hidden.clone()
by_kernel = fused.rms_norm(kernel_hidden, ones, 1e-6, result)
by_parts = layers.rms_norm(parts_hidden, ones, 1e-6, result)
print("stored by the kernel", kernel_hidden.tolist(), "by the parts", parts_hidden.tolist())
print("norm, by the kernel ", by_kernel.tolist(), "by the parts", by_parts.tolist())
print("norm of the sum before it is rounded", normed(hidden.float() + result.float()).half().tolist())
assert kernel_hidden.tolist() == parts_hidden.tolist() == [[2048.0, 1003.0]] and by_kernel.tolist() == by_parts.tolist()

# %% [markdown]
# A difference in the last bit, in one row. How often does it occur? The next cell takes 500 random rows, and counts results that differ
# from those of the separate operations in any bit.
#
# **Predict.** Which share of the numbers differs with the kernel, and which if the sum is not rounded?

# %%
hidden = (8 * torch.randn(500, 192)).half()
result = torch.randn(500, 192).half()
weight = (1 + 0.1 * torch.randn(192)).half()
kernel_hidden, parts_hidden = hidden.clone(), hidden.clone()
by_kernel = fused.rms_norm(kernel_hidden, weight, 1e-6, result)
by_parts = layers.rms_norm(parts_hidden, weight, 1e-6, result)
unrounded = weight * normed(hidden.float() + result.float()).half()
shares = {"the kernel": (by_kernel != by_parts).float().mean().item(), "no rounding": (unrounded != by_parts).float().mean().item()}
for name, share in shares.items():
    print(f"{name:12} {share:8.3%} of the numbers differ")
assert kernel_hidden.equal(parts_hidden) and shares["the kernel"] < 0.001 and shares["no rounding"] > 0.05

# %% [markdown]
# The kernel sums a row in another order than PyTorch, so now and then a last bit differs. Without the rounding it is many of them, in
# every layer.
#
# ## 7. A tensor with gaps
#
# `gate` and `up` are columns of one joined product. The kernel gets the distance between rows. The next cell launches it with the
# distance that a tensor without gaps would have.
#
# **Predict.** For how many of one token's results is that wrong? And of three tokens'?

# %%
def careless(gate, up):
    """The gate's kernel, launched as if gate and up had no gaps."""
    num_tokens, width = gate.shape
    out = torch.empty(num_tokens, width)
    fused._gate_kernel[(num_tokens, 1)](out, gate, up, width, width, SIZE=width, TILE=fused.TILE)
    return out


for num_tokens in (1, 3):
    gate, up = torch.randn(num_tokens, 2 * 512).split([512, 512], dim=-1)
    want = F.silu(gate) * up
    right = torch.isclose(fused.silu_times(gate, up), want, atol=1e-6).all(-1).tolist()
    wrong = torch.isclose(careless(gate, up), want, atol=1e-6).all(-1).tolist()
    print(f"{num_tokens} tokens: rows right with strides {right}, without {wrong}")
    assert all(right) and wrong == [True] + [False] * (num_tokens - 1)

# %% [markdown]
# One stream alone gets the right answers, so a test with one token finds nothing.
#
# ## 8. Rectangles of similar length
#
# On a CPU, sequences that feed the same number of tokens are computed as one rectangle, padded to the longest. Five streams have 30,
# 60, 70, 120 and 500 positions.
#
# **Predict.** How many rectangles does v14 make of them, and how many positions do they cover, compared with v13's?

# %%
def rectangles(module, lengths):
    """For each rectangle, how many sequences it has and how many positions each is padded to."""
    seqs = [SimpleNamespace(new_ids=[0], num_computed=length - 1, block_table=array("i", range(-(-length // 16)))) for length in lengths]
    return [(len(part.block_tables), part.context_len) for part in module.build_rectangles(seqs)]


def covered(parts):
    return sum(count * length for count, length in parts)


for name, module in (("v13", v13_batch), ("v14", v14_batch)):
    parts = rectangles(module, [30, 60, 70, 120, 500])
    print(f"{name}: {parts}, {covered(parts):,} positions")
assert parts == [(2, 60), (2, 120), (1, 500)]

# %%
lengths = torch.randint(25, 2000, (64,)).tolist()
figure, axes = plt.subplots(figsize=(7, 2.6))
for name, module in (("v13", v13_batch), ("v14", v14_batch)):
    parts = sorted(rectangles(module, lengths), key=lambda part: part[1])
    heights = [length for count, length in parts for _ in range(count)]
    axes.step(range(65), [heights[0], *heights], label=f"{name}: {len(parts)} rectangles, {covered(parts):,} positions")
    assert covered(parts) >= sum(lengths)
axes.fill_between(range(65), [*sorted(lengths), max(lengths)], color="lightgrey", step="post", label=f"needed: {sum(lengths):,}")
axes.set(title="64 streams, by length", xlabel="stream", ylabel="positions")
axes.set_ylim(0, 3600)
axes.legend(fontsize=8, loc="upper left")
plt.show()

# %% [markdown]
# At most half of a rectangle above 64 positions is padding, however different the streams are.
#
# ## To try
#
# 1. In part 1, use 4 threads (`torch.set_num_threads(4)`). Which part of the curve moves, and why not all of it?
# 2. In part 3, multiply pocket's weights by 1.001, and ask again how many move. Why does the engine then choose another form?
# 3. In part 5, count with `attention="torch"`. Which of the 39 operations come back, and which do not?
# 4. In part 8, set `v14_batch.MIN_LEN` to 1. Who pays for the additional rectangles?
#
# The chapter's text is [milestones/v14_fused_step/README.md](../milestones/v14_fused_step/README.md). `python -m shared.bench.forms`
# measures all forms at more sizes, `make traps-v14` plants the chapter's seeded bugs, and `make diff-v14` shows everything that the
# chapter changed.
