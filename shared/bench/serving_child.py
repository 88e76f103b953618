"""The two processes that `serving` measures: a chapter's server, and its engine without one.

    python -m shared.bench.serving_child serve v09_responses    # the server, and a thread that reads all clocks; takes more flags
    python -m shared.bench.serving_child alone v09_responses    # the engine, which runs the requests it receives

Each answers every line of JSON on stdin with a line of JSON on stdout, and exits when stdin closes. Linux only.

The event loop's thread is sampled by its own CPU clock: when a tick of the kernel finds the thread computing, a signal
interrupts it and its stack is counted. A profiler that samples the process from outside, at regular intervals, also
counts threads that wait for the interpreter lock. `socket.send` releases that lock and waits to reacquire it, so with
py-spy it appears to cost three times the CPU time that the thread's clock shows.

Reads: the chapters.
"""
import ctypes
import importlib
import json
import linecache
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import islice
from types import FrameType

from shared.chapters import ROOT, find
from shared.checkpoints import POCKET

MAX_NUM_SEQS = 64
# The kernel checks a thread's CPU clock once per tick, 4 ms at 250 Hz. This interval is shorter, so every tick is a sample.
SAMPLE_NS = 200_000
Stack = tuple[tuple[str, int], ...]  # file and line of each frame, the innermost first

# What the event loop's CPU time is spent on: each group's name in results, and its label.
GROUPS = {
    "send": "socket send",
    "loop": "event loop: asyncio, select",
    "http": "HTTP protocol: uvicorn, h11",
    "sse": "sse-starlette and anyio",
    "web": "starlette and fastapi",
    "pydantic": "pydantic",
    "json": "json",
    "chapter": "the chapter's other files",
    "delivery": "queues and delivery",
    "tokenizer": "the tokenizer's thread",
    "other": "other",
}
# The group of a file, by the prefix of its `place_of`; the first match counts. Files of the standard library that are
# not listed belong to their caller's group.
FILES = {
    "chapter/async_engine.py": "delivery",
    "chapter/engine_loop.py": "delivery",
    "chapter/engine_process.py": "delivery",
    "chapter/engine_thread.py": "delivery",
    "chapter/": "chapter",
    "library/asyncio/queues.py": "delivery",
    "library/concurrent/": "delivery",
    "library/queue.py": "delivery",
    "library/asyncio/": "loop",
    "library/selectors.py": "loop",
    "library/json/": "json",
    "packages/uvicorn/": "http",
    "packages/h11/": "http",
    "packages/httptools/": "http",
    "packages/sse_starlette/": "sse",
    "packages/anyio/": "sse",
    "packages/sniffio/": "sse",
    "packages/starlette/": "web",
    "packages/fastapi/": "web",
    "packages/pydantic": "pydantic",
    "packages/": "other",
}


# ---- the server


def serve(chapter_name: str, *more: str) -> int:
    """Run the chapter's server on a free port, which it prints to stderr, until stdin closes; the exit code."""
    sampler = Sampler()

    def answer(message: dict) -> dict:
        """The clocks, after pinning if the message says so; if it starts or stops sampling, also each group's samples so far."""
        if "pin" in message:
            pin(message["pin"])
        if "sample" not in message:
            return clocks()
        sampler.set_interval(SAMPLE_NS if message["sample"] else 0)
        return clocks() | {"samples": sampler.groups()}

    threading.Thread(target=answer_lines, args=(answer,), name="clocks", daemon=True).start()
    limits = {"device": "cpu", "max-num-seqs": MAX_NUM_SEQS, "model": POCKET, "port": 0}
    flags = [str(part) for name, value in limits.items() for part in (f"--{name}", value)]
    return importlib.import_module(f"milestones.{chapter_name}.__main__").main(["serve", *flags, *more])


def clocks() -> dict[str, float]:
    """CPU seconds so far of all processes, the engine's thread or process, the event loop's thread and the tokenizer's thread."""
    engine_s = sum(time.clock_gettime(clock_of(process.pid)) for process in multiprocessing.active_children())
    seconds = {"process": time.process_time() + engine_s, "engine": engine_s, "loop": 0.0, "tokenizer": 0.0}
    for thread in threading.enumerate():
        name = "loop" if thread is threading.main_thread() else thread.name.split("_")[0]
        if name in seconds:
            seconds[name] = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return seconds


def clock_of(pid: int) -> int:
    """The CPU clock of a process; /proc has a resolution of only 10 ms."""
    clock = ctypes.c_int()
    error = ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise OSError(error, os.strerror(error))
    return clock.value


def pin(cores: dict[str, list[int]]) -> None:
    """Pin all threads of this process, and of the engine's process if there is one, to cores."""
    for pid, which in [(os.getpid(), "front"), *((process.pid, "engine") for process in multiprocessing.active_children())]:
        for task in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(task), cores[which])


def answer_lines(answer: Callable[[dict], dict]) -> None:
    """Answer each line of stdin; when stdin closes or an answer fails, exit the process, whatever its other threads do."""
    try:
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), flush=True)
    except Exception:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


