"""Generate a claim's block: for each kind of claim, a function from the claim's text to lines of Markdown.

    code    units of this chapter
    diff    units against the chapter before; each changed unit has one such claim
    see     the same diff, shown again
    words   the diff of units in which only comments or docstrings differ; the reason follows
    traps   the chapter's seeded bugs, all or those of some units
    table   a table by name, from TABLES

In a text that belongs to no chapter, an address begins with its chapter: `v03/cache.py::KVCache`.

Reads: the chapters, tests/traps/*.toml.
"""
import re
from collections.abc import Callable

from shared.book.claims import cost_tables, module_map, result_tables
from shared.book.diff import changes_of, diff_lines
from shared.book.traps.seeded_bugs import read_traps
from shared.book.units import Unit, expand, read_units, split
from shared.chapters import Book, Chapter


def code(book: Book, chapter: Chapter | None, what: str) -> list[str]:
    """The units' code: a caption and a fenced block for each file."""
    chapter, what = chapter_of(book, chapter, what)
    units = read_units(chapter.path)
    lines = []
    for file, addresses in by_file(expand(what, units)).items():
        named = [pattern for pattern in split(what) if pattern.split("::")[0] == file]
        lines += [caption(file, named), *fence("python", source([units[address] for address in addresses]))]
    return lines


def diff(book: Book, chapter: Chapter | None, what: str) -> list[str]:
    """The units' diff against the chapter before."""
    chapter, what = chapter_of(book, chapter, what)
    previous = chapter.previous
    if previous is None:
        raise ValueError(f"{chapter.id} is the first chapter and has no diff; show the units with `code:`")
    changes = {change.address: change for change in changes_of(chapter)}
    chosen = [changes[address] for address in expand(what, changes)]
    differing = [change for change in chosen if change.kind != "identical"]
    for pattern in split(what):
        if not any(change.address in expand(pattern, changes) for change in differing):
            raise ValueError(f"{pattern} is the same as in {previous.id}; remove the claim, or show it with `code:`")
    return fence("diff", diff_lines(differing))


def traps(book: Book, chapter: Chapter | None, what: str) -> list[str]:
    """A list of the seeded bugs: their names, where they are, and what a user would see."""
    if chapter is None:
        raise ValueError("traps belong to a chapter; claim them in its README.md")
    path = chapter.traps
    if not path.is_file():
        raise ValueError(f"there is no {path.relative_to(book.root)}; write the chapter's traps first")
    shown = read_traps(path)
    if what:
        expand(what, read_units(chapter.path))
        addresses = set(expand(what, [trap.address for trap in shown]))
        shown = [trap for trap in shown if trap.address in addresses]
    if not shown:
        raise ValueError(f"{path.relative_to(book.root)} has no traps; write them first")
    return [f"- **{trap.name}** (`{trap.address}`): {trap.told}" for trap in shown]


def table(book: Book, chapter: Chapter | None, what: str) -> list[str]:
    """The table with this name."""
    if what not in TABLES:
        raise ValueError(f"there is no table {what!r}; the tables are {', '.join(TABLES)}")
    return TABLES[what](book, chapter)


def chapters_table(book: Book, chapter: Chapter | None) -> list[str]:
    """The chapters, each with its idea."""
    rows = [f"| [{each.name}](milestones/{each.name}/README.md) | {each.idea} |" for each in book.chapters]
    return ["| chapter | idea |", "|---|---|", *rows]


Generator = Callable[[Book, Chapter | None, str], list[str]]

GENERATORS: dict[str, Generator] = {
    "code": code,
    "diff": diff,
    "see": diff,
    "words": diff,
    "traps": traps,
    "table": table,
}

TABLES: dict[str, Callable[[Book, Chapter | None], list[str]]] = {
    "chapters": chapters_table,
    "cost": cost_tables.cost,
    "strip": cost_tables.strip,
    "staircase": cost_tables.staircase,
    "steps": cost_tables.steps,
    "map": module_map.module_map,
    **result_tables.TABLES,
}


def chapter_of(book: Book, chapter: Chapter | None, what: str) -> tuple[Chapter, str]:
    """The chapter that a list of addresses refers to, and the list without the chapter's name."""
    named = {pattern.split("/")[0] for pattern in split(what) if re.match(r"v\d+\w*/", pattern)}
    if not named and chapter is not None:
        return chapter, what
    if len(named) != 1:
        raise ValueError(f"{what!r} must name exactly one chapter, as in v03/cache.py::KVCache")
    [name] = named
    return book.find(name), ", ".join(pattern.removeprefix(f"{name}/") for pattern in split(what))


def by_file(addresses: list[str]) -> dict[str, list[str]]:
    files = {}
    for address in addresses:
        files.setdefault(address.split("::")[0], []).append(address)
    return files


def caption(file: str, patterns: list[str]) -> str:
    """The caption of a block of code.

    >>> caption("layers.py", ["layers.py::RMSNorm.*", "layers.py::rotate"])
    '`layers.py`: `RMSNorm`, `rotate`'
    """
    names = [pattern.partition("::")[2].removesuffix("*").removesuffix(".") for pattern in patterns]
    return f"`{file}`" + (": " + ", ".join(f"`{name}`" for name in names) if all(names) else "")


def source(units: list[Unit]) -> list[str]:
    """The units' lines in the order of their file, without their common indentation."""
    pieces = sorted((piece for unit in units for piece in unit.pieces), key=lambda piece: piece.first_line)
    lines = []
    for piece in pieces:
        lines += [""] * (piece.blank_lines if lines else 0) + piece.text.splitlines()
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return [line[margin:] for line in lines]


def fence(language: str, lines: list[str]) -> list[str]:
    """Lines in a fenced block, whose fence is longer than any run of backticks in them."""
    longest = max((len(run) for line in lines for run in re.findall(r"`+", line)), default=0)
    ticks = "`" * max(3, longest + 1)
    return [ticks + language, *lines, ticks]
