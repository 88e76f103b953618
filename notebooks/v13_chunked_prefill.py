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
# # v13, followed along: compute long prompts in pieces
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v13_chunked_prefill.ipynb)
#
# You let a long prompt stop eight streams, then give each step a budget, follow four requests from step to step, measure gaps for
# six budgets, check that pieces change no result, remove the loop that moves a prompt forward, and predict a decision of
# vLLM's scheduler. Times differ from machine to machine; counts do not. Plan about twenty minutes. Before each run there is a
# question: write your answer down first.

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
import json
import random
import time
import warnings
from itertools import accumulate
from statistics import mean, median

import matplotlib.pyplot as plt
import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets

from milestones import v12_prefix_cache as v12
from milestones import v13_chunked_prefill as v13
from milestones.v13_chunked_prefill.scheduler import Scheduler
from milestones.v13_chunked_prefill.text import encode_chat
from shared.chapters import find
from shared.checkpoints import POCKET
from shared.verify.decisions import Driver, Trace
from shared.workloads import RACE, random_ids

# %% [markdown]
# ## 1. A long prompt stops the streams
#
# Eight requests are generating, one token each per step. Then a prompt of 1,900 tokens arrives. The first engine is v12, which
# computes the prompt in one step. The second is v13 with a budget of 128 tokens per step.
#
# **Predict.** How many steps does v13 take until the long prompt's first token? How long is the longest gap between two tokens of
# a stream, compared with v12's? And which engine is the first to answer the long prompt?

# %%
before = v12.Engine(POCKET, device="cpu", max_num_seqs=16, enable_prefix_caching=False)
engine = v13.Engine(POCKET, device="cpu", max_num_seqs=16, enable_prefix_caching=False, max_num_batched_tokens=128)

# %%
rng = random.Random(3)
streams = [random_ids(20, engine.config.vocab_size, rng) for _ in range(8)]
long_prompt = random_ids(1900, engine.config.vocab_size, rng)


def limit(max_tokens, **others):
    return v13.SamplingParams(max_tokens=max_tokens, ignore_eos=True, **others)


def arrival(engine):
    """Let the long prompt arrive beside the streams. For each step until its first token: the tokens fed, and ms."""
    Params = v12.SamplingParams if engine is before else v13.SamplingParams
    for prompt in streams:
        engine.add_request(prompt, Params(max_tokens=500, ignore_eos=True))
    while len(engine.step()) < 8:  # until all of them generate
        pass
    long_id = engine.add_request(long_prompt, Params(max_tokens=2, ignore_eos=True))
    steps, answered = [], False
    while not answered:
        fed, start = engine.num_positions, time.perf_counter()
        outputs = engine.step()
        answered = long_id in [output.request_id for output in outputs]
        assert len(outputs) == 8 + answered  # each stream has a token in every step
        steps.append((engine.num_positions - fed, 1000 * (time.perf_counter() - start)))
    engine.close()
    return steps


def quiet(engine, repeats):
    """The same, with each step's shortest time in several runs: other programs can only make a step longer."""
    runs = [arrival(engine) for _ in range(repeats)]
    return [(same[0][0], min(ms for _, ms in same)) for same in zip(*runs, strict=True)]


def gaps(steps):
    """The time between each step's tokens and those of the step before, in ms."""
    return [ms for _, ms in steps]


# %% tags=["varies"]
runs = {"v12": quiet(before, 3), "v13, budget 128": quiet(engine, 5)}
for name, steps in runs.items():
    print(f"{name:16} {len(steps):2} steps of at most {max(fed for fed, _ in steps):4} tokens, longest gap {max(gaps(steps)):6.1f} ms, first token of the prompt after {sum(gaps(steps)):6.1f} ms")
assert [len(steps) for steps in runs.values()] == [1, 16]
assert max(fed for fed, _ in runs["v13, budget 128"]) == 128

# %%
figure, axes = plt.subplots(figsize=(7, 2.2))
for row, (name, steps) in enumerate(runs.items()):
    times = list(accumulate(gaps(steps), initial=0))
    axes.plot(times, [row] * len(times), "|", markersize=18, color="tab:blue")
    axes.plot(times[-1], row, "o", color="tab:red")
