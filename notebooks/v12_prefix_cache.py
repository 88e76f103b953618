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
# # v12, followed along: compute a shared beginning once
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v12_prefix_cache.ipynb)
#
# You compare the keys and values of two prompts, build a chain of keys by hand, follow three requests that share blocks, predict
# what a request finds, send one system prompt eight times, evict it, break the chain to get a wrong answer, and keep two clients
# apart. Only counts are printed, no times. Plan about twenty minutes. Before each run there is a question: write your answer
# down first.

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

from milestones import v12_prefix_cache as v12
from milestones.v12_prefix_cache import sequence
from milestones.v12_prefix_cache.prefix import block_key, root_key
from milestones.v12_prefix_cache.text import encode_chat
from shared.checkpoints import POCKET
from shared.workloads import RACE

# %% [markdown]
# ## 1. What depends on what
#
# Three prompts of 8 tokens, in blocks of 4. The first two have the same tokens in their first block, the last two in their second.
#
# **Predict.** Which of these blocks have equal keys and values? Is the answer the same in every layer?

# %%
plain = v12.Engine(POCKET, device="cpu", block_size=4, num_blocks=6, enable_prefix_caching=False)

# %%
prompts = {
    "first": [11, 12, 13, 14, 21, 22, 23, 24],
    "same beginning": [11, 12, 13, 14, 51, 52, 53, 54],
    "same second block": [61, 62, 63, 64, 21, 22, 23, 24],
}
plain.generate(list(prompts.values()), v12.SamplingParams(max_tokens=1))  # blocks 0 and 1, then 2 and 3, then 4 and 5
k = plain.cache.k  # [layers, blocks, 4, key heads, elements]


def same(one, other):
    """For each layer, whether two blocks hold equal keys, up to rounding."""
    return [torch.allclose(k[layer, one], k[layer, other], atol=1e-5) for layer in range(len(k))]


print("11 12 13 14 in both of the first two prompts:    ", same(0, 2))
print("21 22 23 24 after 11 12 13 14, and after 61 62...:", same(1, 5))
assert all(same(0, 2)) and same(1, 5) == [True] + [False] * (len(k) - 1)

# %% [markdown]
# In the first layer a key depends only on its own token and position. In all other layers it is computed from a hidden state that
# has attended to the tokens before it. So the last two prompts cannot share their second blocks, although these have the same
# tokens at the same positions.
#
# ## 2. A chain of keys
#
# So the key by which a block is found (not one of attention's keys) must stand for all tokens from the first one on. `block_key`
# hashes the previous block's key together with the block's tokens. For the first block, a root key takes that place.
#
# **Predict.** You change token 22 to 29 in a prompt of four blocks. Which keys change?

# %%
print(inspect.getsource(block_key))


def chain(token_ids, block_size=4, salt=None):
    """The keys of a prompt's full blocks."""
    keys, parent = [], root_key(salt)
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = block_key(parent, token_ids[start : start + block_size])
        keys.append(parent)
    return keys


def short(key):
    return key.hex()[:4]


before = [11, 12, 13, 14, 21, 22, 23, 24, 31, 32, 33, 34, 41, 42, 43, 44]
after = [29 if token == 22 else token for token in before]
print("before:", *map(short, chain(before)))
print("after: ", *map(short, chain(after)))
print("one token less:", *map(short, chain(before[:-1])))
assert [x == y for x, y in zip(chain(before), chain(after))] == [True, False, False, False]
assert chain(before[:-1]) == chain(before)[:3]

# %% [markdown]
# From the changed block on, every key is different. The key before it is the same. A block that is not full has no key.
#
# ## 3. Three requests, six blocks
#
# A and B have prompts of 10 tokens and agree in the first 8. C has 13 tokens, agrees in the first 4, and arrives before step 5.
# Nothing is reserved. The next cell prints, for each step, how many tokens each request feeds, its blocks, and then the number of
# owners of each block and the free list. A star marks a block that can be found.
#
# **Predict.** How many tokens does B feed in step 2? At the end of step 4 no request is left: which blocks can C find, and which
# are free? Which block is evicted first?

# %%
small = v12.Engine(POCKET, device="cpu", num_blocks=6, block_size=4, reserve_tokens=0)


def limit(max_tokens, **others):
    return v12.SamplingParams(max_tokens=max_tokens, ignore_eos=True, **others)