# ---- where its event loop's time goes


class Sampler:
    """Counts the main thread's stacks by its CPU clock. Only the main thread may create one."""

    def __init__(self):
        self.stacks: Counter[Stack] = Counter()
        self.timer = ctypes.c_void_p()
        self.libc = ctypes.CDLL(None, use_errno=True)
        signal.signal(signal.SIGALRM, self.count)
        clock = time.pthread_getcpuclockid(threading.main_thread().ident)
        # Without a sigevent, a timer sends SIGALRM. Python runs signal handlers on the main thread.
        self.check(self.libc.timer_create(clock, None, ctypes.byref(self.timer)))

    def set_interval(self, nanoseconds: int) -> None:
        """Set the main thread's CPU time between two samples; 0 stops sampling. Any thread may call this."""
        itimerspec = (ctypes.c_long * 4)(0, nanoseconds, 0, nanoseconds)
        self.check(self.libc.timer_settime(self.timer, 0, itimerspec, None))

    def check(self, result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def count(self, _signal: int, frame: FrameType | None) -> None:
        stack = []
        while frame is not None:
            # f_lineno is None between two lines.
            stack.append((frame.f_code.co_filename, frame.f_lineno or 0))
            frame = frame.f_back
        self.stacks[tuple(stack)] += 1

    def groups(self) -> Counter[str]:
        """The number of samples of each group."""
        numbers = Counter()
        # A copy, because the main thread may still be adding to it.
        for stack, number in dict(self.stacks).items():
            numbers[group_of(stack)] += number
        return numbers


def group_of(stack: Stack) -> str:
    """The group of the innermost frame that has one: a key of GROUPS.

    >>> inside = f"{ROOT}/milestones/v07_server"
    >>> group_of(((json.decoder.__file__, 1), (f"{inside}/writer.py", 65), (f"{inside}/streaming.py", 33)))
    'json'
    >>> group_of((("<string>", 1), (f"{inside}/async_engine.py", 44)))
    'delivery'
    """
    for file, line in stack:
        place = place_of(file)
        if place.startswith("library/asyncio/") and "_sock.send" in linecache.getline(file, line):
            return "send"
        for beginning, group in FILES.items():
            if place.startswith(beginning):
                return group
    return "other"


def place_of(file: str) -> str:
    """A file's path within a chapter, the installed packages or the standard library; '' if it is in none of them.

    >>> place_of(f"{ROOT}/milestones/v07_server/kernels/__init__.py"), place_of("/a/site-packages/h11/_util.py")
    ('chapter/kernels/__init__.py', 'packages/h11/_util.py')
    """
    chapters, library = f"{ROOT}/milestones/", f"{os.path.dirname(os.__file__)}/"
    if "-packages/" in file:
        return "packages/" + file.rpartition("-packages/")[2]
    if file.startswith(chapters):
        return "chapter/" + file.removeprefix(chapters).partition("/")[2]
    return "library/" + file.removeprefix(library) if file.startswith(library) else ""


# ---- the engine without a server


def alone(chapter_name: str) -> None:
    """Load the chapter's engine, report that it is ready, and answer lines.

    A line with requests is answered with what `run_alone` returns, any other with the process's CPU seconds so far. A
    line with "pin" pins the process first.
    """
    package = find(chapter_name).load()
    encode = importlib.import_module(f"{package.__name__}.text").encode
    engine = package.Engine(POCKET, device="cpu", max_num_seqs=MAX_NUM_SEQS)
    engine.warm_up()
    print(json.dumps({"ready": True}), flush=True)

    def answer(message: dict) -> dict:
        if "pin" in message:
            pin(message["pin"])
        if "bodies" not in message:
            return {"process": time.process_time()}
        requests = []
        for body in message["bodies"]:
            settings = {name: body[name] for name in ("max_tokens", "temperature", "ignore_eos")}
            requests.append((encode(engine.tokenizer, body["prompt"]), package.SamplingParams(**settings)))
        return run_alone(engine, requests, message["streams"])

    answer_lines(answer)


def run_alone(engine, requests: list[tuple], streams: int) -> dict[str, float]:
    """Run requests, at most `streams` at a time; the number of tokens, wall seconds, and this thread's CPU seconds."""
    waiting, num_tokens = iter(requests), 0
    wall, cpu = time.perf_counter(), time.thread_time()
    for request in islice(waiting, streams):
        engine.add_request(*request)
    while engine.has_unfinished_requests():
        for output in engine.step():
            num_tokens += 1
            if output.finish_reason is not None:
                for request in islice(waiting, 1):
                    engine.add_request(*request)
    return {"tokens": num_tokens, "wall_s": time.perf_counter() - wall, "cpu_s": time.thread_time() - cpu}


if __name__ == "__main__":
    what = {"serve": serve, "alone": alone}.get("".join(sys.argv[1:2]))
    if what is None or len(sys.argv) < 3:
        sys.exit("usage: python -m shared.bench.serving_child serve|alone vNN_NAME [flags of serve]")
    sys.exit(what(*sys.argv[2:]))
