"""Make small random changes to a chapter's code, and run its tests on each: do they catch bugs that no trap plants?

    python -m shared.book.traps.mutants v07 --count 100         # anywhere in the chapter's code
    python -m shared.book.traps.mutants v05 --count 15 --new    # only in what the chapter changed
    python -m shared.book.traps.mutants v05 --new --record      # also record the results

Each mutant changes one comparison, operator, number, condition or line, picked by a seed, in a copy of the chapter; the
chapter's tests run on it until one fails, its claims before all others. A survivor needs a new test, or a sentence in tests/mutants.toml that says why
no test can tell it from the original. Run this by hand: each survivor takes a whole test suite. With --record, results are
written to docs/results/mutants.json after each mutant, and only recorded survivors are tried again.

Reads: a chapter, tests/mutants.toml. Writes: docs/results/mutants.json.
"""
import argparse
import ast
import json
import random
import tomllib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shared import results
from shared.book.diff import changes_of
from shared.book.forks import SLOW, Work, in_forks, preload
from shared.book.traps.tested_copy import Run, run_of, work
from shared.book.units import read_units
from shared.chapters import BOOK, Book, Chapter, python_files
from shared.programs import run

FILE = "mutants.json"
REASONS = "tests/mutants.toml"
TIMEOUT_S = 1800  # the tests of a late chapter take a quarter of an hour
COMPARED = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}
SIGNS = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
    ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in",
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Div: "/", ast.Mod: "%",
    ast.And: "and", ast.Or: "or",
}
OPERATED = {ast.Add: "-", ast.Sub: "+", ast.Mult: "//", ast.FloorDiv: "*", ast.Div: "*", ast.Mod: "//"}
# Not changed: messages, annotations and assertions, which no test checks.
SILENT = (ast.Raise, ast.Assert, ast.JoinedStr, ast.AnnAssign, ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class Mutant:
    """One change of a file: the bytes [start, end) are replaced by `new`."""

    file: str
    line: int
    start: int
    end: int
    new: str
    told: str


def mutants_of(source: str, file: str) -> list[Mutant]:
    """All possible mutants of a file."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    mutants = []

    def at(node, end: bool = False) -> int:
        number, column = (node.end_lineno, node.end_col_offset) if end else (node.lineno, node.col_offset)
        return starts[number - 1] + column

    def replace(node, first: int, last: int, new: str) -> None:
        old = source.encode()[first:last].decode()
        mutants.append(Mutant(file, node.lineno, first, last, new, f"`{' '.join(old.split())}` becomes `{' '.join(new.split())}`"))

    def between(node, left, right, old: str, new: str) -> None:
        """Replace the operator between two operands."""
        gap = source.encode()[at(left, end=True) : at(right)].decode()
        if gap.count(old) == 1:
            replace(node, at(left, end=True), at(right), gap.replace(old, new))

    def visit(node) -> None:
        if isinstance(node, SILENT):
            return
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            kind = type(node.ops[0])
            between(node, node.left, node.comparators[0], SIGNS[kind], COMPARED[kind])
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATED:
            between(node, node.left, node.right, SIGNS[type(node.op)], OPERATED[type(node.op)])
        elif isinstance(node, ast.BoolOp):
            other = "or" if isinstance(node.op, ast.And) else "and"
            between(node, node.values[0], node.values[1], SIGNS[type(node.op)], other)
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            replace(node, at(node), at(node, end=True), str(not node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, int):
            replace(node, at(node), at(node, end=True), str(node.value + 1))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            replace(node, at(node), at(node.operand), "")
        elif isinstance(node, ast.If):
            replace(node.test, at(node.test), at(node.test, end=True), f"not ({ast.unparse(node.test)})")
        elif isinstance(node, (ast.Assign, ast.AugAssign)) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            replace(node, at(node), at(node, end=True), "pass")
        for child in children(node):
            visit(child)

    visit(ast.parse(source))
    return mutants


def children(node: ast.AST):
    """A node's children, without annotations and decorators."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child


def choose(chapter: Chapter, count: int, seed: int, only_new: bool) -> list[Mutant]:
    """`count` of a chapter's mutants, picked by the seed; with only_new, from the lines of units that the chapter changed."""
    allowed = None
    if only_new and chapter.previous:
        units = read_units(chapter.path)
        changed = [change.address for change in changes_of(chapter) if change.kind in ("changed", "added")]
        allowed = {
            (address.split("::")[0], piece.first_line + n)
            for address in changed if address in units
            for piece in units[address].pieces
            for n in range(piece.text.count("\n") + 1)
        }
    mutants = []
    for path in python_files(chapter.path):
        file = path.relative_to(chapter.path).as_posix()
        mutants += [each for each in mutants_of(path.read_text(), file) if allowed is None or (file, each.line) in allowed]
    return random.Random(seed).sample(mutants, min(count, len(mutants)))


def put(mutant: Mutant, chapter: Path) -> None:
    """Apply a mutant to a copy of its chapter."""
    path = chapter / mutant.file
    source = path.read_bytes()
    path.write_bytes(source[: mutant.start] + mutant.new.encode() + source[mutant.end :])


def attempt(chapter: Chapter, mutant: Mutant, tests: list[str]) -> Work:
    """Run tests of the chapter on the mutant until one fails."""
    return work(chapter, partial(put, mutant), [*tests, "-x"], TIMEOUT_S)


def outcome(chapter: Chapter, mutant: Mutant, run: Run) -> dict:
    """A mutant with its result, and the first test that failed."""
    by = next(iter(run.failed or run.broken or {"": ""}))
    if run.exit_code is None:
        result = "hangs"
    elif not run.finished:
        result = "crashes"
    else:
        result = "survived" if run.exit_code == 0 else "killed"
    return about(chapter, mutant) | {"result": result, "by": by}


def about(chapter: Chapter, mutant: Mutant) -> dict:
    """A mutant's description, which identifies it."""
    code = (chapter.path / mutant.file).read_text().splitlines()[mutant.line - 1].strip()
    return {"file": mutant.file, "line": mutant.line, "code": code, "told": mutant.told}


def recorded(book: Book) -> dict[str, dict]:
    """The recorded results, by chapter."""
    path = book.results / FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def record(book: Book, name: str, command: str, tried: list[dict]) -> None:
    """Replace a chapter's recorded results."""
    chapters = recorded(book) | {name: results.about(command) | {"tried": tried}}
    results.store(book.results / FILE, dict(sorted(chapters.items())))


def take(before: list[dict], mutant: dict) -> dict | None:
    """Remove a mutant's result from `before`, even if its line has moved, and return it; None if it survived or was not tried.

    >>> before = [{"line": 7, "code": "x = 1", "result": "killed"}]
    >>> take(before, {"line": 9, "code": "x = 1"}), before
    ({'line': 9, 'code': 'x = 1', 'result': 'killed'}, [])
    """
    for i, each in enumerate(before):
        if each["result"] != "survived" and all(each[key] == mutant[key] for key in mutant if key != "line"):
            return before.pop(i) | mutant
    return None


def reasons(book: Book) -> list[dict]:
    """The reasons why survivors are equivalent to the original code, from tests/mutants.toml."""
    path = book.root / REASONS
    return tomllib.loads(path.read_text())["survivor"] if path.is_file() else []


def unexplained(book: Book) -> list[str]:
    """Messages about recorded survivors without a reason, and reasons without a survivor."""

    def names(mutants) -> set[str]:
        return {f"{each['file']}: `{each['code']}`: {each['told']}" for each in mutants}

    tried = (each for chapter in recorded(book).values() for each in chapter["tried"])
    survived = names(each for each in tried if each["result"] == "survived")
    explained = names(each for each in reasons(book) if each["why"].strip())
    return [
        *(f"{each} survived; test it, or say in {REASONS} why no test can tell" for each in sorted(survived - explained)),
        *(f"{each} did not survive; remove it from {REASONS}" for each in sorted(explained - survived)),
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.book.traps.mutants", description="Make small random changes to a chapter, and run its tests on each.")
    parser.add_argument("chapter", metavar="vNN")
    parser.add_argument("--count", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--new", action="store_true", help="only what the chapter changed")
    parser.add_argument("--record", action="store_true", help=f"record the results in docs/results/{FILE}")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f"--count must be at least 1, got {args.count}")
    try:
        chapter = BOOK.find(args.chapter)
    except ValueError as error:
        parser.error(str(error))
    command = " ".join(["python -m shared.book.traps.mutants", *argv])
    before = recorded(BOOK).get(chapter.id, {}).get("tried", []) if args.record else []
    preload(SLOW)
    chosen = choose(chapter, args.count, args.seed, args.new)
    tried = {number: known for number, mutant in enumerate(chosen) if (known := take(before, about(chapter, mutant)))}
    claims = f"tests/claims/test_{chapter.id}.py"
    def keep() -> None:
        if args.record:
            record(BOOK, chapter.id, command, [tried[number] for number in sorted(tried)] + before)

    # What the chapter's claims do not notice, all of its tests may.
    for tests in ([claims], ["tests", f"--ignore={claims}", "--ignore=tests/book"]):
        unknown = [number for number in range(len(chosen)) if number not in tried]
        for ended in in_forks([attempt(chapter, chosen[number], tests) for number in unknown], chapter.id, limit=1):
            number = unknown[ended.number]
            found = outcome(chapter, chosen[number], run_of(ended))
            if found["result"] == "survived" and tests == [claims]:
                continue
            tried[number] = found
            keep()
            print(json.dumps({"chapter": chapter.id} | found), flush=True)
    before.clear()  # drop the mutants that were not picked this time
    keep()
    return 0


if __name__ == "__main__":
    run(main)
