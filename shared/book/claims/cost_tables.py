"""The tables made from the staircase's result: what one workload costs in each chapter.

    cost       a chapter's card: what the workload costs, beside the chapter before it; what changed is bold
    strip      where one request's time goes in all chapters so far
    staircase  one row for each chapter in which the workload costs something else than before, and for the last
    steps      the same for all chapters

Reads: docs/results/staircase.json.
"""
from shared import results
from shared.book.diff import lines_changed
from shared.book.pictures import steps_of
from shared.chapters import Book, Chapter

COMMAND = "python -m shared.bench staircase --write"

# The rows of a card: label, key in the result, format, and divisor.
COSTS = (
    ("forward passes", "passes", "{:,}", 1),
    ("tokens per forward pass", "tokens_per_pass", "{:.2f}", 1),
    ("positions computed", "positions", "{:,}", 1),
    ("share of them needed", "needed_share", "{:.0%}", 1),
    ("weights read", "weight_read_bytes", "{:,.1f} GB", 1e9),
    ("keys and values read back", "kv_read_bytes", "{:,.2f} GB", 1e9),
    ("memory reserved for keys and values", "kv_bytes", "{:,.0f} MiB", 2**20),
    ("time to first token of request 26", "late_ttft_ms", "{:,.0f} ms", 1),
    ("tokens per second", "tokens_per_s", "{:,.0f}", 1),
)
MEASURED = ("tokens_per_s", "late_ttft_ms")
STRIP_WIDTH = 64
STRIP = {"waits": "\u00b7", "wasted": "\u2591", "useful": "\u2588"}


def rows_by_kind(book: Book) -> dict[str, dict]:
    """The newest staircase measured on each kind of machine, by kind."""
    return results.read(book.results / "staircase.json", COMMAND)


def newest_with(book: Book, *chapters: Chapter) -> dict:
    """The newest measurement that covers all these chapters."""
    rows = {kind: row for kind, row in rows_by_kind(book).items() if all(chapter.id in row for chapter in chapters)}
    if not rows:
        missing = [chapter.id for chapter in chapters if chapter.id not in results.cited(rows_by_kind(book))]
        raise ValueError(f"staircase.json has no {', '.join(missing) or 'row of all chapters'}; run `{COMMAND}`")
    return results.cited(rows)


def written(row: dict, key: str, form: str, unit: float) -> str:
    return form.format(row[key] / unit if unit > 1 else row[key])


def within_noise(rows: list[dict], key: str) -> bool:
    """Whether two measurements differ by less than the spread of their runs."""
    first, second = (row[key] for row in rows)
    return abs(second - first) < first * sum(row["spread"] for row in rows)


def measured(book: Book, chapter: Chapter, row: dict, columns: tuple) -> str:
    """A measured figure, marked if the code has changed since; empty if it was not measured."""
    if chapter.id not in row:
        return ""
    mark = " (old)" if results.is_old(row, [chapter.id, columns[0]], book) else ""
    return written(row[chapter.id], *columns) + mark


def cost(book: Book, chapter: Chapter | None) -> list[str]:
    """The chapter's card: what is counted, and what was measured on each kind of machine.

    Rows that the chapter does not change are left out. If it changes no count, any difference in speed is noise, and the card
    says only that.
    """
    if chapter is None:
        raise ValueError("a cost card belongs to a chapter; in another text use the table staircase")
    chapters = [part for part in (chapter.previous, chapter) if part]
    newest, kinds = newest_with(book, *chapters), rows_by_kind(book)
    first = newest[chapters[0].id]
    changes = any(newest[chapters[0].id][key] != newest[chapter.id][key] for _, key, *_ in COSTS if key not in MEASURED)
    lines = [
        f"| {first['requests']} requests to pocket, {first['tokens']:,} tokens | {' | '.join(part.id for part in chapters)} |",
        "|---|" + "---:|" * len(chapters),
    ]
    if len(chapters) == 2 and not changes:
        lines.append("| forward passes, positions, bytes | | the same |")
    for what, *columns in COSTS if changes or len(chapters) == 1 else ():
        key = columns[0]
        for kind, row in kinds.items() if key in MEASURED else [("", newest)]:
            cells = [measured(book, part, row, columns) for part in chapters]
            costs = [row[part.id] for part in chapters if part.id in row]
            if not any(cost[key] for cost in costs):
                continue
            if len(costs) == 2 and cells[0] == cells[1] and key not in MEASURED:
                continue
            if len(costs) == 2 and cells[0] != cells[1] and not (key in MEASURED and within_noise(costs, key)):
                cells[1] = f"**{cells[1]}**"
            lines.append(f"| {what}{of_kind(kind, kinds)} | {' | '.join(cells)} |")
    if len(chapters) == 2:
        added, removed = lines_changed(*chapters)
        lines.append(f"| lines of Python | | {added:,} added, {removed:,} removed |")
    return lines


