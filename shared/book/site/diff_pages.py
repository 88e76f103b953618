"""A chapter's diff, explained: its text on the left, the change it explains on the right, with the values of names.

The page is Markdown for the site only, made from the chapter's README. Each claim `diff`, `see`, `words` or `unshown` becomes
a row, with the text above it. Unchanged lines of code are folded. Names that had a value while the prompts of `line_values`
ran show it, for the chapter before and for this one.

Reads: a chapter's text and code.
"""
import re
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from html import escape
from pathlib import Path

from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Literal, Name, String

from shared.book.claims.generators import chapter_of
from shared.book.claims.markdown import fenced, find_claims
from shared.book.diff import changes_of
from shared.book.site.line_values import Values
from shared.book.traps.seeded_bugs import read_traps
from shared.book.units import Change, Unit, expand
from shared.chapters import Book, Chapter

SHOWN = ("diff", "see", "words", "unshown")
HEADING = re.compile(r"#{2,4} ")
CONTEXT = 3
KINDS = ((Comment, "c"), (String.Doc, "s"), (String, "s"), (Keyword, "k"), (Literal.Number, "m"), (Name.Builtin, "b"))


Token = tuple[object, str]  # pygments' kind, text


@dataclass(frozen=True)
class Line:
    """A line of code: its number in its file (0: none), and its names' values in each chapter that has it."""

    tokens: list[Token]
    number: int
    values: dict[str, list[tuple[str, dict[int, str]]]]  # name to (chapter, value by step)

    @property
    def text(self) -> str:
        return "".join(token for _, token in self.tokens)


def page(book: Book, chapter: Chapter, values_by_chapter: dict[str, Values], says: dict[str, dict]) -> str:
    """The Markdown of the page that explains a chapter's diff against the one before."""
    previous = chapter.previous
    names = f"{previous.id} to {chapter.id}"
    rows = [
        "---\nhide:\n  - toc\n---",
        f"# From {names}: the diff, explained",
        f"On the left is [the chapter's text](README.md), on the right the change it explains. Point at a marked name, or tap it, to "
        f"see its values while the chapter answered two prompts: in the first step, which computes a prompt, and in the second. "
        f"`make diff-{chapter.id}` shows the same diff in a terminal.",
        '<p class="fold-all"><button type="button" data-open="true">unfold all</button> '
        '<button type="button" data-open="false">fold all</button></p>',
    ]
    changes = {change.address: change for change in changes_of(chapter)}
    shown = set()
    # Not every heading of the text is on this page.
    for section in sections(chapter.text.read_text().replace("](#", "](README.md#")):
        rows += section.heading
        for claim in section.claims:
            _, what = chapter_of(book, chapter, claim.what)
            chosen = [changes[address] for address in expand(what, changes) if changes[address].kind != "identical"]
            if claim.kind == "unshown":
                right = [unshown_html(chapter, chosen)]
            else:
                right = [change_html(book, chapter, change, values_by_chapter) for change in chosen]
            right += traps_html(book, chapter, {change.address for change in chosen} - shown, says)
            shown |= {change.address for change in chosen}
            rows.append('<div class="hunk" markdown="1">')
            words = [claim.before or again(claim.kind), claim.after]
            rows.append('<div class="why" markdown="1">\n\n' + "\n\n".join(filter(None, words)) + "\n\n</div>")
            rows.append('<div class="change">\n' + "\n".join(right) + "\n</div>")
            rows.append("</div>")
    others = {trap.address for trap in read_traps(chapter.traps)} - shown
    if others:
        rows += ["### Bugs in unchanged code", "\n".join(traps_html(book, chapter, others, says, "open"))]
    return "\n\n".join(rows) + "\n"


def again(kind: str) -> str:
    return {"see": "(Shown again.)", "unshown": "(Also new.)"}.get(kind, "(Explained with the change above.)")


def unshown_html(chapter: Chapter, changes: list[Change]) -> str:
    """A list of links to new units that are better read in their files."""
    rows = []
    for change in changes:
        file, _, name = change.address.partition("::")
        link = f"../../{chapter.name}/files/{file_page(file)}/#L{change.new.first_line}"
        rows.append(f'<li><a href="{link}">{escape(file)}</a> {escape(name or "module body")}</li>')
    return f'<details class="unit"><summary>{len(changes)} new units, best read in their files</summary><ul>{"".join(rows)}</ul></details>'


