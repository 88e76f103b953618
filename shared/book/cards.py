"""The tables that are made of the staircase's result: what each chapter took on one workload.

    cost       a chapter's card: what it took, beside the chapter before it; what changed in bold
    strip      one request, followed through all chapters so far
    staircase  all chapters, a row each
"""
import difflib
import json
from pathlib import Path

from shared.book.tree import Tree, python_files, short

# What a card says: the words, the key in the result, how it is written, and by what it is divided.
COSTS = (
    ("forward passes", "passes", "{:,}", 1),
    ("tokens a pass", "tokens_per_pass", "{:.2f}", 1),
    ("positions computed", "positions", "{:,}", 1),
    ("of them needed", "needed_share", "{:.0%}", 1),
    ("weights read", "weight_read_bytes", "{:,.1f} GB", 1e9),
    ("keys and values read back", "kv_read_bytes", "{:,.2f} GB", 1e9),
    ("memory kept for keys and values", "kv_bytes", "{:,.0f} MiB", 2**20),
    ("first token of request 26 in the queue", "late_ttft_ms", "{:,.0f} ms", 1),
    ("tokens a second", "tokens_per_s", "{:,.0f}", 1),
)
MEASURED = ("tokens_per_s", "late_ttft_ms")
STRIP_WIDTH = 64
STRIP = {"waits": "\u00b7", "wasted": "\u2591", "useful": "\u2588"}


def results_of(tree: Tree) -> dict:
    path = tree.results / "staircase.json"
    if not path.is_file():
        raise ValueError("there is no staircase.json; run `python -m shared.bench staircase --write`")
    return json.loads(path.read_text())


def row_of(tree: Tree, chapter: Path) -> dict:
    results = results_of(tree)
    if short(chapter) not in results:
        raise ValueError(f"staircase.json has no {short(chapter)}; run `python -m shared.bench staircase --write`")
    return results[short(chapter)]


def written(row: dict, key: str, form: str, unit: float) -> str:
    return form.format(row[key] / unit if unit > 1 else row[key])


def lines_changed(before: Path, after: Path, only: str | None = None) -> tuple[int, int]:
    """Lines of Python added and removed between two chapters, as `diff -u` counts them; of one file only, if named."""
    added = removed = 0
    names = {path.relative_to(chapter) for chapter in (before, after) for path in python_files(chapter)}
    names = {name for name in names if only in (None, name.as_posix())}
    for name in sorted(names):
        old, new = ((chapter / name).read_text().splitlines() if (chapter / name).is_file() else []
                    for chapter in (before, after))
        for line in list(difflib.unified_diff(old, new, lineterm=""))[2:]:
            added += line.startswith("+")
            removed += line.startswith("-")
    return added, removed


def within_noise(rows: list[dict], key: str) -> bool:
    """Whether two measurements differ by less than the runs do among themselves."""
    first, second = (row[key] for row in rows)
    return abs(second - first) < first * sum(row["spread"] for row in rows)


def cost(tree: Tree, chapter: Path | None) -> list[str]:
    """The chapter's card."""
    if chapter is None:
        raise ValueError("a cost card belongs to a chapter; in another text use the table staircase")
    chapters = [each for each in (tree.previous(chapter), chapter) if each]
    rows = [row_of(tree, each) for each in chapters]
    first = rows[0]
    lines = [
        f"| {first['requests']} requests to pocket, {first['tokens']:,} tokens | {' | '.join(map(short, chapters))} |",
        "|---|" + "---:|" * len(rows),
    ]
    for what, key, form, unit in COSTS:
        cells = [written(row, key, form, unit) for row in rows]
        if not any(row[key] for row in rows):
            continue
        if len(cells) == 2 and cells[0] != cells[1] and not (key in MEASURED and within_noise(rows, key)):
            cells[1] = f"**{cells[1]}**"
        lines.append(f"| {what} | {' | '.join(cells)} |")
    if len(chapters) == 2:
        added, removed = lines_changed(*chapters)
        lines.append(f"| lines of Python, blank ones too | | {added} added, {removed} removed |")
    return lines


def strip(tree: Tree, chapter: Path | None) -> list[str]:
    """One request's time in each chapter up to this one, all on one scale."""
    last = tree.chapters.index(chapter) if chapter else len(tree.chapters) - 1
    names = [short(each) for each in tree.chapters[: last + 1]]
    rows = [row_of(tree, each) for each in tree.chapters[: last + 1]]
    prompt, output = rows[0]["watched"]["lengths"]
    lives = [{what: row["watched"]["life_ms"].get(what, 0) for what in STRIP} for row in rows]
    longest = max(sum(life.values()) for life in lives)
    lines = [
        "```text",
        f"request {rows[0]['watched']['request'] + 1} of {rows[0]['requests']}, {prompt} + {output} tokens; "
        f"a character is {longest / STRIP_WIDTH:,.0f} ms or less",
        *(f"{name}  {bar(life, longest)}" for name, life in zip(names, lives)),
        "",
        f"{'':6}{'waits ' + STRIP['waits']:>12}{'for nothing ' + STRIP['wasted']:>16}"
        f"{'needed ' + STRIP['useful']:>12}{'last token after':>20}",
    ]
    rides = [row["watched"]["life_ms"].get("rides", 0) for row in rows]
    if any(rides):
        lines[-1] += f"{'then rides along':>20}"
    for name, life, after in zip(names, lives, rides):
        cells = (life["waits"], life["wasted"], life["useful"], sum(life.values()), *([after] if any(rides) else []))
        lines.append(f"{name:6}" + "".join(f"{ms:>{width},.0f} ms" for ms, width in zip(cells, (9, 13, 9, 17, 17))))
    return [*lines, "```"]


def bar(life: dict[str, float], longest: float) -> str:
    """A request's time as characters; whatever took time has at least one."""
    counts = {what: max(1, round(STRIP_WIDTH * ms / longest)) if ms else 0 for what, ms in life.items()}
    return "".join(STRIP[what] * count for what, count in counts.items())


# A card's head has room for all; a table of all chapters does not.
IN_TABLE = ("tokens_per_s", "passes", "positions", "needed_share", "weight_read_bytes", "kv_bytes", "late_ttft_ms")


def staircase(tree: Tree, chapter: Path | None) -> list[str]:
    """All chapters, a row each."""
    costs = sorted((cost for cost in COSTS if cost[1] in IN_TABLE), key=lambda cost: IN_TABLE.index(cost[1]))
    head = ("", *(what for what, *_ in costs))
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * len(costs)]
    for each in tree.chapters:
        cells = [written(row_of(tree, each), *columns).replace(" ", "\u00a0") for _, *columns in costs]
        lines.append(f"| [{short(each)}](milestones/{each.name}/README.md) | " + " | ".join(cells) + " |")
    return lines
