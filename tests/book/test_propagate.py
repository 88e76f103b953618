"""Propagation: a change made in one chapter reaches all later ones, or leaves them unchanged."""
import subprocess

import pytest

from shared.book import propagate
from shared.book.propagate import main, state_file

LAYER = "def layer(x):\n    y = x + 1\n\n    return y\n"
ENGINE = "A = 1\nB = 2\n\nC = 3\nD = 4\n\nE = 5\nF = 6\n"


@pytest.fixture
def book(make_book, commit):
    """Three chapters: each adds to the engine, and none changes the layer."""
    book = make_book(
        {"layer.py": LAYER, "engine.py": ENGINE, "README.md": "one\n"},
        {"layer.py": LAYER, "engine.py": ENGINE + "\nG = 7\n", "README.md": "two\n"},
        {
            "layer.py": LAYER,
            "engine.py": ENGINE + "\nG = 7\nH = 8\n",
            "kernels/k.py": "K = 1\n",
            "README.md": "three\n",
        },
    )
    commit(book)
    return book


def read(book):
    """Every file of every later chapter, and their git status."""
    files = {path: path.read_bytes() for chapter in book.chapters[1:] for path in chapter.path.rglob("*") if path.is_file()}
    status = subprocess.run(
        ["git", "status", "--porcelain", *(str(chapter.path) for chapter in book.chapters[1:])], cwd=book.root, capture_output=True, text=True
    ).stdout
    return files, status


def edit(chapter, name, old, new):
    path = chapter.path / name
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))


def test_a_change_reaches_every_later_chapter_and_leaves_their_differences(book):
    one, two, three = book.chapters
    edit(one, "engine.py", "A = 1", "A = 10")
    edit(one, "layer.py", "x + 1", "x + 2")
    assert main(["v01", "--no-tests"], book) == 0
    assert (two.path / "engine.py").read_text() == ENGINE.replace("A = 1", "A = 10") + "\nG = 7\n"
    assert (three.path / "engine.py").read_text() == ENGINE.replace("A = 1", "A = 10") + "\nG = 7\nH = 8\n"
    assert [(chapter.path / "layer.py").read_text() for chapter in book.chapters] == [LAYER.replace("x + 1", "x + 2")] * 3
    assert (three.path / "README.md").read_text() == "three\n"
    assert not state_file(book).exists()


def test_a_bug_planted_and_mended_leaves_every_chapter_as_it_was(book, commit):
    before = read(book)
    edit(book.chapters[0], "layer.py", "x + 1", "x - 1")
    assert main(["v01", "--no-tests"], book) == 0
    assert read(book) != before
    commit(book)
    edit(book.chapters[0], "layer.py", "x - 1", "x + 1")
    assert main(["v01", "--no-tests"], book) == 0
    assert read(book)[0] == before[0]


def test_it_begins_where_it_is_told_to(book):
    edit(book.chapters[1], "engine.py", "A = 1", "A = 10")
    assert main(["v02", "--no-tests"], book) == 0
    assert "A = 10\n" in (book.chapters[2].path / "engine.py").read_text()
    assert (book.chapters[0].path / "engine.py").read_text() == ENGINE


def test_texts_are_never_touched(book):
    before = read(book)
    edit(book.chapters[0], "README.md", "one", "uno")
    assert main(["v01", "--no-tests"], book) == 0
    assert read(book) == before


def test_new_gone_and_renamed_files_are_so_in_later_chapters(book):
    one, two, three = book.chapters
    (one.path / "deep").mkdir()
    (one.path / "deep" / "new.py").write_text("NEW = 1\n")
    (one.path / "layer.py").unlink()
    (one.path / "engine.py").rename(one.path / "motor.py")
    edit(one, "motor.py", "A = 1", "A = 10")
    assert main(["v01", "--no-tests"], book) == 0
    for chapter in (two, three):
        assert (chapter.path / "deep" / "new.py").read_text() == "NEW = 1\n"
        assert not (chapter.path / "layer.py").exists() and not (chapter.path / "engine.py").exists()
    assert (three.path / "motor.py").read_text() == ENGINE.replace("A = 1", "A = 10") + "\nG = 7\nH = 8\n"
    assert (three.path / "kernels" / "k.py").exists()


def test_a_file_that_was_only_renamed_keeps_what_later_chapters_added(book):
    (book.chapters[0].path / "engine.py").rename(book.chapters[0].path / "motor.py")
    assert main(["v01", "--no-tests"], book) == 0
    assert (book.chapters[2].path / "motor.py").read_text() == ENGINE + "\nG = 7\nH = 8\n"
    assert not (book.chapters[2].path / "engine.py").exists()


def test_a_file_that_is_gone_and_a_new_one_unlike_it_are_two():
    assert propagate.find_renames({"a.py": b"A = 1\n", "c.py": b""}, {"b.py": b"B = 2\n", "c.py": b""}) == {}


def test_a_file_that_a_later_chapter_dropped_stays_dropped(book, commit, capsys):
    (book.chapters[1].path / "layer.py").unlink()
    (book.chapters[2].path / "layer.py").unlink()
    commit(book)
    edit(book.chapters[0], "layer.py", "x + 1", "x + 2")
    assert main(["v01", "--no-tests"], book) == 0
    assert "v02 has no layer.py" in capsys.readouterr().out
    assert not (book.chapters[2].path / "layer.py").exists()


