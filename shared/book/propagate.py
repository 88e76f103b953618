"""Carry a change from the chapter it was made in through all later ones.

    python -m shared.book.propagate v03 [--no-tests]
    python -m shared.book.propagate --continue
    python -m shared.book.propagate --abort

The changes to v03's *.py files since HEAD are merged into v04, the resulting changes to v04 into v05, and so on, each
with a 3-way `git merge-file` (base: v03 at HEAD; theirs: v03 now; ours: v04). Files added, deleted or renamed in v03 are
added, deleted or renamed in the later chapters too. Texts are never touched.

At a conflict it stops, with conflict markers in the files that it names. Edit them and give --continue, or give --abort,
which restores every later chapter (v03 keeps its edit). A file that was deleted in v03 and differs in v04 is a conflict
too: empty it to delete it there as well.

Reads: a chapter's change since HEAD. Writes: the later chapters.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from shared.chapters import BOOK, Book, Chapter, python_files
from shared.programs import run

MARKER = re.compile(rb"^(<{7}|\|{7}|={7}|>{7})( |$)", re.MULTILINE)
SAME_FILE = 0.6  # a deleted and a new file count as a rename if they are at least this similar

Files = dict[str, bytes]
Tests = Callable[[Book, tuple[Chapter, ...]], int]


class Refused(Exception):
    """Why a propagation cannot start or continue."""


@dataclass
class Progress:
    """The state of a propagation; stored under .git until it is complete."""

    chapter: str  # where the change was made
    done: int  # how many later chapters have been merged
    conflicts: list[str]  # files with conflict markers, relative to the root
    renames: dict[str, str]
    tests: bool

    def save(self, book: Book) -> None:
        state_file(book).write_text(json.dumps(vars(self)))


def state_file(book: Book) -> Path:
    return book.root / git(book, "rev-parse", "--git-dir").decode().strip() / "stepserve-propagate.json"


def load(book: Book) -> Progress | None:
    path = state_file(book)
    return Progress(**json.loads(path.read_text())) if path.exists() else None


def git(book: Book, *arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=book.root, capture_output=True)
    if done.returncode:
        raise Refused(f"git {arguments[0]}: {done.stderr.decode().strip()}")
    return done.stdout


def at_head(book: Book, chapter: Chapter) -> Files:
    """A chapter's *.py files at HEAD."""
    place = chapter.path.relative_to(book.root).as_posix()
    names = git(book, "ls-tree", "-r", "-z", "--name-only", "HEAD", "--", f"{place}/").decode().split("\0")
    names = [name for name in names if name.endswith(".py")]
    return {name.removeprefix(f"{place}/"): git(book, "show", f"HEAD:./{name}") for name in names}


def at_work(chapter: Chapter) -> Files:
    """A chapter's *.py files in the working tree."""
    return {path.relative_to(chapter.path).as_posix(): path.read_bytes() for path in python_files(chapter.path)}


def find_renames(old: Files, new: Files) -> dict[str, str]:
    """Renamed files, old name to new."""
    renames = {}
    for gone in sorted(old.keys() - new.keys()):
        similarity = {}
        for added in sorted(new.keys() - old.keys() - set(renames.values())):
            lines = old[gone].splitlines(), new[added].splitlines()
            similarity[added] = SequenceMatcher(None, *lines, autojunk=False).ratio()
        best = max(similarity, key=similarity.get, default=None)
        if best and similarity[best] >= SAME_FILE:
            renames[gone] = best
    return renames


def merge_chapter(book: Book, source: Chapter, target: Chapter, renames: dict[str, str]) -> list[str]:
    """Merge the source's changes since HEAD into target; the target's files with conflicts."""
    old, new, ours = at_head(book, source), at_work(source), at_work(target)
    conflicts = []
    pairs = [(name, renames.get(name, name)) for name in old]
    pairs += [(name, name) for name in new if name not in old and name not in renames.values()]
    for before, after in pairs:
        was, now, mine = old.get(before), new.get(after), ours.get(before)
        if was == now and before == after:
            continue
        if mine is None and was is not None:
            print(f"{target.id} has no {before}, and gets none")
            continue
        if now is None and mine == was:
            (target.path / before).unlink()
            continue
        merged, clean = merge(mine, was, now, source, target)
        if before != after:
            (target.path / before).unlink()
        (target.path / after).parent.mkdir(parents=True, exist_ok=True)
        (target.path / after).write_bytes(merged)
        if not clean:
            conflicts.append((target.path / after).relative_to(book.root).as_posix())
    return conflicts


def merge(
    ours: bytes | None,
    base: bytes | None,
    theirs: bytes | None,
    source: Chapter,
    target: Chapter,
) -> tuple[bytes, bool]:
    """One file's 3-way merge, and whether it has no conflict; a missing file counts as empty."""
    if ours is None and base is None:
        return theirs, True
    labels = (target.id, f"{source.id} at HEAD", source.id)
    with tempfile.TemporaryDirectory() as scratch:
        paths = []
        for n, content in enumerate((ours, base, theirs)):
            paths.append(Path(scratch) / str(n))
            paths[n].write_bytes(content or b"")
        command = ["git", "merge-file", "-p", "--diff3"]
        for label in labels:
            command += ["-L", label]
        done = subprocess.run([*command, *map(str, paths)], capture_output=True)
    if done.returncode < 0 or done.returncode > 127:
        raise Refused(f"git merge-file: {done.stderr.decode().strip()}")
    return done.stdout, done.returncode == 0


