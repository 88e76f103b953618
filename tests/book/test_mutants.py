"""Mutants: each kind of damage is done, only where it has an effect, and survivors are reported."""
import ast
import functools

import pytest

from shared.book.traps import mutants
from shared.chapters import BOOK

SOURCE = '''"""A page."""
import os


def f(a: int = 3, *, b=None) -> int:
    """Words, 7."""
    if a < 2 and not b:
        raise ValueError(f"a is {a + 1}")
    assert a != 5, "no"
    total = a * 4
    total += os.getpid() // 6
    print(total)
    return total in [True]
'''


def told(source):
    return {each.told for each in mutants.mutants_of(source, "f.py")}


def test_every_kind_of_damage_is_done_and_nothing_that_is_only_said():
    assert told(SOURCE) == {
        "`3` becomes `4`",
        "`a < 2 and not b` becomes `not (a < 2 and (not b))`",
        "`and` becomes `or`",
        "`<` becomes `<=`",
        "`2` becomes `3`",
        "`not` becomes ``",
        "`total = a * 4` becomes `pass`",
        "`*` becomes `//`",
        "`4` becomes `5`",
        "`total += os.getpid() // 6` becomes `pass`",
        "`//` becomes `*`",
        "`6` becomes `7`",
        "`print(total)` becomes `pass`",
        "`in` becomes `not in`",
        "`True` becomes `False`",
    }


def test_what_was_damaged_still_parses_and_differs_in_one_place(make_book, first):
    first["cache.py"] = SOURCE.replace("Words", "W\u00f6rter \u2192")
    book = make_book(first)
    path = book.chapters[0].path / "cache.py"
    sound = path.read_text()
    for mutant in mutants.mutants_of(sound, "cache.py"):
        mutants.put(mutant, book.chapters[0].path)
        damaged = path.read_text()
        assert ast.dump(ast.parse(damaged)) != ast.dump(ast.parse(sound)), mutant
        changed = [n for n, (a, b) in enumerate(zip(sound.splitlines(), damaged.splitlines()), 1) if a != b]
        assert changed == [mutant.line], mutant
        path.write_text(sound)


def test_a_seed_chooses_and_new_takes_only_what_the_chapter_changed(make_book, first):
    then = dict(first)
    then["cache.py"] = first["cache.py"].replace("return n * SIZE", "return n * SIZE + 1")
    book = make_book(first, then)
    choose = functools.partial(mutants.choose, book.chapters[1])
    assert choose(3, 1, False) == choose(3, 1, False) != choose(3, 2, False)
    assert {each.told for each in choose(99, 0, True)} == {"`+` becomes `-`", "`1` becomes `2`", "`*` becomes `//`"}
    assert len(choose(99, 0, False)) > 3


@pytest.fixture
def survivor(make_book, first):
    """A book in which one of two recorded mutants survived."""
    book = make_book(first)
    book.results.mkdir(parents=True, exist_ok=True)
    (book.root / "tests").mkdir(exist_ok=True)
    lost = {"file": "cache.py", "line": 4, "code": "x = 1", "told": "`1` becomes `2`", "result": "survived", "by": ""}
    mutants.record(book, "v01", "the command", [lost, lost | {"line": 9, "code": "y = 1", "result": "killed", "by": "a test"}])
    return book


def explain(book, *reasons):
    rows = [f"[[survivor]]\nfile = 'cache.py'\ncode = '{code}'\ntold = '`1` becomes `2`'\nwhy = '{why}'\n" for code, why in reasons]
    (book.root / mutants.REASONS).write_text("\n".join(rows))


def test_what_is_recorded_is_kept_when_another_chapter_is(survivor):
    before = mutants.recorded(survivor)["v01"]
    mutants.record(survivor, "v02", "another", [])
    assert mutants.recorded(survivor)["v01"] == before
    assert mutants.recorded(survivor)["v02"]["command"] == "another"


def test_a_survivor_needs_a_reason_and_a_reason_its_survivor(survivor):
    assert [line.split(" survived")[0] for line in mutants.unexplained(survivor)] == ["cache.py: `x = 1`: `1` becomes `2`"]
    explain(survivor, ("x = 1", " "))
    assert len(mutants.unexplained(survivor)) == 1
    explain(survivor, ("x = 1", "nobody reads it"))
    assert mutants.unexplained(survivor) == []
    explain(survivor, ("x = 1", "nobody reads it"), ("y = 1", "gone"))
    assert ["did not survive" in line for line in mutants.unexplained(survivor)] == [True]


def test_no_mutant_of_this_book_survived_without_a_reason():
    assert mutants.unexplained(BOOK) == []
