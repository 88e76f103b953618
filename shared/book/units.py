"""A chapter's source as units: functions, methods, classes, and what a module holds besides.

An *address* names a unit without a line number:

    cache.py                    the module's own body: docstring, constants, what stands outside of the rest
    cache.py::kv_bytes          a function
    cache.py::KVCache           the class itself: decorators, docstring, fields; not its methods
    cache.py::KVCache.read      a method

A claim may take several at once: `cache.py::KVCache.*` is the class with its methods, `cache.py::*` the
whole file. Decorators and the comment directly above a unit belong to it. Imports are a part of the
module's body, and are kept apart, so that "only imports changed" can be told.
"""
import ast
import copy
import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from shared.chapters import python_files

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORTS = (ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class Piece:
    """Adjacent lines of one unit; a unit has several where others stand in between."""

    address: str
    first_line: int
    blank_lines: int  # above it
    text: str


@dataclass(frozen=True)
class Unit:
    """A named part of a chapter.

    `tree` is the syntax tree as text, without docstrings: two units that differ in `text` and not in `tree`
    differ in words only.
    """

    address: str
    kind: str  # module, class or function
    pieces: tuple[Piece, ...]
    tree: str
    imports: str  # of a module: the trees of its imports
    body: str  # of a module: its lines without imports; of others: text

    @property
    def text(self) -> str:
        return "\n\n".join(piece.text for piece in self.pieces)

    @property
    def first_line(self) -> int:
        return self.pieces[0].first_line


@dataclass(frozen=True)
class Change:
    """What became of one unit from one chapter to the next."""

    address: str
    kind: str  # identical, changed, added, removed, imports (only those differ), cosmetic (only words do)
    old: Unit | None
    new: Unit | None

    @property
    def texts(self) -> tuple[str, str]:
        return (self.old.text if self.old else "", self.new.text if self.new else "")


def read_units(directory: Path) -> dict[str, Unit]:
    """All units of a chapter, or of a copy of one, by address: file after file, each in its own order."""
    units = {}
    for path in python_files(directory):
        file = path.relative_to(directory).as_posix()
        try:
            units |= parse(path.read_text(), file)
        except SyntaxError as error:
            found = (error.text or error.msg).strip()
            if found.startswith("<<<<<<<"):
                found += "; if that is a propagation's, end it first: make propagate ARGS=--continue"
            raise ValueError(f"{directory.name}/{file}:{error.lineno} is no Python: {found}") from None
    return units


@functools.cache
def parse(source: str, file: str) -> dict[str, Unit]:
    """The units of one file, by address."""
    module = ast.parse(source, filename=file)
    nodes = find_nodes(module, file)
    lines = source.splitlines()
    owners = assign_lines(nodes, lines, file)
    pieces = cut(lines, owners)
    import_lines = {n for node in module.body if isinstance(node, IMPORTS) for n in span(node)}
    imports = "\n".join(ast.dump(node) for node in module.body if isinstance(node, IMPORTS))
    units = {}
    for address in dict.fromkeys(piece.address for piece in pieces):
        own = tuple(piece for piece in pieces if piece.address == address)
        found = nodes.get(address, [])
        kind = "module" if address == file else "class" if isinstance(found[0], ast.ClassDef) else "function"
        body = "\n\n".join(piece.text for piece in own)
        if kind == "module":
            body = [n for n, owner in enumerate(owners) if owner == file and n not in import_lines]
            body = "\n".join(lines[n] for n in body)
        units[address] = Unit(
            address=address,
            kind=kind,
            pieces=own,
            tree="\n".join(dump(node) for node in found),
            imports=imports if kind == "module" else "",
            body=body,
        )
    return units


def find_nodes(module: ast.Module, file: str) -> dict[str, list[ast.AST]]:
    """The syntax of each unit; several nodes where a name is defined again, as a property's setter is."""
    nodes = {}
    for node in module.body:
        if isinstance(node, FUNCTIONS):
            nodes.setdefault(f"{file}::{node.name}", []).append(node)
        elif isinstance(node, ast.ClassDef):
            nodes.setdefault(f"{file}::{node.name}", []).append(node)
            for child in node.body:
                if isinstance(child, FUNCTIONS):
                    nodes.setdefault(f"{file}::{node.name}.{child.name}", []).append(child)
        elif not isinstance(node, IMPORTS):
            nodes.setdefault(file, []).append(node)
    return nodes


def span(node: ast.AST) -> range:
    """The lines of a node, counted from 0, its decorators among them."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return range(first - 1, node.end_lineno)


def assign_lines(nodes: dict[str, list[ast.AST]], lines: list[str], file: str) -> list[str | None]:
    """The address that owns each line; None for a blank one."""
    owners = [file] * len(lines)
    # Methods come after their class, and take their lines from it.
    for address, found in nodes.items():
        if address == file:
            continue
        for node in found:
            lines_of_node = span(node)
            first = lines_of_node.start
            while first and lines[first - 1].lstrip().startswith("#"):
                first -= 1
            owners[first:lines_of_node.stop] = [address] * (lines_of_node.stop - first)
    return [owner if line.strip() else None for owner, line in zip(owners, lines)]


def cut(lines: list[str], owners: list[str | None]) -> list[Piece]:
    """Runs of lines with one owner; blank lines inside a run are part of it."""
    pieces = []
    filled = [n for n, owner in enumerate(owners) if owner]
    start, before = 0, -1
    for i, n in enumerate(filled):
        if i + 1 == len(filled) or owners[filled[i + 1]] != owners[n]:
            first = filled[start]
            text = "\n".join(lines[first:n + 1])
            pieces.append(Piece(owners[n], first + 1, first - before - 1, text))
            start, before = i + 1, n
    return pieces


def dump(node: ast.AST) -> str:
    """A unit's syntax tree as text, without docstrings, comments and, for a class, its methods."""
    node = copy.deepcopy(node)
    if isinstance(node, ast.ClassDef):
        node.body = [child for child in node.body if not isinstance(child, FUNCTIONS)]
    for inner in ast.walk(node):
        if isinstance(inner, (*FUNCTIONS, ast.ClassDef)) and ast.get_docstring(inner, clean=False) is not None:
            del inner.body[0]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return ""  # a module's docstring
    return ast.dump(node)


def compare(old: dict[str, Unit], new: dict[str, Unit]) -> list[Change]:
    """What became of every unit: in the new chapter's order, then what was removed."""
    changes = [Change(a, kind_of(old.get(a), unit), old.get(a), unit) for a, unit in new.items()]
    return changes + [Change(a, "removed", unit, None) for a, unit in old.items() if a not in new]


def kind_of(old: Unit | None, new: Unit) -> str:
    """The change from one unit to the other, in one word."""
    if old is None:
        return "added"
    if old.body == new.body and old.imports == new.imports:
        return "identical" if old.text == new.text or old.kind != "module" else "cosmetic"
    if old.body == new.body:
        return "imports"
    return "cosmetic" if old.tree == new.tree else "changed"


def misplaced(old: dict[str, Unit], new: dict[str, Unit]) -> list[str]:
    """What differs between two chapters outside of every unit: order, and blank lines in between."""
    found = []
    for file in dict.fromkeys(address.split("::")[0] for address in new):
        before, after = layout(old, file), layout(new, file)
        kept_before = [key for key in before if key in after]
        kept_after = [key for key in after if key in before]
        for key, expected in zip(kept_after, kept_before):
            if key != expected:
                found.append(f"{key[0]} stands where {expected[0]} stood before; units keep their order")
                break
        was = dict(zip(zip(before, list(before)[1:]), list(before.values())[1:]))
        for pair, blank_lines in zip(zip(after, list(after)[1:]), list(after.values())[1:]):
            if was.get(pair, blank_lines) != blank_lines:
                found.append(f"{pair[1][0]} has {blank_lines} blank lines above it, and had {was[pair]}")
    return found


def layout(units: dict[str, Unit], file: str) -> dict[tuple, int]:
    """A file's pieces in order, each with the blank lines above it."""
    pieces, seen = [], Counter()
    for unit in units.values():
        if unit.address.split("::")[0] == file:
            pieces += [(piece, unit.kind) for piece in unit.pieces]
    found = {}
    for piece, kind in sorted(pieces, key=lambda pair: pair[0].first_line):
        # A function is known by its name, whatever it says; what else stands in a file by its text.
        key = (piece.address, "" if kind == "function" else piece.text)
        seen[key] += 1
        found[*key, seen[key]] = piece.blank_lines
    return found


def expand(patterns: str, addresses) -> list[str]:
    """The addresses that a claim's list names, in the order of the list.

    >>> expand("a.py::B.*", ["a.py", "a.py::B", "a.py::B.c", "a.py::Bd"])
    ['a.py::B', 'a.py::B.c']
    """
    chosen = []
    for pattern in split(patterns):
        found = [address for address in addresses if matches(pattern, address)]
        if not found:
            raise ValueError(f"there is no unit {pattern}")
        chosen += found
    return list(dict.fromkeys(chosen))


def split(patterns: str) -> list[str]:
    return [pattern for pattern in patterns.replace("\n", " ").replace(",", " ").split()]


def matches(pattern: str, address: str) -> bool:
    if pattern.endswith("::*"):
        return address.split("::")[0] == pattern[:-3]
    if pattern.endswith(".*"):
        return address == pattern[:-2] or address.startswith(pattern[:-1])
    return address == pattern
