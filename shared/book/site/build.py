"""Build the site: the repository's texts, and pages generated from its code.

    python -m shared.book.site            # writes build/site; neither building nor reading it needs a network
    python -m shared.book.site --serve    # also serves it on port 8001

Pages have the same paths as the texts in the repository, so links work in both. A link to a chapter's Python file leads to
a page that shows it. Generated here are each chapter's explained diff (`diff_pages`) and its files, and for all chapters
together a run to replay, one request's numbers in growing company, the table of seeded bugs, and those that shipped.

Reads: texts, chapters, docs/results, docs/pictures. Writes: build/site.
"""
import argparse
import functools
import html.parser
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.parse
from html import escape
from pathlib import Path

from shared import results
from shared.book.claims.markdown import fenced
from shared.book.site import diff_pages, museum
from shared.book.site.line_values import Values, record
from shared.book.traps.seeded_bugs import read_traps
from shared.chapters import BOOK, Book, python_files
from shared.workloads import TIMELINE_BLOCK_SIZE, TIMELINE_BLOCKS

LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
TOP = ("README.md", "CONTRIBUTING.md")
# The pages that links to directories lead to.
DIRECTORIES = {"milestones": "README.md", "tests/traps": "docs/traps.md", "docs/results": "docs/RESULTS.md"}


class BrokenLink(ValueError):
    """A link in a text has no target."""


def assemble(book: Book, pages: Path, values: dict[str, Values]) -> None:
    """Write the site's sources to a directory: Markdown, pictures and scripts."""
    shutil.rmtree(pages, ignore_errors=True)
    texts = [book.root / name for name in TOP if (book.root / name).is_file()]
    texts += sorted((book.root / "docs").glob("*.md"))
    texts += [chapter.text for chapter in book.chapters]
    for text in texts:
        put(pages / text.relative_to(book.root), for_site(book, text, pages))
    for directory in ("pictures", "site"):
        if (book.root / "docs" / directory).is_dir():
            shutil.copytree(book.root / "docs" / directory, pages / "docs" / directory)
    says = read_json(book.results / "trap-answers.json").get("answers", {})
    for chapter in book.chapters:
        at = pages / "milestones" / chapter.name
        if chapter.previous:
            page = diff_pages.page(book, chapter, values, says)
            put(at / "diff.md", linked(book, chapter.text, page, pages))
        for path in python_files(chapter.path):
            name = diff_pages.file_page(path.relative_to(chapter.path).as_posix())
            put(at / "files" / f"{name}.md", diff_pages.file(chapter, path, values))
    put(pages / "docs" / "trace.md", trace_page(book))
    if (book.results / "exact.json").is_file():
        put(pages / "docs" / "bits.md", bits_page(book))
    put(pages / "docs" / "traps.md", traps_page(book, says))
    put(pages / "docs" / "museum.md", museum.page(book, cell))


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def for_site(book: Book, text: Path, pages: Path) -> str:
    """A text for the site: links lead to pages, and Markdown works inside <details>."""
    return linked(book, text, text.read_text().replace("<details>", '<details markdown="1">'), pages)


def linked(book: Book, text: Path, source: str, pages: Path) -> str:
    """The source with its links, which are relative to the text, changed to those of the site."""
    lines = source.splitlines(keepends=True)
    for n, code in enumerate(fenced(lines)):
        if not code:
            lines[n] = LINK.sub(lambda found: new_link(book, text, found, pages), lines[n])
    return "".join(lines)


def new_link(book: Book, text: Path, found: re.Match, pages: Path) -> str:
    """One link of a text, changed to lead to a page or picture of the site; notebooks are linked in the repository."""
    start, address, anchor, end = found.groups()
    target = (text.parent / address).resolve()
    if not target.exists():
        raise BrokenLink(f"{text.relative_to(book.root)} links to {address}, which does not exist")
    if target.suffix == ".ipynb":
        return f"{start}{repository(book)}/blob/main/{target.relative_to(book.root)}{end}"
    page = page_of(book, target, pages)
    if page is None:
        raise BrokenLink(f"{text.relative_to(book.root)} links to {address}, for which the site has no page; link to a file instead")
    if page == target.relative_to(book.root):
        return found[0]
    return f"{start}{os.path.relpath(page, text.parent.relative_to(book.root))}{anchor or ''}{end}"