axes.set(title="Tokens of a stream, and the prompt's first token (dot)", xlabel="ms after the prompt has arrived")
axes.set_yticks(range(2), runs)
axes.set_ylim(1.6, -0.6)
plt.show()

# %% [markdown]
# Of the 128 tokens, eight go to the streams and 120 to the prompt: 1,900 / 120 is a little less than 16. In v12 a stream gets no
# token until the prompt is done.
#
# ## 2. The budget, step by step
#
# Now four small requests, with a budget of 8 and blocks of 4. A and B arrive first, C with 19 tokens before step 2, D with 6 tokens
# before step 3. The next cell prints for each step how many tokens each request feeds, and its blocks.
#
# **Predict.** How many tokens of C are fed in step 2? In which step does D start, and why not earlier? In which step does C get its
# first token?

# %%
small = v13.Engine(POCKET, device="cpu", num_blocks=32, block_size=4, reserve_tokens=0, max_num_seqs=8, max_num_batched_tokens=8)

# %%
def watch(engine, arrivals):
    """Run requests to the end. arrivals: by step, a list of (name, prompt, max_tokens). Print each step; what was fed, by step."""
    names, history = {}, []
    while engine.has_unfinished_requests() or len(history) < max(arrivals):
        for name, prompt, max_tokens in arrivals.get(len(history) + 1, []):
            names[engine.add_request(prompt, limit(max_tokens))] = name
        fed = {}
        hook = engine.model.register_forward_pre_hook(
            lambda *_: fed.update((names[seq.seq_id], (seq.num_scheduled, list(seq.block_table))) for seq in engine.in_step)
        )
        outputs = engine.step()
        hook.remove()
        history.append({name: count for name, (count, _) in fed.items()})
        parts = [f"{name} feeds {count}, has {blocks}" for name, (count, blocks) in sorted(fed.items())]
        answered = "".join(sorted(names[output.request_id] for output in outputs))
        print(f"step {len(history)}  left {engine.scheduler.budget}  tokens for {answered:4}", *parts, sep="  ")
    return history


C = random_ids(19, small.config.vocab_size, rng)
first = [("A", [11, 12, 13], 6), ("B", [21, 22, 23, 24], 5)]
history = watch(small, {1: first, 2: [("C", C, 2)], 3: [("D", random_ids(6, small.config.vocab_size, rng), 2)]})
assert [fed.get("C", 0) for fed in history] == [0, 6, 6, 6, 1, 1, 0]
assert [fed.get("D", 0) for fed in history] == [0, 0, 0, 0, 5, 1, 1]
assert all(sum(fed.values()) <= 8 for fed in history)

# %%
figure, axes = plt.subplots(figsize=(7, 2.6))
bottom = [0] * len(history)
for name in "ABCD":
    counts = [fed.get(name, 0) for fed in history]
    axes.bar(range(1, len(history) + 1), counts, bottom=bottom, label=name)
    bottom = [low + count for low, count in zip(bottom, counts)]
axes.axhline(8, color="grey", linestyle=":", linewidth=1)
axes.set(title="Tokens fed per step, and the budget (dotted)", xlabel="step", ylabel="tokens")
axes.set_ylim(0, 10.5)
axes.legend(ncols=4, fontsize=8, loc="upper right")
plt.show()

# %% [markdown]
# A and B feed one token each, and C gets the other six. In steps 3 and 4, nothing is left for D. C's last piece has one token, and
# in that step C gets its first token and D starts. A and B get a token in every step. These are the lines that decide it:

# %%
print(inspect.getsource(Scheduler.schedule))
print(inspect.getsource(Scheduler.grow))

# %% [markdown]
# Now E arrives together with C, and has the same prompt. The prefix cache is on.
#
# **Predict.** In which step does E start, and how many tokens does it feed?

# %%
small.reset_prefix_cache()
history = watch(small, {1: first, 2: [("C", C, 2), ("E", list(C), 2)]})
assert [fed.get("E", 0) for fed in history] == [0, 0, 0, 0, 3, 1]

