"""The trap runner: a bug that its test catches is killed; everything else is an error."""
import json
import subprocess
import sys

import pytest

from shared.book.changed_copy import make_copy
from shared.book.traps.runner import belongs, run_in_process
from shared.book.traps.seeded_bugs import Trap, plant, read_traps
from shared.chapters import BOOK, ROOT

from .conftest import FIRST, write

CONFTEST = """\
import importlib
import pytest


def pytest_addoption(parser):
    parser.addoption("--chapter")


@pytest.fixture
def cache(request):
    return importlib.import_module("milestones.v01_a.cache")


@pytest.fixture
def full(cache):
    cache = cache.Cache()
    cache.write("a", 1)
    assert cache.numbers["a"] == 1
    return cache
"""

TESTS = """\
import pytest


def test_write(cache):
    made = cache.Cache()
    made.write("a", 3)
    assert made.numbers == {"a": 3}


def test_cost(cache):
    assert cache.cost(2) == 8


def test_full(full):
    assert full.numbers == {"a": 1}


def test_wrong():
    assert 1 == 2


@pytest.mark.skip
def test_skipped():
    pass
"""

TRAP = dict(
    name="forgets",
    file="cache.py",
    unit="Cache.write",
    find="[name] = number",
    replace="[name] = 0",
    test="tests/test_a.py::test_write",
    sees="nought",
)

COST = "tests/test_a.py::test_cost"

# by name: what differs from TRAP, the result, and part of the detail
CASES = {
    "forgets": ({}, "killed", "test_write: AssertionError"),
    "module body": (dict(unit=None, find="SIZE = 4", replace="SIZE = 5", test=COST), "killed", "test_cost"),
    "two tests": (dict(test=[COST, "tests/test_a.py::test_write"]), "killed", "test_write"),
    "survivor": (dict(test=COST), "survived", "make it catch the bug"),
    "absent": (dict(find="[name] = nummer"), "error", "`find` occurs 0 times in cache.py::Cache.write"),
    "twice": (dict(find="name"), "error", "`find` occurs 2 times"),
    "elsewhere": (dict(find="return n * SIZE"), "error", "`find` occurs 0 times"),
    "no unit": (dict(unit="Cache.put"), "error", "there is no unit cache.py::Cache.put"),
    "no change": (dict(replace="[name] = number"), "error", "nothing was planted"),
    "no python": (dict(replace="[name] = ="), "error", "does not parse"),
    "does not run": (dict(replace="[name] = nummer"), "error", "the planted code does not run: NameError"),
    "fixture": (dict(test="tests/test_a.py::test_full"), "error", "its fixture failed"),
    "already wrong": (dict(test="tests/test_a.py::test_wrong"), "error", "test_a.py::test_wrong fails: assert 1 == 2"),
    "skipped": (dict(test="tests/test_a.py::test_skipped"), "error", "does not pass: it is skipped"),
    "ends the process": (dict(replace="[name] = __import__('os')._exit(0)"), "error", "exited with 0 before pytest was done"),
    "crashes": (
        dict(replace="[name] = __import__('os').abort()", crashes=True), "killed", "test_write: the process died of signal 6"
    ),
    "crashes unannounced": (dict(replace="[name] = __import__('os').abort()"), "error", "exited with -6 before pytest was done"),
    "ends, and was to crash": (dict(replace="[name] = __import__('os')._exit(0)", crashes=True), "error", "exited with 0"),
    "hangs": (dict(find="self.numbers[name] = number", replace="while True: pass"), "error", "not done after 2 s"),
}


# The module that describes the machine takes as long to import as everything else.
RUN = """\
import os
import sys
from pathlib import Path
from types import SimpleNamespace

# What other packages bring along for pytest takes longer to import than the limit below.
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
sys.path.insert(0, {repository!r})
sys.modules["shared.machine"] = SimpleNamespace(machine=lambda gpu: "a machine", today=lambda: "2000-01-01")
from shared.book.traps import runner
from shared.chapters import Book, Row

runner.TIMEOUT_S = 2
sys.exit(runner.main(sys.argv[1:], Book.of(Path({root!r}), [Row("v01_a")]), slow=("pytest",)))
"""


def toml(rows):
    lines = []
    for row in rows:
        lines += ["[[trap]]", *(f"{key} = {json.dumps(value)}" for key, value in row.items() if value is not None), ""]
    return "\n".join(lines)


