"""Plant a chapter's seeded bugs, one at a time, and check that the test named for each catches it.

    python -m shared.book.traps v05 [--only NAME] [--json PATH]
    python -m shared.book.traps --all
    python -m shared.book.traps matrix [v05 ...]      # the whole test suite against each trap; writes the result

They are defined in tests/traps/v05.toml:

    [[trap]]
    name = "q and k swapped"
    file = "attention.py"
    unit = "Attention.project"        # left out for the module's own body
    find = "return rotate(q, cos, sin), rotate(k, cos, sin), v"
    replace = "return rotate(k, cos, sin), rotate(q, cos, sin), v"
    test = "tests/test_modules.py::test_every_module_gives_what_hugging_faces_gives"    # or a list of them
    sees = "Fluent nonsense: the model repeats the last word of the prompt."
    seen = "vllm #43810"              # a project that shipped this bug, if there is one

`find` must occur exactly once in the unit. The bug is planted in a copy of the chapter, which a fork of this process
imports in place of the chapter; this process has imported the slow packages, but no chapter. First the same tests must
pass without the bug, because otherwise their failure means nothing. A trap is killed if a named test itself fails or, with
`crashes = true`, if the process dies of a signal, since that is how a stray address shows. Everything else is reported
as survived or as an error: no test fails, a test is not found, a fixture fails, the code does not run, or a minute passes.

Reads: tests/traps/*.toml. Writes: docs/results/traps-matrix.json for `matrix`.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from shared import results
from shared.book.forks import SLOW, Work, in_forks, preload
from shared.book.traps.seeded_bugs import Trap, plant, read_traps
from shared.book.traps.tested_copy import Run, run_of, work
from shared.chapters import BOOK, Book, Chapter

TIMEOUT_S = 60
MATRIX_TIMEOUT_S = 900
# A planted bug that raises one of these does not run, so it proves nothing about the test.
BROKEN = ("NameError", "SyntaxError", "ImportError", "ModuleNotFoundError", "UnboundLocalError")
COMMAND = (sys.executable, "-m", "shared.book.traps")


@dataclass(frozen=True)
class Outcome:
    """The result for one planted trap."""

    chapter: str
    trap: str
    result: str  # killed, survived or error
    detail: str  # the test that failed and its error, or what is wrong with the trap
    seconds: float


def verdict(trap: Trap, run: Run) -> tuple[str, str]:
    """Killed, survived or error, with the reason."""
    named = {test: how for test, how in run.failed.items() if belongs(test, trap.test)}
    if run.exit_code is None:
        return "error", f"the tests were not done after {TIMEOUT_S} s; plant a bug with which they end"
    if not run.finished and trap.crashes and run.exit_code < 0:
        return "killed", f"{', '.join(trap.test)}: the process died of signal {-run.exit_code}"
    if not run.finished:
        return "error", f"the process exited with {run.exit_code} before pytest was done\n{run.tail}"
    if run.exit_code == 0:
        return "survived", f"{', '.join(trap.test)} passed; make it catch the bug, or name a test that does"
    if run.exit_code != 1:
        return "error", f"pytest exited with {run.exit_code}, not with a failed test\n{run.tail}"
    if not named:
        test, how = next(iter((run.broken | run.failed).items()))
        return "error", f"{test} did not run, because its fixture failed ({how}); name a test that builds what it tests"
    test, how = next(iter(named.items()))
    if how.split(":")[0] in BROKEN:
        return "error", f"the planted code does not run: {how}"
    return "killed", f"{test}: {how}"


def belongs(test: str, named: tuple[str, ...]) -> bool:
    """Whether a test is one of those named: by its file, its function or its case."""
    return any(test == name or test.startswith((f"{name}[", f"{name}::")) for name in named)


def run_chapters(chapters: Sequence[Chapter], only: str | None = None) -> list[Outcome]:
    """Plant each trap of each chapter, several at a time, after checking that the tests pass without them."""
    traps = {chapter: [trap for trap in read_traps(chapter.traps) if only in (None, trap.name)] for chapter in chapters}
    if only and not any(traps.values()):
        raise ValueError(f"{', '.join(chapter.id for chapter in chapters)} has no trap named {only!r}")
    armed = [chapter for chapter in chapters if traps[chapter]]
    sound = {}
    for ended in in_forks([sound_work(traps[chapter], chapter) for chapter in armed], "without a trap"):
        sound[armed[ended.number]] = run_of(ended)
    preload(sorted({name for run in sound.values() for name in run.imported}))
    outcomes, planted = {}, []
    for chapter in chapters:
        if not traps[chapter] and not only:
            why = f"{chapter.traps.relative_to(chapter.root)} has no traps; write some"
            outcomes[chapter, None] = Outcome(chapter.id, "(none)", "error", why, 0.0)
        for trap in traps[chapter]:
            why = why_unsound(trap, sound[chapter])
            outcomes[chapter, trap] = Outcome(chapter.id, trap.name, "error", why or "", 0.0)
            planted += [] if why else [(chapter, trap)]
    works = [work(chapter, partial(plant, trap), [*trap.test, "-x"], TIMEOUT_S) for chapter, trap in planted]
    for ended in in_forks(works, "traps"):
        chapter, trap = planted[ended.number]
        try:
            result, detail = verdict(trap, run_of(ended))
        except ValueError as error:
            result, detail = "error", str(error)
        outcomes[chapter, trap] = Outcome(chapter.id, trap.name, result, detail, round(ended.seconds, 2))
    return list(outcomes.values())


def sound_work(traps: list[Trap], chapter: Chapter) -> Work:
    """Run all tests that a chapter's traps name, without a trap."""
    tests = list(dict.fromkeys(test for trap in traps for test in trap.test))
    return work(chapter, None, tests, TIMEOUT_S * len(tests))


