"""What a busy event loop does to the engine, in a thread of the same process and in its own process.

    python -m shared.bench.lock [--write]       # three minutes

STREAMS streams run through the chapter's server, once with `--engine thread` and once with `--engine process`, while

    quiet      nothing else runs
    neighbor  an unrelated process computes, which shows what sharing the machine alone costs the engine
    busy       a thread in the server's process computes in pure Python
    body       chats of MAX_MESSAGES messages arrive one after another, each as large as a body may be (4 MiB)

for WINDOW_S seconds each. The engine records when each of its steps ends, by the monotonic clock that all processes of
the machine share. A second client requests /health every 20 ms. Both clients run in this process. The engine's process is
pinned to one core, all other processes to a second one; a server with the engine in a thread may use both.

Then start and memory: the server is started START_TURNS times in each way, in turns with the last chapter that has no
engine process. Measured are the seconds from the command to the line that says it is ready, and the memory of all its
processes after its first answer (PSS: a page that n processes share counts 1/n for each).

Reads: the chapters. Writes: docs/results/lock.json.
"""
import argparse
import importlib
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import httpx

from shared.bench.served import Served, processes_of
from shared.bench.timing import progress
from shared.chapters import ROOT, Chapter, find, first_with, last_with
from shared.checkpoints import POCKET
from shared.programs import run
from shared.results import write_row

STREAMS, MAX_TOKENS = 16, 1900
WINDOWS, WINDOW_S = ("quiet", "neighbor", "busy", "body"), 3.0
SHOWN_S = 1.0  # the part of a window that the picture shows
MAX_MESSAGES, MAX_BODY_BYTES = 4096, 4 * 2**20
START_TURNS = 5
ALL_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}


# ---- the server


def timed_engine(chapter_name: str, times: str):
    """The chapter's engine, which appends the time and the number of outputs to a file at the end of each step."""
    chapter = find(chapter_name)
    engine = chapter.load().Engine(POCKET, device="cpu", max_num_seqs=64)
    step, file = engine.step, open(times, "w", buffering=1)

    def timed_step():
        outputs = step()
        file.write(f"{time.monotonic():.6f} {len(outputs)}\n")
        return outputs

    engine.step = timed_step
    return engine


def serve(chapter_name: str, way: str, times: str) -> None:
    """Run the chapter's server. Each line on stdin is a number of seconds, for which a new thread computes."""
    module = {name: importlib.import_module(f"milestones.{chapter_name}.{name}") for name in ("process", "service")}
    make_engine = partial(timed_engine, chapter_name, times)
    if way == "process":
        runner = importlib.import_module(f"milestones.{chapter_name}.engine_process").EngineProcess(make_engine).wait_until_ready()
    else:
        runner = importlib.import_module(f"milestones.{chapter_name}.engine_thread").EngineThread(make_engine())
    cores = two_cores()
    for process in multiprocessing.active_children():
        for task in os.listdir(f"/proc/{process.pid}/task"):
            os.sched_setaffinity(int(task), cores[:1])
    # Threads started from now on inherit this thread's cores.
    os.sched_setaffinity(0, cores[1:] if way == "process" else cores)

    def compute(seconds: float) -> None:
        end, number = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            number += 1

    def obey() -> None:
        for line in sys.stdin:
            threading.Thread(target=compute, args=(float(line),), daemon=True).start()
        os._exit(0)

    threading.Thread(target=obey, daemon=True).start()
    service = module["service"].Service(runner, "pocket")
    module["process"].serve(service, module["process"].bind("127.0.0.1", 0), keep_alive_s=120)


def two_cores() -> list[int]:
    """Two cores that this process may use; the same one twice if there is only one."""
    cores = sorted(ALL_CORES)
    return [cores[0], cores[-1]] if len(cores) < 2 else cores[:2]


# ---- its clients


class Prober(threading.Thread):
    """Requests /health every 20 ms until `stopping` is set; `times` has each request's start and its seconds to the answer."""

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.url, self.times, self.stopping = url, [], threading.Event()

    def run(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self.stopping.wait(0.02):
                start = time.monotonic()
                client.get(f"{self.url}/health").raise_for_status()
                self.times.append((start, time.monotonic() - start))


def stream(url: str) -> threading.Thread:
    """Start a thread that requests a long stream and reads it to its end, without parsing it."""

    def read() -> None:
        host, port = url.removeprefix("http://").split(":")
        body = {"model": "pocket", "prompt": "Once upon a time", "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": True}
        raw = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + raw)
            while connection.recv(2**16):
                pass

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def largest_chat() -> bytes:
    """A chat with the maximum number of messages and the maximum body size."""
    room = MAX_BODY_BYTES // MAX_MESSAGES - 40
    body = {"model": "pocket", "messages": [{"role": "user", "content": "x" * room}] * MAX_MESSAGES}
    raw = json.dumps(body).encode()
    assert MAX_BODY_BYTES * 0.97 < len(raw) <= MAX_BODY_BYTES, len(raw)
    return raw


