"""The module map: a row per module, from its docstring and its callers; and the commands that texts name."""
import re

from shared.book.claims.module_map import make_targets, module_map
from shared.book.claims.sync import texts
from shared.chapters import BOOK, python_files

TOOL = '"""Does this. And more.\n\nReads: a.json. Writes: b*.svg.\n"""\n\n\ndef main():\n    pass\n\n\nif __name__ == "__main__":\n    main()\n'
MAKEFILE = "tool: $(READY)\n\t@$(PY) -m shared.tool\n\n$(CHAPTERS:%=run-%): run-%:\n\t@$(PY) -m shared.tool $*\n"


def test_a_module_has_its_sentence_command_files_and_tests(make_book, first):
    beside = {
        "Makefile": MAKEFILE,
        "shared/__init__.py": '"""Tools."""\n',
        "shared/tool.py": TOOL,
        "shared/used.py": '"""Is used."""\nfrom shared.tool import (\n    main,\n)\nfrom json import dumps\n',
        "shared/alone_1.py": TOOL.replace("Does this", "Stands alone"),
        "tests/test_used.py": "from shared import used\n",
    }
    lines = module_map(make_book(first, beside=beside), None)
    assert "| **shared/** | Tools | |" in lines
    files, run = "<br>reads a.json<br>writes b\\*.svg", "<br>run by `make tool`, `make run-vNN`"
    assert f"| [tool.py](shared/tool.py) | Does this{run}{files} | ([used](tests/test_used.py)) |" in lines
    assert "| [used.py](shared/used.py) | Is used | [used](tests/test_used.py) |" in lines
    assert f"| [alone\\_1.py](shared/alone_1.py) | Stands alone<br>run by `python -m shared.alone_1`{files} |  |" in lines


def test_every_module_is_on_the_map_of_this_book_and_every_command_of_make():
    lines = module_map(BOOK, None)
    for path in python_files(BOOK.root / "shared"):
        if path.name not in ("__init__.py", "__main__.py"):
            assert sum(f"({path.relative_to(BOOK.root).as_posix()})" in line for line in lines) == 1, path
    commands = " ".join(lines)
    for targets in make_targets(BOOK.root / "Makefile").values():
        assert all(f"`make {target}`" in commands for target in targets), targets


def test_every_command_that_a_text_names_is_there():
    """The modules after `python -m`, and the targets after `make`."""
    targets = set(re.findall(r"^([a-z][a-z-]*)(?=:| )", (BOOK.root / "Makefile").read_text(), flags=re.M))
    families = set(re.findall(r"\$\(CHAPTERS:%=([a-z]+)-%\)", (BOOK.root / "Makefile").read_text()))
    named = 0
    for page in texts(BOOK):
        text = page.read_text()
        for module in re.findall(r"python3? -m ((?:shared|milestones)(?:\.\w+)+)", text):
            path = BOOK.root.joinpath(*module.split("."))
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{page.name}: python -m {module}"
            named += 1
        for target in re.findall(r"(?:`|^ {4}|^)make (?:PYTHON=\S+ )?([a-z][\w-]*)", text, flags=re.M):
            family = re.fullmatch(r"([a-z]+)-v(?:\d\d|NN)", target)
            assert family and family[1] in families | {"new"} or target in targets, f"{page.name}: make {target}"
            named += 1
    assert named > 100
