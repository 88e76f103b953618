"""Kill a server, or its engine, under load, and see who is told and what is left.

    python -m shared.verify.killing --count 100 [--chapter v10]      # 100 times each, at random moments: half an hour
    python -m shared.verify.killing --count 5 --what engine

Of an engine that is killed (SIGKILL, as by a kernel that is out of memory): every client has its answer or an error
within a second, and the server has ended within 10 s with status 1. Of a server that is killed: no process that it has
started is left after 5 s. In both cases no pipe, socket or shared memory of theirs stays behind.

Reads: the chapter, /proc (Linux). Writes: docs/results/killing.json with --write.
"""
import argparse
import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from shared.bench.served import Served, processes_of
from shared.bench.timing import progress
from shared.chapters import Chapter, find, last_with
from shared.programs import run
from shared.results import write_row

ANSWER_S, END_S, ORPHAN_S = 1.0, 10.0, 5.0
STREAMS = 8
LENGTHS = (5, 400, 40, 400, 80, 10, 160, 20)  # tokens that clients ask for: some are answered before the kill


@dataclass
class Told:
    """What became of the clients and of the server."""

    answered: int = 0
    failed: int = 0
    hung: int = 0
    seconds_to_answer: float = 0.0  # from the kill to the last client's answer or error
    seconds_to_end: float = 0.0  # from the kill to the end of the last process
    exit_code: int | None = None  # the server's
    error: str = ""  # the last that a client was told
    left: str = ""  # processes and files that are left


def kill(served: Served, what: str, streams: int, after_s: float, lengths: tuple[int, ...] = (400,), patience_s: float = END_S) -> Told:
    """Kill the engine or the server while this many clients are served, and wait for all of them.

    Args:
        lengths: how many tokens the clients ask for, one after the other.
        patience_s: for how long clients and processes may take to end.
    """
    told, lock, shared_before = Told(), threading.Lock(), shared_files(served)
    threads = [threading.Thread(target=be_a_client, args=(served, told, lock, index, lengths), daemon=True) for index in range(streams)]
    for thread in threads:
        thread.start()
    time.sleep(after_s)
    start = time.monotonic()
    os.kill(served.pids[what], signal.SIGKILL)
    for thread in threads:
        thread.join(max(0.0, start + patience_s - time.monotonic()))
    told.hung = sum(thread.is_alive() for thread in threads)
    told.seconds_to_answer = time.monotonic() - start
    with contextlib.suppress(subprocess.TimeoutExpired):
        told.exit_code = served.process.wait(max(0.0, start + patience_s - time.monotonic()))
    while processes_of(served) and time.monotonic() < start + patience_s:
        time.sleep(0.01)
    told.seconds_to_end = time.monotonic() - start
    told.left = ", ".join([*map(str, processes_of(served)), *(shared_files(served) - shared_before)])
    return told


def be_a_client(served: Served, told: Told, lock: threading.Lock, index: int, lengths: tuple[int, ...]) -> None:
    """Ask once: every second client for a stream. An error event or the end of the connection is an answer too."""
    body = {"model": "pocket", "prompt": "Once upon a time", "ignore_eos": True, "stream": index % 2 == 0}
    body["max_tokens"] = lengths[index % len(lengths)]
    error = ""
    try:
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
            lines = list(response.iter_lines())
            whole = lines[-2:-1] == ["data: [DONE]"] or (response.status_code == 200 and not body["stream"])
            error = "" if whole else " ".join(lines[-3:])
    except httpx.HTTPError as gone:
        error = repr(gone)
    with lock:
        told.answered += not error
        told.failed += bool(error)
        told.error = error or told.error


def shared_files(served: Served) -> set[str]:
    """Pipes and sockets with a name in its directory for temporary files, and the machine's shared memory."""
    named = (path for path in Path(served.temporary.name).rglob("*") if path.is_fifo() or path.is_socket())
    return {str(path) for path in [*named, *Path("/dev/shm").iterdir()]}


def kill_often(chapter: Chapter, what: str, count: int, seed: int) -> dict:
    """Kill at random moments, from before the first token to after the last; the worst of all times.

    Raises AssertionError for the first time that is not as the module's docstring says.
    """
    rng, all_told = random.Random(f"{what} {seed}"), []
    for _ in progress(range(count), f"kill the {what}"):
        with Served(chapter) as served:
            after_s = rng.uniform(0.0, 1.5)
            told = kill(served, what, STREAMS, after_s, LENGTHS)
        where = f"{what} killed {after_s:.3f} s after {STREAMS} clients had come: {told}"
        assert told.hung == 0 and not told.left and told.answered + told.failed == STREAMS, where
        if what == "engine":
            assert told.seconds_to_answer < ANSWER_S, where
            assert told.seconds_to_end < END_S and told.exit_code == 1, where
        else:
            assert told.seconds_to_end < ORPHAN_S and told.exit_code == -signal.SIGKILL, where
        all_told.append(told)
    return {
        "count": count,
        "streams": STREAMS,
        "answered": sum(told.answered for told in all_told),
        "failed": sum(told.failed for told in all_told),
        "hung": sum(told.hung for told in all_told),
        "worst_answer_s": round(max(told.seconds_to_answer for told in all_told), 3),
        "worst_end_s": round(max(told.seconds_to_end for told in all_told), 3),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.verify.killing", description="Kill servers and engines under load.")
    parser.add_argument("--chapter", default=last_with("engine_process").id)
    parser.add_argument("--what", choices=["engine", "server"], action="append")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write the result under docs/results/")
    args = parser.parse_args(argv)
    chapter, results = find(args.chapter), {}
    for what in args.what or ["engine", "server"]:
        results[what] = kill_often(chapter, what, args.count, args.seed)
        print(f"{chapter.id}: {what} killed {args.count} times under {STREAMS} clients: {results[what]}")
    if args.write:
        write_row("killing", results | {"chapter": chapter.id}, " ".join(["python -m shared.verify.killing", *argv]), [chapter])
    return 0


if __name__ == "__main__":
    run(main)
