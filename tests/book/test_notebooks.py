"""How a run's output is compared with a notebook's."""
import pytest

from shared.book import notebooks

nbformat = pytest.importorskip("nbformat", reason="`make setup-book` installs it")


@pytest.fixture
def differences(tmp_path):
    """What is wrong with a notebook of one cell that shows these streams, if a run prints this."""

    def differences(shown, printed):
        outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in shown]
        cell = nbformat.v4.new_code_cell("print()", outputs=outputs)
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "v01.ipynb")
        return notebooks.unprinted(tmp_path / "v01.py", [printed])

    return differences


def test_lines_in_another_order_are_other_lines(differences):
    assert not differences([("stdout", "a\nb\n")], "a\nb\n")
    assert "code cell 0 now prints different lines" in differences([("stdout", "a\nb\n")], "b\na\n")[0]


def test_two_streams_may_interleave_in_any_order(differences):
    shown = [("stdout", "a\n"), ("stderr", "b\n"), ("stdout", "c\n")]
    assert not differences(shown, "b\na\nc\n") and differences(shown, "b\na\n")


def test_a_notebook_that_is_not_written_yet_is_named_with_the_remedy(make_book, first):
    book = make_book(first, first, beside={"notebooks/v01_a.ipynb": "{}"})
    with pytest.raises(ValueError, match="^notebooks/v02_b.ipynb is not written yet; run `make notebooks`$"):
        notebooks.diff(book.chapters[1])
