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
# # v01, followed along: the model in a loop
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v01_naive.ipynb)
#
# You take one step of the engine by hand, from a text to the next token, and then watch the engine take many. At the
# end you count and time what this chapter's engine wastes. It takes about 20 minutes and no GPU. Have something to
# write with: each part first asks you to predict a result, then shows it.

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
from collections import Counter

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets

from milestones.v01_naive import Engine, SamplingParams
from milestones.v01_naive.batch import Batch, causal_mask
from milestones.v01_naive.sampling import filter_logits
from shared.bench.recorder import record
from shared.chapters import find
from shared.checkpoints import POCKET
from shared.workloads import fixed, random_ids

torch.set_num_threads(1)
engine = Engine(POCKET, device="cpu")

# %% [markdown]
# The engine printed the line above: its model, dtype, device and maximum length. `POCKET` is the small trained model in
# the repository.
#
# ## 1. A text becomes numbers
#
# > **Predict.** How many tokens is "Once upon a time there was a"? It has seven words. Write the number down.

# %%
prompt = "Once upon a time there was a"
prompt_ids = engine.tokenizer(prompt).input_ids
for position, token_id in enumerate(prompt_ids):
    print(f"position {position}   token {token_id:4}   {engine.tokenizer.decode([token_id])!r}")

assert len(prompt_ids) == 8

# %% [markdown]
# That is one more than there are words. The first token is the BOS (beginning of sequence), which the tokenizer adds:
# the model was trained with it in front, and has never seen a text without it. Common words are one token each, and
# the space before a word belongs to its token.
#
# ## 2. Numbers become logits
#
# The model is a function. Its input is a `Batch`: the tokens, their positions, the rows whose logits are needed, and a
# mask that says which tokens each token attends to.
# Its output is one number for every token in the vocabulary.
#
# > **Predict.** Eight tokens go in, and you request the logits of the last. How many numbers come out? Which
# > words may follow "there was a" in a story, and how probable is the likeliest one: 20%, 50%, 90%?

# %%
@torch.inference_mode()
def next_logits(token_ids):
    positions = torch.arange(len(token_ids))
    batch = Batch(
        token_ids=torch.tensor(token_ids),
        positions=positions,
        logit_rows=torch.tensor([len(token_ids) - 1]),  # the last token alone
        draws=[],  # nothing is drawn here: you choose the token by hand
        mask=causal_mask(positions, len(token_ids)),  # itself and the tokens before it
    )
    return engine.model.compute_logits(engine.model(batch))  # [1, V]


logits = next_logits(prompt_ids)
probs = logits.softmax(-1)[0]
print(f"{tuple(logits.shape)} logits; as probabilities they sum to {probs.sum():.4f}")
assert logits.shape == (1, engine.config.vocab_size)

# %% [markdown]
# A logit is a score, and the softmax turns scores into probabilities. These are the five likeliest tokens:

# %%
top = probs.topk(5)
words = [engine.tokenizer.decode([token_id]) for token_id in top.indices.tolist()]
for word, value in zip(words, top.values.tolist()):
    print(f"{value:6.1%}  {word!r}")

plt.figure(figsize=(8, 2.4))
plt.barh([repr(word) for word in words], top.values, color="#0969da")
plt.gca().invert_yaxis()
plt.xlabel("probability")
plt.title(f"After {prompt!r}")
plt.tight_layout()
plt.show()

# %% [markdown]
# In the stories that the model was trained on, a hero may have any of several traits, so the model is sure of none of
# them. After the next two prompts it may be surer.
#
# > **Predict.** "Keys and values" and "The scheduler": after which of the two is the likeliest next token more
# > probable?

# %%
for text in ("Keys and values", "The scheduler"):
    best = next_logits(engine.tokenizer(text).input_ids).softmax(-1)[0].max(-1)
    print(f"{text!r}: {engine.tokenizer.decode([best.indices.item()])!r} with {best.values:.1%}")

# %% [markdown]
# ## 3. Logits become a token
#
# At temperature 0 the engine always takes the token with the largest logit. Above 0 it divides the logits by the
# temperature before the softmax, and draws a token at random. The chapter's own `filter_logits` does the division.
#
# > **Predict.** After "The scheduler", does the likeliest token become more or less likely at temperature 0.5? At 2?
# > Can a temperature ever change which token is the likeliest?

