"""The tables that are made of committed measurements, and of the chapters' own lines.

    suite, large    every kind of work: how many times as fast as Hugging Face's `generate`, and the share of the limit
    suite-times     the same in CPU milliseconds
    slower          where a chapter takes longer than the one before it
    arrivals        the wait for a first token when requests come by chance, and memory at its peak
    overhead        the engine's own share of a decode step
    changes         lines added and removed from chapter to chapter, by file
    damage          random changes to the code, and whether a test notices
"""
import json
from collections import Counter
from pathlib import Path

from shared.book.cards import lines_changed
from shared.book.tree import Tree, short

PEERS = ("HF generate", "HF continuous")
# Less is not worth a line, whoever is right.
NOTED = 0.02
MODELS = {
    "pocket": "pocket",
    "smollm2-135m-shape": "SmolLM2-135M's shape",
    "qwen3-0.6b-shape": "Qwen3-0.6B's shape",
    "llama-3.2-1b-shape": "Llama-3.2-1B's shape",
}


def read(tree: Tree, file: str, command: str) -> dict:
    path = tree.results / file
    if not path.is_file():
        raise ValueError(f"there is no {file}; run `{command}`")
    return json.loads(path.read_text())


def works(results: dict) -> list[tuple[str, dict]]:
    """Each kind of work, in words, with its rows by contestant."""
    return [(f"{words}, {what}", rows) for model, words in MODELS.items() for what, rows in results.get(model, {}).items()]


def compared(results: dict, names: list[str], cell) -> list[str]:
    """A row for each kind of work, a column for each contestant that did any of it."""
    found = works(results)
    names = [name for name in (*names, *PEERS) if any(name in rows for _, rows in found)]
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for what, rows in found:
        lines.append(f"| {what} | " + " | ".join(cell(rows[name]) if name in rows else "" for name in names) + " |")
    return lines


def times(row: dict) -> str:
    return f"{row['times_hf']:.2f} ({row['share_of_limit']:.0%})"


def suite(tree: Tree, chapter: Path | None) -> list[str]:
    return compared(read(tree, "suite.json", "python -m shared.bench suite --write"), list(map(short, tree.chapters)), times)


def suite_times(tree: Tree, chapter: Path | None) -> list[str]:
    results = read(tree, "suite.json", "python -m shared.bench suite --write")
    return compared(results, list(map(short, tree.chapters)), lambda row: f"{row['cpu_ms']:,.0f}")


def large(tree: Tree, chapter: Path | None) -> list[str]:
    return compared(read(tree, "large.json", "python -m shared.bench large --write"), list(map(short, tree.chapters)), times)


def slower(tree: Tree, chapter: Path | None) -> list[str]:
    """Every kind of work on which a chapter took longer than the one before it, and whether the runs' spread explains it."""
    found = []
    for file, command in (("suite.json", "suite"), ("large.json", "large")):
        found += works(read(tree, file, f"python -m shared.bench {command} --write"))
    decode = read(tree, "decode.json", "python -m shared.bench decode v04 v05 --write")
    for model, words in MODELS.items():
        rows = {name: decode[name][model] for name in map(short, tree.chapters) if model in decode.get(name, {})}
        found += [(f"{words}, a decode step of 16 sequences", rows)] if rows else []
    lines = ["| | on | takes | runs differ by | |", "|---|---|---:|---:|---|"]
    for each in tree.chapters[1:]:
        names = short(tree.previous(each)), short(each)
        for what, rows in found:
            if not all(name in rows for name in names):
                continue
            before, after = (rows[name] for name in names)
            more = after["cpu_ms"] / before["cpu_ms"] - 1
            if more < NOTED:
                continue
            spread = max(before["spread"], after["spread"])
            beyond = "" if more > spread else "may be noise"
            lines.append(f"| {names[1]} after {names[0]} | {what} | {more:.0%} more | {spread:.0%} | {beyond} |")
    return lines


def arrivals(tree: Tree, chapter: Path | None) -> list[str]:
    results = read(tree, "suite.json", "python -m shared.bench suite --write")
    lines = [
        "| | first token after, half of them | 19 of 20 | all done after | MiB at the peak |",
        "|---|---:|---:|---:|---:|",
    ]
    peaks = results.get("peak_mib", {})
    for name in (*map(short, tree.chapters), *PEERS):
        row = results["arrivals"].get(name)
        cells = [f"{row['ttft_ms_p50']:,.0f} ms", f"{row['ttft_ms_p95']:,.0f} ms", f"{row['seconds']:.1f} s"] if row else [""] * 3
        lines.append(f"| {name} | " + " | ".join([*cells, f"{peaks[name]:,.0f}" if name in peaks else ""]) + " |")
    return lines


def overhead(tree: Tree, chapter: Path | None) -> list[str]:
    """Of the chapter alone, in its text; elsewhere of all that were measured."""
    results = read(tree, "overhead.json", "python -m shared.bench overhead --write")
    parts = ("schedule", "build", "choose", "report")
    heads = ("who", "batch", "tokens chosen", "appended, decoded")
    lines = ["| | step | model and head | " + " | ".join(heads) + " | the engine's own |", "|---|" + "---:|" * (len(parts) + 3)]
    for each in [chapter] if chapter else tree.chapters:
        for case, row in results.get(short(each), {}).items():
            way, size = case.split()
            cells = [f"{row[part]:,.0f}" for part in parts]
            model = f"{row['model'] + row['head']:,.0f}"
            name = f"{size} {way}" if chapter else f"{short(each)}, {size} {way}"
            lines.append(f"| {name} | {row['step']:,.0f} | {model} | {' | '.join(cells)} | {row['own_share']:.0%} |")
    return lines


FILES = ("attention.py", "batch.py", "cache.py", "scheduler.py", "engine.py", "sequence.py", "layers.py", "model.py")


def changes(tree: Tree, chapter: Path | None) -> list[str]:
    """A row for all files, and one for each of those that the book is about; a column for each chapter after the first."""
    later = tree.chapters[1:]
    lines = [f"| | {' | '.join(map(short, later))} |", "|---|" + "---:|" * len(later)]
    lines.append("| all files | " + " | ".join(counted(*lines_changed(tree.previous(each), each)) for each in later) + " |")
    for file in FILES:
        cells = [counted(*lines_changed(tree.previous(each), each, only=file)) for each in later]
        lines.append(f"| `{file}` | " + " | ".join(cells) + " |")
    return lines


def counted(added: int, removed: int) -> str:
    return f"+{added} \u2212{removed}" if added or removed else "0"


def damage(tree: Tree, chapter: Path | None) -> list[str]:
    """A row for each chapter that was damaged by chance, and how its tests took it."""
    results = read(tree, "mutants.json", "python -m shared.book.mutants v01 --record")
    ends = ("killed", "hangs", "crashes", "survived")
    lines = ["| | of | tried | a test fails | hangs | crashes | nobody notices |", "|---|---|" + "---:|" * (len(ends) + 1)]
    for name, found in results.items():
        counts = Counter(each["result"] for each in found["tried"])
        only_new = "--new" in found["command"].split() and tree.previous(tree.chapter(name))
        where = "what it changed" if only_new else "all of it"
        lines.append(f"| {name} | {where} | {len(found['tried'])} | " + " | ".join(str(counts[end]) for end in ends) + " |")
    return lines


TABLES = {
    "suite": suite,
    "suite-times": suite_times,
    "large": large,
    "slower": slower,
    "arrivals": arrivals,
    "overhead": overhead,
    "changes": changes,
    "damage": damage,
}
