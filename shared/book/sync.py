"""Writes what is generated in the texts, and says what is untrue in them.

    python -m shared.book.sync            # write blocks, results and the pictures drawn from results
    python -m shared.book.sync --check    # write nothing; fail if anything is stale, unclaimed or unmeasured

A text is a chapter's README.md, README.md or CONTRIBUTING.md at the top, or a page under docs/. `texts` tells how claims
and result tokens are written, `blocks` what each generates.

In the first chapter every unit is shown once by `code`, or listed in `<!-- unshown: ... -->` with the
reason in the paragraph below. In a later one every unit that differs from the chapter before has one home:
`diff` below the paragraph that says why; or, if only words differ, `words` with the reason below; or, if it is
new and better read in its file, `unshown` with the reason below. Units in which only imports differ need none.
"""
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from shared.book import answers
from shared.book.blocks import GENERATORS
from shared.book.diff import changes_of
from shared.book.texts import Claim, TextError, bare_numbers, fill_blocks, fill_results, find_claims, read_result
from shared.book.tree import Tree, short, this_repository
from shared.book.units import expand, misplaced, read_units
from shared.pictures import draw_all

MENDS = "run `make sync`"


@dataclass(frozen=True)
class Problem:
    """Something untrue in a text, and what to do about it."""

    path: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


def texts(tree: Tree) -> dict[Path, Path | None]:
    """Every text of the repository, and the chapter it belongs to."""
    pages = {chapter / "README.md": chapter for chapter in tree.chapters}
    top = [tree.root / "README.md", tree.root / "CONTRIBUTING.md", *sorted((tree.root / "docs").rglob("*.md"))]
    return pages | {page: None for page in top if page.is_file()}


def written(tree: Tree, page: Path, chapter: Path | None) -> tuple[str, list[Problem]]:
    """The text as it should be, and the claims and tokens that say nothing."""
    problems = []
    name = page.relative_to(tree.root)

    def generate(claim: Claim) -> list[str] | None:
        try:
            return GENERATORS[claim.kind](tree, chapter, claim.what)
        except ValueError as error:
            problems.append(Problem(name, claim.line, f"{claim}: {error}"))
            return None

    def read(what: str, line: int) -> str | None:
        try:
            return read_result(tree.results, what)
        except ValueError as error:
            problems.append(Problem(name, line, str(error)))
            return None

    text = page.read_text()
    try:
        text = fill_blocks(text, generate)
        text = fill_results(text, read)
    except TextError as error:
        problems.append(Problem(name, error.line, str(error)))
    return text, sorted(problems, key=lambda problem: problem.line)


def stale(tree: Tree, page: Path, new: str) -> list[Problem]:
    """Where the text as it stands differs from the text as it should be."""
    name, old = page.relative_to(tree.root), page.read_text()
    if old == new:
        return []
    before, after = find_claims(old), find_claims(new)
    lines, new_lines = old.splitlines(), new.splitlines()
    problems = []
    for claim, now in zip(before, after):
        if lines[claim.stop:claim.end] != new_lines[now.stop:now.end]:
            state = "is stale" if claim.end > claim.stop else "is not there yet"
            problems.append(Problem(name, claim.line, f"the block of `{claim}` {state}; {MENDS}"))
    return problems or [Problem(name, 1, f"a result token shows an old value; {MENDS}")]


def unclaimed(tree: Tree, chapter: Path, claims: list[Claim]) -> list[Problem]:
    """Units that differ from the chapter before without one home, and homes without such a unit."""
    name, before = readme(tree, chapter), short(tree.previous(chapter))
    changes = {change.address: change for change in changes_of(tree, chapter)}
    homes = {kind: Counter() for kind in ("diff", "words", "unshown")}
    problems = []
    for claim in claims:
        if claim.kind not in homes:
            continue
        try:
            named = expand(claim.what, changes)
        except ValueError as error:
            # Of the others it is told where their block is generated.
            if claim.kind == "unshown":
                problems.append(Problem(name, claim.line, f"{claim}: {error}"))
            continue
        for address in named:
            if changes[address].kind != "added" and claim.kind == "unshown":
                message = f"{address} is {changes[address].kind} since {before}, not new; show how with diff:"
                problems.append(Problem(name, claim.line, message))
        addresses = [address for address in named if changes[address].kind != "identical"]
        homes[claim.kind].update(addresses)
        for address in addresses:
            cosmetic = changes[address].kind == "cosmetic"
            if cosmetic and claim.kind == "diff":
                advice = "undo it, or claim it with words: and say below why the words had to change"
                problems.append(Problem(name, claim.line, f"only words of {address} differ from {before}; {advice}"))
            if not cosmetic and claim.kind == "words":
                message = f"more than words of {address} differs from {before}; claim it with diff:"
                problems.append(Problem(name, claim.line, message))
    for address, change in changes.items():
        count = sum(home[address] for home in homes.values())
        if change.kind == "cosmetic" and not count:
            advice = "undo it, or claim it with words: and the reason"
            problems.append(Problem(name, 1, f"only words of {address} differ from {before}; {advice}"))
        elif change.kind in ("changed", "added", "removed") and not count:
            advice = "claim it with diff: under a paragraph that says why, or propagate what was mended"
            message = f"{address} is {change.kind} since {before} and no text claims it; {advice}"
            problems.append(Problem(name, 1, message))
        elif count > 1:
            problems.append(Problem(name, 1, f"{address} has {count} homes; keep one diff: and make the others see:"))
    for message in misplaced(read_units(tree.previous(chapter)), read_units(chapter)):
        problems.append(Problem(name, 1, f"{message} ({before}); put it back"))
    return problems


