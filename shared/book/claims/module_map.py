"""The map of shared/: a row for each module, made of what it says of itself and of who calls it.

What it does is the first sentence of its docstring; what it reads and writes stands in the docstring's last line
(`Reads: ... Writes: ...`); what runs it is a make target, or `python -m` where it has none; its tests are those
that import it or, in brackets, those nearest to it.

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
    """All modules, folder after folder."""
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
    told = {"run by": command_of(module, source, targets), "reads": reads, "writes": writes}
    about = "<br>".join([first_sentence(source), *(f"{what} {value}" for what, value in told.items() if value)])
    name = path.name.replace("_", "\\_")
    return f"| [{name}]({place.as_posix()}) | {about.replace('*', BACKSLASH + '*')} | {tests_of(module, root, users)} |"


def dotted(place: Path) -> str:
    """A file's place from the root as the name of its module."""
    return ".".join(place.with_suffix("").parts)


FEW = 4
BACKSLASH = "\\"


def tests_of(module: str, root: Path, users: dict[str, set[Path]]) -> str:
    """The tests that import a module, else in brackets those nearest to it: up to FEW by name, of more their number."""
    modules, seen, direct = {module}, set(), True
    while modules and not (found := sorted(path for name in modules for path in users.get(name, ()) if is_test(path))):
        seen |= modules
        modules = {dotted(path.relative_to(root)) for name in modules for path in users.get(name, ())} - seen
        direct = False
    found = list(dict.fromkeys(path.relative_to(root) for path in found)) if modules else []
    if len(found) > FEW:
        told = f"{len(found)} files"
    else:
        told = " ".join(f"[{path.stem.removeprefix('test_')}]({path.as_posix()})" for path in found)
    return told if direct or not told else f"({told})"


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
    """What a module says that it reads, and writes.

    >>> files_told('"A tool. Reads: a, b.json. Writes: c."')
    ('a, b.json', 'c')
    """
    last = (ast.get_docstring(ast.parse(source)) or "").split("\n")[-1]
    reads = re.search(r"Reads: (.*?)\.(?= Writes:|$)", last)
    writes = re.search(r"Writes: (.*)\.$", last)
    return (reads[1] if reads else "", writes[1] if writes else "")


def command_of(module: str, source: str, targets: dict[str, list[str]]) -> str:
    """How a module is run: by make, or by itself."""
    called = module.removesuffix(".__main__")
    for name in (called, called.rpartition(".")[0] if module.endswith((".runner", ".build")) else called):
        if name in targets:
            return ", ".join(f"`make {target}`" for target in targets[name])
    heads = [ast.unparse(node.test) for node in ast.parse(source).body if isinstance(node, ast.If)]
    return f"`python -m {called}`" if "__name__ == '__main__'" in heads else ""


def make_targets(makefile: Path) -> dict[str, list[str]]:
    """The targets of a Makefile by the module that they run; one for each chapter is called test-vNN."""
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
    """The files that import each module of shared/; also where the import stands in a text that a test runs."""
    found = {}
    for path in paths:
        for package, several, one_line in IMPORT.findall(path.read_text()):
            names = (several or one_line).split(",")
            for name in (package, *(f"{package}.{each.split()[0]}" for each in names if each.strip())):
                found.setdefault(name, set()).add(path)
    return found
