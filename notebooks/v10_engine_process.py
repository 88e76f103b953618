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
# # v10, followed along: an engine in a process of its own
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v10_engine_process.ipynb)
#
# You measure the messages that cross, start an engine in another process, run a busy thread beside it, and then kill it,
# stop it, and take its server away. Plan about twenty minutes. Before each run there is a question: write your answer down
# first.

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
import asyncio
import logging
import os
import signal
import socket
import threading
import time
import warnings
from contextlib import contextmanager
from functools import partial

import matplotlib.pyplot as plt

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets
os.environ["OMP_NUM_THREADS"] = "1"
logging.getLogger("milestones").setLevel(logging.CRITICAL)  # parts 4 and 5 kill an engine on purpose, which is logged

from milestones.v10_engine_process import SamplingParams, engine_process
from milestones.v10_engine_process.engine_loop import Abort, Aborted, Add, Died, Stepped
from milestones.v10_engine_process.engine_process import EngineProcess, load_engine, packed, receive_message
from milestones.v10_engine_process.outputs import Stats, StepOutput
from shared.checkpoints import POCKET
from shared.verify.serving import wait_until

# %% [markdown]
# ## 1. Bytes
#
# A message crosses as its length followed by its pickle. Below is the message of a step in which each running request gets a
# token.
#
# **Predict.** With one request it takes 194 bytes. How many with 16? And if the bytes of two messages are sent in three
# pieces, how many messages does the other side receive?

# %%
stats = Stats(running=1, waiting=0, free_blocks=8190, total_blocks=8192)


def step_of(number):
    """The message of a step with this many tokens, all with the same text."""
    return Stepped([(call_id, 0, StepOutput(call_id, 300, " there", None, None)) for call_id in range(1, number + 1)])


sizes = {number: len(packed((step_of(number), stats))) for number in (1, 4, 16, 64)}
for number, num_bytes in sizes.items():
    print(f"{number:3} tokens: {num_bytes:5} bytes, {num_bytes / number:6.1f} per token")
print("the beginning:", packed((step_of(1), stats))[:12].hex(" "))
assert sizes[1] == 194 and packed((step_of(1), stats))[:4] == (190).to_bytes(4, "big")

# %%
ours, theirs = socket.socketpair()
data = packed(("first", 1)) + packed(("second", 2))
pieces = data[:2], data[2:30], data[30:]
threading.Thread(target=lambda: [ours.sendall(piece) or time.sleep(0.05) for piece in pieces]).start()
received = [receive_message(theirs) for _ in range(2)]
print("pieces:", [len(piece) for piece in pieces], "  received:", received)
ours.close()
print("after the end:", receive_message(theirs))
assert received == [("first", 1), ("second", 2)]

# %% [markdown]
# More than half of the 194 bytes are names of classes and modules, which a pickle writes once. So 16 tokens take three times
# as much, not sixteen times. (The text is written once, too, because all tokens here share it. In a real step each has its
# own.) `receive_message` reads until it has the number of bytes that the length says, wherever the pieces end.
#
# ## 2. Another process
#
# `a_process` starts an engine in a process of its own. To talk to it, `Beside` runs an event loop in a thread of this
# process, and keeps what arrives in a list.
#
# **Predict.** Three requests of 4 tokens are added in one call. How many messages come back? And the tokenizer that turns
# the prompt into tokens here: where does it come from?

# %%
class Beside:
    """A runner, an event loop in a thread, and every message that the engine has sent."""

    def __init__(self, runner):
        self.runner, self.received = runner, []
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.run(runner.start(self.receive))

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def receive(self, message, stats):
        self.received.append((time.monotonic(), message, stats))

    def send(self, *messages):
        for message in messages:
            self.loop.call_soon_threadsafe(self.runner.send, message)

    def of(self, kind):
        return [(at, message) for at, message, _ in self.received if isinstance(message, kind)]


@contextmanager
def a_process():
    """Run an engine in a process of its own until the block ends. (What it writes to stderr is discarded.)"""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    runner = EngineProcess(partial(load_engine, POCKET, device="cpu", max_num_seqs=16))
    os.dup2(stderr, 2)
    os.close(stderr)
    os.close(nowhere)
    runner.wait_until_ready()
    beside = Beside(runner)
    try:
        yield beside
    finally:
        beside.run(runner.stop(timeout_s=0.5))


def tokens(number):
    """Parameters of a request that generates exactly this many tokens."""
    return SamplingParams(max_tokens=number, ignore_eos=True)


