"""The tables made from committed measurements and from the chapters' own lines.

    suite, large    every workload: how many times as fast as Hugging Face's `generate`, and the share of the limit
    suite-times     the same in CPU milliseconds
    slower          where a chapter takes longer than the one before it
    arrivals        time to first token when requests arrive at random, and peak memory
    overhead        the engine's own share of a decode step
    attention       the attention kernel on a GPU, beside what it replaces and the memory bandwidth's limit
    serving         what a server costs over the engine alone: tokens per second, CPU time per token
    serving_profile where the CPU time of a server's event loop goes
    lock            an engine beside a busy event loop, as a thread and as a process
    lock_start      how long a server takes to start, and its memory
    killing         what clients received when a server or its engine was killed
    levers          what cheaper ways to write an event would save of the event loop's CPU time
    admission       steps, preemptions and speed by what is reserved for a request
    comebacks       what a preemption costs, by the length of the request
    gaps            what streams wait for while a long prompt is computed, by the most tokens in a step
    pieces          throughput by the most tokens in a step
    memory          what steps need, by the most tokens in a step and the number of long prompts
    step            where the time of a step goes, and what is left between it and the least it could take
    exact           a step with exact on, beside the chapter before and plain products
    differing       the log-probabilities and texts that differ between a request alone and in company
    recording       what it costs to record and count a step
    grammars        what it takes to compile grammars
    masks           what masks cost, by vocabulary
    grammar_steps   a step of requests with and without a grammar
    valid_answers   how many sampled answers are JSON, with grammars and without
    tool_grammars   what it takes to compile the grammar of answers with tools, by their number
    tool_steps      a step of requests with and without tools
    json_suite      what becomes of the official tests of JSON Schema
    forms           the products of a step by number of rows, in each form of the weights
    step_levers     whole steps with one form or one lever changed at a time
    engines         two chapters beside other engines on the CPU
    crowded         chats with one system prompt in a cache that is too small for all, by chapter
    prefix          chats with one system prompt, with and without a prefix cache
    turns           a conversation: positions computed per turn, with and without a prefix cache
    unshared        what a prefix cache costs when requests share nothing
    hits            hit rate by the size of the cache, and by the order in which free blocks are reused
    changes         lines added and removed from chapter to chapter, by file
    damage          random changes to the code, and whether a test notices

Reads: docs/results/{suite, large, decode, overhead, attention, serving, lock, killing, levers, admission, crowded, prefix,
pieces, step, forms, engines, mutants}.json.
"""
from collections import Counter

from shared import results
from shared.bench.serving_child import GROUPS
from shared.bench.step import words_of
from shared.bench.suite import PEERS
from shared.book.diff import lines_changed
from shared.chapters import Book, Chapter

# Smaller differences are not listed.
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
    """Each workload's description, with what each contestant took."""
    return [(f"{words}, {what}", found) for model, words in MODELS.items() for what, found in row.get(model, {}).items()]


def head_of(book: Book, kind: str, row: dict, names: list[str]) -> str:
    """The line above a machine's figures: which machine, and which columns are of older code."""
    old = results.old_chapters(row, book)
    return f"| *{results.origin(kind, row)}* | " + " | ".join("old" if name in old else "" for name in names) + " |"


def compared(book: Book, file: str, cell) -> list[str]:
    """For each machine one row per workload, and one column per contestant that ran any of them."""
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
    """Every workload on which a chapter took longer than the one before it, and whether the runs' spread explains it."""
    lines = ["| | workload | takes | spread of the runs | |", "|---|---|---:|---:|---|"]
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
    """For every file and machine: its row, each workload's description, and what each contestant took."""
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
        "| | time to first token, median | p95 | all finished after | peak MiB |",
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
    """The chapter's own rows in its text; in other texts those of all measured chapters."""
    parts = ("schedule", "build", "choose", "report")
    heads = ("schedule", "build the batch", "sample", "commit, detokenize")
    lines = ["| | step | model and head | " + " | ".join(heads) + " | all but the model |", "|---|" + "---:|" * (len(parts) + 3)]
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
    """One row for all files, then one for each file in FILES; one column for each chapter after the first."""
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
    """One row for each chapter whose code was changed at random, and what its tests did."""
    recorded = results.read(book.results / "mutants.json", "python -m shared.book.traps.mutants v01 --record")[""]
    ends = ("killed", "hangs", "crashes", "survived")
    lines = ["| | where | tried | a test fails | hangs | crashes | no test notices |", "|---|---|" + "---:|" * (len(ends) + 1)]
    for name, found in recorded.items():
        counts = Counter(each["result"] for each in found["tried"])
        only_new = "--new" in found["command"].split() and book.find(name).previous
        where = "its changes" if only_new else "all of it"
        lines.append(f"| {name} | {where} | {len(found['tried'])} | " + " | ".join(str(counts[end]) for end in ends) + " |")
    return lines