# %%
scheduler = next_logits(engine.tokenizer("The scheduler").input_ids)
shown = scheduler.topk(6).indices[0]
colors = {0.5: "#0550ae", 1.0: "#54aeff", 2.0: "#d4a72c"}
plt.figure(figsize=(8, 3))
for i, (temperature, color) in enumerate(colors.items()):
    changed = filter_logits(scheduler, [SamplingParams(temperature=temperature)]).softmax(-1)[0]
    assert changed.topk(6).indices.tolist() == shown.tolist()  # the order stays
    plt.bar(torch.arange(6) + 0.27 * (i - 1), changed[shown], width=0.25, label=f"temperature {temperature}", color=color)
    print(f"temperature {temperature}: the first has {changed.max():.1%}, these six together {changed[shown].sum():.1%}")
plt.xticks(range(6), [repr(engine.tokenizer.decode([token_id])) for token_id in shown.tolist()])
plt.ylabel("probability")
plt.title("The same logits at three temperatures")
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# The order never changes; the distances do. The probability that these six lose at temperature 2 goes to all the other
# tokens, most of which make no sense here. This is what `top_p` is for: it keeps the fewest tokens, likeliest first,
# whose probabilities together reach p, and drops the tail.
#
# > **Predict.** How many of the 2,048 tokens does `top_p=0.9` keep at temperatures 0.5, 1 and 2? Three numbers.

# %%
kept = []
for temperature in colors:
    filtered = filter_logits(scheduler, [SamplingParams(temperature=temperature, top_p=0.9)])
    kept.append(int(filtered.isfinite().sum()))
    print(f"temperature {temperature}: {kept[-1]} tokens of {engine.config.vocab_size} are left to draw from")

assert kept == sorted(kept)

# %% [markdown]
# Now draw the story's next token three hundred times at temperature 1, with seeds 0 to 299. If drawing is right, each
# token appears about as often as its probability says.

