"""Write the generated parts of the texts, and report what is out of date or unexplained in them.

    python -m shared.book.claims.sync            # writes blocks, results and the pictures drawn from results
    python -m shared.book.claims.sync --check    # writes nothing; fails if anything is stale, unclaimed or without a source

A text is a chapter's README.md, the top-level README.md or CONTRIBUTING.md, or a page under docs/. `markdown` describes how
claims and result tokens are written, `generators` what they generate.

In the first chapter, every unit is shown once by `code`, or listed in `<!-- unshown: ... -->` with the reason in the prose
below it. In later chapters, every unit that differs from the chapter before has exactly one claim: `diff`, below the
paragraph that says why; or `words`, with the reason below, if only comments or docstrings differ; or `unshown`, with the
reason below, if it is new and better read in its file. Units in which only imports differ need no claim. The prose below an
`unshown` names each of its units: `read` or `Checkpoint.read`, or config.py for a module's own body.

Reads: texts, chapters, docs/results/*.json. Writes: texts, docs/pictures/*.svg.
"""
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from shared.book.claims.generators import GENERATORS
from shared.book.claims.markdown import (
    Claim,
    TextError,
    bare_numbers,
    fill_blocks,
    fill_results,
    find_claims,
    read_result,
)
from shared.book.diff import changes_of
from shared.book.pictures import draw_all
from shared.book.traps import answers
from shared.book.units import expand, misplaced, read_units
from shared.chapters import BOOK, Book, Chapter
from shared.programs import run

MENDS = "run `make sync`"


@dataclass(frozen=True)
class Problem:
    """Something wrong in a text, with the remedy in the message."""

    path: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


def texts(book: Book) -> dict[Path, Chapter | None]:
    """Every text in the repository, with the chapter it belongs to, or None."""
    pages = {chapter.text: chapter for chapter in book.chapters}
    top = [book.root / "README.md", book.root / "CONTRIBUTING.md", *sorted((book.root / "docs").rglob("*.md"))]
    return pages | {page: None for page in top if page.is_file()}


def written(book: Book, page: Path, chapter: Chapter | None) -> tuple[str, list[Problem]]:
    """The text with its generated parts up to date, and the claims and tokens that could not be generated."""
    problems = []
    name = page.relative_to(book.root)

    def generate(claim: Claim) -> list[str] | None:
        try:
            return GENERATORS[claim.kind](book, chapter, claim.what)
        except ValueError as error:
            problems.append(Problem(name, claim.line, f"{claim}: {error}"))
            return None

    def read(what: str, line: int) -> str | None:
        try:
            return read_result(book, what)
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


def stale(book: Book, page: Path, new: str) -> list[Problem]:
    """Where the text differs from `new`, the text as it should be."""
    name, old = page.relative_to(book.root), page.read_text()
    if old == new:
        return []
    before, after = find_claims(old), find_claims(new)
    lines, new_lines = old.splitlines(), new.splitlines()
    problems = []
    for claim, now in zip(before, after):
        if lines[claim.stop:claim.end] != new_lines[now.stop:now.end]:
            state = "is stale" if claim.end > claim.stop else "is missing"
            problems.append(Problem(name, claim.line, f"the block of `{claim}` {state}; {MENDS}"))
    return problems or [Problem(name, 1, f"a result token shows an old value; {MENDS}")]


def unclaimed(book: Book, chapter: Chapter, claims: list[Claim]) -> list[Problem]:
    """Units that differ from the chapter before without exactly one claim of the right kind, and claims without such a unit."""
    name, before = readme(chapter), chapter.previous.id
    changes = {change.address: change for change in changes_of(chapter)}
    homes = {kind: Counter() for kind in ("diff", "words", "unshown")}
    problems = []
    for claim in claims:
        if claim.kind not in homes:
            continue
        try:
            named = expand(claim.what, changes)
        except ValueError as error:
            # For the other kinds, generating their block reports this.
            if claim.kind == "unshown":
                problems.append(Problem(name, claim.line, f"{claim}: {error}"))
            continue
        for address in named:
            if changes[address].kind != "added" and claim.kind == "unshown":
                message = f"{address} is not new but {changes[address].kind} since {before}; show it with `diff:`"
                problems.append(Problem(name, claim.line, message))
        addresses = [address for address in named if changes[address].kind != "identical"]
        homes[claim.kind].update(addresses)
        for address in addresses:
            cosmetic = changes[address].kind == "cosmetic"
            if cosmetic and claim.kind == "diff":
                advice = "undo it, or claim it with `words:` and give the reason below"
                problems.append(Problem(name, claim.line, f"only comments or docstrings of {address} differ from {before}; {advice}"))
            if not cosmetic and claim.kind == "words":
                message = f"{address} differs from {before} in more than comments and docstrings; claim it with `diff:`"
                problems.append(Problem(name, claim.line, message))
    for address, change in changes.items():
        count = sum(home[address] for home in homes.values())
        if change.kind == "cosmetic" and not count:
            advice = "undo it, or claim it with `words:` and give the reason"
            problems.append(Problem(name, 1, f"only comments or docstrings of {address} differ from {before}; {advice}"))
        elif change.kind in ("changed", "added", "removed") and not count:
            advice = "claim it with `diff:` below a paragraph that says why, or propagate the fix"
            message = f"{address} is {change.kind} since {before} and no text claims it; {advice}"
            problems.append(Problem(name, 1, message))
        elif count > 1:
            problems.append(Problem(name, 1, f"{address} is claimed {count} times; keep one `diff:` and change the others to `see:`"))
    for message in misplaced(read_units(chapter.previous.path), read_units(chapter.path)):
        problems.append(Problem(name, 1, f"{message} (in {before}); change it back"))
    return problems


