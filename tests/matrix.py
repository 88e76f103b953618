"""Which tests `make test` runs for which chapter.

A test that takes `chapter` holds for every chapter that has what it needs. Running all tests for all chapters would
take longer with each chapter, so `make test` runs

    claims      of a chapter, for it and for the last
    parities    for every chapter, on pocket and two other checkpoints; for the last chapter on all
    of files    for the first chapter, the last, and each that changes one of the files that the tests are about
    whole runs  for the first chapter that can do it and the last

and the tests that belong to no chapter. It leaves out what is marked `whole`: tests that take seconds, and most cases of
tests that have many. The two checkpoints follow from the chapter's number, so three consecutive chapters cover them all.
`make test-vNN` runs all tests of one chapter, `make test-all` those of all chapters; shared/book/full_record.py
explains what `make prove` runs beyond `make test`.
"""
from functools import lru_cache
from pathlib import Path

from shared.chapters import Chapter
from shared.checkpoints import RANDOM

# Each of these compares a chapter's results with another's, and is quick.
PARITIES = {
    "test_arrivals.py",
    "test_engine.py",
    "test_finite.py",
    "test_grammars.py",
    "test_modules.py",
    "test_previous.py",
    "test_product.py",
    "test_source.py",
    "test_tokens.py",
}
# Each of these is about few files, which are the same in many chapters.
ABOUT = {
    "test_refusals.py": ("config.py", "loader.py", "params.py"),
    "test_sampling.py": ("params.py", "sampling.py"),
    "test_text.py": ("text.py",),
}
# These serve an engine. If it can have its own process, they run it in one, and with `--engine thread` in
# `make test-all`: that is how earlier chapters run it, in the same files except for two.
SERVERS = {
    "test_clients.py",
    "test_openai.py",
    "test_openai_under_stress.py",
    "test_prefix_cache.py",
    "test_protocol.py",
    "test_responses.py",
    "test_responses_protocol.py",
    "test_responses_under_stress.py",
    "test_server.py",
    "test_server_fuzz.py",
    "test_server_under_stress.py",
}
# These start processes and servers, or run whole workloads.
WHOLE_RUNS = SERVERS | {
    "test_command_line.py",
    "test_faults.py",
    "test_on_a_gpu.py",
    "test_operate.py",
    "test_soak.py",
    "test_stop_strings.py",
    "test_trace.py",
}
POCKET = "pocket"
CHECKPOINTS = (POCKET, *RANDOM)  # of a test that takes `checkpoint_name`


def chapters_run(file: Path, holds_for: list[Chapter]) -> list[Chapter]:
    """Of the chapters that a test holds for, those for which it is run."""
    if file.parent.name == "claims":
        return [holds_for[0], holds_for[-1]]
    if file.name in PARITIES:
        return holds_for
    if file.name in ABOUT:
        changed = [chapter for chapter in holds_for[1:-1] if changes(chapter, ABOUT[file.name])]
        return [holds_for[0], *changed, holds_for[-1]]
    if file.name in WHOLE_RUNS:
        return [holds_for[0], holds_for[-1]]
    raise ValueError(f"{file.name} has tests that take `chapter`; say in {Path(__file__).name} for which they are run")


@lru_cache
def changes(chapter: Chapter, names: tuple[str, ...]) -> bool:
    """Whether one of these files is not the same as in the chapter before."""
    return any((chapter.path / name).read_bytes() != (chapter.previous.path / name).read_bytes() for name in names)


def checkpoints_run(chapter: Chapter, last: Chapter) -> list[str]:
    """The checkpoints on which a chapter's parities are run."""
    if chapter is last:
        return list(CHECKPOINTS)
    families = CHECKPOINTS[1:]
    return [POCKET, *(families[(2 * chapter.number + i) % len(families)] for i in range(2))]