@pytest.fixture
def conflict(book, commit, capsys):
    """A change to lines that the second chapter changed differently, and the third as the second did."""
    for chapter in book.chapters[1:]:
        edit(chapter, "engine.py", "A = 1", "A = 2")
    commit(book)
    before = read(book)
    (book.chapters[0].path / "new.py").write_text("NEW = 1\n")
    edit(book.chapters[0], "engine.py", "A = 1", "A = 10")
    assert main(["v01", "--no-tests"], book) == 1
    return book, before, capsys.readouterr().out


def test_a_conflict_stops_with_markers_and_the_next_command(conflict):
    book, _, said = conflict
    text = (book.chapters[1].path / "engine.py").read_text()
    assert text.startswith("<<<<<<< v02\nA = 2\n||||||| v01 at HEAD\nA = 1\n=======\nA = 10\n>>>>>>> v01\n")
    assert "milestones/v02_b/engine.py\n" in said and "propagate ARGS=--continue" in said and "propagate ARGS=--abort" in said
    assert not (book.chapters[2].path / "new.py").exists()


def test_it_goes_on_once_the_markers_are_gone(conflict, capsys):
    book, *_ = conflict
    assert main(["--continue", "--no-tests"], book) == 2
    assert "milestones/v02_b/engine.py still has conflict markers" in capsys.readouterr().err
    (book.chapters[1].path / "engine.py").write_text(ENGINE.replace("A = 1", "A = 12") + "\nG = 7\n")
    assert main(["--continue", "--no-tests"], book) == 0
    assert (book.chapters[2].path / "engine.py").read_text() == ENGINE.replace("A = 1", "A = 12") + "\nG = 7\nH = 8\n"
    assert (book.chapters[2].path / "new.py").exists()
    assert main(["--continue"], book) == 2
    assert "no propagation is in progress" in capsys.readouterr().err


def test_abort_gives_every_later_chapter_back_and_keeps_the_edit(conflict):
    book, before, _ = conflict
    (book.chapters[1].path / "deep").mkdir()
    (book.chapters[1].path / "deep" / "stray.py").write_text("made while settling\n")
    assert main(["--abort"], book) == 0
    assert read(book) == before and not (book.chapters[1].path / "deep").exists()
    assert "A = 10" in (book.chapters[0].path / "engine.py").read_text() and (book.chapters[0].path / "new.py").exists()
    assert not state_file(book).exists()


def test_abort_after_a_second_conflict_gives_all_back(conflict):
    book, before, _ = conflict
    (book.chapters[1].path / "engine.py").write_text("nothing like it\n")
    assert main(["--continue", "--no-tests"], book) == 1
    assert "<<<<<<<" in (book.chapters[2].path / "engine.py").read_text()
    assert main(["--abort"], book) == 0
    assert read(book) == before


def test_a_second_propagation_waits_for_the_first(conflict, capsys):
    book, *_ = conflict
    assert main(["v01", "--no-tests"], book) == 2
    assert "a propagation is in progress; give --continue or --abort" in capsys.readouterr().err


def test_a_file_deleted_here_and_edited_there_is_a_conflict(book, commit):
    edit(book.chapters[1], "layer.py", "x + 1", "x + 2")
    edit(book.chapters[2], "layer.py", "x + 1", "x + 2")
    commit(book)
    (book.chapters[0].path / "layer.py").unlink()
    assert main(["v01", "--no-tests"], book) == 1
    (book.chapters[1].path / "layer.py").write_text("")
    assert main(["--continue", "--no-tests"], book) == 0
    assert not any((chapter.path / "layer.py").exists() for chapter in book.chapters)


@pytest.mark.parametrize("name", ["engine.py", "README.md", "stray.py"])
def test_it_refuses_while_a_later_chapter_has_changes(book, name, capsys):
    edit(book.chapters[0], "engine.py", "A = 1", "A = 10")
    (book.chapters[2].path / name).write_text("X = 1\n")
    before = read(book)
    assert main(["v01", "--no-tests"], book) == 2
    assert "v03 has uncommitted changes" in capsys.readouterr().err
    assert read(book) == before


def test_it_refuses_a_new_name_that_is_taken(book, capsys):
    (book.chapters[0].path / "kernels").mkdir()
    (book.chapters[0].path / "engine.py").rename(book.chapters[0].path / "kernels" / "k.py")
    before = read(book)
    assert main(["v01", "--no-tests"], book) == 2
    assert "v03 already has a file called kernels/k.py" in capsys.readouterr().err
    assert read(book) == before


def test_it_says_when_there_is_nothing_to_carry(book, capsys):
    assert main(["v01"], book) == 0
    assert "no *.py file of v01 has changed since HEAD" in capsys.readouterr().out


def test_the_chapters_it_touched_are_tested(book, monkeypatch):
    tested = []
    monkeypatch.setattr(propagate, "run_tests", lambda book, chapters: tested.append(chapters) or 5)
    edit(book.chapters[1], "engine.py", "A = 1", "A = 10")
    assert main(["v02"], book) == 5
    assert tested == [book.chapters[1:]]