# A launch from Python takes up to this long: a shorter time that was not measured in a recorded graph is not the kernel's.
LAUNCH_US = 100


def attention(book: Book, chapter: Chapter | None) -> list[str]:
    """Microseconds of one layer's attention, where the figure is the kernel's and not the launch's."""
    rows = results.read(book.results / "attention.json", "make bench-attention ARGS=--write")
    lines = ["| | sequences x context | limit | the kernel | gather, then torch | torch, contiguous | share of the limit |"]
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
    """One row for each way and number of streams: medians, and the share with its range."""
    rates = ("tokens/s, engine alone", "through the server", "share")
    times = ("CPU \u00b5s/token: engine alone", "engine", "event loop", "client", "wall \u00b5s/token")
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
    """The ways to show: a chapter without an engine process shows only the thread."""
    return [way for way in ways if chapter is None or way == "thread" or "engine_process" in chapter.capabilities]


def serving_profile(book: Book, chapter: Chapter | None) -> list[str]:
    """One row for each group of code, largest first: its share of the event loop's CPU time, and microseconds per token."""
    lines = ["| | share of the event loop's CPU time | CPU \u00b5s/token |", "|---|---:|---:|"]
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
    """One row for each way and each load beside it."""
    heads = ("steps per second", "step, median", "step, worst", "`/health`, worst")
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for kind, row in results.read(book.results / "lock.json", LOCK).items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* |" + " |" * len(heads))
        for window in ("quiet", "neighbor", "busy", "body"):
            for way in ("thread", "process"):
                found = row[way][window]
                cells = [f"{found['steps'] / row['window_s']:,.0f}", *(f"{found[f'{what}_ms']:,.0f} ms" for what in ("p50", "worst", "health"))]
                lines.append(f"| {window}, {way} | " + " | ".join(cells) + " |")
    return lines


def lock_start(book: Book, chapter: Chapter | None) -> list[str]:
    """Medians with their ranges."""
    lines = ["| | time to start | memory |", "|---|---:|---:|"]
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
    """One row for each process that was killed."""
    heads = ("times", "clients answered", "clients that got an error", "neither", "slowest client", "slowest process to end")
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
    "uvloop": "uvloop instead of asyncio's event loop",
    "all": "all of these but orjson",
}


def levers(book: Book, chapter: Chapter | None) -> list[str]:
    """One row for each lever: its change in CPU time and in tokens per second."""
    lines = ["| | the event loop's CPU time per token | tokens per second |", "|---|---:|---:|"]
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


ADMISSION = "python -m shared.bench.admission --write"
# The names of ways that are rules of other engines, as a table shows them.
RULES = {"reserve 0, as vLLM": "0, and no admission in a step that preempted", "reserve 0, watermark": "0, with a watermark of 1%"}


