"""The table of contents: one row a chapter, in reading order.

A *capability* is something a user can do. A chapter has those of all chapters before it and adds
its own; a test names the ones it needs, and then runs for every chapter that has them.

    python -m shared.chapters          # the table
    python -m shared.chapters names    # v01 v02 ...: what the Makefile derives its targets from
"""
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
MILESTONES = ROOT / "milestones"


@dataclass(frozen=True)
class Chapter:
    """One directory under milestones/."""

    name: str
    idea: str
    adds: frozenset[str]

    @property
    def id(self) -> str:
        """The short form that targets and options take: v01."""
        return self.name.split("_")[0]

    @property
    def path(self) -> Path:
        return MILESTONES / self.name

    @property
    def number(self) -> int:
        return CHAPTERS.index(self)

    @property
    def previous(self) -> "Chapter | None":
        return CHAPTERS[self.number - 1] if self.number else None

    @property
    def capabilities(self) -> frozenset[str]:
        """All that a user can do in this chapter."""
        return frozenset().union(*(chapter.adds for chapter in CHAPTERS[: self.number + 1]))

    def load(self) -> ModuleType:
        return importlib.import_module(f"milestones.{self.name}")


def last_with(capability: str) -> Chapter:
    """The newest chapter in which a user can do this."""
    return [chapter for chapter in CHAPTERS if capability in chapter.capabilities][-1]


CHAPTERS = (
    Chapter(
        name="v01_naive",
        idea="A decoder is a function from tokens to the next token's logits; call it in a loop.",
        adds=frozenset({"generate", "sample", "logprobs", "stream", "abort", "chat", "command_line", "max_model_len"}),
    ),
    Chapter(
        name="v02_kv_cache",
        idea="Keys and values of past tokens never change. Prefill once, then feed one token at a time.",
        adds=frozenset({"previous"}),
    ),
    Chapter(
        name="v03_static_batch",
        idea="One pass reads every weight, whether it serves one request or sixteen. Fill a rectangle.",
        adds=frozenset({"max_num_seqs"}),
    ),
    Chapter(
        name="v04_continuous_batch",
        idea="Schedule by the step and by the token, not by the rectangle: a place freed now is taken in the next step.",
        adds=frozenset(),
    ),
    Chapter(
        name="v05_paged_cache",
        idea="A slab reserves the longest length for everyone. Give memory out in blocks, and keep a table per sequence.",
        adds=frozenset({"num_blocks", "block_size", "kv_bytes"}),
    ),
    Chapter(
        name="v06_triton_kernel",
        idea="Gathering copies the whole cache at every step. A kernel can follow the tables itself, with an online softmax.",
        adds=frozenset({"attention"}),
    ),
    Chapter(
        name="v07_server",
        idea="One thread steps the engine, the event loop keeps the connections, and queues lie between them.",
        adds=frozenset({"stop_strings", "prompt_logprobs", "serve"}),
    ),
)


def find(text: str) -> Chapter:
    """The chapter called text: its short form or its whole name.

    >>> find("v01").name
    'v01_naive'
    """
    for chapter in CHAPTERS:
        if text in (chapter.id, chapter.name):
            return chapter
    raise ValueError(f"there is no chapter {text!r}; the chapters are {', '.join(c.id for c in CHAPTERS)}")


def command(chapter: Chapter) -> list[str]:
    """How to run a chapter in a process of its own, as this process would import it: a damaged copy stays one."""
    import milestones

    places = [str(place) for place in milestones.__path__]
    name = f"milestones.{chapter.name}"
    if places == [str(MILESTONES)]:
        return [sys.executable, "-m", name]
    find_copy = f"import runpy, milestones; milestones.__path__ = {places!r}"
    return [sys.executable, "-c", f"{find_copy}; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"]


def main(argv: list[str]) -> int:
    if argv == ["names"]:
        print(*(chapter.id for chapter in CHAPTERS))
        return 0
    for chapter in CHAPTERS:
        print(f"{chapter.name:24}{chapter.idea}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