def start(book: Book, chapter: Chapter, tests: Tests | None) -> int:
    """Propagate a chapter's changes; 0 if that succeeds, 1 at a conflict or a failed test."""
    if load(book):
        raise Refused("a propagation is in progress; give --continue or --abort")
    if not at_head(book, chapter):
        raise Refused(f"{chapter.id} is not committed yet, so there is nothing to compare it with; commit it first")
    later = book.after(chapter)
    for each in later:
        if git(book, "status", "--porcelain", "--", str(each.path)).strip():
            raise Refused(f"{each.id} has uncommitted changes; commit or stash them first")
    old, new = at_head(book, chapter), at_work(chapter)
    if old == new:
        print(f"no *.py file of {chapter.id} has changed since HEAD")
        return 0
    renames = find_renames(old, new)
    for each in later:
        for name in renames.values() & at_work(each).keys():
            raise Refused(f"{each.id} already has a file called {name}; rename one of them first")
    return advance(book, Progress(chapter.name, 0, [], renames, tests is not None), tests)


def advance(book: Book, progress: Progress, tests: Tests | None) -> int:
    """Merge into the remaining chapters, up to the end or the next conflict."""
    first = book.find(progress.chapter)
    chain = (first, *book.after(first))
    while progress.done + 1 < len(chain):
        source, target = chain[progress.done:progress.done + 2]
        before = at_work(target)
        progress.save(book)
        progress.conflicts = merge_chapter(book, source, target, progress.renames)
        progress.done += 1
        progress.save(book)
        if progress.conflicts:
            print(f"conflict between {source.id} and {target.id} in:")
            print(*(f"    {name}" for name in progress.conflicts), sep="\n")
            print("resolve the conflict markers, then run: make propagate ARGS=--continue")
            print("or undo the propagation with:           make propagate ARGS=--abort")
            return 1
        print(f"{target.id} {'unchanged' if at_work(target) == before else 'merged'}")
    state_file(book).unlink(missing_ok=True)
    print("now run `make sync`, since the texts show this code")
    return tests(book, chain) if tests else 0


def go_on(book: Book, tests: Tests | None) -> int:
    """Continue after a conflict has been resolved by hand."""
    progress = load(book)
    if progress is None:
        raise Refused("no propagation is in progress")
    for name in progress.conflicts:
        path = book.root / name
        if path.exists() and MARKER.search(path.read_bytes()):
            raise Refused(f"{name} still has conflict markers; resolve them, then give --continue")
        if path.exists() and not path.read_bytes().strip():
            path.unlink()
    return advance(book, progress, tests if progress.tests else None)


def abort(book: Book) -> int:
    """Restore every later chapter."""
    progress = load(book)
    if progress is None:
        raise Refused("no propagation is in progress")
    restore(book, book.after(book.find(progress.chapter)))
    state_file(book).unlink()
    print(f"the chapters after {book.find(progress.chapter).id} are restored")
    return 0


def restore(book: Book, chapters: tuple[Chapter, ...]) -> None:
    """Restore the chapters' *.py files to HEAD, contents and modes, and delete new ones."""
    for chapter in chapters:
        committed = at_head(book, chapter)
        for name in at_work(chapter).keys() - committed.keys():
            path = chapter.path / name
            path.unlink()
            while path.parent != chapter.path and not any(path.parent.iterdir()):
                path = path.parent
                path.rmdir()
        git(book, "checkout", "HEAD", "--", *(str(chapter.path / name) for name in committed))


def run_tests(book: Book, chapters: tuple[Chapter, ...]) -> int:
    """Run the tests of these chapters; 0 if all pass."""
    options = [option for chapter in chapters for option in ("--chapter", chapter.id)]
    print(f"testing {', '.join(each.id for each in chapters)}", flush=True)
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-n", "logical", "--dist", "worksteal", *options]
    return subprocess.run(command, cwd=book.root).returncode


def main(argv: list[str], book: Book | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.book.propagate", description="Carry a change through all later chapters.")
    parser.add_argument("chapter", nargs="?", metavar="vNN", help="the chapter with the change")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="continue after resolving a conflict")
    parser.add_argument("--abort", action="store_true", help="restore the later chapters")
    parser.add_argument("--no-tests", action="store_true", help="do not run the chapters' tests at the end")
    arguments = parser.parse_args(argv)
    book = book or BOOK
    tests = None if arguments.no_tests else run_tests
    try:
        if arguments.go_on:
            return go_on(book, tests)
        if arguments.abort:
            return abort(book)
        if not arguments.chapter:
            parser.error("name the chapter with the change")
        return start(book, book.find(arguments.chapter), tests)
    except (Refused, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    run(main)
