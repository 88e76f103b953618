"""A chapter's source as units: functions, methods, classes, and module bodies.

An *address* names a unit without a line number:

    cache.py                    the module's own body: docstring, constants, all else outside functions and classes
    cache.py::kv_bytes          a function
    cache.py::KVCache           the class itself: decorators, docstring, fields; not its methods
    cache.py::KVCache.read      a method

A pattern in a claim names several: `cache.py::KVCache.*` is the class with its methods, `cache.py::*` the whole file.
Decorators and the comment directly above a unit belong to it. Imports belong to the module's body, but are compared
separately, to recognize changes of imports only.
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
    """Adjacent lines of one unit; a unit interrupted by others has several pieces."""

    address: str
    first_line: int
    blank_lines: int  # above it
    text: str


@dataclass(frozen=True)
class Unit:
    """A named part of a chapter.

    `tree` is the syntax tree as text, without docstrings. Units that differ in `text` but not in `tree` differ only in
    comments, docstrings or layout.
    """

    address: str
    kind: str  # module, class or function
    pieces: tuple[Piece, ...]
    tree: str
    imports: str  # for a module, the trees of its imports
    body: str  # for a module, its lines without imports; otherwise text

    @property
    def text(self) -> str:
        return "\n\n".join(piece.text for piece in self.pieces)

    @property
    def first_line(self) -> int:
        return self.pieces[0].first_line


@dataclass(frozen=True)
class Change:
    """How one unit differs from one chapter to the next."""

    address: str
    kind: str  # identical, changed, added, removed, imports (only these differ), cosmetic (only comments or docstrings do)
    old: Unit | None
    new: Unit | None

    @property
    def texts(self) -> tuple[str, str]:
        return (self.old.text if self.old else "", self.new.text if self.new else "")


def read_units(directory: Path) -> dict[str, Unit]:
    """All units of a chapter or its copy, by address, in the order of files and of lines."""
    units = {}
    for path in python_files(directory):
        file = path.relative_to(directory).as_posix()
        try:
            units |= parse(path.read_text(), file)
        except SyntaxError as error:
            line = (error.text or error.msg).strip()
            if line.startswith("<<<<<<<"):
                line += "; if this is a propagation's conflict, finish that first: make propagate ARGS=--continue"
            raise ValueError(f"{directory.name}/{file}:{error.lineno} is not valid Python: {line}") from None
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
        syntax = nodes.get(address, [])
        kind = "module" if address == file else "class" if isinstance(syntax[0], ast.ClassDef) else "function"
        body = "\n\n".join(piece.text for piece in own)
        if kind == "module":
            body = [n for n, owner in enumerate(owners) if owner == file and n not in import_lines]
            body = "\n".join(lines[n] for n in body)
        units[address] = Unit(
            address=address,
            kind=kind,
            pieces=own,
            tree="\n".join(dump(node) for node in syntax),
            imports=imports if kind == "module" else "",
            body=body,
        )
    return units


def find_nodes(module: ast.Module, file: str) -> dict[str, list[ast.AST]]:
    """Each unit's syntax nodes; several if a name is defined more than once, like a property with a setter."""
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
    """A node's lines, counted from 0, including its decorators."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return range(first - 1, node.end_lineno)


def assign_lines(nodes: dict[str, list[ast.AST]], lines: list[str], file: str) -> list[str | None]:
    """The address of each line's unit; None for blank lines."""
    owners = [file] * len(lines)
    # Methods follow their class in this order, so their lines are taken from the class.
    for address, syntax in nodes.items():
        if address == file:
            continue
        for node in syntax:
            lines_of_node = span(node)
            first = lines_of_node.start
            while first and lines[first - 1].lstrip().startswith("#"):
                first -= 1
            owners[first:lines_of_node.stop] = [address] * (lines_of_node.stop - first)
    return [owner if line.strip() else None for owner, line in zip(owners, lines)]


def cut(lines: list[str], owners: list[str | None]) -> list[Piece]:
    """Runs of lines with the same owner, including the blank lines inside a run."""
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
    """The change of every unit: in the new chapter's order, then the removed ones."""
    changes = [Change(a, kind_of(old.get(a), unit), old.get(a), unit) for a, unit in new.items()]
    return changes + [Change(a, "removed", unit, None) for a, unit in old.items() if a not in new]


def kind_of(old: Unit | None, new: Unit) -> str:
    """The kind of change from one unit to the other."""
    if old is None:
        return "added"
    if old.body == new.body and old.imports == new.imports:
        return "identical" if old.text == new.text or old.kind != "module" else "cosmetic"
    if old.body == new.body:
        return "imports"
    return "cosmetic" if old.tree == new.tree else "changed"


def misplaced(old: dict[str, Unit], new: dict[str, Unit]) -> list[str]:
    """Differences between two chapters outside all units, as messages: in their order, and in the blank lines between them."""
    messages = []
    for file in dict.fromkeys(address.split("::")[0] for address in new):
        before, after = layout(old, file), layout(new, file)
        kept_before = [key for key in before if key in after]
        kept_after = [key for key in after if key in before]
        for key, expected in zip(kept_after, kept_before):
            if key != expected:
                messages.append(f"{key[0]} is where {expected[0]} was before; units must keep their order")
                break
        was = dict(zip(zip(before, list(before)[1:]), list(before.values())[1:]))
        for pair, blank_lines in zip(zip(after, list(after)[1:]), list(after.values())[1:]):
            if was.get(pair, blank_lines) != blank_lines:
                messages.append(f"{pair[1][0]} has {blank_lines} blank lines above it, and had {was[pair]}")
    return messages


def layout(units: dict[str, Unit], file: str) -> dict[tuple, int]:
    """A file's pieces in order, each with the number of blank lines above it."""
    pieces, seen = [], Counter()
    for unit in units.values():
        if unit.address.split("::")[0] == file:
            pieces += [(piece, unit.kind) for piece in unit.pieces]
    blank_lines = {}
    for piece, kind in sorted(pieces, key=lambda pair: pair[0].first_line):
        # Functions are matched by name, even if their text changes; all other pieces by their text.
        key = (piece.address, "" if kind == "function" else piece.text)
        seen[key] += 1
        blank_lines[*key, seen[key]] = piece.blank_lines
    return blank_lines


def expand(patterns: str, addresses) -> list[str]:
    """The addresses that match a claim's list of patterns, in the order of the list; ValueError for a pattern without a match.

    >>> expand("a.py::B.*", ["a.py", "a.py::B", "a.py::B.c", "a.py::Bd"])
    ['a.py::B', 'a.py::B.c']
    """
    chosen = []
    for pattern in split(patterns):
        matching = [address for address in addresses if matches(pattern, address)]
        if not matching:
            raise ValueError(f"there is no unit {pattern}")
        chosen += matching
    return list(dict.fromkeys(chosen))


def split(patterns: str) -> list[str]:
    return [pattern for pattern in patterns.replace("\n", " ").replace(",", " ").split()]


def matches(pattern: str, address: str) -> bool:
    if pattern.endswith("::*"):
        return address.split("::")[0] == pattern[:-3]
    if pattern.endswith(".*"):
        return address == pattern[:-2] or address.startswith(pattern[:-1])
    return address == pattern
