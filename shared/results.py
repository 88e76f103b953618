"""Measured figures: writes and reads docs/results/*.json.

What depends on the machine has one row for each kind of machine; a new measurement on that kind replaces it:

    {"avx512": {"command": ..., "machine": ..., "date": ..., "code": {"v01": "5f0c..."}, "v01": {...}}, "gpu": {...}}

`code` holds a hash of each measured chapter's code. When the chapter's code changes, its figures are shown as old. What
is the same on every machine, such as a trace of which request ran when, has no rows: command, machine, date and figures
are at the top level.

Reads: docs/results/*.json. Writes: docs/results/*.json.
"""
import ast
import hashlib
import io
import json
import tokenize
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from shared.chapters import BOOK, Book, Chapter, python_files

# The kinds of machines and their names in tables; any other kind has the name PyTorch gives it.
KINDS = {"avx512": "AVX512", "avx2": "AVX2", "gpu": "GPU"}
ABOUT = ("command", "machine", "date", "code")  # a row's description of itself
# What a change of the code does not make old: facts about the machine, and counts, which a test counts again.
TIMELESS = {*ABOUT, "limits", "bandwidth_gb_s", "copy_gb_per_s"} | {
    "requests", "places", "tokens", "passes", "tokens_per_pass", "positions", "needed", "needed_share", "useful_share",
    "kv_bytes", "kv_read_bytes", "weight_bytes", "weight_read_bytes", "lengths", "request",
}  # fmt: skip


# ---- writing


def write(name: str, results: dict, command: str, book: Book = BOOK) -> Path:
    """Write a result that is the same on every machine, with its command, machine and date."""
    return store(book.results / f"{name}.json", about(command) | results)


def write_row(
    name: str,
    results: dict,
    command: str,
    chapters: Iterable[Chapter],
    gpu: bool = False,
    book: Book = BOOK,
) -> Path:
    """Write what was measured of these chapters on this machine; replaces the row of its kind of machine."""
    from shared.machine import kind

    path = book.results / f"{name}.json"
    code = {"code": {chapter.id: code_hash(chapter.path) for chapter in chapters}}
    rows = rows_of(path) if path.is_file() else {}
    rows[kind(gpu)] = about(command, gpu) | code | results
    order = [*KINDS, *sorted(rows.keys() - KINDS)]
    return store(path, {each: rows[each] for each in order if each in rows})


def about(command: str, gpu: bool = False) -> dict[str, str]:
    """What it takes to repeat a measurement: command, machine, date."""
    from shared.machine import machine, today

    return {"command": command, "machine": machine(gpu), "date": today()}


def store(path: Path, everything: dict) -> Path:
    """Write JSON that diffs well: one line per key, and long values over several lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(spread(everything) + "\n")
    return path


LONG = 1000  # characters


def spread(value, margin: str = "") -> str:
    """JSON text in which the outermost level and every long value has one line per part."""
    flat = json.dumps(value, ensure_ascii=False)
    is_row = isinstance(value, dict) and "command" in value
    if not isinstance(value, (dict, list)) or not value or (margin and not is_row and len(flat) <= LONG):
        return flat
    inner = margin + "  "
    if isinstance(value, list):
        parts, ends = [spread(each, inner) for each in value], "[]"
    else:
        parts, ends = [f"{json.dumps(key, ensure_ascii=False)}: {spread(each, inner)}" for key, each in value.items()], "{}"
    return f"{ends[0]}\n" + ",\n".join(inner + part for part in parts) + f"\n{margin}{ends[1]}"


# ---- reading


def rows_of(path: Path) -> dict[str, dict]:
    """A file's rows by kind of machine; a result that is the same on every machine is one row called ''."""
    everything = json.loads(path.read_text())
    has_rows = all(isinstance(row, dict) and "code" in row for row in everything.values())
    return everything if has_rows else {"": everything}


def read(path: Path, command: str) -> dict[str, dict]:
    """The rows of a result file; `command` is what writes it.

    Raises:
        ValueError: if the file does not exist.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path.name}; run `{command}`")
    return rows_of(path)


def cited(rows: dict[str, dict]) -> dict:
    """The row that texts and pictures cite: the newest or, of several of one day, the first that measured the most chapters."""
    return max(rows.values(), key=lambda row: (row.get("date", ""), len(row.get("code", ()))))


def figures(row: dict) -> dict:
    """A row's figures, without its description of itself."""
    return {key: value for key, value in row.items() if key not in ABOUT}


def old_chapters(row: dict, book: Book) -> set[str]:
    """The measured chapters whose code has changed since, or that no longer exist."""
    now = {chapter.id: code_hash(chapter.path) for chapter in book.chapters}
    return {name for name, code in row.get("code", {}).items() if now.get(name) != code}


def is_old(row: dict, keys: list[str], book: Book) -> bool:
    """Whether the figure at these keys of a row was measured on code that has changed since.

    A figure under no chapter's name counts as one of all measured chapters.
    """
    if not TIMELESS.isdisjoint(keys):
        return False
    measured = row.get("code", {}).keys()
    return not old_chapters(row, book).isdisjoint(measured & set(keys) or measured)


def origin(kind: str, row: dict) -> str:
    """The machine and date of a row, for the head of a table.

    >>> origin("gpu", {"machine": "Xeon, 16 cores, H100, Python 3.12.3, torch 2.11", "date": "2026-11-28"})
    'GPU: Xeon, 16 cores, H100, 2026-11-28'
    """
    return f"{KINDS.get(kind, kind)}: {row['machine'].split(', Python ')[0]}, {row['date']}"


def age(row: dict, book: Book) -> str:
    """The end of a table's head that names the chapters whose figures are old; empty if none are."""
    old = sorted(old_chapters(row, book))
    return f"; old, since the code has changed: {spans(old)}" if old else ""


def spans(chapters: list[str]) -> str:
    """Name chapters, given in order; three or more that follow each other by the first and the last.

    >>> spans(["v02", "v03", "v05", "v06", "v07", "v08"])
    'v02, v03, v05 to v08'
    """
    runs = []
    for name in chapters:
        if runs and int(name[1:]) == int(runs[-1][-1][1:]) + 1:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


# ---- the code that was measured


def code_hash(directory: Path) -> str:
    """A hash of a directory's Python code without comments, docstrings and blank lines."""
    digest = hashlib.blake2b(digest_size=8)
    for path in python_files(directory):
        digest.update(f"{path.relative_to(directory).as_posix()}\0{bare(path.read_text())}\0".encode())
    return digest.hexdigest()


@cache
def bare(source: str) -> str:
    """The source without comments, docstrings and blank lines; works on positions in the text, so every Python version agrees.

    >>> bare('"What it is."\\n\\nx = "#"  # a sign\\n')
    'x = "#"'
    """
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            lines[line - 1] = lines[line - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and body:
            if ast.get_docstring(node, clean=False) is not None:
                lines[body[0].lineno - 1 : body[0].end_lineno] = [""] * (body[0].end_lineno - body[0].lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())
