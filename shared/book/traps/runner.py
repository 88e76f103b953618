"""Plants a chapter's seeded bugs, one at a time, and demands that the test which claims to catch each does.

    python -m shared.book.traps v05 [--only NAME] [--json PATH]
    python -m shared.book.traps --all
    python -m shared.book.traps matrix [v05 ...]      # whole suites against each trap, into docs/results/

tests/traps/v05.toml holds them:

    [[trap]]
    name = "q and k swapped"
    file = "attention.py"
    unit = "Attention.project"        # left out for the module's own body
    find = "return rotate(q, cos, sin), rotate(k, cos, sin), v"
    replace = "return rotate(k, cos, sin), rotate(q, cos, sin), v"
    test = "tests/test_modules.py::test_every_module_gives_what_hugging_faces_gives"    # or a list of them
    sees = "Fluent nonsense: the model repeats the last word of the prompt."
    seen = "vllm #43810"              # where somebody shipped it, if anybody did

`find` stands exactly once in the unit. The bug is planted in a copy of the chapter that a child process,
forked from this one, finds in place of the chapter; this one has imported what is slow to import and
nothing of milestones. First the same tests must pass without a bug, otherwise a failure means nothing.
Killed is when a named test itself fails, or, for a trap with `crashes = true`, when the process dies of a
signal: a stray address has no better sight. All else is an error: a survivor, a test that cannot be found, a
fixture that fails, code that does not run, a minute without an answer.

Reads: tests/traps/*.toml. Writes: docs/results/traps-matrix.json, if asked.
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
# A planted bug that cannot even run proves nothing about the test.
BROKEN = ("NameError", "SyntaxError", "ImportError", "ModuleNotFoundError", "UnboundLocalError")
COMMAND = (sys.executable, "-m", "shared.book.traps")


@dataclass(frozen=True)
class Outcome:
    """What became of a planted trap."""

    chapter: str
    trap: str
    result: str  # killed, survived or error
    detail: str  # the test that failed and how, or what is wrong with the trap
    seconds: float


def verdict(trap: Trap, run: Run) -> tuple[str, str]:
    """Killed, survived or error, and why."""
    named = {test: how for test, how in run.failed.items() if belongs(test, trap.test)}
    if run.exit_code is None:
        return "error", f"no answer after {TIMEOUT_S} s; plant a bug that ends"
    if not run.finished and trap.crashes and run.exit_code < 0:
        return "killed", f"{', '.join(trap.test)}: the process died of signal {-run.exit_code}"
    if not run.finished:
        return "error", f"the process ended with {run.exit_code} before pytest did\n{run.tail}"
    if run.exit_code == 0:
        return "survived", f"{', '.join(trap.test)} passed; make it see the bug, or name the test that does"
    if run.exit_code != 1:
        return "error", f"pytest ended with {run.exit_code}, not with a failed test\n{run.tail}"
    if not named:
        test, how = next(iter((run.broken | run.failed).items()))
        return "error", f"{test} was not reached, its fixture failed ({how}); name a test that builds what it tests"
    test, how = next(iter(named.items()))
    if how.split(":")[0] in BROKEN:
        return "error", f"the planted code does not run: {how}"
    return "killed", f"{test}: {how}"


def belongs(test: str, named: tuple[str, ...]) -> bool:
    """Whether a test is one of those named: a file, a test, or one case of it."""
    return any(test == name or test.startswith((f"{name}[", f"{name}::")) for name in named)


def run_chapters(chapters: Sequence[Chapter], only: str | None = None) -> list[Outcome]:
    """Plant each trap of each chapter, several at a time; a chapter's tests must pass without any first."""
    traps = {chapter: [trap for trap in read_traps(chapter.traps) if only in (None, trap.name)] for chapter in chapters}
    if only and not any(traps.values()):
        raise ValueError(f"{', '.join(chapter.id for chapter in chapters)} has no trap called {only!r}")
    armed = [chapter for chapter in chapters if traps[chapter]]
    sound = {}
    for ended in in_forks([sound_work(traps[chapter], chapter) for chapter in armed], "without a trap"):
        sound[armed[ended.number]] = run_of(ended)
    preload(sorted({name for run in sound.values() for name in run.imported}))
    outcomes, planted = {}, []
    for chapter in chapters:
        if not traps[chapter] and not only:
            why = f"there are none in {chapter.traps.relative_to(chapter.root)}; write some"
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
    """All tests that a chapter's traps name, without any."""
    tests = list(dict.fromkeys(test for trap in traps for test in trap.test))
    return work(chapter, None, tests, TIMEOUT_S * len(tests))


