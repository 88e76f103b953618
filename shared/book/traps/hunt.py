"""Find a bug: one of a chapter's seeded bugs is planted at random in a copy, which you test, question and finally reveal.

    make break-v05                          # plants a bug in build/hunt/, and says what to do
    make hunt                               # runs the chapter's tests on the copy
    make hunt ASK="What is a KV cache?"     # asks the copy, together with other questions
    make reveal                             # shows the bug

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

CASE_S = 60  # time limit for one test case: some bugs make tests run forever


class NoHunt(ValueError):
    """There is no bug to find."""


def directory(book: Book) -> Path:
    return book.root / "build" / "hunt"


def begin(book: Book, chapter: Chapter, rng: random.Random) -> Path:
    """Plant one of the chapter's traps in a copy without the README, which lists them; the copy's path."""
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
    """The chapter and the trap of the current hunt."""
    path = directory(book) / "planted.json"
    if not path.is_file():
        raise NoHunt("no bug is planted; start with `make break-v05`, or with another chapter")
    state = json.loads(path.read_text())
    chapter = book.find(state["chapter"])
    for trap in read_traps(chapter.traps):
        if trap.name == state["trap"]:
            return chapter, trap
    raise NoHunt(f"{state['chapter']} no longer has the trap {state['trap']!r}; start again")


def test(book: Book) -> list[str]:
    """Run the chapter's tests on the copy; lines that say which tests fail, and in how many of their cases."""
    import pytest

    chapter, _ = planted(book)
    os.chdir(book.root)
    ledger = Ledger()
    suite = ["tests", "--ignore=tests/book", "--ignore-glob=*test_source*", "--ignore-glob=*test_tools*"]
    with in_place(directory(book)):
        pytest.main([*suite, "--chapter", chapter.id, "--tb=no", "--maxfail=25", "-p", "no:cacheprovider"], plugins=[ledger])
    lines = [f"{failed:4} of {failed + ledger.passed[name]:4}  {name}" for name, failed in ledger.failed.items()]
    if not lines:
        return ["", "Every test that ran passes. Only a test of another kind catches this bug; `make reveal` names it."]
    return ["", "Failing tests, with the number of failed cases so far:", *lines]


class Ledger:
    """A pytest plugin that counts each test's passed and failed cases, and limits the time of a case to CASE_S."""

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
    raise TimeoutError(f"the test was not done after {CASE_S} s")


def ask(book: Book, question: str) -> list[str]:
    """The copy's answers to the question and to those asked together with it, as lines."""
    import importlib

    from shared.book.traps.answers import KERNEL_TOKENS, MAX_TOKENS, OTHERS, in_company, in_kernels

    chapter, trap = planted(book)
    with in_place(directory(book)):
        modules = [importlib.import_module(f"milestones.{chapter.name}{part}") for part in ("", ".text")]
        kernels = in_kernels(trap)
        texts = in_company(*modules, (question,), kernels)
    wrapped = (textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  ") for text in texts)
    answers = [line for asked, text in zip((question, *OTHERS), wrapped) for line in (f"> {asked}", text)]
    rules = f"Answers have at most {KERNEL_TOKENS if kernels else MAX_TOKENS} tokens, and the first story is aborted on purpose."
    return [*answers, "", rules]


def reveal(book: Book) -> list[str]:
    """The bug's name, its diff, its effect, and the tests that catch it, as lines; your edits to the copy do not matter."""
    chapter, trap = planted(book)
    with tempfile.TemporaryDirectory() as scratch:
        again = make_copy(chapter, Path(scratch))
        plant(trap, again)
        old, new = ((directory / trap.file).read_text().splitlines() for directory in (chapter.path, again))
    lines = [f"{trap.name}, in {trap.address}", "", *difflib.unified_diff(old, new, trap.file, trap.file, lineterm="", n=2)]
    return [*lines, "", f"What you see: {trap.told}", f"Caught by: {', '.join(trap.test)}"]


def main(argv: list[str], book: Book | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.book.traps.hunt", description="Find a planted bug.")
    parser.add_argument("what", choices=("break", "hunt", "reveal"))
    parser.add_argument("chapter", nargs="?", metavar="vNN")
    parser.add_argument("--ask", metavar="QUESTION", help="with hunt: ask the copy instead of testing it")
    parser.add_argument("--seed", type=int, help="with break: the same seed plants the same bug")
    args = parser.parse_args(argv)
    if args.chapter and args.what != "break":
        parser.error(f"{args.what} is about the bug that is planted; leave {args.chapter} out, or plant another one with `break {args.chapter}`")
    if args.ask is not None and args.what != "hunt":
        parser.error(f"--ask is for hunt, not for {args.what}; leave it out")
    if args.seed is not None and args.what != "break":
        parser.error(f"--seed is for break, not for {args.what}; leave it out")
    book = book or BOOK
    try:
        if args.what == "break":
            if not args.chapter:
                parser.error("name a chapter, for example `break v05`")
            copy = begin(book, book.find(args.chapter), random.Random(args.seed))
            print(f"There is one bug in {copy.relative_to(book.root)}. The engine still starts.\n")
            todo = {
                "make hunt": "run the tests: which fail, and what do they have in common?",
                'make hunt ASK="What is a KV cache?"': "ask it a question, together with others",
                f"$EDITOR {copy.relative_to(book.root)}": "read the code, as if it were sent to you for review",
                "make reveal": "see the bug",
            }
            for command, what in todo.items():
                print(f"  {command:40}{what}")
            print()
            print(f"Not fair: a diff against milestones/{copy.name}.")
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
