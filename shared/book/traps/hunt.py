"""A seeded bug to be found: planted by chance in a copy of a chapter, which is then tested, asked, and revealed.

    make break-v05                          # plants one in build/hunt/, and says what to do
    make hunt                               # runs the chapter's tests on the copy
    make hunt ASK="What is a KV cache?"     # asks the copy, among other questions
    make reveal                             # what it was

Reads: tests/traps/*.toml. Writes: build/hunt.
"""
import argparse
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

from shared.book.changed_copy import in_place, make_copy
from shared.book.traps.seeded_bugs import Trap, plant, read_traps
from shared.chapters import BOOK, Book, Chapter
from shared.programs import run

CASE_S = 60  # after which a test counts as failed: some bugs make it wait for ever


class NoHunt(ValueError):
    """Nothing was planted."""


def directory(book: Book) -> Path:
    return book.root / "build" / "hunt"


def begin(book: Book, chapter: Chapter, rng: random.Random) -> Path:
    """Plant one of the chapter's traps in a copy of it, without the text, which lists them; return the copy."""
    traps = read_traps(chapter.traps)
    if not traps:
        raise NoHunt(f"{chapter.id} has no traps in {chapter.traps.relative_to(book.root)}")
    trap = rng.choice(traps)
    shutil.rmtree(directory(book), ignore_errors=True)
    copy = make_copy(chapter, directory(book), "README.md")
    plant(trap, copy)
    (directory(book) / "planted.json").write_text(json.dumps({"chapter": chapter.id, "trap": trap.name}))
    return copy


def planted(book: Book) -> tuple[Chapter, Trap]:
    """The chapter and the trap of the hunt that is on."""
    path = directory(book) / "planted.json"
    if not path.is_file():
        raise NoHunt("nothing is planted; begin with `make break-v05`, or another chapter")
    said = json.loads(path.read_text())
    chapter = book.find(said["chapter"])
    for trap in read_traps(chapter.traps):
        if trap.name == said["trap"]:
            return chapter, trap
    raise NoHunt(f"{said['chapter']} has no trap {said['trap']!r} any more; begin again")


def test(book: Book) -> list[str]:
    """Run the chapter's tests on the copy; of each test that fails, in how many of its cases."""
    import pytest

    chapter, _ = planted(book)
    os.chdir(book.root)
    ledger = Ledger()
    suite = ["tests", "--ignore=tests/book", "--ignore-glob=*test_source*", "--ignore-glob=*test_tools*"]
    with in_place(directory(book)):
        pytest.main([*suite, "--chapter", chapter.id, "--tb=no", "--maxfail=25", "-p", "no:cacheprovider"], plugins=[ledger])
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


def ask(book: Book, question: str) -> list[str]:
    """What the copy answers, in company."""
    import importlib

    from shared.book.traps.answers import KERNEL_TOKENS, MAX_TOKENS, OTHERS, in_company, in_kernels

    chapter, trap = planted(book)
    with in_place(directory(book)):
        modules = [importlib.import_module(f"milestones.{chapter.name}{part}") for part in ("", ".text")]
        kernels = in_kernels(trap)
        texts = in_company(*modules, (question,), kernels)
    said = (textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  ") for text in texts)
    answers = [line for asked, text in zip((question, *OTHERS), said) for line in (f"> {asked}", text)]
    rules = f"Answers have {KERNEL_TOKENS if kernels else MAX_TOKENS} tokens at the most, and the first story is taken back on purpose."
    return [*answers, "", rules]


def reveal(book: Book) -> list[str]:
    """The bug as a diff, its name, what one sees of it, and the test that knows; whatever became of the copy."""
    chapter, trap = planted(book)
    with tempfile.TemporaryDirectory() as scratch:
        again = make_copy(chapter, Path(scratch))
        plant(trap, again)
        old, new = ((directory / trap.file).read_text().splitlines() for directory in (chapter.path, again))
    lines = [f"{trap.name}, in {trap.address}", "", *difflib.unified_diff(old, new, trap.file, trap.file, lineterm="", n=2)]
    return [*lines, "", f"What one sees: {trap.told}", f"Who catches it: {', '.join(trap.test)}"]


def main(argv: list[str], book: Book | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.book.traps.hunt", description="Find a planted bug.")
    parser.add_argument("what", choices=("break", "hunt", "reveal"))
    parser.add_argument("chapter", nargs="?", metavar="vNN")
    parser.add_argument("--ask", metavar="QUESTION", help="with hunt: ask the copy instead of testing it")
    parser.add_argument("--seed", type=int, help="with break: the same bug again")
    args = parser.parse_args(argv)
    book = book or BOOK
    try:
        if args.what == "break":
            if not args.chapter:
                parser.error("name a chapter, as in break v05")
            copy = begin(book, book.find(args.chapter), random.Random(args.seed))
            print(f"There is a bug in {copy.relative_to(book.root)}, in one place. The engine still starts.\n")
            todo = {
                "make hunt": "its tests: which fail, and what do they have in common?",
                'make hunt ASK="What is a KV cache?"': "ask it, among others",
                f"$EDITOR {copy.relative_to(book.root)}": "read it, as if somebody had sent it for review",
                "make reveal": "what it was",
            }
            for command, what in todo.items():
                print(f"  {command:40}{what}")
            print()
            print(f"No fair: diff with milestones/{copy.name}.")
        elif args.what == "hunt":
            print("\n".join(test(book) if args.ask is None else ask(book, args.ask)))
        else:
            print("\n".join(reveal(book)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run(main)
