"""The folders of shared/ import each other in one order, and no modules import each other in a circle."""
import ast

from shared.book.claims.module_map import FOLDERS
from shared.chapters import ROOT, python_files


def imports(path):
    """The modules of shared/ that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} imports by a relative name"
        assert not (isinstance(node, ast.Import) and any(each.name.startswith("shared") for each in node.names)), path
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shared"):
            for alias in node.names:
                whole = ROOT.joinpath(*node.module.split("."), f"{alias.name}.py")
                module = ROOT.joinpath(*node.module.split("."))
                yield whole if whole.is_file() else module.with_suffix(".py") if module.with_suffix(".py").is_file() else module / "__init__.py"


def layer(path):
    return FOLDERS.index(path.parent.relative_to(ROOT / "shared").as_posix().removeprefix("."))


def test_a_folder_imports_only_from_those_it_stands_on():
    for path in python_files(ROOT / "shared"):
        for imported in imports(path):
            assert layer(imported) <= layer(path), f"{path.relative_to(ROOT)} imports {imported.relative_to(ROOT)}"


def test_no_module_imports_itself_through_others():
    uses = {path: set(imports(path)) - {path} for path in python_files(ROOT / "shared")}
    free = set()
    while uses:
        ready = {path for path, needed in uses.items() if needed <= free}
        assert ready, f"these import each other: {sorted(path.relative_to(ROOT).as_posix() for path in uses)}"
        free |= ready
        uses = {path: needed for path, needed in uses.items() if path not in free}