def repository(book: Book) -> str:
    """The repository's URL, where notebooks are rendered."""
    return tomllib.loads((book.root / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def page_of(book: Book, target: Path, pages: Path) -> Path | None:
    """The site's page for a file or directory of the repository, created if no other code does; None if there is none."""
    inside = target.relative_to(book.root)
    if inside.as_posix() in DIRECTORIES:
        return Path(DIRECTORIES[inside.as_posix()])
    if target.is_dir():
        return inside / "README.md" if target in [chapter.path for chapter in book.chapters] else None
    if target.suffix in (".md", ".svg", ".png"):
        return inside
    chapter = next((each for each in book.chapters if target.is_relative_to(each.path)), None)
    if chapter:
        return Path("milestones", chapter.name, "files", diff_pages.file_page(target.relative_to(chapter.path).as_posix()) + ".md")
    if target.suffix == ".py":
        page = Path("code") / inside.with_suffix(".md")
        put(pages / page, diff_pages.file_html(inside.as_posix(), diff_pages.numbered(target.read_text(), 1, "", None, {})))
        return page
    (pages / inside).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(target, pages / inside)
    return inside


# ---- a run, replayed

def trace_page(book: Book) -> str:
    """A page that replays the small workload in every chapter, one forward pass at a time."""
    recorded = read_json(book.results / "timeline.json")
    traces = {chapter.id: recorded[chapter.id] for chapter in book.chapters if chapter.id in recorded}
    data = json.dumps(traces, separators=(",", ":")).replace("</", "<\\/")
    return f"""# Replay of a run

Every chapter runs the same ten requests. Each row is a request, each column a forward pass. Press *play*, or drag the
slider. <span class="key"><i class="prompt"></i> computes a prompt</span> <span class="key"><i class="token"></i> computes one
token</span> <span class="key"><i class="waste"></i> computed for nothing</span> <span class="key"><i class="wait"></i> waits</span>

Follow the short requests from v03 to v04: what changes is when requests are admitted. From v05 on, the cache has
{TIMELINE_BLOCKS} blocks of {TIMELINE_BLOCK_SIZE} tokens, which is {TIMELINE_BLOCKS * TIMELINE_BLOCK_SIZE} positions, where v04
has thousands. Requests wait for blocks and the run takes more forward passes, but in less memory than a single row of v04's
slab. (`make trace` records the same run in a terminal.)

<div id="replay" class="replay"><p>This page requires JavaScript, which is turned off.</p></div>

<script type="application/json" id="replay-data">{data}</script>
"""


# ---- one request's numbers

def bits_page(book: Book) -> str:
    """A page on which one request's log-probabilities are read beside any number of other requests, with exact off and on."""
    rows = results.rows_of(book.results / "exact.json")
    row = results.cited(rows)
    kind = next(each for each, found in rows.items() if found is row)
    numbers = row["numbers"]
    data = json.dumps(numbers, separators=(",", ":")).replace("</", "<\\/")
    most = max(map(int, numbers["exact"]))
    return f"""# The same bits

The bundled model continues "{numbers["prompt"]}" with the likeliest tokens. Below are the five likeliest for token {numbers["place"]}, each with its
log-probability, and the 32 bits of that number in hexadecimal. Drag the slider: other requests run beside this one, from
none to {most}. Bits that are not those of the request alone are marked. The text is the same each time, and the numbers
should be, too: nothing about the request has changed.

<div id="bits" class="bits"><p>This page requires JavaScript, which is turned off.</p></div>

(Recorded on {results.origin(kind, row)}{results.age(row, book)}, by `python -m shared.bench.exact --write`; with exact off, the weights are stored as {numbers["fastest_linear"]}, with
exact on as {numbers["exact_linear"]}. Why the bits change, and how they are kept: [v16](../milestones/{book.first_with("exact").name}/README.md).)

<script type="application/json" id="bits-data">{data}</script>
"""


# ---- the seeded bugs

def traps_page(book: Book, says: dict[str, dict]) -> str:
    """A page with every seeded bug: its effect, the tests that catch it, and what the model answers with it."""
    matrix = read_json(book.results / "traps-matrix.json").get("chapters", {})
    rows = [
        "---\nhide:\n  - toc\n---",
        "# Seeded bugs",
        "Each of these was planted in a copy of its chapter, and the test beside it failed; `make traps` repeats this. "
        "Look first at the many bugs that leave the model's answers unchanged.",
    ]
    for chapter in book.chapters:
        rows.append(f"## {chapter.id}")
        table = ["| bug | where, and which test catches it | the model then answers |", "|---|---|---|"]
        for trap in read_traps(chapter.traps):
            file = diff_pages.file_page(trap.file)
            where = f"[`{trap.address}`](../milestones/{chapter.name}/files/{file}.md)"
            failed = matrix.get(chapter.id, {}).get(trap.name, {}).get("failed", [])
            tests = "`" + trap.test[0].split("::")[-1] + "`" + (f" and {len(failed) - 1} more" if len(failed) > 1 else "")
            said = says.get(f"{chapter.id}/{trap.name}", {})
            answer = "" if not said else "the same" if said.get("same") else cell(said["answer"])
            table.append(f"| **{cell(trap.name)}**: {cell(trap.told)} | {where}<br>{tests} | {answer} |")
        rows += ['<div class="stack" markdown="1">', "\n".join(table), "</div>"]
    return "\n\n".join(rows) + "\n"


def cell(text: str) -> str:
    """A text as a cell of a table."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("`", "\\`")


# ---- building

def build(book: Book) -> Path:
    """Build build/site, and return its path; SystemExit if a link has no target or a page is in no menu."""
    assemble(book, book.root / "build" / "pages", {chapter.id: record(chapter) for chapter in book.chapters})
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"], cwd=book.root, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"mkdocs failed:\n{done.stdout}{done.stderr}")
    return book.root / "build" / "site"


class Page(html.parser.HTMLParser):
    """The links of a page, and its anchors."""

    def __init__(self, text: str):
        super().__init__()
        self.leads, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if (tag, name) in (("a", "href"), ("img", "src"), ("script", "src"), ("link", "href")) and value:
                self.leads.append(value)


def dead_links(site: Path) -> list[str]:
    """The links in a built site whose page or anchor does not exist, as messages."""
    pages = {path: Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    dead = []
    for path, page in pages.items():
        name = path.relative_to(site)
        for lead in page.leads:
            address, _, anchor = lead.partition("#")
            if re.match(r"[a-z]+:", address):
                continue
            target = site / address.lstrip("/") if address.startswith("/") else path.parent / address
            target = (target / "index.html" if target.is_dir() else target).resolve() if address else path
            if not target.is_file():
                dead.append(f"{name}: {lead} does not exist")
            elif anchor and target in pages and urllib.parse.unquote(anchor) not in pages[target].anchors:
                dead.append(f"{name}: {lead} has no such anchor")
    return dead


class Server(http.server.ThreadingHTTPServer):
    """A file server that does not report browsers closing the connection early."""

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def serve(site: Path, port: int = 8001) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    print(f"http://127.0.0.1:{port}/  (Ctrl-C stops it)", flush=True)
    with Server(("127.0.0.1", port), handler) as server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.book.site", description="Build the site.")
    parser.add_argument("--serve", action="store_true", help="serve it on port 8001 after building it")
    args = parser.parse_args(argv)
    site = build(BOOK)
    dead = dead_links(site)
    print("\n".join(dead), file=sys.stderr, end="\n" * bool(dead))
    print(f"{sum(1 for _ in site.rglob('*.html'))} pages in {site.relative_to(BOOK.root)}, {len(dead)} dead links")
    if dead:
        return 1
    if args.serve:
        serve(site)
    return 0
