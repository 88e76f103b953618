"""A new chapter: a copy of the last one, with everything that a chapter needs."""
import ast

import pytest

from shared.book.new import main
from shared.chapters import python_files

CONTENTS = '''\
CONTENTS = (
    Row(
        name="v02_b",
        idea="b",
        adds=frozenset({"a"}),
    ),
)


def find(text):
    return text
'''


@pytest.fixture
def book(make_book, first):
    second = first | {"README.md": "the second\n", "kernels/k.py": "K = 1\n", "__pycache__/cache.py": "old"}
    beside = {"shared/chapters.py": CONTENTS, "notebooks/v02_b.py": "# v02_b\nimport milestones.v02_b\n"}
    return make_book(first, second, beside=beside)


def test_a_new_chapter_has_all_that_a_chapter_has(book):
    assert main(["v03", "paging"], book) == 0
    new, last = book.root / "milestones" / "v03_paging", book.chapters[1]
    files = {path.relative_to(new).as_posix(): path.read_text() for path in python_files(new)}
    assert files == {path.relative_to(last.path).as_posix(): path.read_text() for path in python_files(last.path)}
    assert "kernels/k.py" in files and not (new / "__pycache__").exists()
    assert (new / "README.md").read_text().startswith("# v03: ")
    assert "v03" in (book.root / "tests/traps/v03.toml").read_text()
    assert "v03" in (book.root / "tests/claims/test_v03.py").read_text()
    assert (book.root / "notebooks/v03_paging.py").read_text() == "# v03_paging\nimport milestones.v03_paging\n"
    rows = ast.parse((book.root / "shared/chapters.py").read_text()).body[0].value.elts
    assert [row.keywords[0].value.value for row in rows] == ["v02_b", "v03_paging"]


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["v04", "paging"], "the chapter after v02_b is v03, not v04"),
        (["v03", "Paging"], "got 'Paging'"),
        (["v03", "paging!"], "got 'paging!'"),
        (["v03"], "usage:"),
    ],
)
def test_a_wrong_number_or_name_is_refused_and_nothing_written(book, arguments, why, capsys):
    before = sorted(book.root.rglob("*"))
    assert main(arguments, book) == 2
    assert why in capsys.readouterr().err
    assert sorted(book.root.rglob("*")) == before


def test_nothing_is_written_over(book, capsys):
    path = book.root / "tests" / "claims" / "test_v03.py"
    path.parent.mkdir(parents=True)
    path.write_text("mine\n")
    assert main(["v03", "paging"], book) == 2
    assert "tests/claims/test_v03.py already exists" in capsys.readouterr().err
    assert path.read_text() == "mine\n" and not (book.root / "milestones" / "v03_paging").exists()
