"""The notebooks' check: stale cells, errors and changed outputs are reported."""
import functools
import shutil
import subprocess
import tomllib

import nbformat
import pytest

from shared.book import notebooks
from shared.chapters import BOOK

SOURCE = """# %% [markdown]
# # A notebook

# %%
x = 3
print("three:", x)
print("measured: 1.5 ms")
"""


@pytest.fixture
def source(tmp_path):
    """A source with its notebook, as if it had been executed."""
    path = tmp_path / "v00.py"
    path.write_text(SOURCE)
    notebook = notebooks.read(path)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="three: 3\nmeasured: 9.9 ms\n")]
    nbformat.write(notebook, path.with_suffix(".ipynb"))
    return path


def problems_of(source):
    return notebooks.problems([source])[source]


def test_a_notebook_that_is_what_its_source_says_has_no_problems(source):
    assert problems_of(source) == []


def test_other_cells_are_reported(source):
    source.write_text(SOURCE.replace("x = 3", "x = 1 + 2"))
    assert problems_of(source) == ["v00.ipynb does not have the cells of v00.py; run `make notebooks`"]


def test_other_lines_are_reported_unless_the_cell_varies(source):
    text = source.with_suffix(".ipynb").read_text()
    source.with_suffix(".ipynb").write_text(text.replace("three: 3", "three: 4"))
    assert "code cell 0 now prints different lines" in problems_of(source)[0]
    notebook = nbformat.read(source.with_suffix(".ipynb"), 4)
    notebook.cells[1].metadata["tags"] = ["varies"]
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    assert "does not have the cells" in problems_of(source)[0], "the source says whether a cell varies"
    source.write_text(SOURCE.replace("# %%\nx = 3", '# %% tags=["varies"]\nx = 3'))
    assert problems_of(source) == []


def test_what_an_engine_chose_is_compared_and_what_libraries_say_is_not(source):
    source.write_text(SOURCE + 'import sys; print("pocket: 1 MiB", file=sys.stderr); print("a warning", file=sys.stderr)\n')
    notebook = notebooks.read(source)
    said = "three: 3\nmeasured: 9.9 ms\n"
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text=said)]
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    assert "code cell 0 now prints different lines" in problems_of(source)[0]
    notebook.cells[1].outputs.append(nbformat.v4.new_output("stream", name="stderr", text="pocket: 1 MiB\n"))
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    assert problems_of(source) == []


def test_words_beside_a_measurement_are_compared(source):
    text = source.with_suffix(".ipynb").read_text()
    source.with_suffix(".ipynb").write_text(text.replace("measured: 9.9 ms", "estimated: 9.9 ms"))
    assert "code cell 0 now prints different lines" in problems_of(source)[0]


def test_a_value_that_is_only_shown_is_refused(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), 4)
    notebook.cells[1].outputs.append(nbformat.v4.new_output("execute_result", data={"text/plain": "41"}))
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    assert "ends with a value; print it" in problems_of(source)[0]


def test_a_cell_that_raises_or_ends_the_process_is_reported(source):
    for line, told in (("assert x == 4", "AssertionError"), ("import os; os._exit(3)", "exited with 3"), ("exit()", "SystemExit")):
        source.write_text(SOURCE + line + "\n")
        nbformat.write(notebooks.read(source), source.with_suffix(".ipynb"))
        [problem] = problems_of(source)
        assert told in problem


def test_a_notebook_that_is_missing_is_reported(source):
    source.with_suffix(".ipynb").unlink()
    assert problems_of(source) == ["v00.py has no notebook; run `make notebooks`"]
    source.unlink()
    assert problems_of(source) == ["v00.py is missing; every chapter has a notebook"]


def test_all_begin_alike_and_name_themselves_and_no_machine():
    begins = set()
    address = tomllib.loads((BOOK.root / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    for source in (chapter.notebook for chapter in BOOK.chapters):
        text = source.read_text()
        first = text.index("# %%\nimport subprocess")
        begins.add(text[first : text.index("sys.path.insert(0, str(root))\n", first)])
        of_colab = address.replace("https://github.com/", "https://colab.research.google.com/github/")
        assert f"({of_colab}/blob/main/notebooks/{source.stem}.ipynb)" in text and f'"{address}"' in text
        made = source.with_suffix(".ipynb").read_text()
        assert str(BOOK.root) not in made and "image/png" in made
    assert len(begins) == 1


def test_git_shows_a_notebook_by_cells_wherever_it_is_called(tmp_path):
    root = tmp_path / "a clone"
    root.mkdir()
    run = functools.partial(subprocess.run, cwd=root, check=True, capture_output=True, text=True)
    run(["git", "init", "-q"])
    shutil.copy(BOOK.root / ".gitattributes", root)
    path = root / "book.ipynb"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("before = 1", id="a")])
    nbformat.write(book, path)
    run(["git", "add", "."])
    book.cells[0].source = "after = 1"
    nbformat.write(book, path)
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    assert "--- a/book.ipynb" in run(["git", "diff"], env=bare).stdout, "a clone that is not configured shows text"
    notebooks.use_nbdime(root)
    shown = run(["git", "diff"], env=bare).stdout
    assert "nbdiff" in shown and "before = 1" in shown and "after = 1" in shown


def test_the_check_prints_each_problem_and_names_the_notebooks_at_its_end(monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(notebooks, "preload", lambda names: None)
    wrong = {"v02_kv_cache": ["cell 3 is late"], "v08_openai": ["cell 9 is loud"]}
    monkeypatch.setattr(notebooks, "problems", lambda sources: {source: wrong.get(source.stem, []) for source in sources})
    assert not notebooks.check(BOOK)
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("cell 9 is loud") - 1].split() == ["v08_openai", "wrong"]
    sound, all_of_them = len(BOOK.chapters) - 2, len(BOOK.chapters)
    assert lines[-1] == f"{sound} of {all_of_them} notebooks run and are up to date, but not v02_kv_cache, v08_openai"
    wrong.clear()
    assert notebooks.check(BOOK) and capsys.readouterr().out.endswith("notebooks run and are up to date\n")
