"""v09: an API that remembers."""
import filecmp

import pytest


@pytest.mark.until("v10")
def test_responses_are_added_and_the_rest_stays_as_it_is(chapter):
    """The files that differ from the last chapter's, and those that are new."""
    files = {path.relative_to(chapter.path).as_posix() for path in chapter.path.rglob("*.py")}
    before = {path.relative_to(chapter.previous.path).as_posix() for path in chapter.previous.path.rglob("*.py")}
    assert files - before == {"responses.py", "responses_protocol.py", "responses_store.py"} and not before - files
    changed = {name for name in before if not filecmp.cmp(chapter.path / name, chapter.previous.path / name, shallow=False)}
    assert changed == {"gate.py", "process.py"}


def test_only_the_process_knows_of_responses(chapter):
    """Completions and chat work without them."""
    knows = {
        path.name
        for path in chapter.path.glob("*.py")
        if any(line.startswith(("from .responses", "from . import")) and "responses" in line for line in path.read_text().splitlines())
    }
    assert knows - {"responses.py", "responses_store.py", "responses_protocol.py"} == {"process.py"}
