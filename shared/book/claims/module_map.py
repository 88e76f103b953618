"""The map of shared/: a row for each module, made from its docstring and its callers.

What it does is the first sentence of its docstring, and what it reads and writes is the docstring's last line
(`Reads: ... Writes: ...`). What runs it is a make target, or `python -m` if it has none. Its tests are those that import
it or, in brackets, those that import its nearest users.

Reads: shared/**/*.py, tests/**/*.py, Makefile.
"""
import ast
import re
from collections.abc import Iterable
from pathlib import Path

from shared.chapters import Book, Chapter, python_files

# Each imports only from those before it.
FOLDERS = ("", "models", "bench", "verify", "book", "book/traps", "book/claims", "book/site", "commands")


def module_map(book: Book, chapter: Chapter | None) -> list[str]:
    """The map's table: all modules, by directory."""
    shared = book.root / "shared"
    targets = make_targets(book.root / "Makefile")
    users = importers(path for folder in (shared, book.root / "tests") if folder.is_dir() for path in python_files(folder))
    lines = ["| | what it does, what runs it, what it reads and writes | tests |", "|---|---|---|"]
    for folder in FOLDERS:
        directory = shared / folder
        init = directory / "__init__.py"
        lines.append(f"| **shared/{folder}** | {first_sentence(init.read_text()) if init.is_file() else ''} | |")
        for path in sorted(directory.glob("*.py")):
            if path.name != "__init__.py" and (path.name != "__main__.py" or "def main" in path.read_text()):
                lines.append(row(path, shared.parent, targets, users))
    return lines


def row(path: Path, root: Path, targets: dict[str, list[str]], users: dict[str, set[Path]]) -> str:
    """One module's row."""
    place, source = path.relative_to(root), path.read_text()
    module = dotted(place)
    reads, writes = files_told(source)
    facts = {"run by": command_of(module, source, targets), "reads": reads, "writes": writes}
    about = "<br>".join([first_sentence(source), *(f"{what} {value}" for what, value in facts.items() if value)])
    name = path.name.replace("_", "\\_")
    return f"| [{name}]({place.as_posix()}) | {about.replace('*', BACKSLASH + '*')} | {tests_of(module, root, users)} |"


def dotted(place: Path) -> str:
    """The module name of a file's path from the root."""
    return ".".join(place.with_suffix("").parts)


FEW = 4
BACKSLASH = "\\"


def tests_of(module: str, root: Path, users: dict[str, set[Path]]) -> str:
    """The tests that import a module or, in brackets, its nearest users; if there are more than FEW, their number."""
    modules, seen, direct = {module}, set(), True
    while modules and not (tests := sorted(path for name in modules for path in users.get(name, ()) if is_test(path))):
        seen |= modules
        modules = {dotted(path.relative_to(root)) for name in modules for path in users.get(name, ())} - seen
        direct = False
    tests = list(dict.fromkeys(path.relative_to(root) for path in tests)) if modules else []
    if len(tests) > FEW:
        cell = f"{len(tests)} files"
    else:
        cell = " ".join(f"[{path.stem.removeprefix('test_')}]({path.as_posix()})" for path in tests)
    return cell if direct or not cell else f"({cell})"


def is_test(path: Path) -> bool:
    return path.name.startswith("test_")


def first_sentence(source: str) -> str:
    """The first sentence of a module's docstring, without its full stop.

    >>> first_sentence('"What it is: a list. More of it."')
    'What it is: a list'
    """
    head = " ".join((ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[^.])\.(?: (?=[A-Z])|$)", head)[0]


def files_told(source: str) -> tuple[str, str]:
    """What a module reads and writes, according to its docstring.

    >>> files_told('"A tool. Reads: a, b.json. Writes: c."')
    ('a, b.json', 'c')
    """
    last = (ast.get_docstring(ast.parse(source)) or "").split("\n")[-1]
    reads = re.search(r"Reads: (.*?)\.(?= Writes:|$)", last)
    writes = re.search(r"Writes: (.*)\.$", last)
    return (reads[1] if reads else "", writes[1] if writes else "")


def command_of(module: str, source: str, targets: dict[str, list[str]]) -> str:
    """The command that runs a module: its make targets, or `python -m`; empty if it is not a program."""
    called = module.removesuffix(".__main__")
    for name in (called, called.rpartition(".")[0] if module.endswith((".runner", ".build")) else called):
        if name in targets:
            return ", ".join(f"`make {target}`" for target in targets[name])
    heads = [ast.unparse(node.test) for node in ast.parse(source).body if isinstance(node, ast.If)]
    return f"`python -m {called}`" if "__name__ == '__main__'" in heads else ""


def make_targets(makefile: Path) -> dict[str, list[str]]:
    """A Makefile's targets, by the module they run; targets for each chapter are written like test-vNN."""
    targets, current = {}, ""
    for line in makefile.read_text().splitlines() if makefile.is_file() else ():
        head = re.match(r"(?:\$\(CHAPTERS:%=([a-z]+)-%\)|([a-z][a-z-]*)(-%)?): ", line)
        if head:
            current = f"{head[1]}-vNN" if head[1] else head[2] + ("-vNN" if head[3] else "")
        for module in re.findall(r"-m (shared(?:\.\w+)+)|python3 (shared/\S+)\.py", line) if line.startswith("\t") else ():
            name = module[0] or module[1].replace("/", ".")
            if current not in targets.setdefault(name, []):
                targets[name].append(current)
    return targets


IMPORT = re.compile(r"^\s*from (shared[\w.]*) import (?:\(([^)]*)\)|(.*)$)", re.MULTILINE)


def importers(paths: Iterable[Path]) -> dict[str, set[Path]]:
    """The files that import each module of shared/, including imports in code that a test holds as a string."""
    users = {}
    for path in paths:
        for package, in_parentheses, one_line in IMPORT.findall(path.read_text()):
            names = (in_parentheses or one_line).split(",")
            for name in (package, *(f"{package}.{part.split()[0]}" for part in names if part.strip())):
                users.setdefault(name, set()).add(path)
    return users
