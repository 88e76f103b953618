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
    test = "tests/test_modules.py::test_every_module_is_hugging_faces"    # or a list of them
    sees = "Fluent nonsense: the model repeats the last word of the prompt."

`find` stands exactly once in the unit. The bug is planted in a copy of the chapter that a child process,
forked from this one, finds in place of the chapter; this one has imported what is slow to import and
nothing of milestones. First the same tests must pass without a bug, otherwise a failure means nothing.
Killed is when a named test itself fails, or, for a trap with `crashes = true`, when the process dies of a
signal: a stray address has no better sight. All else is an error: a survivor, a test that cannot be found, a
fixture that fails, code that does not run, a minute without an answer.
"""
import argparse
import ast
import json
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from shared.book.forks import SLOW, Run, preload, run_copy
from shared.book.tree import Tree, short, this_repository
from shared.book.units import read_units

TIMEOUT_S = 60
MATRIX_TIMEOUT_S = 900
# A planted bug that cannot even run proves nothing about the test.
BROKEN = ("NameError", "SyntaxError", "ImportError", "ModuleNotFoundError", "UnboundLocalError")
COMMAND = (sys.executable, "-m", "shared.book.traps")
KEYS = {"name", "file", "unit", "find", "replace", "test", "sees", "crashes"}
OPTIONAL = {"unit", "crashes"}


@dataclass(frozen=True)
class Trap:
    """A seeded bug, the tests that claim to catch it, and what a learner sees when they do not."""

    name: str
    file: str
    find: str
    replace: str
    test: tuple[str, ...]
    sees: str
    unit: str = ""
    crashes: bool = False  # what the tests see of it is that the process dies of a signal

    @property
    def address(self) -> str:
        return f"{self.file}::{self.unit}" if self.unit else self.file


@dataclass(frozen=True)
class Outcome:
    """What became of a planted trap."""

    chapter: str
    trap: str
    result: str  # killed, survived or error
    detail: str  # the test that failed and how, or what is wrong with the trap
    seconds: float


def read_traps(path: Path) -> list[Trap]:
    """The traps of a chapter; a key that is missing or unknown is refused."""
    if not path.is_file():
        return []
    traps = []
    for row in tomllib.loads(path.read_text()).get("trap", []):
        name = row.get("name", f"trap {len(traps) + 1}")
        if set(row) | OPTIONAL != KEYS:
            wrong = ", ".join(sorted((set(row) | OPTIONAL) ^ KEYS))
            keys = ", ".join(sorted(KEYS))
            raise ValueError(f"{path.name}: {name!r} lacks or does not know: {wrong}; the keys are {keys}")
        tests = [row["test"]] if isinstance(row["test"], str) else row["test"]
        traps.append(Trap(**(row | {"test": tuple(tests)})))
        if [trap.name for trap in traps].count(name) > 1:
            raise ValueError(f"{path.name}: two traps are called {name!r}; give each a name of its own")
    return traps


def plant(trap: Trap, chapter: Path) -> None:
    """Put the bug into a copy of its chapter."""
    units = read_units(chapter)
    if trap.address not in units:
        raise ValueError(f"there is no unit {trap.address}; it was renamed or removed")
    pieces = units[trap.address].pieces
    count = sum(piece.text.count(trap.find) for piece in pieces)
    if count != 1:
        raise ValueError(f"`find` stands {count} times in {trap.address}; it must stand there exactly once")
    piece = next(piece for piece in pieces if trap.find in piece.text)
    path = chapter / trap.file
    lines = path.read_text().splitlines(keepends=True)
    before, after = lines[:piece.first_line - 1], lines[piece.first_line + piece.text.count("\n"):]
    planted = "".join(before) + piece.text.replace(trap.find, trap.replace) + "\n" + "".join(after)
    if trap.find == trap.replace:
        raise ValueError("`replace` is what `find` is; nothing was planted")
    try:
        ast.parse(planted)
    except SyntaxError as error:
        raise ValueError(f"with `replace` in place {trap.file} does not parse: {error}") from None
    path.write_text(planted)


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


def run_chapter(tree: Tree, chapter: Path, only: str | None = None) -> list[Outcome]:
    """Plant each trap of a chapter; its tests must pass without any first."""
    traps = [trap for trap in read_traps(tree.traps(chapter)) if only in (None, trap.name)]
    if only and not traps:
        raise ValueError(f"{short(chapter)} has no trap called {only!r}")
    if not traps:
        why = f"there are none in {tree.traps(chapter).relative_to(tree.root)}; write some"
        return [Outcome(short(chapter), "(none)", "error", why, 0.0)]
    tests = list(dict.fromkeys(test for trap in traps for test in trap.test))
    sound = run_copy(tree, chapter, None, tests, TIMEOUT_S * len(tests))
    preload(sound.imported)
    outcomes = []
    for trap in traps:
        why = why_unsound(trap, sound)
        outcomes.append(Outcome(short(chapter), trap.name, "error", why, 0.0) if why else run_trap(tree, chapter, trap))
    return outcomes


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


def run_trap(tree: Tree, chapter: Path, trap: Trap) -> Outcome:
    """Plant one trap, and run the tests that it names."""
    start = time.monotonic()
    try:
        result, detail = verdict(trap, run_copy(tree, chapter, partial(plant, trap), [*trap.test, "-x"], TIMEOUT_S))
    except ValueError as error:
        result, detail = "error", str(error)
    return Outcome(short(chapter), trap.name, result, detail, round(time.monotonic() - start, 2))


def run_in_process(chapter: str, command: tuple[str, ...] = COMMAND, root: Path | None = None) -> list[Outcome]:
    """The same from anywhere, a test for example: in a process of its own, which has not imported a chapter."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "outcomes.json"
        done = subprocess.run(
            [*command, chapter, "--json", str(path)], cwd=root or this_repository().root, capture_output=True, text=True
        )
        if not path.exists():
            raise RuntimeError(f"the trap runner ended with {done.returncode}: {done.stderr[-2000:]}")
        return [Outcome(**row) for row in json.loads(path.read_text())]


