"""pytest in a fork of this process, which finds a copy of a chapter in the chapter's place.

A fork inherits what was imported before it, so a child is at its tests in a second. The process that forks
imports what is slow, and nothing of milestones: the child has to find the copy.
"""
import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shared.book.tree import Tree, short

# What every child would import first.
SLOW = ("torch", "safetensors.torch", "transformers", "tokenizers", "pytest", "shared.checkpoints", "shared.reference")


@dataclass(frozen=True)
class Run:
    """What pytest said in a child: its exit code, and the tests that passed, failed, or could not start."""

    exit_code: int | None  # None: no answer in time
    finished: bool  # whether it was pytest that ended, and not the process under it
    passed: list[str]
    failed: dict[str, str]  # how, by test
    broken: dict[str, str]
    imported: list[str]  # modules from outside of the repository
    output: str

    @property
    def tail(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        return "\n".join(f"    {line}" for line in lines[-12:])


def preload(names) -> None:
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


def run_copy(
    tree: Tree, chapter: Path, change: Callable[[Path], None] | None, arguments: list[str], timeout_s: float
) -> Run:
    """Run pytest in a fork that finds a changed copy of the chapter in the chapter's place."""
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        copy = scratch / "milestones" / chapter.name
        shutil.copytree(chapter, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if change is not None:
            change(copy)
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            be_child(tree, scratch, [*arguments, "--chapter", short(chapter)])
        exit_code = wait(child, timeout_s)
        output = (scratch / "output").read_text(errors="replace") if (scratch / "output").exists() else ""
        said = scratch / "reports.json"
        reports = json.loads(said.read_text()) if said.exists() else vars(Recorder()) | {"imported": []}
        return Run(exit_code=exit_code, finished=said.exists(), output=output, **reports)


def be_child(tree: Tree, scratch: Path, arguments: list[str]) -> None:
    """In the fork: run pytest, leave what it said in scratch, and end without returning."""
    exit_code = 70
    try:
        os.setsid()
        output = os.open(scratch / "output", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(tree.root)
        sys.path.insert(0, str(tree.root))
        import milestones
        import pytest

        milestones.__path__ = [str(scratch / "milestones"), *milestones.__path__]
        before = set(sys.modules)
        recorder = Recorder()
        base = ["-q", "-p", "no:cacheprovider", f"--rootdir={tree.root}"]
        exit_code = int(pytest.main([*base, *arguments], plugins=[recorder]))
        new = [name for name in sys.modules if name not in before and is_installed(sys.modules[name])]
        (scratch / "reports.json").write_text(json.dumps(vars(recorder) | {"imported": new}))
    except BaseException as error:
        print(f"the child process failed: {type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def is_installed(module) -> bool:
    """Whether a module comes from a package that every child may as well inherit."""
    return "-packages" in (getattr(module, "__file__", None) or "")


def wait(child: int, timeout_s: float) -> int | None:
    """The child's exit code; None if it had to be stopped."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class Recorder:
    """A pytest plugin that notes how each test ended."""

    def __init__(self):
        self.passed = []
        self.failed = {}
        self.broken = {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            how = crash.message.splitlines()[0] if crash and crash.message else str(report.longrepr)[-200:]
            (self.failed if report.when == "call" else self.broken)[report.nodeid] = how
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)