@dataclass
class Shown:
    """A claim with its text: what is above it, and, up to the next heading, what is below."""

    before: str
    kind: str
    what: str
    after: str = ""


@dataclass
class Section:
    """A heading's part of a text, with its claims."""

    heading: list[str]
    claims: list[Shown]


def sections(text: str) -> list[Section]:
    """The parts of a text under one heading that show a diff, in order."""
    lines = text.splitlines()
    code = fenced(lines)
    found, start = [], 0
    claims = [claim for claim in find_claims(text) if claim.kind in SHOWN]
    for claim in claims:
        heads = [n for n in range(start, claim.start) if not code[n] and HEADING.match(lines[n])]
        if heads and found:
            found[-1].claims[-1].after = joined(lines[start : heads[0]])
        if heads or not found:
            found.append(Section([lines[heads[-1]]] if heads else [], []))
            start = heads[-1] + 1 if heads else start
        found[-1].claims.append(Shown(joined(lines[start : claim.start]), claim.kind, claim.what))
        start = claim.end
    ends = [n for n in range(start, len(lines)) if not code[n] and HEADING.match(lines[n])]
    if found:
        found[-1].claims[-1].after = joined(lines[start : ends[0] if ends else len(lines)])
    return found


def joined(lines: list[str]) -> str:
    """The lines without lists of traps, since the page shows each trap beside its code."""
    text = "\n".join(lines)
    kept, at = [], 0
    for claim in find_claims(text):
        if claim.kind == "traps":
            kept += lines[at : claim.start]
            at = claim.end
    return "\n".join([*kept, *lines[at:]]).strip()


# ---- code

def change_html(book: Book, chapter: Chapter, change: Change, values_by_chapter: dict[str, Values]) -> str:
    """One unit's diff, foldable, with a link to its file."""
    previous = chapter.previous
    old = lines_of(change.old, change.address, previous, values_by_chapter) if change.old else []
    new = lines_of(change.new, change.address, chapter, values_by_chapter) if change.new else []
    rows, added, removed = [], 0, 0
    matcher = SequenceMatcher(lambda line: not line.strip(), [a.text for a in old], [b.text for b in new], autojunk=False)
    for tag, a, a_end, b, b_end in matcher.get_opcodes():
        if tag == "equal":
            rows += folded([both(x, y) for x, y in zip(old[a:a_end], new[b:b_end])], first=not rows, last=b_end == len(new))
            continue
        removed += a_end - a
        added += b_end - b
        rows += [line_html(line, "del") for line in old[a:a_end]]
        rows += [line_html(line, "add") for line in new[b:b_end]]
    file, _, name = change.address.partition("::")
    where = chapter if change.new else previous
    first = (change.new or change.old).first_line
    link = f'<a href="../../{where.name}/files/{file_page(file)}/#L{first}">{escape(file)}</a>'
    count = f'<span class="count"><span class="plus">+{added}</span> <span class="minus">\u2212{removed}</span></span>'
    title = f"{link} {escape(name or 'module body')} {count}"
    return f'<details class="unit" open><summary>{title}</summary><div class="code">{"".join(rows)}</div></details>'


def file_page(file: str) -> str:
    """The name of a file's page.

    >>> file_page("kernels/__init__.py")
    'kernels-__init__'
    """
    return file.removesuffix(".py").replace("/", "-")


def lines_of(unit: Unit, address: str, chapter: Chapter, values_by_chapter: dict[str, Values]) -> list[Line]:
    """A unit's lines, with their names' values in a run of its chapter."""
    file = address.split("::")[0]
    lines = []
    for n, piece in enumerate(unit.pieces):
        lines += [Line([], 0, {})] * bool(n)
        lines += numbered(piece.text, piece.first_line, file, chapter, values_by_chapter)
    return lines


def numbered(text: str, first: int, file: str, chapter: Chapter | None, values_by_chapter: dict[str, Values]) -> list[Line]:
    """The lines of a part of a file that starts at line `first`, with their names' values."""
    held_by_line = values_by_chapter.get(chapter.id, {}) if chapter else {}
    lines = []
    for number, tokens in enumerate(tokens_by_line(text.rstrip("\n")), first):
        held = held_by_line.get((file, number), {})
        lines.append(Line(tokens, number, {name: [(chapter.id, values)] for name, values in held.items()}))
    return lines


