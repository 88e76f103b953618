"""The harness's own checks: which files a run has read, what it records, and its progress line."""
import contextlib
import os
import pty
import subprocess
import sys
from types import SimpleNamespace

import pytest

from shared.book import full_record
from shared.chapters import CHAPTERS, ROOT
from tests.support.progress import OneLine
from tests.support.seen import Seen


def test_whatever_is_opened_or_imported_is_seen(tmp_path):
    seen, file = Seen(), tmp_path / "data.txt"
    file.write_text("x")
    assert file in seen.files()
    assert ROOT / "shared" / "chapters.py" in seen.files(), "it was imported before"
    assert tmp_path / "other.txt" not in seen.files()


@pytest.mark.parametrize(
    ("exit_status", "skipped", "before", "after", "told"),
    [
        (1, 0, "", "", "not written, since not all tests of v02 ran and passed"),
        (0, 3, "", "", "not written, since not all tests of v02 ran and passed"),
        (0, 0, " M a.py", "", "not written, since there are uncommitted changes"),
        (0, 0, "", " M a.py", "not written, since there are uncommitted changes"),
        (0, 0, None, None, "not written, since `git status` fails here"),
        (0, 0, "", "", "all tests of v02 pass, on 1 files; commit it"),
    ],
)
def test_all_tests_of_a_chapter_are_written_down_if_they_pass_in_a_clean_tree(harness, monkeypatch, exit_status, skipped, before, after, told):
    written = []
    monkeypatch.setattr(full_record, "changes", lambda root: after)
    monkeypatch.setattr(full_record, "record", lambda book, chapter, files: written.append((chapter.id, files)))
    config = SimpleNamespace(only=[CHAPTERS[1]], seen={"shared/chapters.py"}, num_skipped=skipped, changes=before)
    assert harness.kept(config, exit_status).endswith(told)
    assert written == ([("v02", ["shared/chapters.py"])] if told.startswith("all") else [])


def test_a_run_of_fewer_tests_is_not_recorded_as_all():
    options = ["-k", "x", "--collect-only", "--chapter", "v01", "--gpu"]
    for given, named in ((options, "keyword, chapter, gpu, collectonly"), (["tests/test_engine.py"], "paths")):
        done = subprocess.run([sys.executable, "-m", "pytest", "--full", "v02", *given], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 4 and f"--full records that all tests of a chapter pass; leave out {named}" in done.stderr


def test_a_process_that_saw_a_part_of_the_tests_writes_down_nothing(harness, monkeypatch):
    monkeypatch.setattr(harness, "kept", lambda *_: pytest.fail("it was written down"))
    config = SimpleNamespace(workerinput={}, getoption=lambda name: name == "--full", distances={}, left_out=0)
    harness.pytest_terminal_summary(SimpleNamespace(write_line=pytest.fail), 0, config)


def test_of_a_chapter_only_files_are_collected_that_may_hold_for_it(harness):
    tests = ROOT / "tests"
    for name, held in (("test_engine.py", True), ("conftest.py", True), ("test_tools.py", False), ("book/test_sync.py", False)):
        assert harness.may_hold(tests / name, [CHAPTERS[1]]) == held, name
    assert [harness.may_hold(tests / "claims" / f"test_v0{n}.py", [CHAPTERS[1]]) for n in (1, 2, 3)] == [True, True, False]


def test_what_workers_measured_and_saw_is_put_together(harness):
    config = SimpleNamespace(seen=set(), left_out=0, distances={})
    for distance, file in ((1.0, "a"), (float("nan"), "b"), (2.0, "c")):
        said = {"seen": [file], "left_out": 7, "distances": {"x": {"distance": distance, "where": file}}}
        harness.pytest_testnodedown(SimpleNamespace(config=config, workeroutput=said), None)
    assert config.seen == {"a", "b", "c"} and config.left_out == 7
    assert config.distances["x"]["where"] == "b", "NaN counts as the largest distance"


def test_pytest_in_a_terminal_draws_one_line_and_no_dots():
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_layers.py"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=its, stdout=its, stderr=subprocess.STDOUT)
    os.close(its)
    said = b""
    with contextlib.suppress(OSError):  # on Linux, how a read reports that no writer is left
        while part := os.read(ours, 4096):
            said += part
    os.close(ours)
    assert process.wait() == 0
    assert b"of 2 tests, 0:0" in said and b"%]" not in said, said


def test_on_a_terminal_one_line_says_how_far_it_is():
    lines = []
    line = OneLine(SimpleNamespace(rewrite=lambda text, erase: lines.append(text)))
    line.pytest_xdist_node_collection_finished(None, ["a", "b", "c"])
    for when, failed in (("setup", False), ("call", True), ("teardown", False)):
        line.drawn = 0.0
        report = SimpleNamespace(when=when, failed=failed, passed=not failed, skipped=False)
        line.pytest_runtest_logreport(report)
        assert line.pytest_report_teststatus(report)[1] == "", "no letter for each test"
    line.pytest_sessionfinish()
    assert [text.split(",")[0] for text in lines] == ["0 of 3 tests", "0 of 3 tests", "1 of 3 tests", ""]
    assert "1 failed" in lines[2]
