"""The diff of a chapter against the one before, by units.

    python -m shared.book.diff v05

Each hunk is headed by its unit, and unchanged lines are left out. Blank lines between units are not counted.

Reads: the chapters.
"""
import sys
from difflib import SequenceMatcher, unified_diff

from shared.book.units import Change, compare, read_units
from shared.chapters import BOOK, Book, Chapter, python_files
from shared.programs import run

COLORS = {"+": "\033[32m", "-": "\033[31m", "@": "\033[36m", "=": "\033[1m"}


def changes_of(chapter: Chapter) -> list[Change]:
    """The change of every unit against the chapter before; in the first chapter all are added."""
    previous = chapter.previous
    return compare(read_units(previous.path) if previous else {}, read_units(chapter.path))


def mark(old: str, new: str) -> list[str]:
    """The lines of both texts, each prefixed with a blank, a minus or a plus."""
    a, b = old.splitlines(), new.splitlines()
    # Blank lines are junk, so that the texts are not aligned on them.
    matcher = SequenceMatcher(lambda line: not line.strip(), a, b, autojunk=False)
    marked = []
    for tag, a_start, a_end, b_start, b_end in matcher.get_opcodes():
        if tag == "equal":
            marked += [f" {line}" for line in a[a_start:a_end]]
        else:
            marked += [f"-{line}" for line in a[a_start:a_end]]
            marked += [f"+{line}" for line in b[b_start:b_end]]
    return [line.rstrip() or " " for line in marked]


def hunks(change: Change, context: int = 3) -> list[str]:
    """A change as lines of a diff, each hunk headed by the unit's address."""
    marked = mark(*change.texts)
    near = {n + i for n, line in enumerate(marked) if line[0] in "+-" for i in range(-context, context + 1)}
    lines = []
    for n, line in enumerate(marked):
        if n in near:
            lines += [line] if n - 1 in near and n else [f"@@ {change.address} @@", line]
    return lines


def diff_lines(changes: list[Change]) -> list[str]:
    """Changes as one diff; a new class is one hunk with its methods."""
    lines, whole = [], None
    for change in changes:
        if whole and change.kind == "added" and change.address.startswith(f"{whole}."):
            lines += ["+", *hunks(change)[1:]]
            continue
        whole = change.address if change.kind == "added" and change.new.kind == "class" else None
        lines += hunks(change)
    return lines


def count(change: Change) -> tuple[int, int]:
    """The numbers of lines added and removed."""
    marked = mark(*change.texts)
    return sum(line[0] == "+" for line in marked), sum(line[0] == "-" for line in marked)


def summary(changes: list[Change]) -> list[str]:
    """The numbers of changes: one line per file, then the totals."""
    by_file = {}
    for change in changes:
        by_file.setdefault(change.address.split("::")[0], []).append(change)
    total = {"units": [0, 0, 0], "lines": [0, 0]}
    lines = []
    for file, of_file in by_file.items():
        kinds = [change.kind for change in of_file if change.kind != "identical"]
        new, gone = kinds.count("added"), kinds.count("removed")
        units = [len(kinds) - new - gone, new, gone]
        added, removed = (sum(column) for column in zip(*map(count, of_file)))
        total["units"] = [sum(pair) for pair in zip(total["units"], units)]
        total["lines"] = [sum(pair) for pair in zip(total["lines"], (added, removed))]
        if any(units):
            lines.append(row(file, units, added, removed))
    added, removed = total["lines"]
    return [*lines, row("total", total["units"], added, removed) + f"; {added + removed} lines"]


def row(name: str, units: list[int], added: int, removed: int) -> str:
    changed, new, gone = units
    return f"{name:20} +{added:<4} -{removed:<4} units: {changed} changed, {new} added, {gone} removed"


def lines_changed(before: Chapter, after: Chapter, only: str | None = None) -> tuple[int, int]:
    """Lines of Python added and removed between two chapters, as `diff -u` counts them; of one file only, if `only` names it."""
    added = removed = 0
    names = {path.relative_to(chapter.path) for chapter in (before, after) for path in python_files(chapter.path)}
    names = {name for name in names if only in (None, name.as_posix())}
    for name in sorted(names):
        old, new = ((chapter.path / name).read_text().splitlines() if (chapter.path / name).is_file() else []
                    for chapter in (before, after))
        for line in list(unified_diff(old, new, lineterm=""))[2:]:
            added += line.startswith("+")
            removed += line.startswith("-")
    return added, removed


def show(chapter: Chapter) -> list[str]:
    """The chapter's diff and its summary, as lines."""
    previous = chapter.previous
    if previous is None:
        return [f"{chapter.id} is the first chapter, so there is nothing to compare it with"]
    changes = changes_of(chapter)
    lines = []
    for file in sorted({change.address.split("::")[0] for change in changes if change.kind != "identical"}):
        of_file = [change for change in changes if change.address.split("::")[0] == file]
        lines += ["", f"=== {file}", *diff_lines([change for change in of_file if change.kind != "identical"])]
    added, removed = lines_changed(previous, chapter)
    as_diff = f"{'as diff -u counts':20} +{added:<4} -{removed:<4} blank lines between units included"
    return [*lines, "", f"{previous.id} to {chapter.id}", *summary(changes), as_diff]


def color(line: str) -> str:
    start = COLORS.get(line[:1])
    return f"{start}{line}\033[0m" if start else line


def main(argv: list[str], book: Book | None = None) -> int:
    if len(argv) != 1:
        print("usage: python -m shared.book.diff v05", file=sys.stderr)
        return 2
    book = book or BOOK
    try:
        lines = show(book.find(argv[0]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for line in lines:
        print(color(line) if sys.stdout.isatty() else line)
    return 0


if __name__ == "__main__":
    run(main)
