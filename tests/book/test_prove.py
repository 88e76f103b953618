"""The proof, its stages, and the examples in docstrings."""
import sys

from shared.book.doctests import check_package
from shared.book.prove import STAGES, Stage, main


def stage(name, code, **options):
    return Stage(name, f"{name} holds", (sys.executable, "-c", code), **options)


def test_a_failed_stage_fails_the_proof_and_keeps_none_from_running(tmp_path, capsys):
    stages = (
        stage("first", "raise SystemExit(3)"),
        stage("second", "open('second', 'w')"),
        stage("third", "open('third', 'w')", needs="notebooks/*.py"),
    )
    assert main([], stages, tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "1 passed, 1 failed"
    assert lines[-4].split()[:2] == ["first", "FAILED"] and lines[-3].split()[:2] == ["second", "passed"]
    assert (tmp_path / "second").exists() and not (tmp_path / "third").exists()


def test_a_proof_without_a_failure_passes(tmp_path, capsys):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "a.py").touch()
    stages = (
        stage("first", "pass"),
        stage("third", "pass", needs="notebooks/*.py"),
        stage("last", "raise SystemExit(1)"),
    )
    assert main(["first", "third"], stages, tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 passed, 0 failed"


def test_an_unknown_stage_is_refused(tmp_path, capsys):
    assert main(["frist"], (stage("first", "pass"),), tmp_path) == 2
    assert "there is no stage frist; the stages are first" in capsys.readouterr().err


def test_tests_traps_and_texts_are_stages():
    assert [stage.name for stage in STAGES][:3] == ["tests", "traps", "texts"]


def test_examples_in_docstrings_are_run_and_false_ones_reported(tmp_path, monkeypatch):
    package = tmp_path / "examples_of_the_book" / "inner"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text('"""\n>>> 1 + 1\n2\n"""\n')
    (package / "__init__.py").touch()
    module = package / "a.py"
    module.write_text('def f():\n    """\n    >>> f()\n    3\n    >>> f() + 1\n    4\n    """\n    return 3\n')
    monkeypatch.syspath_prepend(tmp_path)
    report = check_package("examples_of_the_book")
    assert (report.attempted, report.failures) == (3, ())
    sys.modules["examples_of_the_book.inner.a"].f.__doc__ += "\n>>> f()\n5\n"
    report = check_package("examples_of_the_book")
    assert report.attempted == 4 and len(report.failures) == 1 and "Expected:\n    5\nGot:\n    3" in report.failures[0]


def test_the_examples_of_these_tools_are_true():
    report = check_package("shared.book")
    assert report.attempted and not report.failures
