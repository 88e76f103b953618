"""Begins a chapter as a copy of the last one.

    python -m shared.book.new v08 preemption

Copies its directory and its notebook, and writes what a chapter has besides: the beginning of a text, an
empty list of traps, a page for its claims, and a row in the table of contents, to be filled in.
"""
import ast
import re
import shutil
import sys
from pathlib import Path

from shared.book.tree import Tree, short, this_repository

TEXT = """\
# {id}: what it is, and nothing else

One sentence: the idea.

## Predict before you run

## The change

What changed and why, a paragraph above each claim: `diff: FILE::UNIT` in a comment, then `make sync`.

## Run it

## What it costs

## What it still gets wrong

## How others do it

## Exercises
"""

TRAPS = """\
# The mistakes people make in {id}: each is planted, and must fail the test that it names.
# python -m shared.book.traps {id} plants them; its docstring says how one is written.
"""

CLAIMS = '''"""What {id} claims: its own way of doing things, for it and all later chapters."""
'''

ROW = """\
    Chapter(
        name="{name}",
        idea="",
        adds=frozenset(),
    ),
"""


def create(tree: Tree, number: str, noun: str) -> list[Path]:
    """Make the chapter; what was written, and nothing if it is refused."""
    last = tree.chapters[-1]
    expected = f"v{int(short(last)[1:]) + 1:02}"
    if number != expected:
        raise ValueError(f"the chapter after {last.name} is {expected}, not {number}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", noun):
        raise ValueError(f"NAME is {noun!r}; it takes small letters, digits and underscores, and begins with a letter")
    name = f"{number}_{noun}"
    contents = tree.root / "shared" / "chapters.py"
    chapter, claims = last.with_name(name), tree.root / "tests" / "claims" / f"test_{number}.py"
    for path in (chapter, claims, tree.traps(chapter)):
        if path.exists():
            raise ValueError(f"{path.relative_to(tree.root)} is there already; remove it first")
    rows = add_row(contents.read_text(), name)
    shutil.copytree(last, chapter, ignore=shutil.ignore_patterns("__pycache__", "README.md"))
    written = [chapter]
    for path, template in ((chapter / "README.md", TEXT), (tree.traps(chapter), TRAPS), (claims, CLAIMS)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template.format(id=number))
        written.append(path)
    notebook = tree.root / "notebooks" / f"{last.name}.py"
    if notebook.exists():
        copy = notebook.with_name(f"{name}.py")
        copy.write_text(notebook.read_text().replace(last.name, name))
        written.append(copy)
    contents.write_text(rows)
    return [*written, contents]


def add_row(source: str, name: str) -> str:
    """The table of contents with a row for name before the end of CHAPTERS."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CHAPTERS":
            lines = source.splitlines(keepends=True)
            if lines[node.end_lineno - 1].strip() == ")":
                lines.insert(node.end_lineno - 1, ROW.format(name=name))
                return "".join(lines)
    raise ValueError("shared/chapters.py has no CHAPTERS that ends with a line `)`")


def main(argv: list[str], tree: Tree | None = None) -> int:
    if len(argv) != 2:
        print("usage: python -m shared.book.new v08 NAME", file=sys.stderr)
        return 2
    tree = tree or this_repository()
    try:
        written = create(tree, *argv)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for path in written:
        print(f"wrote {path.relative_to(tree.root)}")
    print(f"next: say what {argv[0]} adds in shared/chapters.py, then `make diff-{argv[0]}`")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
