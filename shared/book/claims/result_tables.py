"""The tables that are made of committed measurements, and of the chapters' own lines.

    suite, large    every kind of work: how many times as fast as Hugging Face's `generate`, and the share of the limit
    suite-times     the same in CPU milliseconds
    slower          where a chapter takes longer than the one before it
    arrivals        the wait for a first token when requests come by chance, and memory at its peak
    overhead        the engine's own share of a decode step
    attention       the attention kernel on a GPU, beside what it replaces and the limit of the memory
    serving         what a server costs beside the engine alone: tokens per second, CPU time per token
    serving_profile where the CPU time of a server's event loop goes
    lock            an engine beside a busy event loop, in a thread and in a process
    lock_start      how long a server takes to start, and its memory
    killing         who was told when a server or its engine was killed
    levers          what cheaper ways to write an event would take off the front's CPU time
    changes         lines added and removed from chapter to chapter, by file
    damage          random changes to the code, and whether a test notices

Reads: docs/results/{suite, large, decode, overhead, attention, serving, lock, killing, levers, mutants}.json.
"""
from collections import Counter

from shared import results
from shared.bench.serving_child import GROUPS
from shared.bench.suite import PEERS
from shared.book.diff import lines_changed
from shared.chapters import Book, Chapter

# Less is not worth a line, whoever is right.
NOTED = 0.02
MODELS = {
    "pocket": "pocket",
    "smollm2-135m-shape": "SmolLM2-135M's shape",
    "qwen3-0.6b-shape": "Qwen3-0.6B's shape",
    "llama-3.2-1b-shape": "Llama-3.2-1B's shape",
}


def read(book: Book, file: str) -> dict[str, dict]:
    """The rows of a result of `shared.bench`, by kind of machine."""
    return results.read(book.results / f"{file}.json", f"python -m shared.bench {file} --write")


def works(row: dict) -> list[tuple[str, dict]]:
    """Each kind of work, in words, with what each contestant took."""
    return [(f"{words}, {what}", found) for model, words in MODELS.items() for what, found in row.get(model, {}).items()]


def head_of(book: Book, kind: str, row: dict, names: list[str]) -> str:
    """A line above the figures of a machine: which it was, and below which names they are old."""
    old = results.old_chapters(row, book)
    return f"| *{results.origin(kind, row)}* | " + " | ".join("old" if name in old else "" for name in names) + " |"


def compared(book: Book, file: str, cell) -> list[str]:
    """Of each machine a row for each kind of work, and a column for each contestant that did any of it."""
    rows = read(book, file)
    names = [*(chapter.id for chapter in book.chapters), *PEERS]
    names = [name for name in names if any(name in found for row in rows.values() for _, found in works(row))]
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for kind, row in rows.items():
        lines.append(head_of(book, kind, row, names))
        for what, found in works(row):
            lines.append(f"| {what} | " + " | ".join(cell(found[name]) if name in found else "" for name in names) + " |")
    return lines


def times(row: dict) -> str:
    return f"{row['times_hf']:.2f} ({row['share_of_limit']:.0%})"


def suite(book: Book, chapter: Chapter | None) -> list[str]:
    return compared(book, "suite", times)


def suite_times(book: Book, chapter: Chapter | None) -> list[str]:
    return compared(book, "suite", lambda row: f"{row['cpu_ms']:,.0f}")


def large(book: Book, chapter: Chapter | None) -> list[str]:
    return compared(book, "large", times)


def slower(book: Book, chapter: Chapter | None) -> list[str]:
    """Every kind of work on which a chapter took longer than the one before it, and whether the runs' spread explains it."""
    lines = ["| | on | takes | runs differ by | |", "|---|---|---:|---:|---|"]
    for each in book.chapters[1:]:
        names = each.previous.id, each.id
        for where, what, found in all_works(book):
            if not all(name in found for name in names):
                continue
            before, after = (found[name] for name in names)
            more = after["cpu_ms"] / before["cpu_ms"] - 1
            if more < NOTED:
                continue
            spread = max(before["spread"], after["spread"])
            beyond = "" if more > spread else "may be noise"
            old = "; old" if results.old_chapters(where, book).intersection(names) else ""
            lines.append(f"| {names[1]} after {names[0]} | {what}{old} | {more:.0%} more | {spread:.0%} | {beyond} |")
    return lines


