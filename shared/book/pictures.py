"""Pictures of committed results: SVG for the texts, and a page for a trace. `make sync` writes them.

Standard library only. A picture follows the reader's light or dark theme, and says in its title what it shows.

Reads: docs/results/*.json. Writes: docs/pictures/*.svg, through sync.
"""
import math
import re
from collections.abc import Callable
from html import escape

from shared import results
from shared.chapters import CHAPTERS, Book, first_with
from shared.workloads import SHARED_BLOCKS, TIGHT_BLOCKS, TIMELINE_BLOCK_SIZE, TIMELINE_BLOCKS

STYLE = """\
  text { font: 13px system-ui, sans-serif; fill: #24292f }
  .head { font-weight: 600 }
  .small { font-size: 11px; fill: #57606a }
  .prompt { fill: #0550ae }
  .token { fill: #54aeff }
  .waste { fill: #d0d7de }
  .waits { stroke: #8c959f; stroke-width: 1.2; stroke-dasharray: 2 3 }
  .grid { stroke: #d8dee4 }
  .owner0 { fill: #54aeff } .owner1 { fill: #4ac26b } .owner2 { fill: #d4a72c } .owner3 { fill: #ff8182 }
  .owner4 { fill: #c297ff } .owner5 { fill: #ffa657 } .owner6 { fill: #39c5cf } .owner7 { fill: #f778ba }
  .owner8 { fill: #a8b35b } .owner9 { fill: #9db2d0 }
  .curve0, .dot0 { stroke: #0969da } .curve1, .dot1 { stroke: #bf3989 } .curve2, .dot2 { stroke: #1a7f37 } .curve3, .dot3 { stroke: #9a6700 }
  .dot0 { fill: #0969da } .dot1 { fill: #bf3989 } .dot2 { fill: #1a7f37 } .dot3 { fill: #9a6700 }
  @media (prefers-color-scheme: dark) {
    .curve0, .dot0 { stroke: #58a6ff } .curve1, .dot1 { stroke: #f778ba } .curve2, .dot2 { stroke: #3fb950 } .curve3, .dot3 { stroke: #d29922 }
    .dot0 { fill: #58a6ff } .dot1 { fill: #f778ba } .dot2 { fill: #3fb950 } .dot3 { fill: #d29922 }
    text { fill: #e6edf3 }
    .small { fill: #9198a1 }
    .prompt { fill: #79c0ff }
    .token { fill: #1f6feb }
    .waste { fill: #3d444d }
    .waits { stroke: #656c76 }
    .grid { stroke: #30363d }
    .owner0 { fill: #1f6feb } .owner1 { fill: #238636 } .owner2 { fill: #9e6a03 } .owner3 { fill: #da3633 }
    .owner4 { fill: #8957e5 } .owner5 { fill: #bc4c00 } .owner6 { fill: #1b7c83 } .owner7 { fill: #bf4b8a }
    .owner8 { fill: #6e7f2a } .owner9 { fill: #57708f }
  }"""


def svg(width: int, height: int, title: str, body: list[str]) -> str:
    """An SVG with the common style; screen readers read title."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' role="img" aria-labelledby="t">',
        f'<title id="t">{escape(title)}</title>',
        f"<style>\n{STYLE}\n</style>",
        *body,
        "</svg>\n",
    ])


def text(x: float, y: float, what: object, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(str(what))}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    tip = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2">{tip}</rect>'


# ---- timelines

LEFT, TOP, CELL, LANE = 96, 56, 14, 18
# What follows a timeline's last column, at the least.
RIGHT = 24


def name_of(request: int) -> str:
    """A letter for each of the first 26 requests, then A1, B1, ...

    >>> name_of(0), name_of(25), name_of(26)
    ('A', 'Z', 'A1')
    """
    letter = chr(ord("A") + request % 26)
    return f"{letter}{request // 26}" if request >= 26 else letter


def timeline(trace: dict, num_columns: int | None = None) -> str:
    """A run: one lane per request, one column per pass; the part of each cell that was needed is colored.

    num_columns: leave room for this many passes, so that pictures of several runs share one scale.
    """
    num_columns = num_columns or len(trace["passes"])
    width = LEFT + max(num_columns * CELL, 440) + RIGHT
    height = TOP + len(trace["lengths"]) * LANE + 30
    passes = len(trace["passes"])
    body = [text(16, 24, f"{trace['chapter']}: {passes} forward passes", "head"), *legend(LEFT, 42)]
    for column in range(0, passes + 1, 5):
        x = LEFT + column * CELL
        body.append(f'<path class="grid" d="M{x} {TOP - 4}V{height - 22}"/>')
        body.append(text(x, height - 8, column, "small", "middle"))
    for request, (prompt, output) in enumerate(trace["lengths"]):
        y = TOP + request * LANE
        body.append(text(16, y + 12, f"{name_of(request)}  {prompt} + {output}"))
        body += lane(trace["passes"], request, y)
    return svg(width, height, f"{trace['chapter']}: which request took part in which forward pass", body)


def legend(x: float, y: float) -> list[str]:
    """The key of colors, on one line."""
    body = []
    for kind, what, room in (("prompt", "its prompt", 84), ("token", "one token", 80), ("waste", "for nothing", 90)):
        body += [rect(x, y - 10, CELL - 2, LANE - 6, kind), text(x + 18, y, what, "small")]
        x += room
    return [*body, f'<path class="waits" d="M{x} {y - 4}h16"/>', text(x + 22, y, "waits", "small")]


def lane(passes: list[dict], request: int, y: float) -> list[str]:
    """One request's lane in the timeline."""
    body = []
    for column, each in enumerate(passes):
        x = LEFT + column * CELL
        part = next((part for part in each["parts"] if part["request"] == request), None)
        if part:
            useful, total = part["useful"], part["num_tokens"]
            tip = f"pass {column + 1}, request {name_of(request)}: {useful} of {total} positions needed, row {part['rows']}"
            if useful < total:
                body.append(rect(x + 1, y + 2, CELL - 2, LANE - 4, "waste", tip))
            if useful:
                height = (LANE - 4) * useful / total
                kind = "prompt" if useful > 1 else "token"
                body.append(rect(x + 1, y + LANE - 2 - height, CELL - 2, height, kind, tip))
        elif request in each["waiting"]:
            body.append(f'<path class="waits" d="M{x} {y + LANE / 2:g}h{CELL}"/>')
    return body


