"""Import a changed copy in place of a chapter: in this process, its forks, and every process they start.

    with changed_copy(chapter, partial(plant, trap), scratch) as copy:
        ...      # `milestones.v05_paged_cache` is the copy

`milestones/__init__.py` first searches the directories in the environment variable STEPSERVE_COPIES, so a server that a
test starts, or a spawned engine process, runs the copy too. The chapter must not have been imported before.

Reads: a chapter. Writes: a copy in a given directory.
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
    """Copy the chapter into scratch/milestones and apply `change` to the copy; while entered, the copy is imported."""
    copy = make_copy(chapter, scratch / "milestones")
    if change is not None:
        change(copy)
    with in_place(copy.parent):
        yield copy


def make_copy(chapter: Chapter, directory: Path, *left_out: str, name: str | None = None) -> Path:
    """Copy a chapter into a directory, without caches and the files in `left_out`, under `name` if given; the copy's path."""
    copy = directory / (name or chapter.name)
    shutil.copytree(chapter.path, copy, ignore=shutil.ignore_patterns("__pycache__", *left_out))
    return copy


@contextlib.contextmanager
def in_place(directory: Path) -> Iterator[None]:
    """While entered, chapters that are in this directory are imported from it."""
    import milestones

    names = [path.name for path in directory.iterdir()]
    loaded = [name for name in sys.modules if any(name.startswith(f"milestones.{each}") for each in names)]
    assert not loaded, f"{loaded[:3]} were imported before the copy was made; use a fresh process or a fork"
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