def has_torch(pid):
    """Whether a process has PyTorch's library in its memory."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


with a_process() as beside:
    story = beside.runner.tokenizer("Once upon a time").input_ids
    beside.send(Add(1, [(story, tokens(4))] * 3))
    wait_until(lambda: len(beside.of(Stepped)) == 4)
for _, message, stats in beside.received:
    said = [output.text for _, _, output in message.outputs] if isinstance(message, Stepped) else ""
    print(f"{type(message).__name__:8} {said} {stats.running} running")
assert [type(message).__name__ for _, message, _ in beside.received] == ["Added"] + ["Stepped"] * 4

# %% [markdown]
# Four of the five messages carry the twelve tokens. The engine sent the tokenizer, in `Ready`.
#
# ## 3. A busy thread beside it
#
# Sixteen requests run, first undisturbed, then beside a thread of this process that counts in pure Python. This is done twice:
# with the engine in a process of its own, and with the engine in a thread of this process, as in v09. PyTorch uses one
# thread.
#
# **Predict.** An engine thread may have to wait 5 ms for the interpreter lock before each operation, and a step has some
# four hundred of them. How many steps per second are left with the thread, and how many with the process?

# %% tags=["varies"]
SECONDS = 2.0


def count(seconds):
    """Pure Python that holds the interpreter lock whenever it can."""
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        number += 1


def measure(beside):
    beside.send(Add(1, [(story, tokens(1500))] * 16))
    wait_until(lambda: beside.of(Stepped))
    found = {}
    for name, work in {"quiet": time.sleep, "busy": count}.items():
        time.sleep(0.3)
        before, start = len(beside.of(Stepped)), time.monotonic()
        thread = threading.Thread(target=work, args=(SECONDS,))
        thread.start()
        thread.join()
        # Let the event loop read what the engine has sent so far.
        time.sleep(0.1)
        found[name] = (len(beside.of(Stepped)) - before) / (time.monotonic() - start)
    beside.send(Abort(1))
    wait_until(lambda: beside.of(Aborted))
    return found


with a_process() as beside:
    in_a_process = measure(beside)

import torch

from milestones.v10_engine_process.engine_thread import EngineThread

torch.set_num_threads(1)
beside = Beside(EngineThread(load_engine(POCKET, device="cpu", max_num_seqs=16)))
in_a_thread = measure(beside)
beside.run(beside.runner.stop(timeout_s=5))
for name, found in {"thread": in_a_thread, "process": in_a_process}.items():
    print(f"{name:8} steps per second: quiet {found['quiet']:6.1f}, beside a busy thread {found['busy']:6.1f}")
figure, axes = plt.subplots(figsize=(7, 2.2))
axes.barh(["process, busy", "process, quiet", "thread, busy", "thread, quiet"], [in_a_process["busy"], in_a_process["quiet"], in_a_thread["busy"], in_a_thread["quiet"]])
axes.set(xlabel="steps per second")
plt.show()
assert in_a_thread["busy"] < in_a_thread["quiet"]

# %% [markdown]
# How much the thread loses depends on the machine. The engine releases the lock in every operation. If the other thread
# wakes up fast enough to take it, the engine gets it back 5 ms later, otherwise at once. With two cores the other thread is
# fast, and the engine nearly stops. An engine in a process loses only what it shares with the rest of the machine: caches,
# and cores if more processes are busy than there are cores.
#
# ## 4. The engine dies
#
# A request is running, and the engine process is killed as the kernel would kill it when memory runs out.
#
# **Predict.** No line of the engine's code runs after the kill. How does this process find out, and how soon?

# %%
with a_process() as beside:
    beside.send(Add(1, [(story, tokens(1500))]))
    wait_until(lambda: len(beside.of(Stepped)) > 10)
    killed_at = time.monotonic()
    os.kill(beside.runner.process.pid, signal.SIGKILL)
    wait_until(lambda: beside.of(Died))
    [(at, message)] = beside.of(Died)
print(message)
assert message.reason == "the engine's process has ended (SIGKILL)" and at - killed_at < 1

# %% [markdown]
# The system closed the engine's end of the socket, so `read` reached the end of the stream. It delivers a `Died`, like the
# one that an engine loop sends when it ends with an exception. In a server, `AsyncEngine` then fails every call.
#
# ## 5. The engine hangs
#
# SIGSTOP stops a process, which then does nothing and closes nothing. Here the process is killed after two seconds of
# silence; the server allows ten.
#
# **Predict.** The process is stopped for one second, and later for good. Which of the two is detected?

# %%
engine_process.SILENCE_S = 2.0
with a_process() as beside:
    pid = beside.runner.process.pid
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1)
    os.kill(pid, signal.SIGCONT)
    time.sleep(1.5)
    print("stopped for a second:", [message for _, message in beside.of(Died)] or "goes on")
    assert not beside.of(Died)
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: beside.of(Died))
    print("stopped for good:    ", beside.of(Died)[0][1].reason)
engine_process.SILENCE_S = 10.0

# %% [markdown]
# ## 6. The server dies
#
# A script starts an engine, prints the engine process's id, and is killed.
#
# **Predict.** Which of the two processes has PyTorch in memory? What ends the engine? What if it is in the middle of a step?

# %%
script = f"""
import sys, time
sys.path.insert(0, {str(root)!r})
from functools import partial
from milestones.v10_engine_process.engine_process import EngineProcess, load_engine
runner = EngineProcess(partial(load_engine, {str(POCKET)!r})).wait_until_ready()
print(runner.process.pid, flush=True)
time.sleep(600)
"""
server = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
engine_pid = int(server.stdout.readline())


def is_there(pid):
    """Whether a process still runs. A zombie, which has ended and has not been waited for, does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


print("PyTorch:", {"in the server": has_torch(server.pid), "in the engine": has_torch(engine_pid)})
assert has_torch(engine_pid) and not has_torch(server.pid)
print("before:", {"engine": is_there(engine_pid)})
server.kill()
server.wait()
wait_until(lambda: not is_there(engine_pid), 5)
print("after: ", {"engine": is_there(engine_pid)})

# %% [markdown]
# The engine's reader thread reached the end of the stream and ended its process, even if the main thread was in a step. So
# nothing is left to clean up after a server, and a GPU's memory is free for the next one.
#
# ## To try
#
# 1. In part 1, put logprobs into the outputs: `{300: -0.5, 301: -2.0}`. How many bytes does a step of 64 tokens take then?
# 2. In part 3, let the busy thread sleep for a millisecond now and then. How much faster is the engine in the thread?
# 3. In part 6, send SIGTERM to the engine process instead. What happens, and why is that intended?
#
# The chapter's text is [milestones/v10_engine_process/README.md](../milestones/v10_engine_process/README.md).
# `python -m shared.verify.killing` kills servers and engines under load, `make traps-v10` plants the chapter's seeded bugs,
# and `make diff-v10` shows everything that the chapter changed.
