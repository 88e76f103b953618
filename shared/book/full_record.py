"""The record of which chapters have passed all of their tests in their current state: tests/full.json.

`make test` runs only part of the tests. When `make test-vNN` passes in a clean tree, it records a hash of every file that
its tests imported or opened: of the chapter, of those it is compared with, of tests/ and of shared/. As long as the hash
matches, nothing that those tests used has changed. `make prove` runs all tests, and plants all traps, of the last chapter,
of one picked by the commit's hash, and of at most LIMIT whose hash no longer matches. After a change to what all tests
share, run `make test-all` and `python -m shared.book.traps --all`.

    python -m shared.book.full_record         # prints which chapters' records are current
    python -m shared.book.full_record pick    # prints the chapters whose tests `make prove` runs in full

Reads: tests/full.json, git. Writes: tests/full.json.
"""
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from shared.chapters import BOOK, Book, Chapter
from shared.programs import run

FILE = Path("tests") / "full.json"
FOLDERS = ("milestones", "shared", "tests")  # only files in these count
LIMIT = 1


def counted(paths: Iterable[Path], root: Path) -> list[str]:
    """The files among paths that count, relative to the root; if one is a model's, all files of that model.

    Some of a model's files are opened by a native library, where Python does not see it.
    """
    models = root / "shared" / "models"
    files = set()
    for path in paths:
        if not path.is_relative_to(root) or path.relative_to(root).parts[0] not in FOLDERS or path == root / FILE:
            continue
        if "__pycache__" in path.parts or not path.is_file():
            continue
        files.add(path)
        if path.is_relative_to(models) and path.parent != models:
            files.update(each for each in path.parent.iterdir() if each.is_file())
    return sorted(path.relative_to(root).as_posix() for path in files)


def digest(root: Path, files: list[str]) -> str:
    """A hash of files' paths and contents; a missing file changes it."""
    total = hashlib.blake2b(digest_size=16)
    for file in files:
        path = root / file
        total.update(file.encode() + b"\0" + (path.read_bytes() if path.is_file() else b"gone") + b"\0")
    return total.hexdigest()


def read(root: Path) -> dict[str, dict]:
    path = root / FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def record(book: Book, chapter: Chapter, files: list[str]) -> None:
    """Record that all of a chapter's tests passed on these files."""
    rows = read(book.root) | {chapter.id: {"hash": digest(book.root, files), "files": files}}
    lines = [f"  {json.dumps(each.id)}: {json.dumps(rows[each.id])}" for each in book.chapters if each.id in rows]
    (book.root / FILE).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def stale(book: Book) -> list[Chapter]:
    """The chapters without a record, or with a file that has changed since."""
    rows = read(book.root)

    def holds(chapter: Chapter) -> bool:
        row = rows.get(chapter.id)
        return row is not None and digest(book.root, row["files"]) == row["hash"]

    return [chapter for chapter in book.chapters if not holds(chapter)]


def changes(root: Path) -> str:
    """git's list of changes since the last commit, except to the record; ValueError outside a git repository."""
    command = ["git", "status", "--porcelain", "--", ".", f":(exclude){FILE.as_posix()}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"`git status` failed in {root}: {done.stderr.strip()}")
    return done.stdout


def commit(root: Path) -> str:
    """The hash of HEAD; "0" outside a git repository."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "0"


def picked(book: Book, commit: str) -> list[Chapter]:
    """The chapters to run in full: the last, one by the commit's hash, and the first LIMIT others whose record is stale."""
    by_chance = book.chapters[int(commit, 16) % len(book.chapters)]
    others = [chapter for chapter in stale(book) if chapter not in (book.chapters[-1], by_chance)]
    chosen = {book.chapters[-1], by_chance, *others[:LIMIT]}
    return [chapter for chapter in book.chapters if chapter in chosen]


def main(argv: list[str], book: Book = BOOK) -> int:
    if argv not in ([], ["pick"]):
        print("usage: python -m shared.book.full_record [pick]", file=sys.stderr)
        return 2
    if argv:
        print(*(chapter.id for chapter in picked(book, commit(book.root))))
        return 0
    old = stale(book)
    for chapter in book.chapters:
        print(f"{chapter.id}  {'missing or stale; run `make test-' + chapter.id + '`' if chapter in old else 'current'}")
    return 0


if __name__ == "__main__":
    run(main)