def why_unsound(trap: Trap, run: Run) -> str | None:
    """Why a trap's tests prove nothing even without a bug; None if they pass."""
    if run.exit_code not in (0, 1):
        return f"without any bug pytest ended with {run.exit_code} on the tests that are named\n{run.tail}"
    for test, how in (run.broken | run.failed).items():
        if belongs(test, trap.test):
            return f"without any bug {test} fails: {how}"
    for name in trap.test:
        if not any(belongs(test, (name,)) for test in run.passed):
            return f"without any bug {name} does not pass: it is skipped, or not this chapter's"
    return None


def run_in_process(chapter: str, command: tuple[str, ...] = COMMAND, root: Path | None = None) -> list[Outcome]:
    """The same from anywhere, a test for example: in a process of its own, which has not imported a chapter."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "outcomes.json"
        done = subprocess.run(
            [*command, chapter, "--json", str(path)], cwd=root or BOOK.root, capture_output=True, text=True
        )
        if not path.exists():
            raise RuntimeError(f"the trap runner ended with {done.returncode}: {done.stderr[-2000:]}")
        return [Outcome(**row) for row in json.loads(path.read_text())]


def kill_table(outcomes: list[Outcome]) -> list[str]:
    """What became of each trap, as lines."""
    lines = [f"{o.chapter:5} {o.result:9} {o.seconds:5.1f} s  {o.trap:44} {o.detail}" for o in outcomes]
    killed = sum(outcome.result == "killed" for outcome in outcomes)
    return [*lines, f"{killed} of {len(outcomes)} traps killed by the test they name"]


def matrix(chapters: Sequence[Chapter]) -> dict:
    """For each trap, how many tests of the chapter's whole suite catch it, and which."""
    # Tests that plant traps themselves, or that test these tools, say nothing about a chapter.
    suite = ["tests", "--ignore=tests/book", "--ignore-glob=*test_traps*"]
    traps = [(chapter, trap) for chapter in chapters for trap in read_traps(chapter.traps)]
    found = {chapter.id: dict.fromkeys(trap.name for each, trap in traps if each is chapter) for chapter in chapters}
    for ended in in_forks([work(chapter, partial(plant, trap), suite, MATRIX_TIMEOUT_S) for chapter, trap in traps], "traps"):
        (chapter, trap), run = traps[ended.number], run_of(ended)
        failed = sorted(run.failed | run.broken)
        row = found[chapter.id][trap.name] = {"failed": failed, "passed": len(run.passed)}
        if not run.finished:
            row["ended"] = "hangs" if run.exit_code is None else "crashes"
        told = row.get("ended") or f"{len(failed)} of {len(failed) + len(run.passed)} tests fail"
        print(f"{chapter.id}  {trap.name:44} {told}", flush=True)
    return found


def main(argv: list[str], book: Book | None = None, slow: tuple[str, ...] = SLOW) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.book.traps", description="Plant the seeded bugs.")
    parser.add_argument("chapters", nargs="*", metavar="vNN", help="chapters; `matrix` first: whole suites")
    parser.add_argument("--all", action="store_true", help="every chapter")
    parser.add_argument("--only", metavar="NAME", help="the one trap of this name")
    parser.add_argument("--json", metavar="PATH", help="write the outcomes there too")
    arguments = parser.parse_args(argv)
    book = book or BOOK
    whole_suites = arguments.chapters[:1] == ["matrix"]
    names = arguments.chapters[1:] if whole_suites else arguments.chapters
    if not (names or arguments.all or whole_suites):
        parser.error("name a chapter, or --all")
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