def tokens_by_line(text: str) -> list[list[Token]]:
    """Python source as tokens, by line; a token that spans lines, such as a docstring, is split."""
    lines = [[]]
    for kind, token in PythonLexer(stripnl=False, ensurenl=False).get_tokens(text):
        for n, part in enumerate(token.split("\n")):
            if n:
                lines.append([])
            if part:
                lines[-1].append((kind, part))
    return lines


def both(old: Line, new: Line) -> Line:
    """An unchanged line, with its names' values in both chapters."""
    names = dict.fromkeys([*old.values, *new.values])
    return replace(new, values={name: [*old.values.get(name, []), *new.values.get(name, [])] for name in names})


def folded(lines: list[Line], first: bool, last: bool) -> list[str]:
    """Unchanged lines: CONTEXT lines next to a change are shown, the others are folded."""
    rows = [line_html(line, "same") for line in lines]
    head, tail = (0 if first else CONTEXT), (0 if last else CONTEXT)
    hidden = rows[head : len(rows) - tail]
    if len(hidden) < 3:
        return rows
    what = f"{len(hidden)} unchanged lines"
    fold = f'<details class="fold"><summary>{what}</summary>{"".join(hidden)}</details>'
    return [*rows[:head], fold, *rows[len(rows) - tail :]]


def line_html(line: Line, kind: str, anchor: str = "") -> str:
    sign = {"add": "+", "del": "\u2212"}.get(kind, " ")
    return f'<div class="l {kind}"{anchor}><i>{sign}</i>{code_html(line) or " "}</div>'


def code_html(line: Line) -> str:
    """A line of Python with syntax colors; names with values carry them."""
    html, chained, before = [], "", ""
    for kind, token in line.tokens:
        if kind in Name:
            # After a call or an index, the attribute's owner is unknown.
            chained = token if before != "." else f"{chained}.{token}" if chained else ""
            held = line.values.get(chained)
            html.append(value_html(chained, token, held) if held else span(kind, token))
        else:
            html.append(span(kind, token))
            chained = chained if token == "." else ""
        before = token
    # In Markdown, `names[index](*arguments)` would be a link.
    return "".join(html).replace("](", "]&#40;")


def span(kind, token: str) -> str:
    found = next((name for type_, name in KINDS if kind in type_), None)
    return f'<span class="{found}">{escape(token)}</span>' if found and token.strip() else escape(token)


def value_html(name: str, token: str, held: list[tuple[str, dict[int, str]]]) -> str:
    """A name that shows its values when pointed at or tapped."""
    values = [name]
    for chapter, steps in held:
        values += [f"{chapter}, {f'step {step}' if step else 'before'}  {value}" for step, value in steps.items()]
    text = "&#10;".join(escape(each) for each in values)
    return f'<span class="live" tabindex="0" data-held="{text}">{escape(token)}</span>'


# ---- traps, files

def traps_html(book: Book, chapter: Chapter, addresses: set[str], says: dict[str, dict], state: str = "") -> list[str]:
    """The seeded bugs of these units: their effect, and what the model answers with them."""
    rows = []
    for trap in read_traps(chapter.traps):
        if trap.address in addresses:
            said = says.get(f"{chapter.id}/{trap.name}")
            rows.append(f"<li><b>{escape(trap.name)}</b>: {escape(trap.told)}{said_html(said)}</li>")
    if not rows:
        return []
    return [f'<details class="traps" {state}><summary>What breaks if this is wrong ({len(rows)})</summary><ul>{"".join(rows)}</ul></details>']


def said_html(said: dict | None) -> str:
    """The model's answer with the bug planted, and the question."""
    if said is None:
        return ""
    if said.get("same"):
        return ' <span class="said">The model gives the same answers.</span>'
    return f' <span class="said">{escape(said["question"])} \u2192 {escape(said["answer"])}</span>'


def file(chapter: Chapter, path: Path, values_by_chapter: dict[str, Values]) -> str:
    """The page that shows a chapter's file."""
    name = path.relative_to(chapter.path).as_posix()
    return file_html(f"{chapter.id}: {name}", numbered(path.read_text(), 1, name, chapter, values_by_chapter))


def file_html(title: str, lines: list[Line]) -> str:
    """A page of numbered lines, each with an anchor."""
    rows = [line_html(line, "same", f' id="L{line.number}" data-n="{line.number}"') for line in lines]
    return f'# {title}\n\n<div class="code numbered">{"".join(rows)}</div>\n'
