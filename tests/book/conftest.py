"""Small books on which the tools run."""
import subprocess
from pathlib import Path

import pytest

from shared.chapters import Book, Row

FIRST = {
    "__init__.py": '"""A book."""\nfrom .cache import Cache\n',
    "cache.py": '''\
"""What is remembered."""
import math

SIZE = 4  # entries


# The oldest is the first to go.
class Cache:
    """Numbers by name."""

    def __init__(self):
        self.numbers = {}

    def write(self, name, number):
        self.numbers[name] = number


def cost(n):
    """Bytes of n entries."""
    return n * SIZE
''',
}


@pytest.fixture
def make_book(tmp_path):
    """A function that writes a book: a dict of files for each chapter, and files beside the chapters."""

    def make(*chapters: dict[str, str], beside: dict[str, str] = {}) -> Book:
        names = tuple(f"v{n + 1:02}_{'abcdef'[n]}" for n in range(len(chapters)))
        for name, files in zip(names, chapters):
            write(tmp_path / "milestones" / name, files)
        write(tmp_path, beside)
        return Book.of(tmp_path, [Row(name) for name in names])

    return make


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def first():
    """A chapter's files, for a test to vary."""
    return dict(FIRST)


@pytest.fixture
def commit():
    """A function that commits all of a book, as a git repository of its own."""

    def commit(book: Book) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "a book"]):
            subprocess.run(["git", *command], cwd=book.root, check=True, capture_output=True)

    return commit


def row(figures: dict, kind: str = "avx512", date: str = "2000-01-01", code: dict = {}) -> dict:
    """A result file with one row, measured on this kind of machine."""
    about = {"command": "measure", "machine": f"{kind} machine, Python 3", "date": date, "code": code}
    return {kind: about | figures}