# %%
params = [SamplingParams(max_tokens=1, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(300)]
drawn = [completion.token_ids[0] for completion in engine.generate([prompt] * 300, params)]
counts = Counter(drawn)
shown = probs.topk(10).indices

plt.figure(figsize=(8, 3))
plt.bar(torch.arange(10) - 0.2, 300 * probs[shown], width=0.38, label="expected", color="#d0d7de")
found = [counts[token_id] for token_id in shown.tolist()]
plt.bar(torch.arange(10) + 0.2, found, width=0.38, label="drawn", color="#0969da")
plt.xticks(range(10), [engine.tokenizer.decode([token_id]) for token_id in shown.tolist()], rotation=20)
plt.ylabel("times of 300")
plt.title("300 draws at temperature 1")
plt.legend()
plt.tight_layout()
plt.show()

again = engine.generate([prompt], SamplingParams(max_tokens=1, temperature=1.0, seed=7, ignore_eos=True))
assert again[0].token_ids == [drawn[7]]  # the same seed, the same random number, the same token

# %% [markdown]
# ## 4. The loop
#
# Append the token and begin again: that is all there is to generating text. First you do it by hand, then the engine
# does. The results have to match.

# %%
token_ids = list(prompt_ids)
for _ in range(12):
    token_ids.append(int(next_logits(token_ids).argmax()))

[completion] = engine.generate([prompt], SamplingParams(max_tokens=12))
print(prompt + completion.text)
assert completion.token_ids == token_ids[len(prompt_ids) :]

# %% [markdown]
# Your loop is two lines. The engine's step chooses the sequences (`schedule`), builds the input (`build_batch`), calls
# the model, chooses the tokens (`sample`), and appends them (`commit`).

# %%
print(inspect.getsource(Engine.step))

# %% [markdown]
# ## 5. What is computed
#
# Look at your loop again: `next_logits(token_ids)` gets *all* tokens, each time. A *position* is one token in one
# forward pass.
#
# > **Predict.** The prompt has 8 tokens and the engine generates 12. How many positions does it compute in all, and how
# > many of them for the first time? Two numbers.
#
# A hook on the model counts them: it sees every batch before the model does.

# %%
fed = []
hook = engine.model.register_forward_pre_hook(lambda model, args: fed.append(len(args[0].token_ids)))
engine.generate([prompt], SamplingParams(max_tokens=12))
hook.remove()

print("tokens fed in each forward pass:", fed)
print(f"{sum(fed)} positions, {max(fed)} of them for the first time: {max(fed) / sum(fed):.0%}")
assert fed == list(range(8, 20))
assert sum(fed) == 12 * 8 + 12 * 11 // 2 == 162  # n P + n (n - 1) / 2

# %% [markdown]
# In the picture, each line is one forward pass. Blue is new; gray repeats earlier work, and its result is thrown away.

# %%
grid = torch.zeros(len(fed), max(fed))  # 0: not fed, 1: again, 2: for the first time
for number, width in enumerate(fed):
    grid[number, :width] = 1
    grid[number, fed[number - 1] if number else 0 : width] = 2

plt.figure(figsize=(8, 3.2))
plt.imshow(grid, cmap=ListedColormap(["white", "#d0d7de", "#0969da"]), aspect="auto")
plt.xticks(range(max(fed)))
plt.xlabel("position")
plt.ylabel("forward pass")
plt.title("What each forward pass computes")
plt.legend(handles=[Patch(color="#0969da", label="new"), Patch(color="#d0d7de", label="again")], loc="upper right")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## 6. What it costs
#
# > **Predict.** One token takes some time at length 64. How many times as long does it take at length 1,024, which is
# > 16 times the length: 1, 4, 16, more? Write it down.
#
# Each time below is the best of three runs, for a prompt of random tokens and one new token.

# %%
rng = random.Random(0)
lengths = (64, 128, 256, 512, 1024)
times_ms = []
for length in lengths:
    ids = random_ids(length, engine.config.vocab_size, rng)
    runs = []
    for _ in range(3):
        start = time.perf_counter()
        engine.generate([ids], SamplingParams(max_tokens=1))
        runs.append(1000 * (time.perf_counter() - start))
    times_ms.append(min(runs))
    print(f"length {length:5}: {times_ms[-1]:7.1f} ms, {times_ms[-1] / times_ms[0]:5.1f} times that of length 64")

# %%
plt.figure(figsize=(8, 3))
plt.plot(lengths, times_ms, "o-", color="#0969da", label="measured")
plt.plot(lengths, [times_ms[0] * length / 64 for length in lengths], "--", color="#8c959f", label="in proportion to length")
plt.xlabel("length of the sequence, tokens")
plt.ylabel("ms for one token")
plt.title("Each token costs more than the one before")
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# The dashed line is what the time would be if it depended only on the number of positions. Where the measured line
# rises above it, you see the cost of attention: it compares each position with every other, so its time grows with the
# square of the length.
#
# ## 7. And meanwhile, the others
#
# Six equal requests are queued at the start, each with 12 prompt tokens and 20 tokens to generate. The engine serves
# one at a time.
#
# > **Predict.** How many forward passes does the sixth request wait before its first one? What share of its time is
# > that?
#
# `record` runs a workload and notes which requests are in each forward pass. `life` returns where a request's time
# went.

# %% tags=["varies"]
trace, _ = record(find("v01"), engine, fixed([(12, 20)] * 6, engine.config.vocab_size))
lives = []
for request in range(6):
    lives.append(Counter())
    for what, seconds in trace.life(request):
        lives[-1][what] += 1000 * seconds
total = sum(lives[5].values())
print(f"the sixth waits {trace.waits(5)} forward passes of {len(trace.passes)}, {lives[5]['waits'] / total:.0%} of its time")
print(f"{lives[5]['useful'] / total:.1%} of its time was needed for its text")
assert [trace.waits(request) for request in range(6)] == [0, 20, 40, 60, 80, 100]

# %%
plt.figure(figsize=(8, 2.6))
left = [0.0] * 6
for what, color in {"waits": "#eaeef2", "wasted": "#8c959f", "useful": "#0969da"}.items():
    widths = [life[what] for life in lives]
    plt.barh(range(1, 7), widths, left=left, color=color, label={"wasted": "computed again"}.get(what, what))
    left = [a + b for a, b in zip(left, widths)]
plt.gca().invert_yaxis()
plt.xlabel("ms since the start")
plt.ylabel("request")
plt.title("Where each request's time goes")
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# The picture shows two kinds of waste. v02 removes the dark gray one, computing again. The pale one, waiting for other
# requests, takes v03 and v04.
#
# ## Things to try
#
# Change a line, say what you expect, run it.
#
# 1. In part 2, leave out the BOS: `next_logits(prompt_ids[1:])`. Is " brave" still the likeliest token? Is it as
#    likely?
# 2. In part 2, give the `Batch` position 0 for all tokens: `positions=torch.zeros(len(token_ids), dtype=torch.long)`.
#    What is the likeliest token after "Once upon a time there was a" now, and what does your loop of part 4 generate?
#    (Its assert then fails, as it should.)
# 3. In part 5, generate 100 tokens from a prompt of 10 (take `random_ids`, and set `ignore_eos=True`).
#    Work out the count first: n P + n (n - 1) / 2.
#
# The chapter's text, with all of its code, is
# [milestones/v01_naive/README.md](https://github.com/stepserve/stepserve/blob/main/milestones/v01_naive/README.md). In
# a terminal, `make test-v01` compares it with Hugging Face, and `make traps-v01` plants its seeded bugs and names the
# test that catches each. `make diff-v02` prints what the next chapter changes (`make diff-v01` prints nothing, because
# no chapter comes before it).
