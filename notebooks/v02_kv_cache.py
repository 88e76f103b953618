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
# # v02, followed along: remember, do not recompute
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v02_kv_cache.ipynb)
#
# You watch the cache fill, compare what v01 and v02 feed the model, damage keys by hand to see that the answer really
# depends on the cache, and see what the cache costs in memory. It takes about 20 minutes and no GPU. Each part first
# asks you to predict a result, then measures it.

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

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets

from milestones import v01_naive, v02_kv_cache
from milestones.v02_kv_cache import Engine, SamplingParams
from milestones.v02_kv_cache.attention import Attention
from milestones.v02_kv_cache.cache import kv_bytes_per_token
from milestones.v02_kv_cache.sequence import Sequence
from milestones.v02_kv_cache.text import encode_chat
from shared.checkpoints import POCKET
from shared.workloads import random_ids

torch.set_num_threads(1)
before = v01_naive.Engine(POCKET, device="cpu")
engine = Engine(POCKET, device="cpu")

# %% [markdown]
# These are two engines, v01's and v02's. The second prints one thing more: how much memory it has reserved for keys and
# values, before any request has arrived.
#
# ## 1. What never changes
#
# v01 feeds all tokens in every forward pass. Look at one layer while it does that: a hook records the output of layer
# 3's `v_proj` for each token, in every forward pass.
#
# > **Predict.** The prompt has 8 tokens. How much do the values of these 8 change between the first forward pass and
# > the last?

# %%
prompt = "Once upon a time there was a"
values = []
layer = before.model.model.layers[3].self_attn
hook = layer.v_proj.register_forward_hook(lambda module, args, output: values.append(output.clone()))
before.generate([prompt], v01_naive.SamplingParams(max_tokens=12))
hook.remove()

print("values of layer 3, by forward pass:", [tuple(each.shape) for each in values[:3]], "...", tuple(values[-1].shape))
first, last = values[0], values[-1][:8]
print(f"largest difference: {(first - last).abs().max():.1e}; largest value: {first.abs().max():.2f}")
assert torch.allclose(first, last, atol=1e-4)

# %% [markdown]
# They do not change, except perhaps in the last bits of float32 (a sum over another shape may be taken in another
# order). It cannot be otherwise: a token's key and value depend only on the token, its position, and the tokens
# *before* it. So v02 stores them. The whole change in attention is the two lines with `batch.cache`:

# %%
print(inspect.getsource(Attention.forward))

# %% [markdown]
# ## 2. What is fed
#
# What a step feeds is one property of a sequence. `num_computed` says how many of its tokens have their keys and values
# in the cache; the rest is fed.

# %%
print(inspect.getsource(Sequence.new_ids.fget))

# %% [markdown]
# > **Predict.** With a prompt of 8 tokens and 12 new ones, v01 fed 8, 9, 10, ... 19 tokens, 162 in all. What does v02
# > feed in its 12 forward passes, and how many tokens is that in all?


# %%
def count_fed(engine, params_of):
    fed = []
    hook = engine.model.register_forward_pre_hook(lambda model, args: fed.append(len(args[0].token_ids)))
    [completion] = engine.generate([prompt], params_of(max_tokens=12))
    hook.remove()
    return fed, completion.token_ids


fed_before, tokens_before = count_fed(before, v01_naive.SamplingParams)
fed, tokens = count_fed(engine, v02_kv_cache.SamplingParams)
print(f"v01 {fed_before}, {sum(fed_before)} in all\nv02 {fed}, {sum(fed)} in all")
assert fed == [8] + [1] * 11
assert sum(fed) == 8 + 12 - 1  # P + n - 1: the last token is never fed
assert tokens == tokens_before  # and the answer is the same

# %%
passes = torch.arange(1, 13)
plt.figure(figsize=(8, 3))
plt.bar(passes - 0.2, fed_before, width=0.38, color="#8c959f", label=f"v01: {sum(fed_before)} in all")
plt.bar(passes + 0.2, fed, width=0.38, color="#0969da", label=f"v02: {sum(fed)} in all")
plt.xticks(passes.tolist())
plt.xlabel("forward pass")
plt.ylabel("tokens fed")
plt.title("The prompt once, then one token at a time")
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# The first bar is the *prefill*, the others are *decode* steps. The code does not distinguish them: both feed what is
# new.
#
# ## 3. Watch it fill
#
# The cache is two tensors, `engine.cache.k` and `engine.cache.v`, of shape `[layers, positions, KV heads, head_dim]`.
# In a fresh engine they are all zeros, so you can see what has been written.
#
# > **Predict.** After the first step (8 prompt tokens in, 1 token out), how many positions are filled: 7, 8 or 9?

