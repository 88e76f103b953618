"""Start a new chapter as a copy of the last one.

    python -m shared.book.new v08 preemption

Copies the last chapter's directory and notebook, and creates the chapter's other files: a skeleton text, an empty
list of traps, a test file for its claims, and a row in the table of contents, for you to fill in.

Reads: the last chapter. Writes: milestones/vNN_*, tests/traps, tests/claims, notebooks, shared/chapters.py.
"""
import ast
import re
import sys
from pathlib import Path

from shared.book.changed_copy import make_copy
from shared.chapters import BOOK, Book, Chapter, Row
from shared.programs import run

TEXT = """\
# {id}: what it is, and nothing else

One sentence: the idea. Below it the tables `cost` and `strip`, and a picture.

> **Predict before you run.**

## The change

What changed and why, a paragraph above each claim: `diff: FILE::UNIT` in a comment, then `make sync`.

## Run it

## What it costs

## What it still gets wrong

## In vLLM and SGLang

## Exercises
"""

TRAPS = """\
# The mistakes people make in {id}: each is planted, and the test that it names must fail.
# python -m shared.book.traps {id} plants them; shared/book/traps/runner.py describes the format.
"""

CLAIMS = '''"""What {id} claims: its own way of doing things, for it and all later chapters."""
'''

ROW = """\
    Row(
        name="{name}",
        idea="",
        adds=frozenset(),
    ),
"""


def create(book: Book, number: str, noun: str) -> list[Path]:
    """Create the chapter; the paths written. ValueError if it cannot be created, in which case nothing is written."""
    last = book.chapters[-1]
    expected = f"v{int(last.id[1:]) + 1:02}"
    if number != expected:
        raise ValueError(f"the chapter after {last.name} is {expected}, not {number}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", noun):
        raise ValueError(f"NAME must be lower-case letters, digits and underscores, starting with a letter, got {noun!r}")
    name = f"{number}_{noun}"
    contents = book.root / "shared" / "chapters.py"
    chapter = Chapter(*Row(name), root=book.root, previous=last)
    for path in (chapter.path, chapter.claims, chapter.traps):
        if path.exists():
            raise ValueError(f"{path.relative_to(book.root)} already exists; remove it first")
    rows = add_row(contents.read_text(), name)
    make_copy(last, chapter.path.parent, "README.md", name=name)
    written = [chapter.path]
    for path, template in ((chapter.text, TEXT), (chapter.traps, TRAPS), (chapter.claims, CLAIMS)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template.format(id=number))
        written.append(path)
    if last.notebook.exists():
        chapter.notebook.write_text(last.notebook.read_text().replace(last.name, name))
        written.append(chapter.notebook)
    contents.write_text(rows)
    return [*written, contents]


def add_row(source: str, name: str) -> str:
    """The source of the table of contents with a row for name added at the end of CONTENTS."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONTENTS":
            lines = source.splitlines(keepends=True)
            if lines[node.end_lineno - 1].strip() == ")":
                lines.insert(node.end_lineno - 1, ROW.format(name=name))
                return "".join(lines)
    raise ValueError("shared/chapters.py has no CONTENTS that ends with a line `)`")


def main(argv: list[str], book: Book | None = None) -> int:
    if len(argv) != 2:
        print("usage: python -m shared.book.new v08 NAME", file=sys.stderr)
        return 2
    book = book or BOOK
    try:
        written = create(book, *argv)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for path in written:
        print(f"wrote {path.relative_to(book.root)}")
    print(f"next: declare what {argv[0]} adds in shared/chapters.py, then run `make diff-{argv[0]}`")
    return 0


if __name__ == "__main__":
    run(main)
