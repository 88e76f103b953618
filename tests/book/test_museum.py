"""The page of the seeded bugs that somebody shipped."""
import pytest

from shared.book.site import museum
from shared.book.site.build import cell
from shared.book.traps.seeded_bugs import Trap, read_traps
from shared.chapters import BOOK


def shipped():
    return [(chapter, trap) for chapter in BOOK.chapters for trap in read_traps(chapter.traps) if trap.seen]


def test_the_page_has_each_shipped_bug_once_with_its_reports_and_its_test():
    lines = [line for line in museum.page(BOOK, cell).splitlines() if line.startswith("| **")]
    assert len(lines) == len(shipped())
    for line, (chapter, trap) in zip(lines, shipped(), strict=True):
        assert cell(trap.name) in line and cell(trap.sees) in line and f"/{chapter.name}/" in line
        assert trap.test[0].rpartition("::")[2] in line
        assert all(f"{project} {number}" in line for project, number in museum.reports(trap))


def test_the_page_counts_the_bugs_and_the_projects():
    [counted] = [line for line in museum.page(BOOK, cell).splitlines() if "not invented" in line]
    projects = {project for _, trap in shipped() for project, _ in museum.reports(trap)}
    assert f"{len(shipped())} are not invented" in counted and f"{len(projects)} projects" in counted


@pytest.mark.parametrize("seen", ["vllm", "vllm 43810", "#43810", "vllm #1; sglang #2", "vllm #1,sglang #2"])
def test_a_report_that_nobody_can_look_up_is_refused(seen):
    with pytest.raises(ValueError, match="projects and numbers"):
        museum.reports(Trap("a name", "", "", "", (), "", seen=seen))


def test_a_report_leads_to_its_repository_if_that_is_known():
    assert museum.link("vllm", "PR #29") == "[vllm PR #29](https://github.com/vllm-project/vllm/issues/29)"
    assert museum.link("a/b", "#1") == "[a/b #1](https://github.com/a/b/issues/1)"
    assert museum.link("nobody-knows", "#1") == "nobody-knows #1"
    assert museum.link("vllm", "CVE-2025-1") == "vllm CVE-2025-1"
