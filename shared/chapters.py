"""The table of contents, and the one model of a chapter: what it is called, what it adds, where its parts lie.

A *capability* is something a user can do. A chapter has those of all chapters before it and adds
its own; a test names the ones it needs, and then runs for every chapter that has them.

Tools take a Book, so that they can be pointed at any directory that is laid out like this one.

    python -m shared.chapters          # the table
    python -m shared.chapters names    # v01 v02 ...: what the Makefile derives its targets from
"""
import importlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Row(NamedTuple):
    """A line of the table of contents."""

    name: str
    idea: str = ""
    adds: frozenset[str] = frozenset()
    races: bool = False


@dataclass(frozen=True, eq=False)
class Chapter:
    """One directory under milestones/, and what belongs to it elsewhere."""

    name: str
    idea: str
    adds: frozenset[str]
    races: bool  # whether it answers many questions in another way than the chapter before: then the demo shows it
    root: Path  # of the repository
    previous: "Chapter | None"

    @property
    def id(self) -> str:
        """The short form that targets and options take: v01."""
        return self.name.split("_")[0]

    @property
    def path(self) -> Path:
        return self.root / "milestones" / self.name

    @property
    def text(self) -> Path:
        return self.path / "README.md"

    @property
    def traps(self) -> Path:
        """Where its seeded bugs are written down."""
        return self.root / "tests" / "traps" / f"{self.id}.toml"

    @property
    def claims(self) -> Path:
        """The tests of what it claims."""
        return self.root / "tests" / "claims" / f"test_{self.id}.py"

    @property
    def notebook(self) -> Path:
        """The source of its notebook."""
        return self.root / "notebooks" / f"{self.name}.py"

    @property
    def number(self) -> int:
        """Its place in the book, counted from 0."""
        return self.previous.number + 1 if self.previous else 0

    @property
    def capabilities(self) -> frozenset[str]:
        """All that a user can do in this chapter."""
        return self.adds | (self.previous.capabilities if self.previous else frozenset())

    @property
    def command(self) -> list[str]:
        """How to run it in a process of its own."""
        return [sys.executable, "-m", f"milestones.{self.name}"]

    def load(self) -> ModuleType:
        return importlib.import_module(f"milestones.{self.name}")

    def __repr__(self) -> str:
        return f"<{self.name}>"


@dataclass(frozen=True, eq=False)
class Book:
    """A repository with chapters under milestones/, in reading order."""

    root: Path
    chapters: tuple[Chapter, ...]

    @classmethod
    def of(cls, root: Path, rows: Iterable[Row]) -> "Book":
        chapters = []
        for row in rows:
            chapters.append(Chapter(*row, root=root, previous=chapters[-1] if chapters else None))
        return cls(root, tuple(chapters))

    def find(self, text: str) -> Chapter:
        """The chapter called text: its short form or its whole name.

        >>> BOOK.find("v01")
        <v01_naive>
        """
        for chapter in self.chapters:
            if text in (chapter.id, chapter.name):
                return chapter
        raise ValueError(f"there is no chapter {text!r}; the chapters are {', '.join(c.id for c in self.chapters)}")

    def after(self, chapter: Chapter) -> tuple[Chapter, ...]:
        """The chapters that follow a chapter."""
        return self.chapters[chapter.number + 1 :]

    def first_with(self, capability: str) -> Chapter:
        """The chapter that adds a capability."""
        return next(chapter for chapter in self.chapters if capability in chapter.adds)

    def last_with(self, capability: str) -> Chapter:
        """The newest chapter in which a user can do this."""
        return [chapter for chapter in self.chapters if capability in chapter.capabilities][-1]

    @property
    def results(self) -> Path:
        """Where measured figures are committed, as JSON."""
        return self.root / "docs" / "results"


CONTENTS = (
    Row(
        name="v01_naive",
        idea="A decoder is a function from tokens to the next token's logits; call it in a loop.",
        adds=frozenset({"generate", "sample", "logprobs", "stream", "abort", "chat", "command_line", "max_model_len"}),
        races=True,
    ),
    Row(
        name="v02_kv_cache",
        idea="Keys and values of past tokens never change. Prefill once, then feed one token at a time.",
        adds=frozenset({"previous", "kv_cache"}),
        races=True,
    ),
    Row(
        name="v03_static_batch",
        idea="One pass reads every weight, whether it serves one request or sixteen. Fill a rectangle.",
        adds=frozenset({"max_num_seqs"}),
        races=True,
    ),
    Row(
        name="v04_continuous_batch",
        idea="Choose anew before every pass who is in it, and lay tokens end to end: a place freed now is taken in the next step.",
        adds=frozenset(),
        races=True,
    ),
    Row(
        name="v05_paged_cache",
        idea="A slab reserves the longest length for everyone. Give memory out in blocks, and keep a table per sequence.",
        adds=frozenset({"num_blocks", "block_size", "kv_bytes"}),
        races=True,
    ),
    Row(
        name="v06_triton_kernel",
        idea="Gathering copies the whole cache at every step. A kernel can follow the tables itself, with an online softmax.",
        adds=frozenset({"attention"}),
    ),
    Row(
        name="v07_server",
        idea="One thread steps the engine, the event loop keeps the connections, and messages cross between them.",
        adds=frozenset({"serve"}),
    ),
    Row(
        name="v08_openai",
        idea="An API is a promise: whatever a client may send is answered as documented, or refused by name.",
        adds=frozenset({"stop_strings", "prompt_logprobs", "openai"}),
    ),
    Row(
        name="v09_responses",
        idea="Completions forget, responses remember: what is kept, for how long, and what a cancelled one leaves behind.",
        adds=frozenset({"responses"}),
    ),
    Row(
        name="v10_engine_process",
        idea="One interpreter lock lets one thread run. The engine moves into a process with a lock of its own, and one message per step crosses.",
        adds=frozenset({"engine_process"}),
    ),
)

BOOK = Book.of(ROOT, CONTENTS)
CHAPTERS = BOOK.chapters
find, first_with, last_with = BOOK.find, BOOK.first_with, BOOK.last_with


def python_files(directory: Path) -> list[Path]:
    """The *.py files under a directory, in order, without caches and hidden directories."""
    found = []
    for path in sorted(directory.rglob("*.py")):
        if not any(part.startswith((".", "__pycache__")) for part in path.relative_to(directory).parts):
            found.append(path)
    return found


def main(argv: list[str]) -> int:
    if argv == ["names"]:
        print(*(chapter.id for chapter in CHAPTERS))
        return 0
    for chapter in CHAPTERS:
        print(f"{chapter.name:24}{chapter.idea}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
