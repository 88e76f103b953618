"""Run work in forks of this process, several at a time.

A fork inherits all imported modules, so a child starts its work at once. The forking process imports the slow packages,
but no chapter, because a child may have to import a changed copy of it.
"""
import contextlib
import gc
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

# Packages that nearly every child needs.
SLOW = ("torch", "safetensors.torch", "transformers", "tokenizers", "pytest", "shared.checkpoints", "shared.verify.reference")
FAILED = 70  # the exit code of a child whose work raised


@dataclass(frozen=True)
class Work:
    """What a child runs, and its time limit."""

    run: Callable[[Path], None]  # called in the child with a scratch directory, where it leaves its result
    timeout_s: float


@dataclass(frozen=True)
class Ended:
    """How a child ended. Its scratch directory exists until the iterator yields the next one."""

    number: int  # the index of its work
    exit_code: int | None  # None if it was stopped at its time limit
    scratch: Path
    seconds: float

    @property
    def output(self) -> str:
        """What the child wrote to stdout and stderr."""
        return (self.scratch / "output").read_text(errors="replace")


def at_once() -> int:
    """How many children may run at a time: one per core."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def preload(names: Sequence[str]) -> None:
    """Import slow packages once, and keep torch from starting threads, since a fork does not inherit threads."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in names:
        with contextlib.suppress(Exception):  # the work that needs it will report the error
            importlib.import_module(name)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    loaded = [name for name in sys.modules if name.startswith("milestones.")]
    assert not loaded, f"the forking process must not have imported a chapter, but it has imported {loaded[:3]}"


def in_forks(works: Sequence[Work], label: str = "", limit: int | None = None) -> Iterator[Ended]:
    """Run all works, at most `limit` at a time (default: one per core); yield how each ended, in the order they end.

    With a label, a terminal shows a progress bar.
    """
    waiting, running = list(enumerate(works)), {}
    tqdm.monitor_interval = 0  # no monitor thread, since forking with threads is unsafe
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
    """Fork a child that does the work and exits; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    exit_code = FAILED
    gc.disable()  # if it runs Python while Python 3.11 parses a large file, the parser fails
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
    """Wait until a child ends, or stop it at its time limit; its process id and exit code."""
    while True:
        for child, (_, work, _, began) in running.items():
            done = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if done:
                # Kill what it started and left running. Until the child is waited for, no other group can have its id.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child, signal.SIGKILL)
                return child, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if time.monotonic() - began > work.timeout_s:
                stop(child)
                return child, None
        time.sleep(0.01)


def stop(child: int) -> None:
    """Kill a child and the processes it started."""
    for kill in (os.killpg, os.kill):  # it may not have created its group yet
        with contextlib.suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
