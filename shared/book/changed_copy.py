"""A changed copy of a chapter in the chapter's place: in this process, in its forks, and in every process they start.

    with changed_copy(chapter, partial(plant, trap), scratch) as copy:
        ...      # `milestones.v05_paged_cache` is the copy

`milestones/__init__.py` looks first where the variable STEPSERVE_COPIES says. So a server that a test starts, or an
engine's process that is spawned, runs the copy too. Nothing of the chapter may have been imported before.

Reads: a chapter. Writes: a copy in a directory that is given.
"""
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from shared.chapters import Chapter

COPIES = "STEPSERVE_COPIES"


@contextlib.contextmanager
def changed_copy(chapter: Chapter, change: Callable[[Path], None] | None, scratch: Path) -> Iterator[Path]:
    """Copy the chapter into scratch/milestones and change it there; while entered, the copy is what is imported."""
    copy = make_copy(chapter, scratch / "milestones")
    if change is not None:
        change(copy)
    with in_place(copy.parent):
        yield copy


def make_copy(chapter: Chapter, directory: Path, *left_out: str, name: str | None = None) -> Path:
    """Copy a chapter into a directory, without caches and what else is left out; the copy, which may have a name of its own."""
    copy = directory / (name or chapter.name)
    shutil.copytree(chapter.path, copy, ignore=shutil.ignore_patterns("__pycache__", *left_out))
    return copy


@contextlib.contextmanager
def in_place(directory: Path) -> Iterator[None]:
    """While entered, chapters are imported from a directory where it has them."""
    import milestones

    names = [path.name for path in directory.iterdir()]
    loaded = [name for name in sys.modules if any(name.startswith(f"milestones.{each}") for each in names)]
    assert not loaded, f"{loaded[:3]} were imported before the copy was made; run it in a fresh process or a fork"
    path, variable = list(milestones.__path__), os.environ.get(COPIES)
    milestones.__path__ = [str(directory), *path]
    os.environ[COPIES] = os.pathsep.join(milestones.__path__[:-1])
    try:
        yield
    finally:
        milestones.__path__ = path
        if variable is None:
            del os.environ[COPIES]
        else:
            os.environ[COPIES] = variable
