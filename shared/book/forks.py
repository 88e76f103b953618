"""Work in forks of this process, several at a time.

A fork inherits what was imported before it, so a child is at its work in a moment. The process that forks imports what
is slow, and nothing of milestones: a child may have to find a changed copy.
"""
import contextlib
import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

# What nearly every child would import first.
SLOW = ("torch", "safetensors.torch", "transformers", "tokenizers", "pytest", "shared.checkpoints", "shared.verify.reference")
FAILED = 70  # the exit code of a child whose work raised


@dataclass(frozen=True)
class Work:
    """What a child does, in a directory of its own, and how long it may take."""

    run: Callable[[Path], None]  # in the child; what it leaves in the directory is its result
    timeout_s: float


@dataclass(frozen=True)
class Ended:
    """How a child ended; its directory is there until the next is asked for."""

    number: int  # of its work, counted from 0
    exit_code: int | None  # None: stopped, since it took too long
    scratch: Path
    seconds: float

    @property
    def output(self) -> str:
        """What the child wrote to stdout and stderr."""
        return (self.scratch / "output").read_text(errors="replace")


def at_once() -> int:
    """How many children may run at a time: one a core."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def preload(names: Sequence[str]) -> None:
    """Import what is slow, once, and keep torch from starting threads: a fork does not take them along."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in names:
        with contextlib.suppress(Exception):  # what it is needed for will say so
            importlib.import_module(name)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    loaded = [name for name in sys.modules if name.startswith("milestones.")]
    assert not loaded, f"the process that forks must not have imported a chapter, it has {loaded[:3]}"


def in_forks(works: Sequence[Work], label: str = "", limit: int | None = None) -> Iterator[Ended]:
    """Do all works, several at a time; how each ended, in the order in which they end.

    On a terminal a line tells how far it is.
    """
    waiting, running = list(enumerate(works)), {}
    tqdm.monitor_interval = 0  # its thread would be in the way of a fork
    bar = tqdm(total=len(works), desc=label, leave=False, disable=not (label and sys.stderr.isatty()))
    try:
        while waiting or running:
            while waiting and len(running) < (limit or at_once()):
                number, work = waiting.pop(0)
                scratch = tempfile.TemporaryDirectory()
                running[start(work, Path(scratch.name))] = number, work, scratch, time.monotonic()
            child, exit_code = one_that_ended(running)
            number, _, scratch, began = running.pop(child)
            with scratch:
                yield Ended(number, exit_code, Path(scratch.name), time.monotonic() - began)
            bar.update()
    finally:
        bar.close()
        for child, (_, _, scratch, _) in running.items():
            stop(child)
            scratch.cleanup()


def start(work: Work, scratch: Path) -> int:
    """Fork; the child does its work and ends without returning."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    exit_code = FAILED
    try:
        os.setsid()
        output = os.open(scratch / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work.run(scratch)
        exit_code = 0
    except SystemExit as error:
        exit_code = error.code if isinstance(error.code, int) else FAILED
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)


def one_that_ended(running: dict) -> tuple[int, int | None]:
    """Wait until a child ends, or has taken too long and is stopped; its id and exit code."""
    while True:
        for child, (_, work, _, began) in running.items():
            done = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if done:
                # What it started and did not end goes with it; until it is waited for, its group is its own.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child, signal.SIGKILL)
                return child, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if time.monotonic() - began > work.timeout_s:
                stop(child)
                return child, None
        time.sleep(0.01)


def stop(child: int) -> None:
    """End a child and whatever it started."""
    for kill in (os.killpg, os.kill):  # it may not have its group yet
        with contextlib.suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
