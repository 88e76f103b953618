"""Run every check of the book, whether or not earlier ones fail, and print a table of results.

    python -m shared.book.prove [STAGE ...]
"""
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from shared import programs
from shared.book import full_record, promtool
from shared.book.forks import at_once
from shared.chapters import BOOK

PYTHON = sys.executable
ON_ALL_CORES = (PYTHON, "-m", "pytest", "-n", "logical", "--dist", "worksteal")


@dataclass(frozen=True)
class Stage:
    """One check: a command that exits with 0 if it passes."""

    name: str
    proves: str
    command: tuple[str, ...]
    needs: str = ""  # a file pattern; the stage is skipped if no file matches
    tells: str = ""  # a pattern for the part of the output that says how much was checked


def budget_minutes(num_chapters: int) -> int:
    """How long all of it may take on two idle cores, installation included.

    >>> budget_minutes(7), budget_minutes(24)
    (15, 30)
    """
    return round(15 + 15 * (num_chapters - 7) / 17)


def tests_stage(chapters: list[str]) -> Stage:
    """The tests that `make test` runs, and all tests of these chapters."""
    also = [argument for chapter in chapters for argument in ("--also", chapter)]
    return Stage(
        name="tests",
        proves=f"what `make test` runs, and all tests of {', '.join(chapters)}",
        command=(*ON_ALL_CORES, "tests", *also),
        tells=r"\d+ (?:failed|passed)[^=]*(?= in )",
    )


def traps_stage(chapters: list[str]) -> Stage:
    """The seeded bugs of these chapters; that those of all others can be planted is a test."""
    return Stage(
        name="traps",
        proves=f"every seeded bug of {', '.join(chapters)} is caught by the test that it names",
        command=(PYTHON, "-m", "shared.book.traps", *chapters),
        needs="tests/traps/*.toml",
        tells=r"\d+ of \d+ traps killed",
    )


PICKED = [chapter.id for chapter in full_record.picked(BOOK, full_record.commit(BOOK.root))]
STAGES = (
    tests_stage(PICKED),
    traps_stage(PICKED),
    Stage(
        name="texts",
        proves="every generated block is up to date, every change is explained, every number has a source",
        command=(PYTHON, "-m", "shared.book.claims.sync", "--check"),
        tells=r"\d+ changed units explained.*",
    ),
    Stage(
        name="notebooks",
        proves="every notebook runs, and prints what its committed copy shows",
        command=(PYTHON, "-m", "shared.book.notebooks", "check"),
        needs="notebooks/*.py",
        tells=r"\d+ of \d+ notebooks run.*",
    ),
    Stage(
        name="site",
        proves="every page builds, every link has a target, and a browser shows the pages without errors",
        command=(*ON_ALL_CORES, "tests/site"),
        needs="mkdocs.yml",
        tells=r"\d+ (?:failed|passed)[^=]*(?= in )",
    ),
)


@dataclass(frozen=True)
class Result:
    """The result of a stage."""

    stage: Stage
    passed: bool
    seconds: float
    told: str = ""


def prove(root: Path, stages: tuple[Stage, ...]) -> list[Result]:
    """Run the stages in order, also after a failure."""
    results = []
    for stage in stages:
        if stage.needs and not any(root.glob(stage.needs)):
            print(f"=== {stage.name}: skipped, there is no {stage.needs}", flush=True)
            continue
        print(f"=== {stage.name}: {stage.proves}", flush=True)
        start = time.monotonic()
        exit_code, output = run(stage.command, root)
        told = re.findall(stage.tells, output) if stage.tells else []
        results.append(Result(stage, exit_code == 0, time.monotonic() - start, told[-1] if told else stage.proves))
    return results


def run(command: tuple[str, ...], root: Path) -> tuple[int, str]:
    """Run a command and print its stdout; its exit code and stdout."""
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def table(results: list[Result]) -> list[str]:
    """One line per stage with its result and time, then the totals."""
    lines = [
        f"{each.stage.name:12} {'passed' if each.passed else 'FAILED'} {each.seconds:7.1f} s  {each.told or each.stage.proves}"
        for each in results
    ]
    passed = sum(result.passed for result in results)
    total_s = sum(result.seconds for result in results)
    total = f"{'total':19} {total_s:7.1f} s, on {at_once()} cores; the budget is {budget_minutes(len(BOOK.chapters))} minutes on two idle cores, installation included"
    return [*lines, total, f"{passed} passed, {len(results) - passed} failed"]


def main(argv: list[str], stages: tuple[Stage, ...] = STAGES, root: Path | None = None) -> int:
    unknown = set(argv) - {stage.name for stage in stages}
    if unknown:
        names = ", ".join(stage.name for stage in stages)
        print(f"there is no stage {', '.join(sorted(unknown))}; the stages are {names}", file=sys.stderr)
        return 2
    root = root or BOOK.root
    print(promtool.put_on_path(), flush=True)
    chosen = tuple(stage for stage in stages if not argv or stage.name in argv)
    results = prove(root, chosen)
    print("", *table(results), sep="\n")
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    programs.run(main)