def unshown(book: Book, chapter: Chapter, claims: list[Claim]) -> list[Problem]:
    """Units of the first chapter that its text does not show, or list as unshown, exactly once."""
    name, units = readme(chapter), read_units(chapter.path)
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
            state = f"shown {shown[address]} times" if shown[address] else "not shown"
            advice = "show it once with `code:`, or list it in `unshown:` with the reason"
            problems.append(Problem(name, 1, f"{address} is {state}; {advice}"))
    return problems


def unreasoned(book: Book, page: Path, claims: list[Claim]) -> list[Problem]:
    """Claims without the reason that has to be above or below them."""
    name, lines = page.relative_to(book.root), page.read_text().splitlines()
    problems = []
    for claim in claims:
        above = next((line for line in reversed(lines[:claim.start]) if line.strip()), "#")
        below = next((line for line in lines[claim.end:] if line.strip()), "#")
        if claim.kind == "diff" and not is_prose(above):
            message = f"`{claim}` has no paragraph directly above it; say there why this changed"
            problems.append(Problem(name, claim.line, message))
        if claim.kind in ("words", "unshown") and not is_prose(below):
            problems.append(Problem(name, claim.line, f"`{claim}` has no reason; give it in the paragraph below"))
    return problems


def unnamed(chapter: Chapter, claims: list[Claim]) -> list[Problem]:
    """Units claimed as unshown that the prose below the claim does not name."""
    problems, lines, units = [], chapter.text.read_text().splitlines(), read_units(chapter.path)
    for claim in claims:
        if claim.kind != "unshown":
            continue
        prose = []
        for line in lines[claim.end:]:
            if not is_prose(line):
                break
            prose.append(line)
        names = set(re.findall(r"`([\w.]+)`|\[([\w.]+)\]\(", "\n".join(prose)))
        named = {name for pair in names for name in pair if name}
        try:
            addresses = expand(claim.what, units)
        except ValueError:
            continue  # reported elsewhere
        for address in addresses:
            file, _, name = address.partition("::")
            # Naming the class counts as naming its constructor.
            name = name.removesuffix(".__init__")
            if not named & {name or file, name.rpartition(".")[2] or file}:
                message = f"the prose below `{claim}` does not name {address}; say in a sentence what it does, or show it"
                problems.append(Problem(readme(chapter), claim.line, message))
    return problems


def is_prose(line: str) -> bool:
    return not line.lstrip().startswith(("#", "<!--", "```", "~~~"))


def readme(chapter: Chapter) -> Path:
    return chapter.text.relative_to(chapter.root)


def check_text(book: Book, page: Path, chapter: Chapter | None) -> list[Problem]:
    """All problems in one text."""
    name = page.relative_to(book.root)
    if not page.is_file():
        return [Problem(name, 1, "is missing; every chapter has a text")]
    new, problems = written(book, page, chapter)
    try:
        claims = find_claims(page.read_text())
    except TextError:
        return problems
    problems += stale(book, page, new)
    problems += unreasoned(book, page, claims)
    if chapter is not None:
        guard = unclaimed if chapter.previous else unshown
        problems += guard(book, chapter, claims)
        problems += unnamed(chapter, claims)
    for line, number in bare_numbers(page.read_text()):
        advice = "make it a result token, or add <!-- given: source --> after it"
        problems.append(Problem(name, line, f"{number!r} has no source; {advice}"))
    return problems


def pictures(book: Book) -> dict[Path, str]:
    """The pictures drawn from committed results, by path."""
    return {book.root / "docs" / "pictures" / name: content for name, content in draw_all(book).items()}


def check(book: Book) -> list[Problem]:
    """All problems in the texts and pictures; writes nothing."""
    problems = [problem for page, chapter in texts(book).items() for problem in check_text(book, page, chapter)]
    for path, content in pictures(book).items():
        if not path.is_file() or path.read_text() != content:
            problems.append(Problem(path.relative_to(book.root), 1, f"does not match its result; {MENDS}"))
    answers_file = book.results / answers.FILE
    if answers_file.is_file():
        name = answers_file.relative_to(book.root)
        problems += [Problem(name, 1, f"the answer for {trap!r} is missing or stale; {answers.MENDS}") for trap in answers.stale(book)]
    return problems


def explained(book: Book) -> int:
    """How many units differ from the chapter before; without problems, each of them is explained in a text."""
    return sum(change.kind not in ("identical", "imports") for chapter in book.chapters[1:] for change in changes_of(chapter))


def sync(book: Book) -> tuple[list[Path], list[Problem]]:
    """Write what is generated; the texts and pictures that changed, and the problems of claims that could not be generated."""
    changed, problems = [], []
    for page, chapter in texts(book).items():
        if not page.is_file():
            continue
        new, page_problems = written(book, page, chapter)
        problems += page_problems
        if new != page.read_text():
            page.write_text(new)
            changed.append(page)
    for path, content in pictures(book).items():
        if not path.is_file() or path.read_text() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            changed.append(path)
    return changed, problems


def main(argv: list[str], book: Book | None = None) -> int:
    if argv not in ([], ["--check"]):
        print("usage: python -m shared.book.claims.sync [--check]", file=sys.stderr)
        return 2
    book = book or BOOK
    try:
        changed, problems = ([], check(book)) if argv else sync(book)
    except ValueError as error:
        print(error)
        return 1
    for page in changed:
        print(f"wrote {page.relative_to(book.root)}")
    for problem in problems:
        print(problem)
    if argv:
        summary = f"{explained(book)} changed units explained, {len(texts(book))} texts up to date"
        print(f"{len(problems)} problems" if problems else summary)
    return 1 if problems else 0


if __name__ == "__main__":
    run(main)
