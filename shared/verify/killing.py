"""Kill a server, or its engine, under load; check that every client is answered and that nothing is left behind.

    python -m shared.verify.killing --count 100 [--chapter v10]      # 100 times each, at random moments: half an hour
    python -m shared.verify.killing --count 5 --what engine

When the engine is killed (SIGKILL, as by the kernel's out-of-memory killer), every client must have its answer or an
error within a second, and the server must exit with status 1 within 10 s. When the server is killed, none of its
processes may be left after 5 s. In both cases, none of their pipes, sockets or shared memory may be left.

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
from shared.chapters import Chapter, find, first_with, last_with
from shared.programs import run
from shared.results import write_row

ANSWER_S, END_S, ORPHAN_S = 1.0, 10.0, 5.0
STREAMS = 8
LENGTHS = (5, 400, 40, 400, 80, 10, 160, 20)  # max_tokens of the clients' requests: some are answered before the kill


@dataclass
class Outcome:
    """What happened to the clients and the server."""

    answered: int = 0
    failed: int = 0
    hung: int = 0
    seconds_to_answer: float = 0.0  # from the kill to the last client's answer or error
    seconds_to_end: float = 0.0  # from the kill to the exit of the last process
    exit_code: int | None = None  # the server's
    error: str = ""  # the last error that a client received
    left: str = ""  # processes and files left behind


def kill(served: Served, what: str, streams: int, after_s: float, lengths: tuple[int, ...] = (400,), patience_s: float = END_S) -> Outcome:
    """Kill the engine or the server `after_s` seconds after `streams` clients have started, and wait for all of them.

    Args:
        lengths: max_tokens of the clients' requests; repeated if there are more clients.
        patience_s: how long to wait for clients and processes.
    """
    outcome, lock, shared_before = Outcome(), threading.Lock(), shared_files(served)
    threads = [threading.Thread(target=be_a_client, args=(served, outcome, lock, index, lengths), daemon=True) for index in range(streams)]
    for thread in threads:
        thread.start()
    time.sleep(after_s)
    start = time.monotonic()
    os.kill(served.pids[what], signal.SIGKILL)
    for thread in threads:
        thread.join(max(0.0, start + patience_s - time.monotonic()))
    outcome.hung = sum(thread.is_alive() for thread in threads)
    outcome.seconds_to_answer = time.monotonic() - start
    with contextlib.suppress(subprocess.TimeoutExpired):
        outcome.exit_code = served.process.wait(max(0.0, start + patience_s - time.monotonic()))
    while processes_of(served) and time.monotonic() < start + patience_s:
        time.sleep(0.01)
    outcome.seconds_to_end = time.monotonic() - start
    outcome.left = ", ".join([*map(str, processes_of(served)), *(shared_files(served) - shared_before)])
    return outcome


def be_a_client(served: Served, outcome: Outcome, lock: threading.Lock, index: int, lengths: tuple[int, ...]) -> None:
    """Send one request, every second client for a stream, and count it as answered or failed.

    An error event or a closed connection counts as failed; a client that waits in vain is counted as hung by `kill`.
    """
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
        outcome.answered += not error
        outcome.failed += bool(error)
        outcome.error = error or outcome.error


def shared_files(served: Served) -> set[str]:
    """Named pipes and sockets in its temporary directory, and all shared memory on the machine."""
    named = (path for path in Path(served.temporary.name).rglob("*") if path.is_fifo() or path.is_socket())
    return {str(path) for path in [*named, *Path("/dev/shm").iterdir()]}


def kill_often(chapter: Chapter, what: str, count: int, seed: int) -> dict:
    """Kill `count` times at random moments, from before the first token to after the last; counts and worst times.

    Raises:
        AssertionError: the first time that what the module's docstring requires does not hold.
    """
    rng, outcomes = random.Random(f"{what} {seed}"), []
    for _ in progress(range(count), f"kill the {what}"):
        with Served(chapter) as served:
            after_s = rng.uniform(0.0, 1.5)
            outcome = kill(served, what, STREAMS, after_s, LENGTHS)
        where = f"{what} killed {after_s:.3f} s after {STREAMS} clients had started: {outcome}"
        assert outcome.hung == 0 and not outcome.left and outcome.answered + outcome.failed == STREAMS, where
        if what == "engine":
            assert outcome.seconds_to_answer < ANSWER_S, where
            assert outcome.seconds_to_end < END_S and outcome.exit_code == 1, where
        else:
            assert outcome.seconds_to_end < ORPHAN_S and outcome.exit_code == -signal.SIGKILL, where
        outcomes.append(outcome)
    return {
        "count": count,
        "streams": STREAMS,
        "answered": sum(outcome.answered for outcome in outcomes),
        "failed": sum(outcome.failed for outcome in outcomes),
        "hung": sum(outcome.hung for outcome in outcomes),
        "worst_answer_s": round(max(outcome.seconds_to_answer for outcome in outcomes), 3),
        "worst_end_s": round(max(outcome.seconds_to_end for outcome in outcomes), 3),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.verify.killing", description="Kill servers and engines under load.")
    parser.add_argument("--chapter", default=last_with("engine_process").id)
    parser.add_argument("--what", choices=["engine", "server"], action="append")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write the result under docs/results/")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f"--count must be at least 1, got {args.count}")
    try:
        chapter = find(args.chapter)
    except ValueError as error:
        parser.error(str(error))
    whats, results = args.what or ["engine", "server"], {}
    most, needed = ("engine", "engine_process") if "engine" in whats else ("server", "serve")
    if needed not in chapter.capabilities:
        parser.error(f"{chapter.id} has no process of the {most}; name {first_with(needed).id} or a later chapter")
    for what in whats:
        results[what] = kill_often(chapter, what, args.count, args.seed)
        print(f"{chapter.id}: {what} killed {args.count} times with {STREAMS} clients: {results[what]}")
    if args.write:
        write_row("killing", results | {"chapter": chapter.id}, " ".join(["python -m shared.verify.killing", *argv]), [chapter])
    return 0


if __name__ == "__main__":
    run(main)