def send_bodies(url: str, until: float) -> int:
    """Send the largest chat repeatedly; how many were answered. The server parses each completely, then rejects it as too long."""
    raw, number = largest_chat(), 0
    with httpx.Client(timeout=60) as client:
        while time.monotonic() < until:
            answer = client.post(f"{url}/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded", answer.text
            number += 1
    return number


def measure_way(chapter: Chapter, way: str) -> dict:
    """The figures of each window, by name."""
    with tempfile.NamedTemporaryFile("r") as times:
        command = [sys.executable, "-m", "shared.bench.lock", "serve", chapter.name, way, times.name]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as server:
            try:
                # Not before: a process inherits its parent's cores.
                os.sched_setaffinity(0, two_cores()[1:])
                while not (line := server.stderr.readline()).startswith("  curl "):
                    assert line, "the server exited before it was ready"
                url = line.split()[1].removesuffix("/v1/completions")
                for _ in range(STREAMS):
                    stream(url)
                prober = Prober(url)
                prober.start()
                time.sleep(1.5)
                windows, bodies = {}, 0
                for name in WINDOWS:
                    start = time.monotonic()
                    if name == "neighbor":
                        command = f"import time\nwhile time.monotonic() < {start + WINDOW_S}: pass"
                        subprocess.run([sys.executable, "-c", command])
                    if name == "busy":
                        server.stdin.write(f"{WINDOW_S}\n")
                        server.stdin.flush()
                    if name == "body":
                        bodies = send_bodies(url, start + WINDOW_S)
                    time.sleep(max(0.0, start + WINDOW_S - time.monotonic()))
                    windows[name] = start, time.monotonic()
                    time.sleep(1.0)
                prober.stopping.set()
            finally:
                server.kill()
                os.sched_setaffinity(0, ALL_CORES)
        ends = [tuple(map(float, line.split())) for line in times.read().splitlines()]
    return {name: figures(ends, prober.times, *window) | ({"bodies": bodies} if name == "body" else {}) for name, window in windows.items()}


def figures(ends: list[tuple[float, float]], health: list[tuple[float, float]], start: float, stop: float) -> dict:
    """A window's figures: steps, tokens, times between the ends of steps, the slowest /health, and the ends in the first SHOWN_S.

    The time between two ends counts if any of it is in the window.

    >>> figures([(0.9, 2), (1.1, 2), (1.5, 2), (3.0, 2)], [(1.0, 0.01), (1.9, 0.5), (2.5, 3.0)], 1.0, 2.0)
    {'steps': 2, 'tokens': 4, 'p50_ms': 400.0, 'worst_ms': 1500.0, 'health_ms': 500.0, 'ends_ms': [100, 500]}
    """
    inside = [(end, tokens) for end, tokens in ends if start <= end < stop]
    edges = [end for end, _ in ends]
    gaps = [after - before for before, after in zip(edges, edges[1:]) if after >= start and before < stop]
    shortened = [after - max(before, start) for before, after in zip(edges, edges[1:]) if start <= after < stop]
    waits = [seconds for asked, seconds in health if start <= asked < stop]
    return {
        "steps": len(inside),
        "tokens": int(sum(tokens for _, tokens in inside)),
        "p50_ms": round(1e3 * statistics.median_low(sorted(gaps) if gaps else shortened), 1),
        "worst_ms": round(1e3 * max(gaps), 1),
        "health_ms": round(1e3 * max(waits), 1) if waits else None,
        "ends_ms": [round(1e3 * (end - start)) for end, _ in inside if end - start < SHOWN_S],
    }


# ---- start and memory


def measure_starts(chapters: dict[str, tuple[Chapter, list[str]]]) -> dict:
    """Seconds until each server is ready, and MiB after its first answer: medians and ranges over START_TURNS."""
    turns = {name: {"seconds": [], "mib": []} for name in chapters}
    for _ in progress(range(START_TURNS), "starts"):
        for name, (chapter, flags) in chapters.items():
            start = time.monotonic()
            with Served(chapter, *flags) as served:
                turns[name]["seconds"].append(time.monotonic() - start)
                served.ask({"prompt": "Once", "max_tokens": 5}).raise_for_status()
                turns[name]["mib"].append(sum(map(pss_mib, processes_of(served))))
    return {
        name: {what: {"median": round(statistics.median(each), 1), "low": round(min(each), 1), "high": round(max(each), 1)} for what, each in by.items()}
        for name, by in turns.items()
    }


def pss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"process {pid} has no Pss")


def main(argv: list[str]) -> int:
    if argv[:1] == ["serve"]:
        serve(*argv[1:])
    parser = argparse.ArgumentParser(prog="python -m shared.bench.lock", description="Measure what a busy event loop does to the engine.")
    parser.add_argument("--write", action="store_true", help="write the result under docs/results/")
    args = parser.parse_args(argv)
    chapter, before = last_with("engine_process"), first_with("engine_process").previous
    row = {"chapter": chapter.id, "streams": STREAMS, "window_s": WINDOW_S}
    for way in ("thread", "process"):
        row[way] = measure_way(chapter, way)
        for window, values in row[way].items():
            print(f"{way:9}{window:10}{ {name: value for name, value in values.items() if name != 'ends_ms'} }")
    row["start"] = measure_starts({before.id: (before, []), "process": (chapter, []), "thread": (chapter, ["--engine", "thread"])})
    print(row["start"])
    if args.write:
        path = write_row("lock", row, " ".join(["python -m shared.bench.lock", *argv]), [chapter, before])
        print(f"wrote {path.name}; now `make sync`")
    return 0


if __name__ == "__main__":
    run(main)