# %% [markdown]
# While C takes all of the budget, E waits. In step 5, budget is left. By then C has filled four blocks, so E finds 16 of its 19 tokens.
#
# ## 3. Which budget?
#
# The long prompt arrives beside the streams again, with six budgets.
#
# **Predict.** How many steps does its prompt take with 32 tokens per step? Which budget gives the earliest first token? Sketch the
# longest gap as a function of the budget.

# %% tags=["varies"]
budgets = (32, 64, 128, 256, 512, 2048)
by_budget = {}
for budget in budgets:
    engine.scheduler.max_num_batched_tokens = budget
    by_budget[budget] = quiet(engine, 2)
for budget, steps in by_budget.items():
    print(f"{budget:5}: {len(steps):3} steps, longest gap {max(gaps(steps)):6.1f} ms, median {median(gaps(steps)):6.1f} ms, first token after {sum(gaps(steps)):7.1f} ms")
assert [len(steps) for steps in by_budget.values()] == [-(-1900 // (budget - 8)) for budget in budgets]

# %%
figure, axes = plt.subplots(figsize=(7, 3))
axes.plot(budgets, [max(gaps(by_budget[budget])) for budget in budgets], "o-", label="longest gap of a stream")
axes.plot(budgets, [sum(gaps(by_budget[budget])) for budget in budgets], "s--", label="first token of the long prompt")
axes.axhline(sum(gaps(runs["v12"])), color="grey", linestyle=":", label="v12: both")
axes.set(title="A prompt of 1,900 tokens beside eight streams", xlabel="budget, tokens per step", ylabel="ms")
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks(budgets, budgets)
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# The gap grows with the budget. Tiny pieces are bad for the long prompt, because each step has a cost of its own. With those of a few
# hundred its first token comes no later than in v12, and often earlier: a whole prompt computes the scores of all pairs of its tokens,
# and then masks half of them.
#
# The budget counts tokens, but a stream waits for time. Are the steps of one prompt equally long? The next plot shows the gaps of
# part 1, one after another.

# %%
figure, axes = plt.subplots(figsize=(7, 2.2))
pieces = gaps(runs["v13, budget 128"])
axes.bar(range(1, len(pieces) + 1), pieces)
axes.set(title="Steps of 120 prompt tokens each", xlabel="step", ylabel="ms")
plt.show()

# %% [markdown]
# No: a later piece attends to more positions. (The last piece is shorter.)
#
# ## 4. The same results
#
# **Predict.** A prompt is sent with `prompt_logprobs` and a budget of 8. How many rows of logits does each step compute? Which
# positions have no score? And how many rows does it compute without `prompt_logprobs`?

# %%
exact = v13.Engine(POCKET, device="cpu", num_blocks=64, block_size=4, max_num_seqs=4, max_num_batched_tokens=8)

# %%
chat = encode_chat(exact.tokenizer, [{"role": "user", "content": " ".join(RACE[:4])}])


def answer(budget, prompt_logprobs=True):
    """The chat's result with a budget, and for each step the tokens fed and the rows of logits."""
    exact.scheduler.max_num_batched_tokens = budget
    exact.reset_prefix_cache()
    steps = []
    hook = exact.model.register_forward_pre_hook(lambda _, inputs: steps.append((len(inputs[0].token_ids), len(inputs[0].draws))))
    [result] = exact.generate([chat], v13.SamplingParams(max_tokens=12, logprobs=0, prompt_logprobs=prompt_logprobs))
    hook.remove()
    return result, steps


whole, steps = answer(512)
print(f"a prompt of {len(chat)} tokens; for each step, the tokens fed and the rows of logits:")
print(f"budget 512: {steps[:3]}")
pieced, steps = answer(8)
print(f"budget   8: {steps[:6]}")
print(f"without prompt_logprobs: {answer(8, prompt_logprobs=False)[1][:6]}")
print("positions without a score:", [position for position, score in enumerate(pieced.prompt_logprobs) if score is None])
assert [score is None for score in pieced.prompt_logprobs] == [True] + [False] * (len(chat) - 1)


def values(result):
    return torch.tensor([value for score in result.prompt_logprobs[1:] + result.logprobs for value in score.values()])


for budget in range(4, 41):
    result, _ = answer(budget)
    assert result.token_ids == whole.token_ids and torch.allclose(values(result), values(whole), atol=1e-4)
print(f"budgets 4 to 40: the same {len(whole.token_ids)} tokens, and the same logprobs up to rounding")

# %% [markdown]
# Without `prompt_logprobs`, only the last piece of a prompt needs a row of logits. With it, each position is scored once, in the
# piece that feeds the token before it. Only position 0 has no score, whatever the pieces.
#
# ## 5. Break it
#
# Up to v12, `num_computed` moved only when a token was drawn. The next cell takes away the loop that v13 added to `commit`.
#
# **Predict.** A prompt of 19 tokens arrives, with a budget of 8. What happens in the first six steps? And with a prompt of 6?

# %%
def old_commit(batch, token_ids, logprobs):
    """Commit as in v12: without moving sequences that have no draw."""
    exact.in_step = []
    return v13.Engine.commit(exact, batch, token_ids, logprobs)


def try_out(length):
    exact.scheduler.max_num_batched_tokens = 8
    exact.add_request(list(range(100, 100 + length)), limit(3))
    for number in range(1, 7):
        outputs = exact.step()
        states = [f"fed {seq.num_scheduled}, {seq.num_computed} of {seq.num_tokens} computed" for seq in exact.scheduler.running]
        print(f"  step {number}: {len(outputs)} outputs", *states, sep="; ")
        if not exact.has_unfinished_requests():
            break
    finished = not exact.has_unfinished_requests()
    exact.close()
    return finished


# %%
exact.commit = old_commit
print("19 tokens:")
long_finished = try_out(19)
print("6 tokens:")
short_finished = try_out(6)
del exact.commit
assert short_finished and not long_finished

# %% [markdown]
# The long prompt feeds its first 8 tokens again and again. Nothing fails, the processor is busy, and no answer ever comes. Short
# prompts work, so a test with short prompts finds nothing.
#
# ## 6. A decision of vLLM's scheduler
#
# `tests/golden/scheduler` has 36 workloads, and for each step what vLLM decided. `Driver` runs the same requests with v13's
# scheduler, without a model. This is the state before step 3 of one of them. The budget is 8, blocks have 2 positions, and a smaller
# priority is more important.
#
# **Predict.** What does vLLM do in this step? What does v13 do?

# %%
def read_trace(path):
    return Trace(path.stem, json.loads(path.read_text()))


def state_before(trace, step, reserve_tokens=0):
    """Run v13's scheduler up to this step; print the state before it, and return what it then decides."""
    driver = Driver(find("v13"), trace, reserve_tokens)
    decisions, schedule = driver.run(), driver.scheduler.schedule

    def show_and_schedule():
        print(f"before step {step}: {driver.pool.num_free} blocks free")
        for name, seqs in (("runs", driver.scheduler.running), ("waits", driver.scheduler.waiting)):
            for seq in seqs:
                print(f"  request {driver.ids[seq.seq_id]}, priority {seq.params.priority}, {name}: {seq.num_computed} of {seq.num_tokens} computed, a table of {len(seq.block_table)}")
        return schedule()

    for _ in range(step):
        next(decisions)
    driver.scheduler.schedule = show_and_schedule
    return next(decisions)


trace = read_trace(root / "tests" / "golden" / "scheduler" / "28-priority.json")
ours = state_before(trace, 3)

# %%
print("vLLM:", trace.decisions[3])
print("v13: ", ours)
assert trace.decisions[3].scheduled == {1: 1, 5: 6} and ours.scheduled == {1: 1, 2: 7} and ours.preempted == {5}

# %% [markdown]
# Both give request 1 its token and request 5 the rest of its prompt. But then v13 considers request 2, which is more important than
# request 5. Without request 5 it fits exactly: 12 blocks of request 1 and 8 of its own are all 20. So request 5 is preempted in
# the middle of its prompt, its 6 tokens go back to the budget, and request 2 gets 7.
#
# ## 7. Which rule is better?
#
# **Predict.** In which step does request 2 get its first token in v13, and in which in vLLM? And request 5?

# %%
def first_tokens(trace, decisions):
    """By request, the step in which its prompt is first complete, and the sum of all positions that were fed."""
    prompts = {request["id"]: len(request["prompt"]) for request in trace.requests}
    computed, first, fed = {}, {}, 0
    for step, decision in enumerate(decisions):
        computed |= dict.fromkeys(decision.preempted, 0) | decision.cached
        for request, count in decision.scheduled.items():
            computed[request] = computed.get(request, 0) + count
            fed += count
            if computed[request] >= prompts[request]:
                first.setdefault(request, step)
    return first, fed


def rules(trace):
    """The decisions on a trace of vLLM, of v13, and of v13 with reservations."""
    ours = {reserve: list(Driver(find("v13"), trace, reserve).run()) for reserve in (0, 4, 16)}
    return {"vLLM": trace.decisions} | {f"v13, {reserve} reserved": decisions for reserve, decisions in ours.items()}


found = {name: first_tokens(trace, decisions) for name, decisions in rules(trace).items()}
for name, (first, fed) in found.items():
    print(f"{name:16} first token of request 2 in step {first[2]:2}, of request 5 in step {first[5]:2}; {fed} positions in all")
assert [first[2] for first, _ in found.values()] == [10, 10, 10, 10]
assert [first[5] for first, _ in found.values()] == [3, 13, 3, 3]

# %% [markdown]
# Here v13's rule gains nothing. In step 5, request 1 needs another block, and request 2 is preempted itself, two tokens before the
# end of its prompt. A small reservation prevents that: request 2 is not admitted in step 3, and request 5 is not preempted.
#
# One workload proves little. The next cell takes all twelve workloads with priorities, and averages the number of steps from arrival
# to first token.
#
# **Predict.** Which requests gain from v13's rules, and which lose? And what does a reservation of 16 tokens do in these tiny caches?

# %%
waits = {}
for path in sorted((root / "tests" / "golden" / "scheduler").glob("*.json")):
    trace = read_trace(path)
    if trace.by_priority:
        for name, decisions in rules(trace).items():
            first, _ = first_tokens(trace, decisions)
            for request in trace.requests:
                if request["id"] in first:
                    waits.setdefault(name, {}).setdefault(request["priority"], []).append(first[request["id"]] - request["arrives"])
for name, by_priority in waits.items():
    print(f"{name:16}", *(f"priority {priority}: {mean(steps):4.1f} steps ({len(steps)} requests)" for priority, steps in sorted(by_priority.items())), sep="   ")
averages = {name: [round(mean(by_priority[priority]), 1) for priority in range(3)] for name, by_priority in waits.items()}
assert averages["vLLM"] == [2.5, 13.5, 27.7] and averages["v13, 0 reserved"] == [1.7, 13.6, 28.2]

# %%
figure, axes = plt.subplots(figsize=(7, 2.8))
for offset, (name, values_of) in enumerate(averages.items()):
    axes.bar([priority + 0.2 * offset for priority in range(3)], values_of, width=0.18, label=name)
axes.set(title="Steps from arrival to first token, by priority", ylabel="steps")
axes.set_xticks([0.3, 1.3, 2.3], ["0, most important", "1", "2"])
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# The most important requests start earlier in v13, and the others a little later. Positions that preempted requests compute again
# are the price. In these caches fewer than two requests run at a time on average, and a reservation of 16 tokens makes everything
# wait. With more room it costs little, as v11's notebook shows.
#
# ## To try
#
# 1. In part 2, let D arrive before step 2, ahead of C in the list. Which request waits now, and for how many steps?
# 2. In part 3, use prompts of 200 tokens for the streams. Does the longest gap still depend on the budget in the same way?
# 3. In part 6, choose another workload and step, and predict. `python -m shared.verify.decisions tests/golden/scheduler v13`
#    says in which step each of them first differs.
#
# The chapter's text is [milestones/v13_chunked_prefill/README.md](../milestones/v13_chunked_prefill/README.md). `make soak ARGS=v13`
# runs thousands of requests in tiny caches, `make traps-v13` plants the chapter's seeded bugs, and `make diff-v13` shows everything
# that the chapter changed.
