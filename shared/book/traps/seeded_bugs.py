"""Read seeded bugs from tests/traps, and plant one in a copy of its chapter.

Reads: tests/traps/*.toml. Writes: a copy of a chapter.
"""
import ast
import tomllib
from dataclasses import dataclass
from pathlib import Path

from shared.book.units import read_units

KEYS = {"name", "file", "unit", "find", "replace", "test", "sees", "crashes", "seen"}
OPTIONAL = {"unit", "crashes", "seen"}


@dataclass(frozen=True)
class Trap:
    """A seeded bug, the tests that must catch it, and what a user would see of it."""

    name: str
    file: str
    find: str
    replace: str
    test: tuple[str, ...]
    sees: str
    unit: str = ""
    crashes: bool = False  # whether the bug kills the test's process with a signal
    seen: str = ""  # where this bug was shipped: a project and an issue's number, as "vllm #43810"

    @property
    def address(self) -> str:
        return f"{self.file}::{self.unit}" if self.unit else self.file

    @property
    def told(self) -> str:
        """What a user would see, and where the bug was shipped."""
        return " ".join(self.sees.split()) + (f" (This shipped: {self.seen}.)" if self.seen else "")


def read_traps(path: Path) -> list[Trap]:
    """The traps in a chapter's file; ValueError if a key is missing or unknown, or if two have the same name."""
    if not path.is_file():
        return []
    traps = []
    for row in tomllib.loads(path.read_text()).get("trap", []):
        name = row.get("name", f"trap {len(traps) + 1}")
        if set(row) | OPTIONAL != KEYS:
            wrong = ", ".join(sorted((set(row) | OPTIONAL) ^ KEYS))
            keys = ", ".join(sorted(KEYS))
            raise ValueError(f"{path.name}: {name!r} has missing or unknown keys: {wrong}; the keys are {keys}")
        tests = [row["test"]] if isinstance(row["test"], str) else row["test"]
        traps.append(Trap(**(row | {"test": tuple(tests)})))
        if [trap.name for trap in traps].count(name) > 1:
            raise ValueError(f"{path.name}: two traps are named {name!r}; give each its own name")
    return traps


def plant(trap: Trap, chapter: Path) -> None:
    """Plant the bug in a copy of its chapter; ValueError if it cannot be planted."""
    units = read_units(chapter)
    if trap.address not in units:
        raise ValueError(f"there is no unit {trap.address}; it was renamed or removed")
    pieces = units[trap.address].pieces
    count = sum(piece.text.count(trap.find) for piece in pieces)
    if count != 1:
        raise ValueError(f"`find` occurs {count} times in {trap.address}; it must occur exactly once")
    piece = next(piece for piece in pieces if trap.find in piece.text)
    path = chapter / trap.file
    lines = path.read_text().splitlines(keepends=True)
    before, after = lines[:piece.first_line - 1], lines[piece.first_line + piece.text.count("\n"):]
    planted = "".join(before) + piece.text.replace(trap.find, trap.replace) + "\n" + "".join(after)
    if trap.find == trap.replace:
        raise ValueError("`replace` is the same as `find`, so nothing was planted; make it different")
    try:
        ast.parse(planted)
    except SyntaxError as error:
        raise ValueError(f"with `replace`, {trap.file} does not parse: {error}") from None
    path.write_text(planted)