# %%
A = [11, 12, 13, 14, 21, 22, 23, 24, 31, 32]
B = [11, 12, 13, 14, 21, 22, 23, 24, 41, 42]
C = [11, 12, 13, 14, 51, 52, 53, 54, 55, 56, 57, 58, 59]


def watched_step(engine, names):
    """Take a step; what each request fed, with its blocks at that time."""
    fed = []
    hook = engine.model.register_forward_pre_hook(
        lambda *_: fed.extend((seq.seq_id, len(seq.new_ids), list(seq.block_table)) for seq in engine.in_step)
    )
    engine.step()
    hook.remove()
    return {names[seq_id]: f"{names[seq_id]} feeds {count}, has {blocks}" for seq_id, count, blocks in fed}


names = {small.add_request(A, limit(3)): "A", small.add_request(B, limit(3)): "B"}
history = []
for number in range(1, 10):
    if number == 5:
        names[small.add_request(C, limit(5))] = "C"
    said = watched_step(small, names)
    free = [f"{block}{'*' if block in small.pool.key_of else ''}" for block in small.pool.free_ids]
    history.append((list(small.pool.num_owners), free))
    print(f"step {number}", *(f"{said.get(name, ''):29}" for name in "ABC"), f"owners {small.pool.num_owners}", f"free {' '.join(free)}", sep="  ")
print("positions:", small.num_positions, " without sharing:", sum(len(prompt) + n - 1 for prompt, n in ((A, 3), (B, 3), (C, 5))))
assert history[1][0][:2] == [2, 2] and history[3][1] == ["4", "5", "2*", "3*", "1*", "0*"]
assert small.num_positions == 29

# %%
figure, axes = plt.subplots(figsize=(7, 2.8))
owners = torch.tensor([owners for owners, _ in history], dtype=torch.float).T
axes.imshow(owners, cmap="Blues", vmin=0, vmax=3, aspect="auto")
for block in range(6):
    for step, (_, free) in enumerate(history):
        mark = "free*" if f"{block}*" in free else "free" if str(block) in free else f"{int(owners[block, step])}"
        axes.text(step, block, mark, ha="center", va="center", fontsize=7)
axes.set(title="Owners of each block after each step (*: can be found)", xlabel="step", ylabel="block")
axes.set_xticks(range(9), range(1, 10))
plt.show()

# %% [markdown]
# In step 1, B could not find anything yet, but A was computing exactly the blocks that B needed, so B waited. In step 2, B found
# two blocks and fed 2 tokens. In step 5, C took block 0 out of the free list. Then it needed three more: 4 and 5, which had never
# been used, and 2, which had been freed first. With that, A's third block was evicted. At the end block 3 was freed to the front
# of the list: C had filled only one of its positions, so it cannot be found.
#
# ## 4. What a request finds
#
# A request is sent, and then sent again.
#
# **Predict.** With blocks of 4, how many tokens does the second one find if the prompt has 3, 4, 5, 8, 9 or 12 tokens? And how
# many if it sets `prompt_logprobs`?

# %%
roomy = v12.Engine(POCKET, device="cpu", block_size=4, num_blocks=256)

# %%
def found_again(length, **others):
    """How many tokens a prompt finds when it is sent for the second time to an empty cache."""
    roomy.reset_prefix_cache()
    prompt = list(range(100, 100 + length))
    for _ in range(2):
        [result] = roomy.generate([prompt], limit(1, **others))
    return result.num_cached


counts = {length: found_again(length) for length in range(1, 14)}
for length in (3, 4, 5, 8, 9, 12):
    print(f"{length:2} tokens: finds {counts[length]}, computes {length - counts[length]};  with prompt_logprobs: finds {found_again(length, logprobs=0, prompt_logprobs=True)}")