def admission(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per reservation: counts, and the median speed of interleaved runs."""
    heads = ("steps", "sequences per step", "preemptions", "positions computed", "of them needed", "tokens per CPU second")
    lines = ["| tokens reserved | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for kind, row in results.read(book.results / "admission.json", ADMISSION).items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* |" + " |" * len(heads))
        for name, counts in row["ways"].items():
            cells = [f"{counts['steps']:,}", f"{counts['mean_batch']:.1f}", f"{counts['preemptions']:,}", f"{counts['positions']:,}"]
            cells += [f"{counts['useful_share']:.0%}", f"{counts['tokens_per_cpu_s']:,.0f}"]
            lines.append(f"| {reservation_of(name)} | {' | '.join(cells)} |")
    return lines


def reservation_of(name: str) -> str:
    """The label of a way.

    >>> reservation_of("reserve 16"), reservation_of("reserve 1000000"), reservation_of("v10")
    ('16', 'up to `max_tokens`', 'v10')
    """
    if name in RULES:
        return RULES[name]
    number = name.removeprefix("reserve ")
    return "up to `max_tokens`" if number == "1000000" else number


def comebacks(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per length of a request: milliseconds to compute it again, and to swap it out and in."""
    lines = ["| tokens in the cache | computed again | swapped out and in |", "|---:|---:|---:|"]
    for kind, row in results.read(book.results / "admission.json", ADMISSION).items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* | | |")
        for length, took in row["comebacks"].items():
            lines.append(f"| {int(length):,} | {took['computed']:,.1f} ms | {took['swapped']:,.1f} ms |")
    return lines


def crowded(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per chapter, in a chapter's text up to that chapter: counts, and medians of interleaved runs."""
    heads = ("steps", "tokens per step", "preemptions", "positions computed", "time to first token, median", "tokens per second")
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    shown = [each.id for each in (book.chapters[: chapter.number + 1] if chapter else book.chapters)]
    for kind, row in results.read(book.results / "crowded.json", "python -m shared.bench crowded --write").items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* |" + " |" * len(heads))
        for name, found in results.figures(row).items():
            if name in shown:
                cells = [f"{found['passes']:,}", f"{found['tokens_per_pass']:.1f}", f"{found['preemptions']:,}", f"{found['positions']:,}"]
                cells += [f"{found['ttft_ms']:,.0f} ms", f"{found['tokens_per_s']:,.0f}"]
                lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


PREFIX = "python -m shared.bench.prefix --write"


def way_of(name: str, row: dict) -> str:
    """The label of a way to run a chapter's prefix cache: the chapter before has none."""
    before, after = sorted(row["code"])
    return before if name == before else f"{after}, prefix cache {name}"


def prefix(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per arrival and way: positions beside those by arithmetic, and medians of interleaved runs."""
    heads = ("positions computed", "by arithmetic", "steps", "time to first token, median", "CPU time")
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for kind, row in results.read(book.results / "prefix.json", PREFIX).items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* |" + " |" * len(heads))
        for arrival in ("one after another", "all at once"):
            for name, found in row["chats"][arrival].items():
                cells = [f"{found[key]:,}" for key in ("positions", "arithmetic", "passes")]
                cells += [f"{found['ttft_ms']:,.1f} ms", f"{found['cpu_ms'] / 1e3:,.2f} s"]
                lines.append(f"| {arrival}: {way_of(name, row)} | {' | '.join(cells)} |")
    return lines


def turns(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per turn. The same on every machine, so only the newest measurement is shown."""
    row = results.cited(results.read(book.results / "prefix.json", PREFIX))
    heads = ("prompt tokens", "of them cached", "output tokens", "positions computed", "without a prefix cache")
    lines = ["| turn | " + " | ".join(heads) + " |", "|---:|" + "---:|" * len(heads)]
    for number, found in enumerate(row["turns"], 1):
        cells = [f"{found[key]:,}" for key in ("prompt", "cached", "output", "positions", "positions_without")]
        lines.append(f"| {number} | {' | '.join(cells)} |")
    return lines


def unshared(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per comparison: the ratio of CPU times of neighboring runs, with its quartiles; then the time to hash a token."""
    lines = ["| requests that share nothing | |", "|---|---:|"]
    for kind, row in results.read(book.results / "prefix.json", PREFIX).items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* | |")
        before, after = sorted(row["code"])
        found = row["unshared"]
        names = {"on_to_off": f"{after}, prefix cache on, over off", "off_to_before": f"{after}, prefix cache off, over {before}"}
        for key, words in names.items():
            low, median, high = (f"{found[key][part]:.3f}" for part in ("low", "median", "high"))
            lines.append(f"| CPU time of {words} | {median} ({low} to {high}) |")
        lines.append(f"| hashing, per token | {found['hash_ns_per_token']:,.0f} ns |")
    return lines


# The orders in which free blocks are reused, as a table names them.
ORDERS = {
    "own": "prompt tokens cached",
    "head first": "if heads are reused before tails",
    "at random": "if any block is",
    "newest first": "if the one freed last is",
    "only running": "if only running requests' blocks are found",
}


def hits(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per size of the cache. The same on every machine, so only the newest measurement is shown."""
    row = results.cited(results.read(book.results / "prefix.json", PREFIX))
    heads = (*ORDERS.values(), "positions computed", "without a prefix cache", "steps", "without")
    lines = ["| blocks | " + " | ".join(heads) + " |", "|---:|" + "---:|" * len(heads)]
    for size, found in row["hits"]["sizes"].items():
        cells = [f"{found[order]['hit_share']:.0%}" for order in ORDERS]
        cells += [f"{found[way][key]:,}" for key in ("positions", "passes") for way in ("own", "off")]
        lines.append(f"| {int(size):,} | {' | '.join(cells)} |")
    return lines


PIECES = "python -m shared.bench.pieces --write"


def budget_of(name: str) -> str:
    """The label of a budget; `whole` is the chapter before, which has none."""
    return f"{int(name):,}" if name.isdigit() else "whole prompts"


def gaps(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per budget: what the streams and the long prompt wait for, medians of interleaved runs."""
    heads = ("steps for the long prompt", "longest gap of a stream", "median gap", "first token of the long prompt after")
    lines = ["| most tokens in a step | " + " | ".join(heads) + " |", "|---:|" + "---:|" * len(heads)]
    for kind, row in results.read(book.results / "pieces.json", PIECES).items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* |" + " |" * len(heads))
        for name, found in row["gaps"].items():
            cells = [f"{found['steps']:,}", *(f"{found[key]:,.0f} ms" for key in ("longest_ms", "median_ms", "first_token_ms"))]
            lines.append(f"| {budget_of(name)} | {' | '.join(cells)} |")
    return lines


def pieces(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per budget: steps, and the median speed of interleaved runs with its spread."""
    lines = ["| most tokens in a step | steps | tokens per second | spread |", "|---:|---:|---:|---:|"]
    for kind, row in results.read(book.results / "pieces.json", PIECES).items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* | | | |")
        for name, found in row["throughput"].items():
            lines.append(f"| {budget_of(name)} | {found['steps']:,} | {found['tokens_per_s']:,.0f} | {found['spread']:.0%} |")
    return lines


def memory(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per budget: the memory that steps need, by the number of long prompts that arrive at once."""
    rows = results.read(book.results / "pieces.json", PIECES)
    counts = list(results.cited(rows)["memory"]["whole"])
    heads = [f"{count} prompt{'s' if count != '1' else ''}" for count in counts]
    lines = ["| most tokens in a step | " + " | ".join(heads) + " |", "|---:|" + "---:|" * len(heads)]
    for kind, row in rows.items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* |" + " |" * len(heads))
        for name, found in row["memory"].items():
            lines.append(f"| {budget_of(name)} | {' | '.join(f'{found[count]:,.0f} MiB' for count in counts)} |")
    return lines


STEP = "python -m shared.bench.step --write"
# The parts of a step, as a table names them.
STEP_PARTS = {
    "products": "products",
    "attention": "attention",
    "between": "norms, rotation, gate",
    "embedding": "embedding, head",
    "own": "the engine's own",
}


def step(book: Book, chapter: Chapter | None) -> list[str]:
    """For each model and step one row per chapter: milliseconds of the parts, the step, the bound, and what is between them."""
    heads = (*STEP_PARTS.values(), "step, median", "best", "bound", "left above the bound")
    lines = ["| ms | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for kind, row in results.read(book.results / "step.json", STEP).items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* |" + " |" * len(heads))
        for what, found in ((f"{words}, {words_of(work)}", found) for model, words in MODELS.items() for work, found in row.get(model, {}).items()):
            for name, took in found.items():
                keys = (*(f"{part}_ms" for part in STEP_PARTS), "step_ms", "best_ms", "bound_ms", "left_ms")
                lines.append(f"| {what}: {name}, {took['linear']} | " + " | ".join(milliseconds(took[key]) for key in keys) + " |")
    return lines


def milliseconds(ms: float) -> str:
    """A time with about three digits.

    >>> milliseconds(0.456), milliseconds(45.6), milliseconds(1456.7)
    ('0.46', '45.6', '1,457')
    """
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


FORMS = "python -m shared.bench.forms --write"
# The forms of weights as a table names them.
FORM_NAMES = {
    "plain": "plain",
    "joined": "joined",
    "blocks_apart": "blocks, not joined",
    "blocks": "blocks",
    "halves_apart": "halves, not joined",
    "halves": "halves",
    "transposed": "joined, transposed copy",
    "packed": "joined, MKL's packed order",
}
LEVER_NAMES = {
    "apart": "not joined",
    "padded": "rectangles padded to the longest",
    "gathered": "queries always gathered",
}


def forms(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per form: milliseconds of all products of a forward pass, by the number of rows."""
    rows = results.read(book.results / "forms.json", FORMS)
    counts = list(results.cited(rows)["rows"]["plain"])
    lines = ["| ms, by rows | " + " | ".join(counts) + " |", "|---|" + "---:|" * len(counts)]
    for kind, row in rows.items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* |" + " |" * len(counts))
        for form, name in FORM_NAMES.items():
            if form in row["rows"]:
                lines.append(f"| {name} | " + " | ".join(milliseconds(row["rows"][form][count]["ms"]) for count in counts) + " |")
    return lines


def step_levers(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per contestant: the ratio of its time to the chapter before's, and its median time, by workload."""
    rows = results.read(book.results / "forms.json", FORMS)
    cited = results.cited(rows)["steps"]["works"]
    heads = ["32 ragged requests" if work == "ragged" else words_of(work) for work in cited]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for kind, row in rows.items():
        before, after = sorted(row["code"])
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* |" + " |" * len(cited))
        found = row["steps"]["works"]
        for name in next(iter(found.values())):
            cells = [f"{took['ratio']['median']:.2f} ({milliseconds(took['ms'])} ms)" for took in (found[what][name] for what in cited)]
            lines.append(f"| {lever_of(name, before, after)} | {' | '.join(cells)} |")
    return lines


def lever_of(name: str, before: str, after: str) -> str:
    """The label of a contestant.

    >>> lever_of("v13", "v13", "v14"), lever_of("halves", "v13", "v14"), lever_of("halves_padded", "v13", "v14")
    ('v13', 'v14, halves', 'v14, halves, rectangles padded to the longest')
    """
    form, _, lever = name.partition("_")
    if name == before:
        return name
    return f"{after}, {form}, {LEVER_NAMES[lever]}" if lever else f"{after}, {form}"


RECORDING = "python -m shared.bench.recording --write"


def recording(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per number of streams: a step without and with records, and what recording, counting and scraping take."""
    rows = results.read(book.results / "recording.json", RECORDING)
    before, after = sorted(results.cited(rows)["code"])
    lines = [f"| | a step of {before}, ms | of {after}, ms | recording, µs | counting, µs | a scrape, µs |", "|---|" + "---:|" * 5]
    for kind, row in rows.items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* | | | | | |")
        for count, found in row["streams"].items():
            cells = [milliseconds(found["before_ms"]), milliseconds(found["after_ms"]), *(f"{found[name]:,.0f}" for name in ("record_us", "count_us", "scrape_us"))]
            lines.append(f"| {words_of(count)} | {' | '.join(cells)} |")
    return lines


GRAMMARS = "python -m shared.bench.grammars --write"


def grammars(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per grammar: the states of its automaton, and milliseconds to compile it in three ways."""
    rows = results.read(book.results / "grammars.json", GRAMMARS)
    lines = ["| | states | here, ms | in a process of its own, ms | by llguidance, ms |", "|---|" + "---:|" * 4]
    for kind, row in rows.items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* | | | | |")
        for name, took in row["compile_ms"].items():
            lines.append(f"| {name} | {took['states']:,} | " + " | ".join(milliseconds(took[way]) for way in ("here", "apart", "llguidance")) + " |")
    return lines


def masks(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per vocabulary: microseconds of a mask by a new state, by one seen before and by the library, and to apply one."""
    rows = results.read(book.results / "grammars.json", GRAMMARS)
    lines = ["| a mask, µs | a new state | the worst of these | a state seen before | by llguidance | the worst of these | to apply it |", "|---|" + "---:|" * 6]
    for kind, row in rows.items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* | | | | | | |")
        for name, took in row["mask_us"].items():
            new, library = took["new"], took["llguidance"]
            cells = [f"{new['median']:,.0f}", f"{new['worst']:,.0f}", f"{took['seen']['median']:,.1f}", f"{library['median']:,.0f}", f"{library['worst']:,.0f}"]
            label = "pocket, 2,048 tokens" if name == "pocket" else name
            lines.append(f"| {label} | {' | '.join(cells)} | {row['apply_us'][name]:,.0f} |")
    return lines


def grammar_steps(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per kind of machine: milliseconds of a step of 16 requests without a grammar, and with one."""
    rows = results.read(book.results / "grammars.json", GRAMMARS)
    lines = ["| a step of 16 requests, ms | without a grammar | all with one |", "|---|" + "---:|" * 2]
    for kind, row in rows.items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* | " + " | ".join(milliseconds(row["step_ms"][name]) for name in ("free", "masked")) + " |")
    return lines


def valid_answers(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per grammar: of so many sampled answers, how many ended, were JSON objects, and follow the schema."""
    rows = results.read(book.results / "grammars.json", GRAMMARS)
    lines = ["| | answers | ended by themselves | JSON objects | follow the schema |", "|---|" + "---:|" * 4]
    names = {"free": "without a grammar", "json_object": "`json_object`", "json_schema": "`json_schema`"}
    for name, numbers in results.cited(rows)["valid"].items():
        lines.append(f"| {names[name]} | " + " | ".join(str(numbers[each]) for each in ("answers", "finished", "json", "valid")) + " |")
    return lines


TOOLS = "python -m shared.bench.tools --write"


def tool_grammars(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per number of tools: the states of the automaton, and milliseconds to compile the grammar in three ways."""
    rows = results.read(book.results / "tools.json", TOOLS)
    lines = ["| tools | states | here, ms | in a process of its own, ms | by llguidance, ms |", "|---:|" + "---:|" * 4]
    for kind, row in rows.items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* | | | | |")
        for took in row["compile_ms"].values():
            ways = ("too many states" if took[way] is None else milliseconds(took[way]) for way in ("here", "apart", "llguidance"))
            lines.append(f"| {took['tools']} | {'' if took['states'] is None else format(took['states'], ',')} | " + " | ".join(ways) + " |")
    return lines


def tool_steps(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per kind of machine: milliseconds of a step of 16 requests without tools and with them, and to take a text apart."""
    rows = results.read(book.results / "tools.json", TOOLS)
    lines = ["| | a step of 16 requests, ms | all with eight tools, ms | to take apart a token's text, µs | in arguments, µs |", "|---|" + "---:|" * 4]
    for kind, row in rows.items():
        cells = [milliseconds(row["step_ms"][name]) for name in ("free", "tools")] + [f"{row['split_us'][name]:.1f}" for name in ("said", "arguments")]
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* | " + " | ".join(cells) + " |")
    return lines


def json_suite(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per variant of the suite and backend: how many tests are right, and what became of the others."""
    [found] = results.read(book.results / "json_suite.json", "python -m shared.verify.json_suite --write").values()
    lines = ["| | tests | right | valid, but not generated | refused by name | **invalid, but generated** |", "|---|" + "---:|" * 5]
    names = {"as_it_is": "the suite as it is", "typed": "with a type in each schema", "formats": "formats of strings"}
    backends = {"own": "our automaton", "llguidance": "llguidance, checked", "auto": "both"}
    for variant, label in names.items():
        row = found[variant]
        for backend, name in backends.items():
            cells = [f"{row['tests']:,}", *(f"{row[backend][each]:,}" for each in ("right", "rejected", "refused", "accepted"))]
            lines.append(f"| {label}: {name} | {' | '.join(cells)} |")
    return lines


EXACT = "python -m shared.bench.exact --write"
# The contestants and settings, as a table names them.
EXACT_NAMES = {"before": "{before}, fastest form", "plain": "PyTorch's own products", "exact": "exact"}
SETTING_NAMES = {"plain": "plain", "fastest": "the fastest form", "exact": "exact"}


def exact(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per contestant and model: milliseconds of a step, and the ratios of exact to the others."""
    rows = results.read(book.results / "exact.json", EXACT)
    cited = results.cited(rows)["price"]
    works = list(next(iter(cited.values())))
    heads = [f"prompt of {work.partition('-')[2]}" if work.startswith("prompt") else words_of(work) for work in works]
    lines = ["| ms per step | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for kind, row in rows.items():
        before = min(row["code"])
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* |" + " |" * len(works))
        for model_name, found in row["price"].items():
            for name, words in EXACT_NAMES.items():
                cells = [milliseconds(found[work][name]["cpu_ms"]) for work in works]
                lines.append(f"| {model_name}: {words.format(before=before)} | {' | '.join(cells)} |")
            for name in ("before", "plain"):
                cells = [f"{found[work][f'exact_to_{name}']:.2f}" for work in works]
                lines.append(f"| {model_name}: exact / {before if name == 'before' else name} | {' | '.join(cells)} |")
    return lines


def differing(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per checkpoint and setting: how much differs between requests alone and in company."""
    rows = results.read(book.results / "exact.json", EXACT)
    lines = ["| | weights | log-probabilities that differ | at most by | texts that differ |", "|---|---|---:|---:|---:|"]
    for kind, row in rows.items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* | | | | |")
        for label, settings in row["differences"].items():
            for name, found in settings.items():
                share = f"{found['logprobs_differ']:,} of {found['logprobs']:,}"
                lines.append(f"| {label}: {SETTING_NAMES[name]} | {found['linear']} | {share} | {found['largest']:.2g} | {found['texts_differ']} of {found['texts']} |")
    return lines


ENGINES = "make bench-peers ARGS=--write"
# The workloads and the other engines, as a table names them.
ENGINE_WORKS = {"single": "single stream", "first": "first token of 512", "ragged": "32 ragged requests"}
ENGINE_NAMES = {
    "hf": "Hugging Face `generate`",
    "vllm": "vLLM, float32",
    "vllm_as_it_comes": "vLLM, as it comes",
    "openvino": "OpenVINO GenAI, float32",
    "openvino_as_it_comes": "OpenVINO GenAI, as it comes",
}


def engines(book: Book, chapter: Chapter | None) -> list[str]:
    """One row per engine: CPU seconds of each workload, and how many requests got other tokens than from the first engine."""
    rows = results.read(book.results / "engines.json", ENGINES)
    heads = [*(f"{words}, CPU s" for words in ENGINE_WORKS.values()), "other answers"]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for kind, row in rows.items():
        lines.append(f"| *{results.origin(kind, row)}{results.age(row, book)}* |" + " |" * len(heads))
        for name, words in row["about"].items():
            taken = [row["works"][work][name] for work in ENGINE_WORKS]
            cells = [f"{took['cpu_ms'] / 1e3:.2f}" for took in taken] + [str(sum(took["other_answers"] for took in taken))]
            lines.append(f"| {ENGINE_NAMES.get(name, name)} ({words}) | {' | '.join(cells)} |")
    return lines


def served(row: dict, chapter: Chapter | None) -> dict[str, dict]:
    """The text's own chapter's figures under the key '' if it was measured; else all figures, by name."""
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
    "admission": admission,
    "comebacks": comebacks,
    "gaps": gaps,
    "pieces": pieces,
    "memory": memory,
    "step": step,
    "recording": recording,
    "grammars": grammars,
    "masks": masks,
    "grammar_steps": grammar_steps,
    "valid_answers": valid_answers,
    "tool_grammars": tool_grammars,
    "tool_steps": tool_steps,
    "json_suite": json_suite,
    "exact": exact,
    "differing": differing,
    "forms": forms,
    "step_levers": step_levers,
    "engines": engines,
    "crowded": crowded,
    "prefix": prefix,
    "turns": turns,
    "unshared": unshared,
    "hits": hits,
    "changes": changes,
    "damage": damage,
}