# %%
engine = Engine(POCKET, device="cpu")  # a fresh one
print("shape of k:", tuple(engine.cache.k.shape))
engine.add_request(prompt, SamplingParams(max_tokens=12))
filled, sizes = [], []
while engine.has_unfinished_requests():
    [output] = engine.step()
    size = engine.cache.k[3].norm(dim=(1, 2))  # [positions] how large each key of layer 3 is
    sizes.append(size[:24].clone())
    filled.append(int((size > 0).sum()))
    print(f"step {len(filled):2}: {filled[-1]:2} positions filled, new text {output.text!r}")

assert filled == list(range(8, 20))

# %% [markdown]
# 8, not 9. The token that the first step drew has not been fed to the model yet, so it has no key. It gets one in the
# next step. The last token never gets one.

# %%
plt.figure(figsize=(8, 3))
plt.imshow(torch.stack(sizes), cmap="Blues", aspect="auto", vmin=0)
plt.xticks(range(0, 24, 2))
plt.xlabel("position in the cache")
plt.yticks(range(0, 12, 2), range(1, 13, 2))
plt.ylabel("after step")
plt.title("The size of each key of layer 3: a key never changes once it is written")
plt.colorbar(label="norm")
plt.tight_layout()
plt.show()

assert all(torch.equal(sizes[0][:8], size[:8]) for size in sizes)

# %% [markdown]
# Each row adds one key, and a column keeps its shade to the end. White is memory that is reserved but empty; the
# picture shows 24 of the 2,048 positions.
#
# ## 4. Damage it
#
# Does the answer really come from the cache? After the prefill the prompt is not fed again. So set the key of one of
# its tokens to zero, in all layers, and let the engine continue. It does not notice the damage.
#
# > **Predict.** The question is "What is a block table?", and the first step has already drawn the answer's first
# > token. Which of the prompt's tokens does the rest of the answer need? Which can be lost without changing it?


# %%
def answer(prompt_ids, lost=None):
    engine.add_request(prompt_ids, SamplingParams(max_tokens=30))
    text = engine.step()[0].text  # the prefill
    if lost is not None:
        engine.cache.k[:, lost] = 0
    while engine.has_unfinished_requests():
        text += engine.step()[0].text
    return text


question = encode_chat(engine.tokenizer, [{"role": "user", "content": "What is a block table?"}])
whole = answer(question)
print("untouched:", whole)

# %%
changed = []
for position, token_id in enumerate(question):
    text = answer(question, lost=position)
    if text != whole:
        changed.append(engine.tokenizer.decode([token_id]))
    print(f"lost the key of {engine.tokenizer.decode([token_id])!r:16} {'the same' if text == whole else repr(text)}")

assert " table" in changed
assert answer(question) == whole  # the next prefill writes over the damage

# %% [markdown]
# The model has learned few things, and is so sure of this answer that it survives most losses. But it needs the word
# " table". A wrong key raises no error: it only leads to a different text.
#
# What about the positions that the next request has not written yet? Fill all of those after the prompt with enormous
# numbers.
#
# > **Predict.** Does the answer change?

# %%
engine.cache.k[:, len(question) :] = 1e30
engine.cache.v[:, len(question) :] = 1e30
assert answer(question) == whole
print("the same:", whole)

# %% [markdown]
# It does not, because `context_len` keeps attention from reading any further than the sequence has written. That is why
# the cache need not be cleared between requests.
#
# ## 5. What a token costs now
#
# > **Predict.** In v01, a token costs more the more tokens come before it. How many times as long does a token take at
# > length 512 as at length 64, in v01 and in v02? Write down two ratios.
#
# The first new token includes the prefill, so it is left out; each time is the best of several steps.


# %%
def ms_per_token(engine, params, length, num_tokens):
    ids = random_ids(length, engine.config.vocab_size, random.Random(length))
    engine.add_request(ids, params(max_tokens=num_tokens + 1, ignore_eos=True))
    engine.step()
    runs = []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        engine.step()
        runs.append(1000 * (time.perf_counter() - start))
    return min(runs)


# %%
lengths = (64, 128, 256, 512)
old = [ms_per_token(before, v01_naive.SamplingParams, length, 3) for length in lengths]
new = [ms_per_token(engine, v02_kv_cache.SamplingParams, length, 10) for length in lengths]
for length, a, b in zip(lengths, old, new):
    print(f"length {length:4}: v01 {a:6.1f} ms, v02 {b:5.1f} ms: {a / b:5.1f} times")
