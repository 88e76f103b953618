"""Run pytest on a changed copy of a chapter, in a fork."""
import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shared.book.changed_copy import changed_copy
from shared.book.forks import Ended, Work
from shared.chapters import Chapter

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Run:
    """The result of pytest in a fork: its exit code, and the tests that passed, failed, or whose fixtures failed."""

    exit_code: int | None  # None: stopped at the time limit
    finished: bool  # whether pytest finished; False if the process died first
    passed: list[str]
    failed: dict[str, str]  # the error, by test
    broken: dict[str, str]  # the fixture's error, by test
    imported: list[str]  # installed modules that the tests imported
    output: str

    @property
    def tail(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        return "\n".join(f"    {line}" for line in lines[-12:])


def work(chapter: Chapter, change: Change | None, arguments: list[str], timeout_s: float) -> Work:
    """The work of running pytest with these arguments on a copy of the chapter, changed by `change` if that is not None.

    If `change` raises ValueError, `run_of` raises it again.
    """
    return Work(partial(run_tests, chapter, change, arguments), timeout_s)


def run_tests(chapter: Chapter, change: Change | None, arguments: list[str], scratch: Path) -> None:
    """Run pytest, in a fork, and write the results to scratch."""
    os.chdir(chapter.root)
    sys.path.insert(0, str(chapter.root))
    import pytest

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(changed_copy(chapter, change, scratch))
        except ValueError as error:
            (scratch / "refused").write_text(str(error))
            return
        before = set(sys.modules)
        recorder = Recorder()
        base = ["-q", "-p", "no:cacheprovider", f"--rootdir={chapter.root}", "--chapter", chapter.id]
        exit_code = int(pytest.main([*base, *arguments], plugins=[recorder]))
        new = [name for name in sys.modules if name not in before and is_installed(sys.modules[name])]
        (scratch / "reports.json").write_text(json.dumps(vars(recorder) | {"imported": new}))
    sys.exit(exit_code)


def run_of(ended: Ended) -> Run:
    """The result that a fork left in scratch; ValueError if the change could not be made."""
    if (ended.scratch / "refused").exists():
        raise ValueError((ended.scratch / "refused").read_text())
    path = ended.scratch / "reports.json"
    reports = json.loads(path.read_text()) if path.exists() else vars(Recorder()) | {"imported": []}
    return Run(exit_code=ended.exit_code, finished=path.exists(), output=ended.output, **reports)


def is_installed(module) -> bool:
    """Whether a module belongs to an installed package, which later forks can inherit."""
    return "-packages" in (getattr(module, "__file__", None) or "")


class Recorder:
    """A pytest plugin that records each test's result."""

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
