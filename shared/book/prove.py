"""Proves the whole book: every stage, whatever becomes of the others, and one table.

    python -m shared.book.prove [STAGE ...]
"""
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from shared import programs
from shared.book import full_record
from shared.book.forks import at_once
from shared.chapters import BOOK, Book

PYTHON = sys.executable
BUDGET_MIN = 15


@dataclass(frozen=True)
class Stage:
    """One thing that is proven: a command that ends with 0 when it holds."""

    name: str
    proves: str
    command: tuple[str, ...]
    needs: str = ""  # a pattern; while no file matches there is nothing to prove
    tells: str = ""  # a pattern of what in its output says how much was proven


def tests_stage(book: Book) -> Stage:
    """What `make test` runs, and in full the chapters that full_record picks for this commit."""
    chapters = [chapter.id for chapter in full_record.picked(book, full_record.commit(book.root))]
    also = [argument for chapter in chapters for argument in ("--also", chapter)]
    return Stage(
        name="tests",
        proves=f"what `make test` runs, and all tests of {', '.join(chapters)}",
        command=(PYTHON, "-m", "pytest", "tests", "-n", "logical", "--dist", "worksteal", *also),
        tells=r"\d+ (?:failed|passed)[^=]*(?= in )",
    )


STAGES = (
    tests_stage(BOOK),
    Stage(
        name="traps",
        proves="every seeded bug is killed by the test it names",
        command=(PYTHON, "-m", "shared.book.traps", "--all"),
        needs="tests/traps/*.toml",
        tells=r"\d+ of \d+ traps killed",
    ),
    Stage(
        name="texts",
        proves="nothing generated is stale, every change is explained, every number has its source",
        command=(PYTHON, "-m", "shared.book.claims.sync", "--check"),
        tells=r"\d+ changed units explained.*",
    ),
    Stage(
        name="notebooks",
        proves="every notebook runs from top to bottom, and is what its source says",
        command=(PYTHON, "-m", "shared.book.notebooks", "check"),
        needs="notebooks/*.py",
        tells=r"\d+ of \d+ notebooks run",
    ),
    Stage(
        name="site",
        proves="every page is built, every link leads somewhere, and a browser shows it without complaint",
        command=(PYTHON, "-m", "pytest", "tests/site", "-s"),
        needs="mkdocs.yml",
        tells=r"\d+ pages.*",
    ),
)


@dataclass(frozen=True)
class Result:
    """How a stage ended."""

    stage: Stage
    passed: bool
    seconds: float
    told: str = ""


def prove(root: Path, stages: tuple[Stage, ...]) -> list[Result]:
    """Run the stages in order; a failed one does not keep the next from running."""
    results = []
    for stage in stages:
        if stage.needs and not any(root.glob(stage.needs)):
            print(f"=== {stage.name}: no {stage.needs} yet", flush=True)
            continue
        print(f"=== {stage.name}: {stage.proves}", flush=True)
        start = time.monotonic()
        exit_code, output = run(stage.command, root)
        told = re.findall(stage.tells, output) if stage.tells else []
        results.append(Result(stage, exit_code == 0, time.monotonic() - start, told[-1] if told else stage.proves))
    return results


def run(command: tuple[str, ...], root: Path) -> tuple[int, str]:
    """Run a command, print what it prints, and return that too."""
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def table(results: list[Result]) -> list[str]:
    """Every stage with its result and its time, then the count."""
    lines = [
        f"{each.stage.name:12} {'passed' if each.passed else 'FAILED'} {each.seconds:7.1f} s  {each.told or each.stage.proves}"
        for each in results
    ]
    passed = sum(result.passed for result in results)
    total_s = sum(result.seconds for result in results)
    together = f"{'together':19} {total_s:7.1f} s, on {at_once()} cores; with the installation it may take {BUDGET_MIN} minutes on two idle ones"
    return [*lines, together, f"{passed} passed, {len(results) - passed} failed"]


def main(argv: list[str], stages: tuple[Stage, ...] = STAGES, root: Path | None = None) -> int:
    unknown = set(argv) - {stage.name for stage in stages}
    if unknown:
        names = ", ".join(stage.name for stage in stages)
        print(f"there is no stage {', '.join(sorted(unknown))}; the stages are {names}", file=sys.stderr)
        return 2
    root = root or BOOK.root
    chosen = tuple(stage for stage in stages if not argv or stage.name in argv)
    results = prove(root, chosen)
    print("", *table(results), sep="\n")
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    programs.run(main)
