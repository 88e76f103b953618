"""The bug hunt: a bug is planted, shows itself, and is revealed."""
import random
import subprocess
import sys

import pytest

from shared.book.traps import hunt
from shared.book.traps.seeded_bugs import read_traps
from shared.chapters import BOOK, ROOT

TRAP = '[[trap]]\nname = "costs nothing"\nfile = "cache.py"\nunit = "cost"\nfind = "n * SIZE"\nreplace = "n * 0"\ntest = "tests/t.py"\nsees = "All is free."\n'


def test_a_bug_is_planted_in_a_copy_and_revealed(make_book, first, capsys):
    book = make_book(first | {"README.md": "# One\n"}, beside={"tests/traps/v01.toml": TRAP})
    assert hunt.main(["break", "v01"], book) == 0
    assert "There is one bug in build/hunt/v01_a" in capsys.readouterr().out
    copy = book.root / "build" / "hunt" / "v01_a"
    assert "n * 0" in (copy / "cache.py").read_text() and not (copy / "README.md").exists()
    assert "n * SIZE" in (book.chapters[0].path / "cache.py").read_text(), "the chapter is unchanged"
    assert hunt.main(["reveal"], book) == 0
    told = capsys.readouterr().out
    for part in ("costs nothing, in cache.py::cost", "-    return n * SIZE", "+    return n * 0", "All is free.", "tests/t.py"):
        assert part in told


def test_the_bug_is_revealed_even_if_the_copy_was_mended_or_deleted(make_book, first):
    book = make_book(first, beside={"tests/traps/v01.toml": TRAP})
    copy = hunt.begin(book, book.chapters[0], random.Random(0))
    (copy / "cache.py").write_text((book.chapters[0].path / "cache.py").read_text())
    assert "+    return n * 0" in hunt.reveal(book)
    (copy / "cache.py").unlink()
    assert "+    return n * 0" in hunt.reveal(book)


def test_without_a_hunt_nothing_is_revealed(make_book, first, capsys):
    book = make_book(first)
    assert hunt.main(["reveal"], book) == 2
    assert "no bug is planted; start with `make break-v05`" in capsys.readouterr().err
    assert hunt.main(["break", "v01"], book) == 2
    assert "v01 has no traps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        hunt.main(["break"], book)


def test_chance_finds_every_trap_and_a_seed_the_same():
    book = BOOK
    traps = read_traps(book.chapters[0].traps)
    drawn = {random.Random(seed).choice(traps).name for seed in range(400)}
    assert drawn == {trap.name for trap in traps}
    assert random.Random(3).choice(traps) == random.Random(3).choice(traps)


def test_the_copy_is_what_is_asked(tmp_path):
    """The answer comes from the copy, in a process that has not imported the chapter."""
    code = f"""
import random
from pathlib import Path
from shared.book.traps import hunt
from shared.chapters import BOOK
book, chapter = BOOK, BOOK.chapters[0]
hunt.directory = lambda book: Path({str(tmp_path)!r})
class First(random.Random):
    def choice(self, traps):
        return next(trap for trap in traps if trap.name == "scale missing")
hunt.begin(book, chapter, First())
print(' '.join(hunt.ask(book, "What is a KV cache?")))
import milestones.v01_naive
print(milestones.v01_naive.__file__.startswith({str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    answer, copied = done.stdout.strip().rsplit("\n", 1)
    assert copied == "True"
    assert answer and "nothing is recomputed" not in answer, "the chapter without the bug generates that"


def test_a_hunt_for_a_bug_that_was_renamed_says_so(make_book, first):
    book = make_book(first, beside={"tests/traps/v01.toml": TRAP})
    hunt.begin(book, book.chapters[0], random.Random(0))
    book.chapters[0].traps.write_text(TRAP.replace("costs nothing", "is free"))
    with pytest.raises(hunt.NoHunt, match="no longer has the trap 'costs nothing'"):
        hunt.reveal(book)