def kill_table(outcomes: list[Outcome]) -> list[str]:
    """What became of each trap, as lines."""
    lines = [f"{o.chapter:5} {o.result:9} {o.seconds:5.1f} s  {o.trap:44} {o.detail}" for o in outcomes]
    killed = sum(outcome.result == "killed" for outcome in outcomes)
    return [*lines, f"{killed} of {len(outcomes)} traps killed by the test they name"]


def matrix(tree: Tree, chapters: list[Path]) -> dict:
    """For each trap, how many tests of the chapter's whole suite catch it, and which."""
    from shared.machine import machine, today

    # Tests that plant traps themselves, or that test these tools, say nothing about a chapter.
    suite = ["tests", "--ignore=tests/book", "--ignore-glob=*test_traps*"]
    found = {}
    for chapter in chapters:
        for trap in read_traps(tree.traps(chapter)):
            run = run_copy(tree, chapter, partial(plant, trap), suite, MATRIX_TIMEOUT_S)
            failed = sorted(run.failed | run.broken)
            found.setdefault(short(chapter), {})[trap.name] = {"failed": failed, "passed": len(run.passed)}
            total = len(failed) + len(run.passed)
            print(f"{short(chapter)}  {trap.name:44} {len(failed)} of {total} tests fail", flush=True)
    return {
        "command": "python -m shared.book.traps matrix",
        "date": today(),
        "machine": machine(),
        "chapters": found,
    }


def main(argv: list[str], tree: Tree | None = None, slow: tuple[str, ...] = SLOW) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.book.traps", description="Plant the seeded bugs.")
    parser.add_argument("chapters", nargs="*", metavar="vNN", help="chapters; `matrix` first: whole suites")
    parser.add_argument("--all", action="store_true", help="every chapter")
    parser.add_argument("--only", metavar="NAME", help="the one trap of this name")
    parser.add_argument("--json", metavar="PATH", help="write the outcomes there too")
    arguments = parser.parse_args(argv)
    tree = tree or this_repository()
    whole_suites = arguments.chapters[:1] == ["matrix"]
    names = arguments.chapters[1:] if whole_suites else arguments.chapters
    if not (names or arguments.all or whole_suites):
        parser.error("name a chapter, or --all")
    try:
        chapters = [tree.chapter(name) for name in names] or list(tree.chapters)
        preload(slow)
        if whole_suites:
            tree.results.mkdir(parents=True, exist_ok=True)
            (tree.results / "traps-matrix.json").write_text(json.dumps(matrix(tree, chapters), indent=1) + "\n")
            return 0
        outcomes = [outcome for chapter in chapters for outcome in run_chapter(tree, chapter, arguments.only)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    print("\n".join(kill_table(outcomes)))
    return 0 if all(outcome.result == "killed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
