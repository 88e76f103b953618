"""Which chapters have had all of their tests, as they are now: tests/full.json.

`make test` runs a part of what there is. A green `make test-vNN` in a clean tree writes down here a hash of every file
that its tests imported or opened: of the chapter, of those it is compared with, of tests/ and of shared/. While the hash
holds, nothing that those tests saw has changed. `make prove` runs in full the last chapter, one more that the commit
chooses, and those whose hash does not hold, at most LIMIT of them: when what all tests share has changed, run
`make test-all`.

    python -m shared.book.full_record         # whose record holds, and whose does not
    python -m shared.book.full_record pick    # the chapters that `make prove` runs in full

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
FOLDERS = ("milestones", "shared", "tests")  # whose files count
LIMIT = 3


def counted(paths: Iterable[Path], root: Path) -> list[str]:
    """Those of the files that were seen that count, by their places from the root; of a model all of its files.

    A library that is no Python opens some of a model's files, which nobody sees.
    """
    models = root / "shared" / "models"
    found = set()
    for path in paths:
        if not path.is_relative_to(root) or path.relative_to(root).parts[0] not in FOLDERS or path == root / FILE:
            continue
        if "__pycache__" in path.parts or not path.is_file():
            continue
        found.add(path)
        if path.is_relative_to(models) and path.parent != models:
            found.update(each for each in path.parent.iterdir() if each.is_file())
    return sorted(path.relative_to(root).as_posix() for path in found)


def digest(root: Path, files: list[str]) -> str:
    """A hash of files and their places; of one that is gone, another hash."""
    found = hashlib.blake2b(digest_size=16)
    for file in files:
        path = root / file
        found.update(file.encode() + b"\0" + (path.read_bytes() if path.is_file() else b"gone") + b"\0")
    return found.hexdigest()


def read(root: Path) -> dict[str, dict]:
    path = root / FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def record(book: Book, chapter: Chapter, files: list[str]) -> None:
    """Write down that a chapter's tests were all run, and passed, on these files."""
    rows = read(book.root) | {chapter.id: {"hash": digest(book.root, files), "files": files}}
    lines = [f"  {json.dumps(each.id)}: {json.dumps(rows[each.id])}" for each in book.chapters if each.id in rows]
    (book.root / FILE).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def stale(book: Book) -> list[Chapter]:
    """The chapters of which something has changed since all of their tests ran, or that never had all."""
    rows = read(book.root)

    def holds(chapter: Chapter) -> bool:
        row = rows.get(chapter.id)
        return row is not None and digest(book.root, row["files"]) == row["hash"]

    return [chapter for chapter in book.chapters if not holds(chapter)]


def changes(root: Path) -> str:
    """What git says has changed since the last commit, beside the record; ValueError where there is no git."""
    command = ["git", "status", "--porcelain", "--", ".", f":(exclude){FILE.as_posix()}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git says nothing of {root}: {done.stderr.strip()}")
    return done.stdout


def commit(root: Path) -> str:
    """The commit's hash; zero where there is no git."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "0"


def picked(book: Book, commit: str) -> list[Chapter]:
    """The chapters to be run in full: the last, one by the commit's hash, and the first LIMIT whose record does not hold."""
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
        print(f"{chapter.id}  {'does not hold: `make test-' + chapter.id + '`' if chapter in old else 'holds'}")
    return 0


if __name__ == "__main__":
    run(main)