def why_unsound(trap: Trap, run: Run) -> str | None:
    """Why a trap's tests do not pass without the bug; None if they do."""
    if run.exit_code not in (0, 1):
        return f"without a bug, pytest exits with {run.exit_code} on the named tests\n{run.tail}"
    for test, how in (run.broken | run.failed).items():
        if belongs(test, trap.test):
            return f"without a bug, {test} fails: {how}"
    for name in trap.test:
        if not any(belongs(test, (name,)) for test in run.passed):
            return f"without a bug, {name} does not pass: it is skipped, or does not run for this chapter"
    return None


def run_in_process(chapter: str, command: tuple[str, ...] = COMMAND, root: Path | None = None) -> list[Outcome]:
    """`run_chapters` for one chapter in a new process, for callers that may have imported a chapter, such as tests."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "outcomes.json"
        done = subprocess.run(
            [*command, chapter, "--json", str(path)], cwd=root or BOOK.root, capture_output=True, text=True
        )
        if not path.exists():
            raise RuntimeError(f"the trap runner exited with {done.returncode}: {done.stderr[-2000:]}")
        return [Outcome(**row) for row in json.loads(path.read_text())]


def kill_table(outcomes: list[Outcome]) -> list[str]:
    """One line per trap with its result, then the totals."""
    lines = [f"{o.chapter:5} {o.result:9} {o.seconds:5.1f} s  {o.trap:44} {o.detail}" for o in outcomes]
    killed = sum(outcome.result == "killed" for outcome in outcomes)
    return [*lines, f"{killed} of {len(outcomes)} traps killed by a test that they name"]


def matrix(chapters: Sequence[Chapter]) -> dict:
    """For each trap, which tests of the chapter's whole suite catch it, and how many pass."""
    # Without the tests that plant traps themselves or that test these tools.
    suite = ["tests", "--ignore=tests/book", "--ignore-glob=*test_traps*"]
    traps = [(chapter, trap) for chapter in chapters for trap in read_traps(chapter.traps)]
    rows = {chapter.id: dict.fromkeys(trap.name for each, trap in traps if each is chapter) for chapter in chapters}
    for ended in in_forks([work(chapter, partial(plant, trap), suite, MATRIX_TIMEOUT_S) for chapter, trap in traps], "traps"):
        (chapter, trap), run = traps[ended.number], run_of(ended)
        failed = sorted(run.failed | run.broken)
        row = rows[chapter.id][trap.name] = {"failed": failed, "passed": len(run.passed)}
        if not run.finished:
            row["ended"] = "hangs" if run.exit_code is None else "crashes"
        result = row.get("ended") or f"{len(failed)} of {len(failed) + len(run.passed)} tests fail"
        print(f"{chapter.id}  {trap.name:44} {result}", flush=True)
    return rows


def main(argv: list[str], book: Book | None = None, slow: tuple[str, ...] = SLOW) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.book.traps", description="Plant the seeded bugs.")
    parser.add_argument("chapters", nargs="*", metavar="vNN", help="chapters; after `matrix`, run their whole test suites")
    parser.add_argument("--all", action="store_true", help="all chapters")
    parser.add_argument("--only", metavar="NAME", help="only the trap with this name")
    parser.add_argument("--json", metavar="PATH", help="also write the results to this file")
    arguments = parser.parse_args(argv)
    book = book or BOOK
    whole_suites = arguments.chapters[:1] == ["matrix"]
    names = arguments.chapters[1:] if whole_suites else arguments.chapters
    if not (names or arguments.all or whole_suites):
        parser.error("name a chapter, or give --all")
    try:
        chapters = [book.find(name) for name in names] or list(book.chapters)
        preload(slow)
        if whole_suites:
            results.write("traps-matrix", {"chapters": matrix(chapters)}, "python -m shared.book.traps matrix", book)
            return 0
        outcomes = run_chapters(chapters, arguments.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    print("\n".join(kill_table(outcomes)))
    return 0 if all(outcome.result == "killed" for outcome in outcomes) else 1
