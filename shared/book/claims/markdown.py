"""Find and fill the claims and result tokens in a text, and tell its prose from what is generated.

A *claim* is a comment on its own lines, outside of code:

    <!-- code: layers.py::RMSNorm.* -->

The block it generates starts on the next line and ends at `<!-- end -->`, without blank lines outside code fences. So a
claim without a block is recognized as such, and lines written by hand are never changed. A *result token* is part of a
sentence, and its value ends at `<!-- / -->`:

    it reaches <!-- result: staircase.json#v02.tokens_per_s .1f -->41.7<!-- / --> tok/s

Reads: docs/results/*.json.
"""
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from shared import results
from shared.chapters import Book

WITH_BLOCK = ("code", "diff", "see", "words", "table", "traps")
WITHOUT_BLOCK = ("unshown",)
INLINE = ("result", "given")

COMMENT = re.compile(r"<!--\s*(?:(?P<kind>\w+)\s*:\s*(?P<what>.*?)|(?P<bare>\w+))\s*-->", re.DOTALL)
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
CODE = r"(?P<code>(?P<ticks>`+)[^`].*?(?<!`)(?P=ticks)(?!`))"
RESULT = re.compile(CODE + r"|<!--\s*result:\s*(?P<what>[^>]*?)\s*-->(?P<shown>[^<\n]*<!--\s*/\s*-->)?")

# The units of measured numbers. "2x" always counts as measured, "2 x" only in a comparison, not in a product.
UNITS = "|".join((
    r"(?:tok(?:ens?)?|req(?:uests?)?|steps?)(?:/s| (?:per|a) second)",
    r"[kKMGT]?i?B/s|[kKMGT]i?B|[GT]?FLOP/?s",
    r"[num\u00b5]?s|seconds?|%",
    r"times (?:faster|slower|more|less|fewer|as)",
    r"(?<=\d)[x\u00d7]",
    r"(?<=\s)[x\u00d7](?=\s*(?:$|[.,;:)*|]|(?:faster|slower|more|less|fewer|as|the)\b))",
))
MEASURED = re.compile(rf"(?<![\w.])\d[\d,._]*(?:e-?\d+)?\s?(?:{UNITS})(?![\w/])", re.MULTILINE)


@dataclass(frozen=True)
class Claim:
    """A claim in lines [start, stop) of the text, with its generated block in lines [stop, end)."""

    kind: str
    what: str
    start: int
    stop: int
    end: int

    @property
    def line(self) -> int:
        """The line of its start, counted from 1."""
        return self.start + 1

    def __str__(self) -> str:
        return textwrap.shorten(f"{self.kind}: {self.what}" if self.what else self.kind, 72, placeholder=" ...")


class TextError(ValueError):
    """An error in a text, with its line and a message that includes the remedy."""

    def __init__(self, line: int, message: str):
        super().__init__(message)
        self.line = line


def fenced(lines: list[str]) -> list[bool]:
    """For each line, whether it is inside a code fence, the fence lines included."""
    inside, fence = [], None
    for line in lines:
        found = FENCE.match(line)
        if fence is None:
            fence = found[1] if found else None
            inside.append(bool(found))
        else:
            inside.append(True)
            if found and found[1].startswith(fence) and line.strip() == found[1]:
                fence = None
    return inside


def find_claims(text: str) -> list[Claim]:
    """The claims of a text, in order; TextError for a comment of an unknown kind."""
    lines = text.splitlines()
    code = fenced(lines)
    claims, n = [], 0
    while n < len(lines):
        if code[n] or not lines[n].startswith("<!--"):
            n += 1
            continue
        stop = n + 1
        while "-->" not in lines[stop - 1] and stop < len(lines):
            stop += 1
        found = COMMENT.fullmatch("\n".join(lines[n:stop]).strip())
        kind = (found["kind"] or found["bare"]) if found else None
        if kind == "end":
            raise TextError(n + 1, "this `end` belongs to no claim; remove it, or restore the block of the claim above")
        if kind in WITH_BLOCK + WITHOUT_BLOCK:
            end = block_end(lines, code, stop) if kind in WITH_BLOCK else stop
            claims.append(Claim(kind, " ".join((found["what"] or "").split()), n, stop, end))
            stop = end
        elif found and found["kind"] and kind not in INLINE:
            known = ", ".join(WITH_BLOCK + WITHOUT_BLOCK + INLINE)
            raise TextError(n + 1, f"there is no claim named {kind!r}; the claims are {known}")
        n = stop
    return claims


def block_end(lines: list[str], code: list[bool], start: int) -> int:
    """The line after the `<!-- end -->` of a block that starts at start; start if there is no block yet."""
    for n in range(start, len(lines)):
        if code[n]:
            continue
        if lines[n].strip() == "<!-- end -->":
            return n + 1
        if not lines[n].strip() or lines[n].startswith("<!--"):
            return start
    return start