def make_repository(root, rows):
    """A small repository with these traps, and the command that plants them."""
    write(root / "milestones" / "v01_a", FIRST)
    write(root, {
        "milestones/__init__.py": "",
        "pyproject.toml": "",
        "tests/conftest.py": CONFTEST,
        "tests/test_a.py": TESTS,
        "tests/traps/v01.toml": toml(rows),
        "run.py": RUN.format(repository=str(ROOT), root=str(root)),
    })
    return sys.executable, str(root / "run.py")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The outcome of every case, by name."""
    root = tmp_path_factory.mktemp("a book")
    command = make_repository(root, [TRAP | {"name": name} | changes for name, (changes, *_) in CASES.items()])
    return {outcome.trap: outcome for outcome in run_in_process("v01", command, root)}


@pytest.mark.parametrize("name", CASES)
def test_each_trap_comes_to_its_end(outcomes, name):
    _, result, detail = CASES[name]
    assert (outcomes[name].result, detail in outcomes[name].detail) == (result, True), outcomes[name]


def test_the_command_fails_unless_every_trap_is_killed(tmp_path):
    survivor = dict(name="survivor", unit="Cache.__init__", find="numbers = {}", replace="numbers = dict()")
    command = make_repository(tmp_path, [TRAP, TRAP | survivor])
    source = (tmp_path / "milestones/v01_a/cache.py").read_text()
    done = subprocess.run([*command, "v01"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "1 of 2 traps killed by a test that they name"
    done = subprocess.run([*command, "--all", "--only", "forgets"], capture_output=True, text=True)
    assert (done.returncode, "1 of 1 traps killed" in done.stdout) == (0, True), done.stdout
    done = subprocess.run([*command, "v01", "--only", "forget"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "v01 has no trap named 'forget'\n")
    assert (tmp_path / "milestones/v01_a/cache.py").read_text() == source


def test_a_chapter_without_traps_is_an_error(tmp_path):
    command = make_repository(tmp_path, [])
    done = subprocess.run([*command, "--all"], capture_output=True, text=True)
    assert (done.returncode, "tests/traps/v01.toml has no traps" in done.stdout) == (1, True)


def test_the_matrix_says_which_tests_of_the_suite_see_a_bug(tmp_path):
    command = make_repository(tmp_path, [TRAP])
    subprocess.run([*command, "matrix"], check=True, capture_output=True)
    matrix = json.loads((tmp_path / "docs/results/traps-matrix.json").read_text())
    failed = ["tests/test_a.py::test_full", "tests/test_a.py::test_write", "tests/test_a.py::test_wrong"]
    assert matrix["chapters"] == {"v01": {"forgets": {"failed": failed, "passed": 1}}}
    assert (matrix["date"], matrix["machine"]) == ("2000-01-01", "a machine")


@pytest.mark.parametrize(
    "row, why",
    [
        ({"sees": None}, "'forgets' has missing or unknown keys: sees"),
        ({"seas": "nought"}, "'forgets' has missing or unknown keys: seas"),
    ],
)
def test_a_trap_with_a_key_too_few_or_too_many_is_refused(tmp_path, row, why):
    path = tmp_path / "v01.toml"
    path.write_text(toml([TRAP | row]))
    with pytest.raises(ValueError, match=why):
        read_traps(path)


def test_two_traps_of_one_name_are_refused(tmp_path):
    path = tmp_path / "v01.toml"
    path.write_text(toml([TRAP, TRAP]))
    with pytest.raises(ValueError, match="two traps are named 'forgets'"):
        read_traps(path)


def test_a_bug_is_planted_where_it_should_be_and_nowhere_else(make_book, first):
    [chapter] = make_book(first).chapters
    trap = Trap(name="a", file="cache.py", unit="cost", find="n * SIZE", replace="n", test=("t",), sees="s")
    plant(trap, chapter.path)
    assert (chapter.path / "cache.py").read_text() == first["cache.py"].replace("n * SIZE", "n")


@pytest.mark.parametrize("planted", BOOK.chapters, ids=lambda chapter: chapter.id)
def test_all_bugs_of_the_book_can_be_planted(tmp_path, planted):
    copy = make_copy(planted, tmp_path)
    for trap in read_traps(planted.traps):
        before = (copy / trap.file).read_text()
        plant(trap, copy)
        (copy / trap.file).write_text(before)


def test_one_tests_name_is_not_mistaken_for_a_longer_one():
    assert belongs("tests/test_a.py::test_b[v01]", ("tests/test_a.py::test_b",))
    assert belongs("tests/test_a.py::test_b", ("tests/test_a.py",))
    assert not belongs("tests/test_a.py::test_bc", ("tests/test_a.py::test_b",))


def test_where_a_bug_shipped_is_shown_with_it(tmp_path):
    path = tmp_path / "v01.toml"
    path.write_text(toml([TRAP | {"seen": "vllm #43810"}, TRAP | {"name": "other"}]))
    assert [trap.told for trap in read_traps(path)] == ["nought (This shipped: vllm #43810.)", "nought"]
