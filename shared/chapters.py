"""The table of contents: each chapter's name, what it adds, and where its files are.

A *capability* is something a user can do. A chapter has the capabilities of all earlier chapters and adds
its own. A test names those it needs and runs for every chapter that has them.

Tools take a Book, so they work on any directory with this layout.

    python -m shared.chapters          # prints the table
    python -m shared.chapters names    # v01 v02 ...: the Makefile derives its targets from these
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
    races_when_full: bool = False


@dataclass(frozen=True, eq=False)
class Chapter:
    """One directory under milestones/, and its files elsewhere."""

    name: str
    idea: str
    adds: frozenset[str]
    races: bool  # whether it runs many requests differently from the chapter before; the demo races these
    races_when_full: bool  # whether it does so when the cache is too small for all; these race once more
    root: Path  # of the repository
    previous: "Chapter | None"

    @property
    def id(self) -> str:
        """The short name that make targets and options use, such as v01."""
        return self.name.split("_")[0]

    @property
    def path(self) -> Path:
        return self.root / "milestones" / self.name

    @property
    def text(self) -> Path:
        return self.path / "README.md"

    @property
    def traps(self) -> Path:
        """The file of its seeded bugs."""
        return self.root / "tests" / "traps" / f"{self.id}.toml"

    @property
    def claims(self) -> Path:
        """The tests of its claims."""
        return self.root / "tests" / "claims" / f"test_{self.id}.py"

    @property
    def notebook(self) -> Path:
        """The source of its notebook."""
        return self.root / "notebooks" / f"{self.name}.py"

    @property
    def number(self) -> int:
        """Its index in the book, from 0."""
        return self.previous.number + 1 if self.previous else 0

    @property
    def capabilities(self) -> frozenset[str]:
        """What a user can do in this chapter: what it adds, and all that earlier chapters add."""
        return self.adds | (self.previous.capabilities if self.previous else frozenset())

    @property
    def command(self) -> list[str]:
        """The command that runs it in its own process."""
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
        """The chapter with this short or full name; ValueError if there is none.

        >>> BOOK.find("v01")
        <v01_naive>
        """
        for chapter in self.chapters:
            if text in (chapter.id, chapter.name):
                return chapter
        raise ValueError(f"there is no chapter {text!r}; the chapters are {', '.join(c.id for c in self.chapters)}")

    def after(self, chapter: Chapter) -> tuple[Chapter, ...]:
        """All chapters after this one."""
        return self.chapters[chapter.number + 1 :]

    def first_with(self, capability: str) -> Chapter:
        """The chapter that adds a capability."""
        return next(chapter for chapter in self.chapters if capability in chapter.adds)

    def last_with(self, capability: str) -> Chapter:
        """The latest chapter that has a capability."""
        return [chapter for chapter in self.chapters if capability in chapter.capabilities][-1]

    @property
    def results(self) -> Path:
        """The directory of committed results, as JSON."""
        return self.root / "docs" / "results"


CONTENTS = (
    Row(
        name="v01_naive",
        idea="A decoder is a function from tokens to the next token's logits. Call it in a loop.",
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
        idea="A forward pass reads every weight, whether it serves one request or sixteen. Pad requests into a rectangle, and run them together.",
        adds=frozenset({"max_num_seqs"}),
        races=True,
    ),
    Row(
        name="v04_continuous_batch",
        idea="Decide before every step which requests run, and lay their tokens end to end: a row freed in one step is taken in the next.",
        adds=frozenset(),
        races=True,
    ),
    Row(
        name="v05_paged_cache",
        idea="A slab reserves the maximum length for every request. Hand out memory in blocks instead, and keep a block table per sequence.",
        adds=frozenset({"num_blocks", "block_size", "kv_bytes"}),
        races=True,
    ),
    Row(
        name="v06_triton_kernel",
        idea="Gathering copies every running sequence's keys and values, in every layer of every step. A kernel follows the block tables instead, with an online softmax.",
        adds=frozenset({"attention"}),
    ),
    Row(
        name="v07_server",
        idea="One thread steps the engine, another runs the event loop with every connection, and they exchange only messages.",
        adds=frozenset({"serve"}),
    ),
    Row(
        name="v08_openai",
        idea="An API is a promise: every documented parameter either works or is refused by name.",
        adds=frozenset({"stop_strings", "prompt_logprobs", "openai"}),
    ),
    Row(
        name="v09_responses",
        idea="A completion is forgotten once it is sent, but a response is stored. Decide what to keep, for how long, and what a cancelled one leaves behind.",
        adds=frozenset({"responses"}),
    ),
    Row(
        name="v10_engine_process",
        idea="Threads share one interpreter lock, so the engine and the event loop take turns. Give the engine its own process, and send one message per step.",
        adds=frozenset({"engine_process"}),
    ),
    Row(
        name="v11_preemption",
        idea="Reserve what a request needs next, not the most it may need. When memory runs out, the least important request gives its blocks back.",
        adds=frozenset({"preemption"}),
        races_when_full=True,
    ),
    Row(
        name="v12_prefix_cache",
        idea="Equal beginnings have equal keys and values. Find full blocks by a hash of all tokens up to their end, and let many requests share them.",
        adds=frozenset({"prefix_cache"}),
        races_when_full=True,
    ),
    Row(
        name="v13_chunked_prefill",
        idea="Give each step a budget of tokens. Each running request gets at least one; long prompts get the rest, piece by piece.",
        adds=frozenset({"chunked_prefill"}),
    ),
    Row(
        name="v14_fused_step",
        idea="A step of few tokens takes as long as its reads and its launches. Store weights in the form that this processor reads fastest, and join what can be one operation.",
        adds=frozenset({"linear"}),
    ),
    Row(
        name="v15_graphs",
        idea="A decode step launches the same kernels every time, and Python takes longer to launch them than the GPU takes to run them. Keep the step's tensors in place, record it once, and replay it.",
        adds=frozenset({"graphs"}),
    ),
    Row(
        name="v16_same_bits",
        idea="Floating-point addition is not associative, and libraries choose the order of a sum by the size of the batch. Fix the order, and a request's numbers no longer depend on its company.",
        adds=frozenset({"exact"}),
    ),
    Row(
        name="v17_metrics",
        idea="Count where things happen, and let a scraper, a page and a person read the same events.",
        adds=frozenset({"metrics"}),
    ),
    Row(
        name="v18_structured_output",
        idea="Between the logits and the draw: add, take away, and forbid what the text's grammar does not allow.",
        adds=frozenset({"grammars"}),
    ),
    Row(
        name="v19_tools",
        idea="An answer has parts: what is thought, what is said, what is called.",
        adds=frozenset({"tools"}),
    ),
)

BOOK = Book.of(ROOT, CONTENTS)
CHAPTERS = BOOK.chapters
find, first_with, last_with = BOOK.find, BOOK.first_with, BOOK.last_with


def python_files(directory: Path) -> list[Path]:
    """The *.py files under a directory, sorted, without caches and hidden directories."""
    paths = []
    for path in sorted(directory.rglob("*.py")):
        if not any(part.startswith((".", "__pycache__")) for part in path.relative_to(directory).parts):
            paths.append(path)
    return paths


def main(argv: list[str]) -> int:
    if argv not in ([], ["names"]):
        print("usage: python -m shared.chapters [names]", file=sys.stderr)
        return 2
    if argv:
        print(*(chapter.id for chapter in CHAPTERS))
        return 0
    for chapter in CHAPTERS:
        print(f"{chapter.name:24}{chapter.idea}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