print(f"length 512 against 64: v01 {old[-1] / old[0]:.1f} times, v02 {new[-1] / new[0]:.1f} times")

plt.figure(figsize=(8, 3))
plt.plot(lengths, old, "o-", color="#8c959f", label="v01")
plt.plot(lengths, new, "o-", color="#0969da", label="v02")
plt.ylim(0)
plt.xlabel("length of the sequence, tokens")
plt.ylabel("ms for one token")
plt.title("One token, by how many came before it")
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# ## 6. What it costs instead
#
# It costs memory. Each token has a key and a value of `head_dim` numbers, in each layer and for each KV head.
#
# > **Predict.** Pocket has 5 layers and 2 KV heads of 32 numbers; a float32 takes 4 bytes. How many bytes does the
# > cache store per token? At how many tokens does it become larger than the model?

# %%
config = engine.config
per_token = kv_bytes_per_token(config, engine.dtype)
# The head and the embedding share one tensor, which is counted once.
weights = sum({weight.data_ptr(): weight.nbytes for weight in engine.model.parameters()}.values())
print(f"{per_token:,} bytes per token; {weights:,} bytes of weights, as much as {weights / per_token:,.0f} tokens")
print(f"reserved: {engine.cache.kv_bytes:,} bytes, {engine.cache.kv_bytes / weights:.0%} of the weights")

assert per_token == 2 * 5 * 2 * 32 * 4
assert engine.cache.kv_bytes == engine.cache.k.nbytes + engine.cache.v.nbytes == 2048 * per_token

# %%
used = torch.arange(0, 2049, 64)
plt.figure(figsize=(8, 3))
plt.plot(used, used * per_token / 2**20, color="#0969da", label="used by a sequence of this length")
plt.axhline(engine.cache.kv_bytes / 2**20, color="#bf3989", linestyle="--", label="reserved, whatever the length")
plt.axhline(weights / 2**20, color="#8c959f", linestyle=":", label="the weights")
plt.xlabel("length of the sequence, tokens")
plt.ylabel("MiB")
plt.title("Bytes of keys and values")
plt.ylim(0, 15)
plt.legend(loc="upper left")
plt.tight_layout()
plt.show()

# %% [markdown]
# The gap between the blue line and the dashed one is reserved for tokens that may never be generated. With one sequence
# that does not hurt. It comes back in v05.
#
# ## 7. What is left
#
# A decode step feeds one token. How much longer does it take to feed eight?
#
# > **Predict.** How many times as long does a forward pass over 8 positions take as a forward pass over a single one?
# > If only the amount of work counted, it would be 8.


# %%
def best_prefill_ms(num_tokens):
    runs = []
    for seed in range(15):
        engine.add_request(random_ids(num_tokens, config.vocab_size, random.Random(seed)), SamplingParams(max_tokens=1))
        start = time.perf_counter()
        engine.step()
        runs.append(1000 * (time.perf_counter() - start))
    return min(runs)


# %%
widths = (1, 2, 4, 8, 16)
pass_ms = [best_prefill_ms(width) for width in widths]
for width, each in zip(widths, pass_ms):
    print(f"{width:2} positions: {each:5.2f} ms, {each / pass_ms[0]:4.1f} times one; {each / width:5.2f} ms per position")

# %% [markdown]
# Each forward pass reads every weight once, and runs every line of Python once, whether for one position or for
# sixteen. But a decode step has only one position to feed, as long as it serves only one sequence. In the next chapter,
# several sequences share a forward pass.
#
# ## Things to try
#
# Change a line, predict what will happen, then run it.
#
# 1. In part 4, ask "Tell me a story about a fox." (and take out the assert on " table"). For how many of the prompt's
#    tokens does losing the key change the story, and is it still about a fox?
# 2. In part 4, lose values instead of keys: `engine.cache.v[:, lost] = 0`. A zero key still gets some attention, but a
#    zero value adds nothing. Do the same words matter?
# 3. In part 3, run two requests one after the other in the same engine, the longer one first. How many positions are
#    filled after the second one's first step, and why is that harmless?
#
# The chapter's text is
# [milestones/v02_kv_cache/README.md](https://github.com/stepserve/stepserve/blob/main/milestones/v02_kv_cache/README.md).
# In a terminal, `make diff-v02` prints what the chapter changes, `make test-v02` tests it against Hugging Face and v01,
# and `make traps-v02` plants its seeded bugs and names the test that catches each.
