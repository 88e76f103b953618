"""Run the examples in docstrings.

    python -m shared.book.doctests                        # of shared and every chapter
    python -m shared.book.doctests milestones.v05_paged_cache
"""
import argparse
import contextlib
import doctest
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path

from shared.chapters import BOOK, python_files
from shared.programs import run


@dataclass(frozen=True)
class Report:
    """How many examples a package has, and the output of the modules with failing ones."""

    attempted: int
    failures: tuple[str, ...]


def check_package(name: str) -> Report:
    """Run the examples of every module under a package."""
    root = Path(importlib.import_module(name).__path__[0])
    attempted, failures = 0, []
    for path in python_files(root):
        parts = path.relative_to(root).with_suffix("").parts
        module = importlib.import_module(".".join((name, *parts)).removesuffix(".__init__"))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            result = doctest.testmod(module)
        attempted += result.attempted
        if result.failed:
            failures.append(printed.getvalue())
    return Report(attempted, tuple(failures))


def is_package(name: str) -> bool:
    """Whether there is such a package below the current directory, or an installed one.

    >>> is_package("shared.book"), is_package("shared.chapters"), is_package("shared.nothing.at_all")
    (True, False, False)
    """
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.submodule_search_locations is not None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.book.doctests", description="Run the examples in docstrings.")
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="such as milestones.v05_paged_cache (default: shared and every chapter)")
    names = parser.parse_args(argv).packages
    if wrong := [name for name in names if not is_package(name)]:
        parser.error(f"there is no package {', '.join(wrong)}; name some such as shared or milestones.v05_paged_cache")
    names = names or ["shared", *(f"milestones.{chapter.name}" for chapter in BOOK.chapters)]
    failed = 0
    for name in names:
        report = check_package(name)
        print(*report.failures, sep="\n", end="")
        print(f"{name:32} {report.attempted} examples, {len(report.failures)} modules fail")
        failed += len(report.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