NUM_OWNERS = 10  # colors; requests that share one differ by letter


def blocks(trace: dict, num_blocks: int = TIMELINE_BLOCKS) -> str:
    """Which request owned which block in which pass: one lane per block, one column per pass, colored as high as the block is full."""
    size = TIMELINE_BLOCK_SIZE
    # A picture that is wider would be too small to read on a phone.
    cell = min(30, 720 // max(1, len(trace["passes"])))
    lane_height, left, top = 22, 76, 60
    width, height = left + len(trace["passes"]) * cell + RIGHT, top + num_blocks * lane_height + 30
    title = f"{trace['chapter']}: which request owns which of {num_blocks} blocks of {size} tokens"
    body = [text(16, 24, title, "head")]
    body.append(text(16, 44, "each column is a forward pass; the colored part of a block holds tokens, the gray part is empty", "small"))
    for block_id in range(num_blocks):
        body.append(text(16, top + block_id * lane_height + 15, f"block {block_id}", "small"))
    reached = [0] * len(trace["lengths"])
    ran = set()
    for column, each in enumerate(trace["passes"]):
        x = left + column * cell
        body.append(text(x + cell / 2, height - 10, column + 1, "small", "middle"))
        for part in each["parts"]:
            request = part["request"]
            # A request that did not run in the last pass computes all of its positions, the first time and after a preemption.
            reached[request] = part["num_tokens"] + (reached[request] if request in ran else 0)
            for index, block_id in enumerate(part["rows"]):
                y = top + block_id * lane_height
                held = min(size, reached[request] - index * size)
                level = (lane_height - 3) * held / size
                tip = f"pass {column + 1}: block {block_id} is number {index} of request {name_of(request)}, {held} of {size}"
                body.append(rect(x + 1, y, cell - 2, lane_height - 3, "waste", tip))
                body.append(rect(x + 1, y + lane_height - 3 - level, cell - 2, level, f"owner{request % NUM_OWNERS}", tip))
                body.append(text(x + cell / 2, y + 14, name_of(request), "small", "middle"))
        ran = {part["request"] for part in each["parts"]}
    return svg(width, height, title, body)


FOUND_STYLE = """\
<style>
  .found { fill: none; stroke: #24292f; stroke-width: 1.6 } .kept { fill-opacity: 0.25 }
  @media (prefers-color-scheme: dark) { .found { stroke: #e6edf3 } .kept { fill-opacity: 0.35 } }
</style>"""


def shared_blocks(trace: dict, num_blocks: int = SHARED_BLOCKS) -> str:
    """Which requests own which block in which pass, which free blocks can still be found, and which requests wait."""
    size = TIMELINE_BLOCK_SIZE
    cell = min(30, 720 // max(1, len(trace["passes"])))
    lane_height, left, top = 22, 76, 84
    foot = top + (num_blocks + 1) * lane_height + 8
    width, height = left + len(trace["passes"]) * cell + RIGHT, foot + 24
    title = f"{trace['chapter']}: which requests own which of {num_blocks} blocks of {size} tokens"
    body = [FOUND_STYLE, text(16, 24, title, "head")]
    body.append(text(16, 44, "each column is a forward pass, and each letter a request that owns the block", "small"))
    keys = (("owner0", "holds tokens", 112), ("found", "found: not computed again", 190), ("kept owner0", "free, can be found", 150), ("waste", "empty", 0))
    x = 16
    for kind, what, room in keys:
        if kind == "found":
            body.append(rect(x, 54, 14, 14, "owner0"))
        body += [rect(x, 54, 14, 14, kind), text(x + 20, 66, what, "small")]
        x += room
    for block_id in range(num_blocks):
        body.append(text(16, top + block_id * lane_height + 15, f"block {block_id}", "small"))
    body.append(text(16, top + num_blocks * lane_height + 20, "waits", "small"))
    reached = [0] * len(trace["lengths"])
    ran, kept = set(), {}
    for column, each in enumerate(trace["passes"]):
        x, owners, level = left + column * cell, {}, {}
        body.append(text(x + cell / 2, foot + 16, column + 1, "small", "middle"))
        found = set()
        for part in each["parts"]:
            request, table = part["request"], part["rows"]
            if request not in ran:
                # Its new tokens fill the last blocks of its table; it has found those before them.
                num_found = len(table) - -(-part["num_tokens"] // size)
                reached[request] = num_found * size
                found |= {(block_id, request) for block_id in table[:num_found]}
            reached[request] += part["num_tokens"]
            for index, block_id in enumerate(table):
                owners.setdefault(block_id, []).append(request)
                level[block_id] = min(size, reached[request] - index * size)
        for block_id in range(num_blocks):
            y = top + block_id * lane_height
            if block_id in owners:
                finders = {request for found_id, request in found if found_id == block_id}
                body += owned(x, y, cell, lane_height - 3, owners[block_id], level[block_id] / size, finders)
                kept[block_id] = f"kept owner{owners[block_id][0] % NUM_OWNERS}" if level[block_id] == size else None
            elif kept.get(block_id):
                tip = f"pass {column + 1}: block {block_id} is free, and can be found"
                body.append(rect(x + 2, y + 1, cell - 4, lane_height - 5, kept[block_id], tip))
        ran = {part["request"] for part in each["parts"]}
        for row, request in enumerate(sorted(set(each["waiting"]) - ran)):
            body.append(text(x + cell / 2 + 8 * row, top + num_blocks * lane_height + 20, name_of(request), "small", "middle"))
    return svg(width, height, title, body)


def owned(x: float, y: float, cell: float, height: float, owners: list[int], level: float, finders: set[int]) -> list[str]:
    """A block in one pass: a stripe per owner, colored as high as the block is full, with a border if it has just found the block."""
    body = []
    stripe = (cell - 2) / len(owners)
    for number, request in enumerate(owners):
        left = x + 1 + number * stripe
        body.append(rect(left, y, stripe, height, "waste"))
        body.append(rect(left, y + height * (1 - level), stripe, height * level, f"owner{request % NUM_OWNERS}"))
        if request in finders:
            body.append(rect(left + 0.8, y + 0.8, stripe - 1.6, height - 1.6, "found", f"request {name_of(request)} has found this block"))
        body.append(text(left + stripe / 2, y + 14, name_of(request), "small", "middle"))
    return body


def page(traces: dict[str, dict]) -> str:
    """Timelines of several runs as one self-contained HTML page, with tooltips."""
    scale = max(len(trace["passes"]) for trace in traces.values())
    sections = "\n".join(
        f"<h2>{escape(trace['chapter'])}</h2>\n{timeline(trace, scale)}\n{table(trace)}" for trace in traces.values()
    )
    return PAGE.replace("SECTIONS", sections)


def table(trace: dict) -> str:
    """What each pass worked on, as a table."""
    rows = []
    for number, each in enumerate(trace["passes"], 1):
        ran = ", ".join(f"{name_of(part['request'])} {part['num_tokens']}" for part in each["parts"])
        useful = sum(part["useful"] for part in each["parts"])
        total = sum(part["num_tokens"] for part in each["parts"])
        waiting = " ".join(map(name_of, each["waiting"])) or "none"
        rows.append(f"<tr><td>{number}<td>{ran}<td>{useful} of {total}<td>{waiting}")
    head = "<tr><th>pass<th>requests, and their number of positions<th>needed<th>waiting when it began"
    return f"<details><summary>pass by pass</summary><table>{head}{''.join(rows)}</table></details>"


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Which request ran in which forward pass</title>
<style>
  :root { color-scheme: light dark }
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
  svg { max-width: 100%; height: auto }
  table { border-collapse: collapse; font-size: 13px }
  td, th { padding: 2px 12px 2px 0; text-align: left }
</style>
<h1>Which request ran in which forward pass</h1>
<p>Each lane is a request, labeled with its prompt tokens + output tokens; each column is a forward pass.</p>
SECTIONS
</html>
"""


# ---- the staircase

STAIRS = (
    ("tokens per second", "tokens_per_s", "{:,.0f}", 1),
    ("ms to the first token of request 26", "late_ttft_ms", "{:,.0f}", 1),
    ("positions computed", "positions", "{:,}", 1),
    ("MiB reserved for keys and values", "kv_bytes", "{:,.0f}", 2**20),
)
# What does not depend on the machine.
COSTS = ("passes", "positions", "kv_bytes")


def steps_of(found: dict[str, dict]) -> list[str]:
    """Of these chapters' costs, by name: those that count something else than the chapter before, the first and the last.

    >>> costs = [{"passes": passes, "positions": 3, "kv_bytes": 0} for passes in (9, 5, 5, 5)]
    >>> steps_of(dict(zip(["v01", "v02", "v03", "v04"], costs)))
    ['v01', 'v02', 'v04']
    """
    counts = {name: [row[key] for key in COSTS] for name, row in found.items()}
    names = list(counts)
    return [name for name, before in zip(names, [None, *names]) if before is None or counts[name] != counts[before] or name == names[-1]]


def staircase(found: dict[str, dict]) -> str:
    """The chapters that change what one workload costs: one panel per quantity, one bar per chapter."""
    found = {name: found[name] for name in steps_of(found)}
    panels = [
        (what, [(name, row[key], form.format(row[key] / unit if unit > 1 else row[key])) for name, row in found.items()])
        for what, key, form, unit in STAIRS
    ]
    names = f"{next(iter(found))} to {list(found)[-1]}"
    return bars(panels, f"{names} on one workload: " + ", ".join(what for what, *_ in STAIRS), 32, 220)


Bars = tuple[str, list[tuple[str, float, str]]]


def bars(panels: list[Bars], title: str, name_room: int, bar_room: int) -> str:
    """Panels in two columns; each has a heading and one bar per (name, value, label)."""
    bar, panel_height = 22, 30
    height_of_panel = panel_height + max(len(rows) for _, rows in panels) * bar + 16
    body = []
    for number, (what, rows) in enumerate(panels):
        left, top = 16 + number % 2 * 350, 10 + number // 2 * height_of_panel
        body.append(text(left, top + 18, what, "head"))
        largest = max(value for _, value, _ in rows) or 1
        for line, (name, value, label) in enumerate(rows):
            y = top + panel_height + line * bar
            body.append(text(left, y + 13, name, "small"))
            length = bar_room * value / largest
            body.append(rect(left + name_room, y, max(length, 1), bar - 5, "token"))
            body.append(text(left + name_room + 6 + length, y + 13, label))
    return svg(700, 10 + -(-len(panels) // 2) * height_of_panel, title, body)


def beside(found: dict[str, dict]) -> str:
    """Chapters beside Hugging Face: tokens per CPU second, and the share of the machine's limit.

    Of the chapters, those that change a step, which are measured with the larger model as well, the first and the last.
    """
    panels, larger = [], found["smollm2-135m-shape"]
    chapters = [name for name in next(iter(found["pocket"].values())) if name.startswith("v")]
    hidden = {*chapters[1:-1]}.difference(*larger.values())
    for model in ("pocket", "smollm2-135m-shape"):
        for what, rows in found[model].items():
            each = []
            for name, row in rows.items():
                if name in hidden:
                    continue
                speed = row["tokens_per_cpu_s"]
                # For a single token, its time says more than a rate.
                label = f"{row['cpu_ms']:,.0f} ms" if what.startswith("first") else f"{speed:,.0f}"
                each.append((name, 1 / row["cpu_ms"], f"{label} ({row['share_of_limit']:.0%})"))
            panels.append((f"{'pocket' if model == 'pocket' else 'SmolLM2 shape'}, {what.split(':')[0]}", each))
    return bars(panels, "Tokens per CPU second of chapters and Hugging Face, and the share of the machine's limit", 84, 130)


# ---- growth

def curves(series: dict[str, dict[int, float]], title: str, across: str, up: str) -> str:
    """A log-log plot of values over sizes; each series is labeled with the exponent of its power-law fit."""
    width, height, left, top, bottom = 700, 350, 60, 54, 46
    sizes = sorted({size for values in series.values() for size in values})
    every = [value for values in series.values() for value in values.values()]
    low, high = math.floor(math.log2(min(every))), math.ceil(math.log2(max(every)))

    def place(size: float, value: float) -> tuple[float, float]:
        x = left + (width - left - 200) * math.log2(size / sizes[0]) / math.log2(sizes[-1] / sizes[0])
        return x, height - bottom - (height - top - bottom) * (math.log2(value) - low) / max(1, high - low)

    body = [text(16, 22, title, "head"), text(left, height - 8, across, "small"), text(16, top - 12, up, "small")]
    for size in sizes:
        x, _ = place(size, 2**low)
        body += [f'<path class="grid" d="M{x:g} {top}V{height - bottom}"/>', text(x, height - bottom + 16, f"{size:,}", "small", "middle")]
    for power in range(low, high + 1):
        _, y = place(sizes[0], 2**power)
        body += [f'<path class="grid" d="M{left} {y:g}H{width - 200}"/>', text(left - 6, y + 4, f"{2**power:g}", "small", "end")]
    for number, (name, values) in enumerate(series.items()):
        points = [place(size, value) for size, value in sorted(values.items())]
        way = "L".join(f"{x:g} {y:g}" for x, y in points)
        body.append(f'<path class="curve{number % 4}" fill="none" stroke-width="2" d="M{way}"/>')
        body += [f'<circle class="dot{number % 4}" cx="{x:g}" cy="{y:g}" r="3"/>' for x, y in points]
        body.append(text(points[-1][0] + 10, points[-1][1] + 4, f"{name}: exponent {exponent(values):.2f}"))
    return svg(width, height, title, body)


def exponent(values: dict[int, float]) -> float:
    """The e for which value = c * size ** e fits best, on logarithms.

    >>> round(exponent({1: 3.0, 2: 12.0, 4: 48.0}), 6)
    2.0
    """
    points = [(math.log(size), math.log(value)) for size, value in values.items()]
    mean_x, mean_y = (sum(each) / len(points) for each in zip(*points))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def growth(found: dict[str, dict]) -> str:
    """Time per token against the length of its sequence."""
    series = {name: {int(n): row["wall_ms"] for n, row in rows.items() if n.isdigit()} for name, rows in found.items()}
    return curves(series, "The longer the sequence, the more a token costs: pocket", "tokens in the sequence", "ms per token")


def together(found: dict[str, dict]) -> str:
    """Time of a forward pass against the number of requests in it."""
    series = {
        label: {int(n): row["wall_ms"] for n, row in found["v03"][model].items() if n.isdigit()}
        for model, label in (("pocket", "pocket"), ("smollm2-135m-shape", "SmolLM2"))
    }
    return curves(series, "The cost of a forward pass grows more slowly than the number of requests in it: v03", "requests in the pass", "ms per pass")


def alone(found: dict[str, dict]) -> str:
    """Time per token, and per position, when every position is computed again for each token."""
    took = {int(length): row["wall_ms"] for length, row in found["v01"].items() if length.isdigit()}
    panels = [
        ("ms per token, by length", [(f"{n:,}", ms, f"{ms:,.0f}") for n, ms in took.items()]),
        ("microseconds per position", [(f"{n:,}", ms / n, f"{1000 * ms / n:,.0f}") for n, ms in took.items()]),
    ]
    return bars(panels, "v01: time per token and per position computed for it, by the length of the sequence", 44, 220)


# ---- what attention moves

# For each chapter: the chapter whose count of bytes applies, the times each byte moves, and a note.
# The staircase runs v06 on v05's path. Its kernel reads each sequence's own keys and values, which is what v02 counted.
IN_PLACE, COPIED = ("read",), ("read", "write the copy", "read the copy")
MOVES = {
    "v02": ("v02", IN_PLACE, ""),
    "v03": ("v03", IN_PLACE, ""),
    "v04": ("v04", COPIED, ""),
    "v05": ("v05", COPIED, ""),
    "v06": ("v02", IN_PLACE, ", by its kernel: computed, not measured"),
}


def moved(found: dict[str, dict]) -> str:
    """Bytes of keys and values between memory and attention on the staircase's workload, the copy's in gray."""
    title = "GB of keys and values that attention moves, at least"
    there = {name: (found[source]["kv_read_bytes"], *rest) for name, (source, *rest) in MOVES.items() if name in found}
    largest = max((given * len(moves) for given, moves, _ in there.values()), default=1)
    left, lane_height, room = 60, 34, 560
    body = [text(16, 24, title, "head")]
    for number, (name, (given, moves, note)) in enumerate(there.items()):
        x, y, length = left, 40 + number * lane_height, room * given / largest
        body.append(text(16, y + 18, name))
        for move in moves:
            body.append(rect(x, y, length - 2, lane_height - 8, "token" if move == "read" else "waste", f"{name}, {move}"))
            body.append(text(x + 8, y + 18, move))
            x += length
        body.append(text(x + 6, y + 18, f"{given * len(moves) / 1e9:.2f}{note}"))
    return svg(700, 48 + len(there) * lane_height, title, body)


# ---- what a client feels

FELT = (("time to first token", "ttft_ms", "{:,.0f} ms"), ("time per token after it", "tpot_ms", "{:.1f} ms"))
POLICIES = {"step by step": "continuous", "in groups": "in_groups"}


def felt(found: dict[str, dict]) -> str:
    """Median latencies that clients measure: one row of panels per number of connections."""
    panels = []
    for connections in found["continuous"]:
        for what, key, form in FELT:
            medians = {name: found[policy][connections][key]["p50"] for name, policy in POLICIES.items()}
            rows = [(name, ms, form.format(ms)) for name, ms in medians.items()]
            panels.append((f"{what}, {connections} connection{'s' if connections != '1' else ''}", rows))
    return bars(panels, f"{found['chapter']}: median latencies that clients measure, with continuous batching and in groups", 84, 160)


# ---- an engine beside a busy thread


def lock(found: dict) -> str:
    """When steps ended, during part of each window: one line per window and way, one mark per step."""
    left, width, line, top = 150, 700, 34, 54
    title = f"When the engine's steps ended during one second, {found['streams']} streams"
    body = [text(16, 22, title, "head")]
    last = max(end for way in ("thread", "process") for window in ("quiet", "busy") for end in found[way][window]["ends_ms"])
    right = width - 90
    scale = (right - left) / max(1000, last)
    for number, (window, way) in enumerate((window, way) for window in ("quiet", "busy") for way in ("thread", "process")):
        y = top + number * line + (number // 2) * 12
        ends = found[way][window]["ends_ms"]
        body.append(text(16, y + 15, f"{window}, {way}"))
        body.append(f'<path class="grid" d="M{left} {y + 22:g}H{right:g}"/>')
        body += [rect(left + scale * end - 0.75, y, 1.5, 22, "token") for end in ends]
        body.append(text(right + 8, y + 15, f"{len(ends)} step{'s' if len(ends) != 1 else ''}", "small"))
    foot = top + 4 * line + 12
    for ms in range(0, 1001, 250):
        body.append(text(left + scale * ms, foot + 16, f"{ms} ms", "small", "middle"))
    return svg(width, foot + 26, title, body)


# ---- prompts in pieces


def gaps(found: dict) -> str:
    """By the most tokens in a step: the longest gap between two tokens of a stream, and the long prompt's first token."""
    def panel(key: str, form: str) -> list[tuple[str, float, str]]:
        return [(f"{int(name):,}" if name.isdigit() else name, row[key], form.format(row[key])) for name, row in found["gaps"].items()]

    panels = [
        ("longest gap between two tokens of a stream", panel("longest_ms", "{:,.0f} ms")),
        ("time to the long prompt's first token", panel("first_token_ms", "{:,.0f} ms")),
    ]
    return bars(panels, "Eight streams while a prompt of 1,900 tokens is computed, by the most tokens in a step", 50, 200)


# ---- the engine's own time

def own_time(found: dict[str, dict]) -> str:
    """The engine's own time in a greedy decode step, and its parts, in the chapters that shorten a step and the one before them."""
    first, last = first_with("linear").previous, first_with("graphs")
    names = [chapter.id for chapter in CHAPTERS[first.number : last.number + 1]]
    panels = []
    for size in (16, 64):
        rows = {name: found[name][f"greedy {size}"] for name in names}
        panels.append((f"{size} sequences: all but the model", [(name, row["own"], f"{row['own']:,.0f} µs ({row['own_share']:.0%})") for name, row in rows.items()]))
        for what, part in (("building the batch", "build"), ("committing and detokenizing", "report"), ("scheduling", "schedule")):
            panels.append((f"{size} sequences: {what}", [(name, row[part], f"{row[part]:,.0f} µs") for name, row in rows.items()]))
    return bars(panels, "The engine's own microseconds in a decode step of pocket, and their share of it", 32, 190)


# ---- one request's numbers

def bits(found: dict) -> str:
    """How far the log-probabilities of one request's likeliest tokens move from those alone, by the number of others, with exact off and on."""
    numbers = found["numbers"]
    counts = sorted(map(int, numbers["exact"]))
    title = "How far one request's log-probabilities move, by the number of other requests"
    tokens = [each["token"] for each in numbers["exact"]["0"]][:4]
    moved = {}
    for way in ("fastest", "exact"):
        alone = {each["token"]: each["logprob"] for each in numbers[way]["0"]}
        moved[way] = [(count, each["token"], 1e6 * (each["logprob"] - alone[each["token"]])) for count in counts for each in numbers[way][str(count)] if each["token"] in tokens]
    most = max(1, math.ceil(max(abs(value) for each in moved.values() for _, _, value in each)))
    top, bottom = 86, 300
    body = [text(16, 22, title, "head")]
    for number, token in enumerate(tokens):
        body += [f'<circle class="dot{number}" cx="{64 + 110 * number}" cy="46" r="4"/>', text(74 + 110 * number, 50, repr(token))]
    for way, left in (("fastest", 56), ("exact", 400)):
        right = left + 284
        body.append(text(left, top - 14, "exact off, millionths" if way == "fastest" else "exact on, millionths", "small"))
        for value in (-most, 0, most):
            y = (top + bottom) / 2 - value / most * (bottom - top) / 2
            body += [f'<path class="grid" d="M{left} {y:g}H{right}"/>', text(left - 6, y + 4, value, "small", "end")]
        place = {count: left + 12 + index * (right - left - 24) / (len(counts) - 1) for index, count in enumerate(counts)}
        body += [text(x, bottom + 16, count, "small", "middle") for count, x in place.items()]
        body.append(text((left + right) / 2, bottom + 34, "other requests", "small", "middle"))
        for count, token, value in moved[way]:
            number = tokens.index(token)
            y = (top + bottom) / 2 - value / most * (bottom - top) / 2
            body.append(f'<circle class="dot{number}" cx="{place[count] + 2 * number - 3:g}" cy="{y:g}" r="2.5"/>')
    return svg(700, bottom + 46, title, body)


# ---- a request's life

def moments(_: dict) -> str:
    """The moments of one request's life, and what is measured between them. Drawn, not measured."""
    arrived, began, first, *others = 60, 170, 260, 315, 370, 460, 515
    last, top = others[-1], 70
    body = [text(16, 22, "The moments of a request, and what is measured between them", "head")]
    body += [rect(arrived, top, began - arrived, 22, "waste"), rect(began, top, first - began, 22, "prompt"), rect(first, top, last - first, 22, "token")]
    for x, name in ((arrived, "arrived"), (began, "began"), (first, "first"), (last, "last")):
        body += [f'<path class="waits" d="M{x} {top - 8}V{top + 150}"/>', text(x, top - 14, name, "", "middle")]
    for x in others:
        body.append(f'<path class="grid" d="M{x} {top}v22"/>')
    spans = [("in the queue", arrived, began), ("prompt", began, first), ("first token", arrived, first), ("gaps between tokens", first, last), ("the whole request", arrived, last)]
    for line, (name, begin, end) in enumerate(spans):
        y = top + 46 + 24 * line
        body += [f'<path class="curve0" fill="none" d="M{begin} {y}H{end}M{begin} {y - 4}v8M{end} {y - 4}v8"/>', text(end + 8, y + 4, name)]
    for x in others[:-1]:
        body.append(f'<path class="curve0" fill="none" d="M{x} {top + 46 + 72 - 4}v8"/>')
    return svg(700, top + 170, "The moments of a request", body)


def mask(_: dict) -> str:
    """An automaton of `(no)+|yes`, a state of it, and where some tokens lead from there. Drawn, not measured."""
    body = [text(16, 22, "Which tokens may follow? The automaton of (no)+|yes, byte by byte, after \u201cno\u201d", "head")]
    places = {"start": (50, 130), "n": (150, 84), "no": (250, 84), "y": (150, 176), "ye": (250, 176), "yes": (350, 176)}
    ways = [("start", "n", "n"), ("n", "no", "o"), ("start", "y", "y"), ("y", "ye", "e"), ("ye", "yes", "s")]
    for begin, end, byte in ways:
        (x, y), (to_x, to_y) = places[begin], places[end]
        body += [f'<path class="curve0" d="M{x + 16} {y + (to_y - y) * 0.16:g}L{to_x - 16} {to_y - (to_y - y) * 0.16:g}"/>', text((x + to_x) / 2, (y + to_y) / 2 - 8, byte, "", "middle")]
    body += ['<path class="curve0" fill="none" d="M240 71C220 40 180 40 160 71"/>', text(200, 42, "n (back)", "", "middle")]
    for name, (x, y) in places.items():
        body.append(rect(x - 16, y - 12, 32, 24, "token" if name == "no" else "waste"))
        body.append(text(x, y + 4, "" if name == "start" else name, "", "middle"))
        if name in ("no", "yes"):  # the text may end here
            body.append(f'<rect class="curve0" x="{x - 19}" y="{y - 15}" width="38" height="30" fill="none"/>')
    body += [text(50, 134, "start", "small", "middle"), text(250, 118, "here now; may end", "small", "middle"), text(350, 210, "may end", "small", "middle")]
    tokens = [("n", "to \u201cn\u201d", True), ("no", "to \u201cno\u201d", True), ("nono", "to \u201cno\u201d", True), ("nope", "dead at the p", False), ("o", "dead at once", False)]
    tokens += [("yes", "dead at once", False), ("\u2423no", "dead at the space", False), ("<end>", "may end here", True)]
    body += [text(440, 60, "token"), text(510, 60, "its bytes lead"), text(630, 60, "mask")]
    for line, (token, where, allowed) in enumerate(tokens):
        y = 80 + 18 * line
        body += [text(440, y, token, "" if allowed else "small"), text(510, y, where, "" if allowed else "small"), text(630, y, "1" if allowed else "0")]
    return svg(700, 236, "A mask is a walk of all tokens through the automaton", body)


def parts(_: dict) -> str:
    """The text of one answer, colored by part, with the splitter's states above and the pieces that a client gets below. Drawn, not measured."""
    left, size = 30, 10  # of a character
    # Of each run of text: what it is, and what the client gets of it.
    lines = [
        [("<think>\n", "", ""), ("It asks for weather.", "owner4", "reasoning_content, in pieces"), ("\n</think>\n\n", "", ""), ("Let me look.", "token", "content, in pieces"), ("\n<tool_call>", "", "")],
        [('\n{"name": "', "", ""), ("weather", "owner2", "id and name, once"), ('", "arguments": ', "", ""), ('{"city": "Oslo"}', "owner1", "arguments, in pieces"), ("}\n</tool_call>", "", "")],
    ]
    # Of each state: how many characters it reads.
    states = [[("begin", 7), ("thought", 30), ("content", 26)], [("name", 34), ("arguments", 16), ("rest", 14)]]
    title = "The text of one answer, the splitter\u2019s states above it, and what a client gets below"
    body = [text(16, 22, title, "head")]
    for number, (runs, reads) in enumerate(zip(lines, states)):
        top = 46 + 112 * number
        x = left
        for name, count in reads:
            end = x + size * count
            body += [f'<path class="grid" fill="none" d="M{x + 2} {top + 14}v-6H{end - 2}v6"/>', text((x + end) / 2, top + 2, name, "small", "middle")]
            x = end
        x = left
        for run, kind, sent in runs:
            width = size * len(run)
            body += [rect(x, top + 18, width, 26, kind or "waste")]
            body += [
                f'<text x="{x + size * index + size / 2:g}" y="{top + 36}" text-anchor="middle" style="font-family: ui-monospace, monospace">{escape(letter)}</text>'
                for index, letter in enumerate(run.replace("\n", "\u23ce"))
            ]
            if sent:
                body += [f'<path class="curve0" d="M{x + width / 2:g} {top + 46}v10"/>', text(x + width / 2, top + 70, sent, "", "middle")]
            x += width
    body += [rect(left, 256, 14, 14, "waste"), text(left + 22, 267, "held back until it is whole, then dropped: it belongs to no part", "small"), text(670, 267, "at the end: finish_reason \u201ctool_calls\u201d", "small", "end")]
    return svg(700, 284, title, body)


# ---- forms of weights

# The forms that are drawn, as the picture names them.
FORMS = {"plain": "plain", "joined": "joined", "blocks": "blocks", "halves": "halves"}


def forms(found: dict) -> str:
    """By the number of rows: the time of all products in each form with the least it could take, and the speed relative to plain."""
    drawn = {name: {int(rows): each["ms"] for rows, each in found["rows"][name].items()} for name in FORMS if name in found["rows"]}
    counts = sorted(drawn["plain"])
    stored, limits = found["steps"]["weight_bytes"], found["limits"]
    operations = 2 * stored["plain"] / 4

    def least(form: str) -> dict[int, float]:
        read_ms = 1e3 * stored[form] / (1e9 * limits["gb_per_s"])
        return {rows: max(read_ms, 1e3 * rows * operations / (1e9 * limits["gflops"])) for rows in counts}

    title = "All products of a step of SmolLM2-135M's shape, by rows and the form of the weights"
    body = [text(16, 22, title, "head")]
    x = 56
    for number, name in enumerate(drawn):
        body += [f'<path class="curve{number}" stroke-width="2" d="M{x} 42h18"/>', text(x + 24, 46, FORMS[name])]
        x += 90
    body += [f'<path class="waits" d="M{x} 42h18"/>', text(x + 24, 46, "the machine's limit")]
    top, bottom, height = 84, 320, 366
    every = [ms for each in (*drawn.values(), *map(least, drawn)) for ms in each.values()]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    left = Frame(56, 330, top, bottom, counts, low, high)
    body += left.grid({power: f"{10**power:,g}" for power in range(low, high + 1)}, "ms")
    for bytes_stored in sorted({stored[name] for name in drawn}):
        form = next(name for name in drawn if stored[name] == bytes_stored)
        body.append(f'<path class="waits" fill="none" d="{left.way({rows: math.log10(ms) for rows, ms in least(form).items()})}"/>')
    speeds = {name: {rows: drawn["plain"][rows] / ms for rows, ms in each.items()} for name, each in drawn.items()}
    most = math.ceil(max(speed for each in speeds.values() for speed in each.values()))
    right = Frame(410, 684, top, bottom, counts, 0, most)
    body += right.grid({speed: f"{speed}" for speed in range(most + 1)}, "times as fast as plain")
    for number, name in enumerate(drawn):
        body += left.curve({rows: math.log10(ms) for rows, ms in drawn[name].items()}, number)
        body += right.curve(speeds[name], number)
    return svg(700, height, title, body)


class Frame:
    """A plot's frame: sizes across on a logarithmic scale, values up on a linear one."""

    def __init__(self, left: float, right: float, top: float, bottom: float, sizes: list[int], low: float, high: float):
        self.left, self.right, self.top, self.bottom = left, right, top, bottom
        self.sizes, self.low, self.high = sizes, low, high

    def place(self, size: int, value: float) -> tuple[float, float]:
        across = math.log2(size / self.sizes[0]) / math.log2(self.sizes[-1] / self.sizes[0])
        up = (value - self.low) / (self.high - self.low)
        return self.left + (self.right - self.left) * across, self.bottom - (self.bottom - self.top) * up

    def grid(self, marks: dict[float, str], what: str) -> list[str]:
        body = [text(self.left - 40, self.top - 14, what, "small")]
        for size in self.sizes:
            x, _ = self.place(size, self.low)
            body += [f'<path class="grid" d="M{x:g} {self.top}V{self.bottom}"/>', text(x, self.bottom + 16, size, "small", "middle")]
        for value, label in marks.items():
            _, y = self.place(self.sizes[0], value)
            body += [f'<path class="grid" d="M{self.left} {y:g}H{self.right}"/>', text(self.left - 6, y + 4, label, "small", "end")]
        return [*body, text((self.left + self.right) / 2, self.bottom + 34, "rows", "small", "middle")]

    def way(self, values: dict[int, float]) -> str:
        return "M" + "L".join(f"{x:g} {y:g}" for x, y in (self.place(*each) for each in sorted(values.items())))

    def curve(self, values: dict[int, float], number: int) -> list[str]:
        dots = [f'<circle class="dot{number}" cx="{x:g}" cy="{y:g}" r="2.5"/>' for x, y in (self.place(*each) for each in values.items())]
        return [f'<path class="curve{number}" fill="none" stroke-width="2" d="{self.way(values)}"/>', *dots]


def where(found: dict) -> str:
    """For each way and number of streams: CPU microseconds per token of engine and event loop, and wall time."""
    [measured] = [figures for name, figures in found.items() if name.startswith("v")]
    left, right, line, top = 150, 600, 48, 40
    title = "CPU time per token of engine and event loop, beside the wall time"
    body = [text(16, 22, title, "head")]
    y = top
    for streams in (key for key in measured if key.isdigit()):
        ways = {way: {name: measured[streams][way][f"{name}_us"]["median"] for name in ("engine", "front", "wall")} for way in ("thread", "process")}
        scale = (right - left) / max(max(each["engine"] + each["front"], each["wall"]) for each in ways.values())
        body.append(text(16, y + 14, f"{streams} stream{'s' if streams != '1' else ''}", "head"))
        y += 22
        for way, each in ways.items():
            body.append(text(28, y + 13, way))
            engine, front, wall = (scale * each[name] for name in ("engine", "front", "wall"))
            # In threads the two take turns; in processes they run at the same time.
            start, below = (left + engine, 0) if way == "thread" else (left, 15)
            body.append(rect(left, y, engine, 13, "owner0", f"engine {each['engine']:,.0f}"))
            body.append(rect(start, y + below, front, 13, "owner2", f"event loop {each['front']:,.0f}"))
            body.append(f'<path class="waits" d="M{left + wall:g} {y - 3:g}V{y + 31:g}"/>')
            ends = max(left + wall, start + front, left + engine)
            body.append(text(ends + 8, y + 12, f"{each['wall']:,.0f} \u00b5s"))
            y += line - 10
        y += 12
    body.append(rect(16, y, 12, 12, "owner0"))
    body.append(text(34, y + 11, "engine", "small"))
    body.append(rect(96, y, 12, 12, "owner2"))
    body.append(text(114, y + 11, "event loop: the rest of the server", "small"))
    body.append(f'<path class="waits" d="M340 {y - 2:g}V{y + 14:g}"/>')
    body.append(text(348, y + 11, "wall time; the client computes too", "small"))
    return svg(700, y + 24, title, body)


# ---- what is drawn from which result

Picture = tuple[str, Callable[[dict], str]]


def of_chapter(name: str) -> Callable[[dict], str]:
    """The chapter's timeline, on the scale of the longest one that batches requests."""

    def draw(found: dict) -> str:
        together = [len(trace["passes"]) for trace in found.values() if trace["places"] > 1]
        return timeline(found[name], max(together))

    return draw


PICTURES: dict[str, Picture] = {
    "staircase.svg": ("staircase.json", staircase),
    "beside.svg": ("suite.json", beside),
    "growth.svg": ("growth.json", growth),
    "together.svg": ("batch.json", together),
    "v03_timeline.svg": ("timeline.json", of_chapter("v03")),
    "v04_timeline.svg": ("timeline.json", of_chapter("v04")),
    "v05_blocks.svg": ("timeline.json", lambda found: blocks(found["v05"])),
    "v11_blocks.svg": ("timeline.json", lambda found: blocks(found["v11"], TIGHT_BLOCKS)),
    "v12_blocks.svg": ("timeline.json", lambda found: shared_blocks(found["shared"])),
    "v01_growth.svg": ("growth.json", alone),
    "v06_moved.svg": ("staircase.json", moved),
    "v07_felt.svg": ("load.json", felt),
    "v10_lock.svg": ("lock.json", lock),
    "v10_where.svg": ("serving.json", where),
    "v13_gaps.svg": ("pieces.json", gaps),
    "v14_forms.svg": ("forms.json", forms),
    "v15_own.svg": ("overhead.json", own_time),
    "v16_bits.svg": ("exact.json", bits),
    "v17_moments.svg": ("recording.json", moments),
    "v18_mask.svg": ("grammars.json", mask),
    "v19_parts.svg": ("grammars.json", parts),
}

# Pictures in which nothing depends on the machine.
COUNTED = (moved, moments, mask, parts)


def draw_all(book: Book) -> dict[str, str]:
    """Every picture whose result exists, by file name; pictures of timings name the machine below."""
    drawn = {}
    for name, (file, draw) in PICTURES.items():
        path = book.results / file
        if not path.is_file():
            continue
        rows = results.rows_of(path)
        row = results.cited(rows)
        kind = next(each for each, found in rows.items() if found is row)
        drawn[name] = draw(results.figures(row))
        if kind and draw not in COUNTED:
            drawn[name] = with_note(drawn[name], results.origin(kind, row) + results.age(row, book))
    return drawn


def with_note(picture: str, words: str) -> str:
    """The picture with a line of small text below it."""
    size = re.search(r'viewBox="0 0 (\d+) (\d+)" width="\d+" height="\d+"', picture)
    width, height = int(size[1]), int(size[2])
    taller = f'viewBox="0 0 {width} {height + 20}" width="{width}" height="{height + 20}"'
    return picture.replace(size[0], taller, 1).replace("</svg>", f"{text(16, height + 8, words, 'small')}\n</svg>")