def all_works(book: Book):
    """Of every file and machine: its row, each kind of work in words, and what each contestant took."""
    several = len({kind for file in ("suite", "large", "decode") for kind in read(book, file)}) > 1
    for file in ("suite", "large"):
        for kind, row in read(book, file).items():
            for what, found in works(row):
                yield row, what + on(kind, several), found
    for kind, row in read(book, "decode").items():
        for model, words in MODELS.items():
            found = {name: figures[model] for name, figures in results.figures(row).items() if model in figures}
            yield row, f"{words}, a decode step of 16 sequences" + on(kind, several), found


def on(kind: str, several: bool) -> str:
    return f", {results.KINDS.get(kind, kind)}" if several else ""


def arrivals(book: Book, chapter: Chapter | None) -> list[str]:
    lines = [
        "| | first token after, half of them | 19 of 20 | all done after | MiB at the peak |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, row in read(book, "suite").items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* | | | | |")
        peaks = row.get("peak_mib", {})
        for name in (*(each.id for each in book.chapters), *PEERS):
            if name not in row["arrivals"] and name not in peaks:
                continue
            took = row["arrivals"].get(name)
            cells = [f"{took['ttft_ms_p50']:,.0f} ms", f"{took['ttft_ms_p95']:,.0f} ms", f"{took['seconds']:.1f} s"] if took else [""] * 3
            cells.append(f"{peaks[name]:,.0f}" if name in peaks else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def overhead(book: Book, chapter: Chapter | None) -> list[str]:
    """Of the chapter alone, in its text; elsewhere of all that were measured."""
    parts = ("schedule", "build", "choose", "report")
    heads = ("who", "batch", "tokens chosen", "appended, decoded")
    lines = ["| | step | model and head | " + " | ".join(heads) + " | the engine's own |", "|---|" + "---:|" * (len(parts) + 3)]
    for kind, row in read(book, "overhead").items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* |" + " |" * (len(parts) + 3))
        for each in [chapter] if chapter else book.chapters:
            for case, spent in row.get(each.id, {}).items():
                way, size = case.split()
                cells = [f"{spent[part]:,.0f}" for part in parts]
                model = f"{spent['model'] + spent['head']:,.0f}"
                name = f"{size} {way}" if chapter else f"{each.id}, {size} {way}"
                lines.append(f"| {name} | {spent['step']:,.0f} | {model} | {' | '.join(cells)} | {spent['own_share']:.0%} |")
    return lines


FILES = ("attention.py", "batch.py", "cache.py", "scheduler.py", "engine.py", "sequence.py", "layers.py", "model.py")


def changes(book: Book, chapter: Chapter | None) -> list[str]:
    """A row for all files, and one for each of those that the book is about; a column for each chapter after the first."""
    later = book.chapters[1:]
    lines = [f"| | {' | '.join((each.id for each in later))} |", "|---|" + "---:|" * len(later)]
    lines.append("| all files | " + " | ".join(counted(*lines_changed(each.previous, each)) for each in later) + " |")
    for file in FILES:
        cells = [counted(*lines_changed(each.previous, each, only=file)) for each in later]
        lines.append(f"| `{file}` | " + " | ".join(cells) + " |")
    return lines


def counted(added: int, removed: int) -> str:
    return f"+{added} \u2212{removed}" if added or removed else "0"


def damage(book: Book, chapter: Chapter | None) -> list[str]:
    """A row for each chapter that was damaged by chance, and how its tests took it."""
    recorded = results.read(book.results / "mutants.json", "python -m shared.book.traps.mutants v01 --record")[""]
    ends = ("killed", "hangs", "crashes", "survived")
    lines = ["| | of | tried | a test fails | hangs | crashes | nobody notices |", "|---|---|" + "---:|" * (len(ends) + 1)]
    for name, found in recorded.items():
        counts = Counter(each["result"] for each in found["tried"])
        only_new = "--new" in found["command"].split() and book.find(name).previous
        where = "what it changed" if only_new else "all of it"
        lines.append(f"| {name} | {where} | {len(found['tried'])} | " + " | ".join(str(counts[end]) for end in ends) + " |")
    return lines


# A launch from Python takes up to this long: below it, launches that were not recorded say nothing of the kernel.
LAUNCH_US = 100


def attention(book: Book, chapter: Chapter | None) -> list[str]:
    """Microseconds of one layer's attention, where the kernel is what was timed."""
    rows = results.read(book.results / "attention.json", "make bench-attention ARGS=--write")
    lines = ["| | sequences x context | the limit | the kernel | gathered, then torch | torch, not paged | of the limit |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for kind, row in rows.items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* | | | | | | |")
        for each in row["rows"]:
            if each["kernel_us"] is None or ("layers" not in each and each["bound_us"] < LAUNCH_US):
                continue
            found = [each[f"{way}_us"] for way in ("bound", "kernel", "torch", "contiguous")]
            times = ["" if us is None else f"{us:,.0f}" for us in found]
            lines.append(f"| {each['shape']} | {each['batch']:,} x {each['context']:,} | {' | '.join(times)} | {each['kernel_share']:.0%} |")
    return lines


SERVING = "python -m shared.bench.serving --write"


def serving(book: Book, chapter: Chapter | None) -> list[str]:
    """A row for each way and each number of streams: medians, of the share with its range."""
    rates = ("tokens/s, engine alone", "through the server", "share")
    times = ("CPU \u00b5s/token: engine alone", "engine", "front", "client", "wall \u00b5s/token")
    heads = (*rates, *times)
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for kind, row in results.read(book.results / "serving.json", SERVING).items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* |" + " |" * len(heads))
        for name, figures in served(row, chapter).items():
            for streams in (key for key in figures if key.isdigit()):
                for way in shown_ways(chapter, figures["profile"]):
                    alone, server, share = figures[streams]["alone"], figures[streams][way], figures[streams]["share"][way]
                    cells = [f"{alone['tokens_per_s']['median']:,.0f}", f"{server['tokens_per_s']['median']:,.0f}"]
                    cells.append(f"{share['median']:.0%} ({share['low']:.0%} to {share['high']:.0%})")
                    figures_us = (alone["engine_us"], *(server[f"{key}_us"] for key in ("engine", "front", "client", "wall")))
                    cells += [f"{each['median']:,.0f}" for each in figures_us]
                    lines.append(f"| {name}{way}, {streams} {'streams' if streams != '1' else 'stream'} | " + " | ".join(cells) + " |")
    return lines


def shown_ways(chapter: Chapter | None, ways: dict) -> list[str]:
    """A chapter whose engine has no process of its own shows what its own way costs."""
    return [way for way in ways if chapter is None or way == "thread" or "engine_process" in chapter.capabilities]


def serving_profile(book: Book, chapter: Chapter | None) -> list[str]:
    """A row for each group of code, the largest first: its share of the front's CPU time, and microseconds per token."""
    lines = ["| | share of the front's CPU time | CPU \u00b5s/token |", "|---|---:|---:|"]
    for kind, row in results.read(book.results / "serving.json", SERVING).items():
        for name, figures in served(row, chapter).items():
            for way in shown_ways(chapter, figures["profile"]):
                profile = figures["profile"][way]
                about = f"{name}{way}, {profile['streams']} streams, {profile['samples']:,} samples"
                lines.append(f"| *{results.origin(kind, row)}; {about}{results.age(row, book)}* | | |")
                for group, part in profile["groups"].items():
                    lines.append(f"| {GROUPS[group]} | {part['share']:.0%} | {part['us']:,.0f} |")
    return lines


LOCK = "python -m shared.bench.lock --write"


def lock(book: Book, chapter: Chapter | None) -> list[str]:
    """A row for each way and each thing that happens meanwhile."""
    heads = ("steps per second", "a step: median", "worst", "`/health`: worst")
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for kind, row in results.read(book.results / "lock.json", LOCK).items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* |" + " |" * len(heads))
        for window in ("quiet", "neighbour", "busy", "body"):
            for way in ("thread", "process"):
                found = row[way][window]
                cells = [f"{found['steps'] / row['window_s']:,.0f}", *(f"{found[f'{what}_ms']:,.0f} ms" for what in ("p50", "worst", "health"))]
                lines.append(f"| {window}, {way} | " + " | ".join(cells) + " |")
    return lines


def lock_start(book: Book, chapter: Chapter | None) -> list[str]:
    """Medians with their ranges."""
    lines = ["| | until it serves | memory |", "|---|---:|---:|"]
    for kind, row in results.read(book.results / "lock.json", LOCK).items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* | | |")
        for name, found in row["start"].items():
            seconds, mib = found["seconds"], found["mib"]
            name = name if name.startswith("v") else f"{row['chapter']}, {name}"
            lines.append(
                f"| {name} | {seconds['median']:.1f} s ({seconds['low']:.1f} to {seconds['high']:.1f}) "
                f"| {mib['median']:,.0f} MiB ({mib['low']:,.0f} to {mib['high']:,.0f}) |"
            )
    return lines


def killing(book: Book, chapter: Chapter | None) -> list[str]:
    """A row for each process that was killed."""
    heads = ("times", "clients answered", "told of the end", "neither", "the last client, at worst", "the last process, at worst")
    lines = ["| killed | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for kind, row in results.read(book.results / "killing.json", "python -m shared.verify.killing --count 100 --write").items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* |" + " |" * len(heads))
        for what in ("engine", "server"):
            found = row[what]
            cells = [f"{found[name]:,}" for name in ("count", "answered", "failed", "hung")]
            cells += [f"{found[name]:.2f} s" for name in ("worst_answer_s", "worst_end_s")]
            lines.append(f"| the {what} | " + " | ".join(cells) + " |")
    return lines


LEVERS = {
    "template": "a token's event from a template instead of a dict",
    "raw": "ASGI's `send` instead of sse-starlette",
    "orjson": "orjson instead of json",
    "httptools": "httptools instead of h11",
    "uvloop": "uvloop instead of asyncio's loop",
    "all": "all of these but orjson",
}


def levers(book: Book, chapter: Chapter | None) -> list[str]:
    """A row for each lever: what it changes in CPU time and in tokens per second."""
    lines = ["| | the front's CPU time per token | tokens per second |", "|---|---:|---:|"]
    for kind, row in results.read(book.results / "levers.json", "python -m shared.bench.levers --write").items():
        about = f"{row['chapter']}, {row['streams']} streams, {row['front_us']:,.0f} \u00b5s per token unchanged"
        lines.append(f"| *{results.origin(kind, row)}; {about}{results.age(row, book)}* | | |")
        for lever, words in LEVERS.items():
            cells = [
                f"{figure['median']:+.0%} ({figure['low']:+.0%} to {figure['high']:+.0%})"
                for figure in (row[lever]["front_us"], row[lever]["tokens_per_s"])
            ]
            lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return lines


def served(row: dict, chapter: Chapter | None) -> dict[str, dict]:
    """The figures of the text's own chapter under '', if it was measured; else those of all, each under its name."""
    figures = results.figures(row)
    if chapter and chapter.id in figures:
        return {"": figures[chapter.id]}
    return {f"{name}, ": measured for name, measured in figures.items()}


TABLES = {
    "attention": attention,
    "suite": suite,
    "suite-times": suite_times,
    "large": large,
    "slower": slower,
    "arrivals": arrivals,
    "overhead": overhead,
    "serving": serving,
    "serving_profile": serving_profile,
    "lock": lock,
    "lock_start": lock_start,
    "killing": killing,
    "levers": levers,
    "changes": changes,
    "damage": damage,
}