def fill_blocks(text: str, generate: Callable[[Claim], list[str] | None]) -> str:
    """The text with each claim's block replaced by what generate returns; None leaves a block unchanged."""
    lines = text.splitlines()
    for claim in reversed(find_claims(text)):
        block = generate(claim) if claim.kind in WITH_BLOCK else None
        if block is not None:
            lines[claim.stop:claim.end] = [*block, "<!-- end -->"]
    return "\n".join(lines) + ("\n" if text.endswith("\n") else "")


def fill_results(text: str, read: Callable[[str, int], str | None]) -> str:
    """The text with each result token filled with what read returns for it and its line; None leaves it unchanged."""
    lines = text.splitlines(keepends=True)
    for n, code in enumerate(fenced(lines)):
        if code:
            continue
        if re.match(r" {0,3}<!--\s*(result|given):", lines[n]):
            raise TextError(n + 1, "a result or given at the start of a line ends the paragraph on GitHub; put a word before it")
        if re.match(r"#+[^#\s]", lines[n]):
            raise TextError(n + 1, "the site reads a line that starts with # as a heading; put a word before it")

        def fill(found: re.Match) -> str:
            value = None if found["code"] else read(found["what"], n + 1)
            return found[0] if value is None else f"<!-- result: {found['what']} -->{value}<!-- / -->"

        lines[n] = RESULT.sub(fill, lines[n])
    return "".join(lines)


def read_result(book: Book, what: str) -> str:
    """The formatted value of a result token: `FILE#KEY`, or `FILE#KEY FORMAT` (`|` may replace the blank).

    KEY is a path of names and list indices joined by dots; FORMAT is a Python format like `.1f` or `,`. `FILE@KIND#KEY`
    names the kind of machine; otherwise the newest measurement is used. If the measured code has changed since, "(old)"
    follows the value.
    """
    address, _, form = what.replace("|", " ").partition(" ")
    file, _, key = address.partition("#")
    file, _, kind = file.partition("@")
    path = book.results / file
    if not key or not path.is_file():
        raise ValueError(f"result {what!r} does not name a file in docs/results/; write FILE.json#KEY, and commit the file")
    rows = results.rows_of(path)
    if kind and kind not in rows:
        raise ValueError(f"docs/results/{file} has no row for {kind}; it has {', '.join(rows)}")
    row = rows[kind] if kind else results.cited(rows)
    try:
        shown = format(look_up(row, key), form.strip())
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"docs/results/{file} has no {key} ({error}); run the command that measures it") from None
    return shown + (" (old)" if results.is_old(row, key.split("."), book) else "")


def look_up(tree, key: str):
    """The value at a dotted key; a longer name that contains dots is tried first."""
    if isinstance(tree, list):
        head, _, rest = key.partition(".")
        return look_up(tree[int(head)], rest) if rest else tree[int(head)]
    if key in tree:
        return tree[key]
    heads = [key[:n] for n, letter in enumerate(key) if letter == "."]
    for head in reversed(heads):
        if head in tree:
            return look_up(tree[head], key[len(head) + 1:])
    raise KeyError(key)


def prose(text: str) -> str:
    """The text with code, generated blocks, comments and filled results blanked out; line numbers stay the same.

    A `given`, which says that the number before it was measured elsewhere, becomes a section sign.
    """
    lines = text.splitlines()
    code = fenced(lines)
    for claim in find_claims(text):
        code[claim.start:claim.end] = [True] * (claim.end - claim.start)
    kept = "\n".join("" if inside else line for inside, line in zip(code, lines))
    kept = RESULT.sub(lambda found: "`code`" if found["code"] else "(result)", kept)
    kept = re.sub(r"<!--\s*given:.*?-->", "\u00a7", kept, flags=re.DOTALL)
    kept = re.sub(r"<!--.*?-->", lambda found: "\n" * found[0].count("\n"), kept, flags=re.DOTALL)
    kept = re.sub(r"\]\([^)\s]*\)|https?://\S+", "]", kept)
    return kept.replace("*", "")


def bare_numbers(text: str) -> list[tuple[int, str]]:
    """Measured numbers without a source, as (line, number): neither a result token nor followed by a `given`."""
    text = prose(text)
    numbers = list(MEASURED.finditer(text))
    bare = []
    for n, match in enumerate(numbers):
        paragraph = text.find("\n\n", match.end())
        stop = min(
            numbers[n + 1].start() if n + 1 < len(numbers) else len(text),
            paragraph if paragraph >= 0 else len(text),
        )
        if "\u00a7" not in text[match.end():stop]:
            bare.append((text.count("\n", 0, match.start()) + 1, " ".join(match[0].split())))
    return bare
