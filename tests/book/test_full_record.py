"""The record of the chapters for which all tests have run."""
import json
import subprocess

import pytest

from shared.book import full_record
from shared.book.full_record import counted, main, picked, record, stale


@pytest.fixture
def book(make_book, first):
    """Five chapters, and the files that their tests read."""
    beside = {"shared/tool.py": "X = 1\n", "tests/test_a.py": "def test(): pass\n", "shared/models/small/a.json": "{}", "shared/models/small/b.bin": "b"}
    return make_book(first, first, first, first, first, beside=beside)


def seen(book, chapter):
    return [f"milestones/{chapter.name}/cache.py", "shared/tool.py", "tests/test_a.py"]


def test_a_record_holds_until_something_changes_that_the_tests_saw(book):
    assert stale(book) == list(book.chapters)
    for chapter in book.chapters:
        record(book, chapter, seen(book, chapter))
    assert stale(book) == []
    (book.root / "shared" / "other.py").write_text("nobody saw this\n")
    assert stale(book) == []
    path = book.chapters[1].path / "cache.py"
    path.write_text(path.read_text() + "\n")
    assert stale(book) == [book.chapters[1]]
    (book.root / "tests" / "test_a.py").unlink()
    assert stale(book) == list(book.chapters)


def test_a_record_is_a_line_a_chapter_in_their_order(book):
    for chapter in book.chapters[::-1]:
        record(book, chapter, seen(book, chapter))
    lines = (book.root / full_record.FILE).read_text().splitlines()
    assert [line.split('"')[1] for line in lines[1:-1]] == [chapter.id for chapter in book.chapters]
    record(book, book.chapters[2], ["shared/tool.py"])
    after = json.loads((book.root / full_record.FILE).read_text())
    assert after["v03"]["files"] == ["shared/tool.py"] and len(after["v02"]["files"]) == 3


def test_files_count_that_are_the_repositorys_own(book, tmp_path):
    paths = [
        book.root / "shared" / "tool.py",
        book.root / "shared" / "__pycache__" / "tool.pyc",
        book.root / full_record.FILE,
        book.root / "README.md",
        book.root / "shared" / "gone.py",
        book.root / "shared" / "models" / "small" / "a.json",
        tmp_path.parent / "elsewhere.py",
    ]
    (book.root / "README.md").touch()
    (book.root / full_record.FILE).write_text("{}")
    # All files of a model count, because some are opened by code other than Python.
    assert counted(paths, book.root) == ["shared/models/small/a.json", "shared/models/small/b.bin", "shared/tool.py"]


def test_the_last_one_by_chance_and_the_first_that_do_not_hold_are_run_in_full(book):
    assert [chapter.id for chapter in picked(book, "1")] == ["v01", "v02", "v05"]
    for chapter in book.chapters:
        record(book, chapter, seen(book, chapter))
    for number in range(5):
        chance = book.chapters[number]
        assert set(picked(book, f"{number:x}")) == {chance, book.chapters[-1]}
    (book.root / "shared" / "tool.py").write_text("X = 2\n")
    assert [chapter.id for chapter in picked(book, "4")] == ["v01", "v05"]


def test_the_command_says_whose_record_holds_and_what_git_says_has_changed(book, commit, capsys):
    with pytest.raises(ValueError, match="`git status` failed"):
        full_record.changes(book.root)
    commit(book)
    assert full_record.changes(book.root) == ""
    record(book, book.chapters[0], seen(book, book.chapters[0]))
    assert full_record.changes(book.root) == "", "the record itself does not count as a change"
    (book.root / "shared" / "tool.py").write_text("X = 2\n")
    assert "tool.py" in full_record.changes(book.root)
    assert main([], book) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "v01  missing or stale; run `make test-v01`"
    assert main(["pick"], book) == 0
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=book.root, capture_output=True, text=True).stdout.strip()
    assert capsys.readouterr().out.split() == [chapter.id for chapter in picked(book, head)]
    assert main(["pick", "v01"], book) == 2