def unshown(tree: Tree, chapter: Path, claims: list[Claim]) -> list[Problem]:
    """Units of the first chapter that its text does not show once."""
    name, units = readme(tree, chapter), read_units(chapter)
    shown, problems = Counter(), []
    for claim in claims:
        if claim.kind in ("code", "unshown"):
            try:
                shown.update(expand(claim.what, units))
            except ValueError as error:
                if claim.kind == "unshown":
                    problems.append(Problem(name, claim.line, f"{claim}: {error}"))
    for address in units:
        if shown[address] != 1:
            times = f"{shown[address]} times" if shown[address] else "nowhere"
            advice = "show it once with code:, or list it in unshown: with the reason"
            problems.append(Problem(name, 1, f"{address} is shown {times}; {advice}"))
    return problems


def unreasoned(tree: Tree, page: Path, claims: list[Claim]) -> list[Problem]:
    """Claims that want a reason beside them and have none."""
    name, lines = page.relative_to(tree.root), page.read_text().splitlines()
    problems = []
    for claim in claims:
        above = next((line for line in reversed(lines[:claim.start]) if line.strip()), "#")
        below = next((line for line in lines[claim.end:] if line.strip()), "#")
        if claim.kind == "diff" and not is_prose(above):
            message = f"`{claim}` stands under no paragraph; say above it why this changed"
            problems.append(Problem(name, claim.line, message))
        if claim.kind in ("words", "unshown") and not is_prose(below):
            problems.append(Problem(name, claim.line, f"`{claim}` has no reason; give it in the paragraph below"))
    return problems


def is_prose(line: str) -> bool:
    return not line.lstrip().startswith(("#", "<!--", "```", "~~~"))


def readme(tree: Tree, chapter: Path) -> Path:
    return (chapter / "README.md").relative_to(tree.root)


def check_text(tree: Tree, page: Path, chapter: Path | None) -> list[Problem]:
    """All that is untrue in one text."""
    name = page.relative_to(tree.root)
    if not page.is_file():
        return [Problem(name, 1, "is missing; a chapter has a text")]
    new, problems = written(tree, page, chapter)
    try:
        claims = find_claims(page.read_text())
    except TextError:
        return problems
    problems += stale(tree, page, new)
    problems += unreasoned(tree, page, claims)
    if chapter is not None:
        guard = unclaimed if tree.previous(chapter) else unshown
        problems += guard(tree, chapter, claims)
    for line, number in bare_numbers(page.read_text()):
        advice = "make it a result token, or follow it with <!-- given: source -->"
        problems.append(Problem(name, line, f"where does {number!r} come from? {advice}"))
    return problems


def pictures(tree: Tree) -> dict[Path, str]:
    """The pictures that are drawn from committed results, as they should be."""
    drawn = draw_all(tree.results, lambda path: json.loads(path.read_text()))
    return {tree.root / "docs" / "pictures" / name: content for name, content in drawn.items()}


def check(tree: Tree) -> list[Problem]:
    """All that is untrue in the texts and pictures; writes nothing."""
    problems = [problem for page, chapter in texts(tree).items() for problem in check_text(tree, page, chapter)]
    for path, content in pictures(tree).items():
        if not path.is_file() or path.read_text() != content:
            problems.append(Problem(path.relative_to(tree.root), 1, f"is not what its result draws; {MENDS}"))
    said = tree.results / answers.FILE
    if said.is_file():
        name = said.relative_to(tree.root)
        problems += [Problem(name, 1, f"has no answer to {trap!r} as it is now; {answers.MENDS}") for trap in answers.stale(tree)]
    return problems


def explained(tree: Tree) -> int:
    """How many units differ from the chapter before, and are told of in a text."""
    return sum(change.kind not in ("identical", "imports") for chapter in tree.chapters[1:] for change in changes_of(tree, chapter))


def sync(tree: Tree) -> tuple[list[Path], list[Problem]]:
    """Write what is generated; the texts and pictures that changed, and the claims that say nothing."""
    changed, problems = [], []
    for page, chapter in texts(tree).items():
        if not page.is_file():
            continue
        new, found = written(tree, page, chapter)
        problems += found
        if new != page.read_text():
            page.write_text(new)
            changed.append(page)
    for path, content in pictures(tree).items():
        if not path.is_file() or path.read_text() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            changed.append(path)
    return changed, problems


def main(argv: list[str], tree: Tree | None = None) -> int:
    if argv not in ([], ["--check"]):
        print("usage: python -m shared.book.sync [--check]", file=sys.stderr)
        return 2
    tree = tree or this_repository()
    try:
        changed, problems = ([], check(tree)) if argv else sync(tree)
    except ValueError as error:
        print(error)
        return 1
    for page in changed:
        print(f"wrote {page.relative_to(tree.root)}")
    for problem in problems:
        print(problem)
    if argv:
        told = f"{explained(tree)} changed units explained, {len(texts(tree))} texts true"
        print(f"{len(problems)} problems" if problems else told)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