assert counts == {length: (length - 1) // 4 * 4 for length in counts}
assert found_again(12, logprobs=0, prompt_logprobs=True) == 0

# %% [markdown]
# The last token must always be fed, because its logits choose the next one. So of 8 tokens only one block is taken, and 4
# positions are computed again. `prompt_logprobs` needs the logits of every prompt token, so nothing may be taken.
#
# Generated tokens are found, too. Here the second prompt is the first one, its output, and one more token.
#
# **Predict.** The first prompt has 10 tokens and generates 11, so the second has 22. How many of them are found?

# %%
roomy.reset_prefix_cache()
[first] = roomy.generate([A], limit(11))
[second] = roomy.generate([A + first.token_ids + [99]], limit(1))
print(f"{len(second.prompt_ids)} tokens: {second.num_cached} found")
assert second.num_cached == 20

# %% [markdown]
# The last generated token was never fed, so 20 positions were computed: five full blocks.
#
# ## 5. One system prompt, eight chats
#
# Eight chats have the same system prompt and different questions. Blocks have 16 tokens, the default.
#
# **Predict.** How many positions are computed for all eight prompts if they are sent one after another? If all are sent at once? And
# what if a request did not wait for a block that another one is computing?

# %%
SYSTEM = " ".join(["You answer questions about language models. You are brief, and you never invent anything."] * 6)
engine = v12.Engine(POCKET, device="cpu")
off = v12.Engine(POCKET, device="cpu", enable_prefix_caching=False)

# %%
chats = [encode_chat(engine.tokenizer, [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]) for question in RACE[:8]]
common = next(i for i in range(len(chats[0])) if len({tuple(chat[: i + 1]) for chat in chats}) > 1)
print(f"prompts of {min(map(len, chats))} to {max(map(len, chats))} tokens, {sum(map(len, chats))} together; the first {common} are the same")


def count(engine, calls):
    """Send the calls one after another, each a list of prompts; positions, steps, what each request found, and the tokens."""
    engine.reset_prefix_cache()
    start = engine.num_positions, engine.num_steps
    results = [result for prompts in calls for result in engine.generate(prompts, limit(4))]
    return {
        "positions": engine.num_positions - start[0],
        "steps": engine.num_steps - start[1],
        "found": [result.num_cached for result in results],
        "tokens": [result.token_ids for result in results],
    }


one_by_one, at_once = [[chat] for chat in chats], [chats]
runs = {
    "cache off, one by one": count(off, one_by_one),
    "cache off, at once": count(off, at_once),
    "one by one": count(engine, one_by_one),
    "at once": count(engine, at_once),
}
engine.scheduler.awaits = lambda *_: False
runs["at once, no waiting"] = count(engine, at_once)
del engine.scheduler.awaits
for name, run in runs.items():
    print(f"{name:22} {run['positions']:5} positions in {run['steps']:2} steps, found {run['found']}")
assert all(run["tokens"] == runs["cache off, one by one"]["tokens"] for run in runs.values())
assert runs["one by one"]["positions"] == runs["at once"]["positions"] < runs["at once, no waiting"]["positions"] / 4
assert runs["at once, no waiting"]["positions"] == runs["cache off, at once"]["positions"]
assert runs["at once"]["steps"] == runs["cache off, at once"]["steps"] + 1

# %%
figure, axes = plt.subplots(figsize=(7, 2.4))
axes.barh(list(runs), [run["positions"] for run in runs.values()])
axes.set(title="Eight chats with one system prompt", xlabel="positions computed")
axes.invert_yaxis()
plt.show()

# %% [markdown]
# One after another, seven of the eight chats find all full blocks of the system prompt. At once, they wait for the first chat for
# one step, and find the same. Without waiting, all eight are admitted in the first step, when nothing can be found, and the prefix
# cache saves nothing. The tokens are the same in all five runs.
#
# ## 6. Eviction, one block after another
#
# Now a small cache of 32 blocks. One chat is sent, then other prompts of one block each, then the same chat again.
#
# **Predict.** How does the number of tokens that the chat finds depend on the number of other prompts? Does it fall to 0 at once,
# or little by little? And if a table's first block were freed first?

# %%
cramped = v12.Engine(POCKET, device="cpu", num_blocks=32, block_size=16)


def left_after(num_blocks):
    """How many tokens the chat finds after other prompts have needed this many blocks."""
    cramped.reset_prefix_cache()
    cramped.generate([chats[0]], limit(1))
    cramped.generate([[200 + number] * 16 for number in range(num_blocks)], limit(1))
    return cramped.generate([chats[0]], limit(1))[0].num_cached


def head_first(block_ids):
    """Free a table's blocks in order, the first one first."""
    tail_first(list(reversed(block_ids)))


# %%
tail_first = cramped.pool.free
floods = range(33)
kept = {"tail first": [left_after(number) for number in floods]}
cramped.pool.free = head_first
kept["head first"] = [left_after(number) for number in floods]
del cramped.pool.free
for name, tokens in kept.items():
    print(f"{name}: {tokens}")
assert kept["tail first"] == sorted(kept["tail first"], reverse=True)
assert len(set(kept["tail first"])) > 10 and len(set(kept["head first"])) == 2

# %%
figure, axes = plt.subplots(figsize=(7, 2.8))
for (name, tokens), style in zip(kept.items(), ("o-", "s--")):
    axes.step(floods, tokens, style, where="post", markersize=3, label=name)
axes.set(title=f"A prompt of {len(chats[0])} tokens, sent again", xlabel="other prompts, one block each", ylabel="tokens found")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# Free blocks that hold nothing are used first. Then the chat's blocks are evicted from its end, one after another, and its
# beginning, which other chats share, stays longest. If the head went first, the very first eviction would make all the rest
# useless: a block is found only if all blocks before it are.
#
# ## 7. Break the chain
#
# What if a key did not contain its parent? The next cell replaces `block_key` by a function that hashes only the block's own
# tokens. The two conversations below consist of the same six blocks of 4 tokens, in a different order.
#
# **Predict.** The second conversation ends with "What is prefill?". What does the engine answer?

# %%
def conversation(first_question, second_question):
    turns = [("user", first_question), ("assistant", "It is a part of the engine."), ("user", second_question)]
    return encode_chat(roomy.tokenizer, [{"role": role, "content": content} for role, content in turns])


def pieces(token_ids):
    return " | ".join(roomy.tokenizer.decode(token_ids[i : i + 4]) for i in range(0, len(token_ids), 4))


def second_answer():
    """Ask both conversations' questions, one after another; the result of the second."""
    roomy.reset_prefix_cache()
    roomy.generate([about_decode], v12.SamplingParams(max_tokens=40, new_text=True))
    return roomy.generate([about_prefill], v12.SamplingParams(max_tokens=40, new_text=True))[0]


# %%
about_decode = conversation("What is prefill?", "What is decode?")
about_prefill = conversation("What is decode?", "What is prefill?")
print(pieces(about_decode))
print(pieces(about_prefill))

right = second_answer()
sequence.block_key = lambda parent, token_ids: block_key(b"", token_ids)
wrong = second_answer()
sequence.block_key = block_key
print(f"\nwith parents:    {right.num_cached:2} tokens found. {right.text}")
print(f"without parents: {wrong.num_cached:2} tokens found. {wrong.text}")
assert right.text.startswith("Prefill") and wrong.text.startswith("Decode")
assert right.num_cached == 4 and wrong.num_cached == 20
assert second_answer().text == right.text

# %% [markdown]
# Without parents, the engine answers the other question, fluently and without an error. The request has found five of its six
# blocks, but their keys and values were computed in the first conversation, in which the questions are in the other order.
#
# ## 8. Two clients
#
# A `cache_salt` goes into the root key, so it changes every key. The server makes it from the client's API key and the
# client's own salt.
#
# **Predict.** The same chat is sent with salt x, x, y, none, x. How many tokens does each find?

# %%
public = v12.Engine(POCKET, device="cpu", num_blocks=256)

# %%
for salt in ("x", "x", "y", None, "x"):
    [result] = public.generate([chats[0]], limit(1, cache_salt=salt))
    print(f"salt {str(salt):5} key of the first block {short(chain(chats[0], 16, salt)[0])}   found {result.num_cached}")
assert result.num_cached > 0
assert len({chain(chats[0], 16, salt)[0] for salt in ("x", "y", None)}) == 3

# %%
from milestones.v12_prefix_cache.service import Service

print(inspect.getsource(Service.cache_salt))
salts = {(api_key, salt): Service.cache_salt(None, api_key, salt) for api_key in (None, "alice", "bob") for salt in (None, "x")}
for (api_key, salt), engine_salt in salts.items():
    print(f"API key {str(api_key):6} salt {str(salt):5} engine's salt {engine_salt and engine_salt[:8]}")
assert len(set(salts.values())) == 6

# %% [markdown]
# Clients with different keys never share a block, even if both send salt x. Without keys, all clients that send no salt share.
#
# ## To try
#
# 1. In part 3, give the cache 7 blocks. Which block is evicted now, and what would A find if it were sent again?
# 2. In part 5, put the number of the chat in front of the system prompt ("Chat 3. You answer ..."). What is found, and why?
# 3. In part 6, send the chat once more after half of the other prompts. How many more blocks does it survive?
#
# The chapter's text is [milestones/v12_prefix_cache/README.md](../milestones/v12_prefix_cache/README.md). `make soak ARGS=v12` runs
# thousands of requests in tiny caches, `make traps-v12` plants the chapter's seeded bugs, and `make diff-v12` shows everything
# that the chapter changed.
