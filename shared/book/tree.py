"""The repository as the tools see it: a root, and its chapters in reading order.

Every tool takes a Tree, so that it can be pointed at any directory that is laid out like this one.
"""
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tree:
    """A repository with chapters under milestones/."""

    root: Path
    names: tuple[str, ...]

    @property
    def chapters(self) -> tuple[Path, ...]:
        """The chapters' directories, in reading order."""
        return tuple(self.root / "milestones" / name for name in self.names)

    def chapter(self, text: str) -> Path:
        """The directory of the chapter called text: its short form or its whole name."""
        for directory in self.chapters:
            if text in (short(directory), directory.name):
                return directory
        raise ValueError(f"there is no chapter {text!r}; the chapters are {', '.join(map(short, self.chapters))}")

    def previous(self, chapter: Path) -> Path | None:
        number = self.chapters.index(chapter)
        return self.chapters[number - 1] if number else None

    def later(self, chapter: Path) -> tuple[Path, ...]:
        return self.chapters[self.chapters.index(chapter) + 1:]

    def traps(self, chapter: Path) -> Path:
        """Where the chapter's seeded bugs are written down."""
        return self.root / "tests" / "traps" / f"{short(chapter)}.toml"

    @property
    def results(self) -> Path:
        """Where measured figures are committed, as JSON."""
        return self.root / "docs" / "results"


def short(chapter: Path) -> str:
    """What options and targets call a chapter.

    >>> short(Path("milestones/v05_paged_cache"))
    'v05'
    """
    return chapter.name.split("_")[0]


def this_repository() -> Tree:
    from shared.chapters import CHAPTERS, ROOT

    return Tree(ROOT, tuple(chapter.name for chapter in CHAPTERS))


def python_files(directory: Path) -> list[Path]:
    """The *.py files under a directory, in order, without caches and hidden directories."""
    found = []
    for path in sorted(directory.rglob("*.py")):
        if not any(part.startswith((".", "__pycache__")) for part in path.relative_to(directory).parts):
            found.append(path)
    return found
