"""A seeded bug to be found: planted by chance in a copy of a chapter, which is then tested, asked, and revealed.

    make break-v05                          # plants one in build/hunt/, and says what to do
    make hunt                               # runs the chapter's tests on the copy
    make hunt ASK="What is a KV cache?"     # asks the copy, among other questions
    make reveal                             # what it was
"""
import argparse
import contextlib
import difflib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import textwrap
from collections import Counter
from pathlib import Path

from shared.book.traps import Trap, plant, read_traps
from shared.book.tree import Tree, short, this_repository

CASE_S = 60  # after which a test counts as failed: some bugs make it wait for ever


class NoHunt(ValueError):
    """Nothing was planted."""


def directory(tree: Tree) -> Path:
    return tree.root / "build" / "hunt"


def begin(tree: Tree, chapter: Path, rng: random.Random) -> Path:
    """Plant one of the chapter's traps in a copy of it, without the text, which lists them; return the copy."""
    traps = read_traps(tree.traps(chapter))
    if not traps:
        raise NoHunt(f"{short(chapter)} has no traps in {tree.traps(chapter).relative_to(tree.root)}")
    trap = rng.choice(traps)
    shutil.rmtree(directory(tree), ignore_errors=True)
    copy = directory(tree) / chapter.name
    shutil.copytree(chapter, copy, ignore=shutil.ignore_patterns("__pycache__", "README.md"))
    plant(trap, copy)
    (directory(tree) / "planted.json").write_text(json.dumps({"chapter": short(chapter), "trap": trap.name}))
    return copy


def planted(tree: Tree) -> tuple[Path, Trap]:
    """The chapter and the trap of the hunt that is on."""
    path = directory(tree) / "planted.json"
    if not path.is_file():
        raise NoHunt("nothing is planted; begin with `make break-v05`, or another chapter")
    said = json.loads(path.read_text())
    chapter = tree.chapter(said["chapter"])
    for trap in read_traps(tree.traps(chapter)):
        if trap.name == said["trap"]:
            return chapter, trap
    raise NoHunt(f"{said['chapter']} has no trap {said['trap']!r} any more; begin again")


@contextlib.contextmanager
def in_place(tree: Tree):
    """While entered, the copy is imported in place of its chapter."""
    import milestones

    before = list(milestones.__path__)
    milestones.__path__ = [str(directory(tree)), *before]
    try:
        yield
    finally:
        milestones.__path__ = before


def test(tree: Tree) -> list[str]:
    """Run the chapter's tests on the copy; of each test that fails, in how many of its cases."""
    import pytest

    chapter, _ = planted(tree)
    os.chdir(tree.root)
    ledger = Ledger()
    suite = ["tests", "--ignore=tests/book", "--ignore-glob=*test_source*", "--ignore-glob=*test_tools*"]
    with in_place(tree):
        pytest.main([*suite, "--chapter", short(chapter), "--tb=no", "--maxfail=25", "-p", "no:cacheprovider"], plugins=[ledger])
    lines = [f"{failed:4} of {failed + ledger.passed[name]:4}  {name}" for name, failed in ledger.failed.items()]
    if not lines:
        return ["", "Every test passes: this bug is seen by a test of another kind. `make reveal` says which."]
    return ["", "What fails, in how many of its cases so far:", *lines]


class Ledger:
    """A pytest plugin: what passed and failed, by test without its cases; and no case goes on for ever."""

    def __init__(self):
        self.passed, self.failed = Counter(), Counter()

    def pytest_runtest_logreport(self, report) -> None:
        name = report.nodeid.split("[")[0]
        if report.failed:
            self.failed[name] += 1
        elif report.when == "call":
            self.passed[name] += 1

    def pytest_runtest_protocol(self, item) -> None:
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(CASE_S)


def too_long(signum, frame):
    raise TimeoutError(f"this went on for {CASE_S} s")


def ask(tree: Tree, question: str) -> list[str]:
    """What the copy answers, in company."""
    import importlib

    from shared.book.answers import KERNEL_TOKENS, MAX_TOKENS, OTHERS, in_company

    chapter, trap = planted(tree)
    with in_place(tree):
        modules = [importlib.import_module(f"milestones.{chapter.name}{part}") for part in ("", ".text")]
        kernels = trap.file.startswith("kernels/")
        texts = in_company(*modules, (question,), kernels)
    said = (textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  ") for text in texts)
    answers = [line for asked, text in zip((question, *OTHERS), said) for line in (f"> {asked}", text)]
    rules = f"Answers have {KERNEL_TOKENS if kernels else MAX_TOKENS} tokens at the most, and the first story is taken back on purpose."
    return [*answers, "", rules]


def reveal(tree: Tree) -> list[str]:
    """The bug as a diff, its name, what one sees of it, and the test that knows; whatever became of the copy."""
    chapter, trap = planted(tree)
    with tempfile.TemporaryDirectory() as scratch:
        again = Path(scratch) / chapter.name
        shutil.copytree(chapter, again, ignore=shutil.ignore_patterns("__pycache__"))
        plant(trap, again)
        old, new = ((directory / trap.file).read_text().splitlines() for directory in (chapter, again))
    lines = [f"{trap.name}, in {trap.address}", "", *difflib.unified_diff(old, new, trap.file, trap.file, lineterm="", n=2)]
    return [*lines, "", f"What one sees: {' '.join(trap.sees.split())}", f"Who catches it: {', '.join(trap.test)}"]


def main(argv: list[str], tree: Tree | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.book.hunt", description="Find a planted bug.")
    parser.add_argument("what", choices=("break", "hunt", "reveal"))
    parser.add_argument("chapter", nargs="?", metavar="vNN")
    parser.add_argument("--ask", metavar="QUESTION", help="with hunt: ask the copy instead of testing it")
    parser.add_argument("--seed", type=int, help="with break: the same bug again")
    args = parser.parse_args(argv)
    tree = tree or this_repository()
    try:
        if args.what == "break":
            if not args.chapter:
                parser.error("name a chapter, as in break v05")
            copy = begin(tree, tree.chapter(args.chapter), random.Random(args.seed))
            print(f"There is a bug in {copy.relative_to(tree.root)}, in one place. The engine still starts.\n")
            todo = {
                "make hunt": "its tests: which fail, and what do they have in common?",
                'make hunt ASK="What is a KV cache?"': "ask it, among others",
                f"$EDITOR {copy.relative_to(tree.root)}": "read it, as if somebody had sent it for review",
                "make reveal": "what it was",
            }
            for command, what in todo.items():
                print(f"  {command:40}{what}")
            print()
            print(f"No fair: diff with milestones/{copy.name}.")
        elif args.what == "hunt":
            print("\n".join(test(tree) if args.ask is None else ask(tree, args.ask)))
        else:
            print("\n".join(reveal(tree)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