def of_kind(kind: str, kinds: dict) -> str:
    """The kind of machine, if there is more than one."""
    return f", {results.KINDS.get(kind, kind)}" if kind and len(kinds) > 1 else ""


def strip(book: Book, chapter: Chapter | None) -> list[str]:
    """Where one request's time goes in each chapter up to this one, on one scale."""
    chapters = book.chapters[: chapter.number + 1] if chapter else book.chapters
    row = newest_with(book, *chapters)
    names = [part.id for part in chapters]
    rows = [row[name] for name in names]
    prompt, output = rows[0]["watched"]["lengths"]
    lives = [{what: costs["watched"]["life_ms"].get(what, 0) for what in STRIP} for costs in rows]
    longest = max(sum(life.values()) for life in lives)
    old = [name for name in names if name in results.old_chapters(row, book)]
    lines = [
        "```text",
        f"request {rows[0]['watched']['request'] + 1} of {rows[0]['requests']}, {prompt} + {output} tokens; "
        f"one character is at most {longest / STRIP_WIDTH:,.0f} ms",
        *([f"measured before the code changed: {', '.join(old)}"] if old else []),
        *(f"{name}  {bar(life, longest)}" for name, life in zip(names, lives)),
        "",
        f"{'':6}{'waits ' + STRIP['waits']:>12}{'for nothing ' + STRIP['wasted']:>16}"
        f"{'needed ' + STRIP['useful']:>12}{'last token after':>20}",
    ]
    rides = [costs["watched"]["life_ms"].get("rides", 0) for costs in rows]
    if any(rides):
        lines[-1] += f"{'then rides along':>20}"
    for name, life, after in zip(names, lives, rides):
        cells = (life["waits"], life["wasted"], life["useful"], sum(life.values()), *([after] if any(rides) else []))
        lines.append(f"{name:6}" + "".join(f"{ms:>{width},.0f} ms" for ms, width in zip(cells, (9, 13, 9, 17, 17))))
    return [*lines, "```"]


def bar(life: dict[str, float], longest: float) -> str:
    """A request's time as characters; every part that took any time has at least one."""
    counts = {what: max(1, round(STRIP_WIDTH * ms / longest)) if ms else 0 for what, ms in life.items()}
    return "".join(STRIP[what] * count for what, count in counts.items())


# A table of all chapters has no room for every column.
IN_TABLE = ("tokens_per_s", "passes", "positions", "needed_share", "weight_read_bytes", "kv_bytes", "late_ttft_ms")


def staircase(book: Book, chapter: Chapter | None) -> list[str]:
    """The chapters that change what the workload costs, one row each, with links for a text in the root."""
    names = steps_of({part.id: newest_with(book, part)[part.id] for part in book.chapters})
    return table_of(book, {part: f"[{part.id}](milestones/{part.name}/README.md)" for part in book.chapters if part.id in names})


def steps(book: Book, chapter: Chapter | None) -> list[str]:
    """All chapters, one row each."""
    return table_of(book, {part: part.id for part in book.chapters})


def table_of(book: Book, heads: dict[Chapter, str]) -> list[str]:
    """A row for each of these chapters, which begins with its head; measured figures have a column for each kind of machine."""
    costs = sorted((cost for cost in COSTS if cost[1] in IN_TABLE), key=lambda cost: IN_TABLE.index(cost[1]))
    kinds = rows_by_kind(book)
    columns = [(what + of_kind(kind, kinds), kind, rest) for what, *rest in costs for kind in (kinds if rest[0] in MEASURED else [""])]
    lines = ["| " + " | ".join(["", *(head for head, _, _ in columns)]) + " |", "|---|" + "---:|" * len(columns)]
    for part, head in heads.items():
        newest = newest_with(book, part)
        cells = [measured(book, part, kinds.get(kind, newest) if kind else newest, rest) for _, kind, rest in columns]
        cells = [cell.replace(" ", "\u00a0") for cell in cells]
        lines.append(f"| {head} | " + " | ".join(cells) + " |")
    return lines
