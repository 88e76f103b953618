"""What tools cost: to compile the grammar of all answers, in each step, and to take an answer apart.

    python -m shared.bench.tools            # a minute on an idle machine
    python -m shared.bench.tools --write

Compiling: for a few numbers of tools, in this process, in one of its own as a server does, and by llguidance. Steps: of
requests that are free, and of requests that may call something and are still in their thought. Splitting: a long answer, a
token's text at a time.

Reads: the chapter. Writes: docs/results/tools.json.
"""
import argparse
import importlib
import json
import statistics

from shared.bench.grammars import STREAMS, by, grammars_of, timed_us
from shared.bench.step import begin, end, make_engine
from shared.bench.timing import interleave, progress, summary, timed
from shared.chapters import Chapter, first_with
from shared.programs import run
from shared.results import write_row

COUNTS = (1, 8, 32, 128)
# Of each tool: what a function of a program typically takes.
SCHEMA = {
    "type": "object",
    "properties": {
        "query": {"type": "string"},
        "limit": {"type": "integer", "minimum": 1, "maximum": 100},
        "order": {"enum": ["newest", "oldest", "best"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["query", "limit"],
    "additionalProperties": False,
}
SAID = "It depends on what you mean. " * 200


def parts_of(package: str, count: int, **others):
    """The parts of an answer that may call one of so many tools, in the form of Hermes."""
    parts = importlib.import_module(f"{package}.parts")
    form = importlib.import_module(f"{package}.tools").FORMS["hermes"]
    tools = tuple(parts.Tool(f"search_{number}", json.dumps(SCHEMA), False, "tools") for number in range(count))
    return parts.Parts(form=form, tools=tools, thought=("<think>", "</think>"), **others)


def compile_ms(package: str, engine) -> dict:
    """Milliseconds to compile the grammar for each number of tools: here, in a process of its own, and by the library."""
    compiler = importlib.import_module(f"{package}.compiler")
    library = grammars_of(package, None, engine, "llguidance").guidance
    ways = {"here": compiler.compile_here, "apart": compiler.compile_apart, "llguidance": by(library)}
    measured = {}
    for count in COUNTS:
        constraint = "parts", parts_of(package, count)
        found: dict[str, object] = {"tools": count}
        for way, compile_it in ways.items():
            try:
                times = [timed_us(lambda: compile_it(*constraint))[1] for _ in range(3)]
                found[way] = round(statistics.median(times) / 1e3, 1)
            except compiler.RequestError:  # it has too many states
                found[way] = None
        found["states"] = len(compiler.compile_here(*constraint).table) if found["here"] else None
        measured[str(count)] = found
    return measured


def step_ms(chapter: Chapter, repeats: int) -> dict:
    """Milliseconds of CPU time of a step of 16 streams on pocket: free, and with eight tools, within a thought that goes on."""
    import torch

    torch.set_num_threads(1)
    max_new = 2 * repeats + 40
    free, tools = (make_engine(chapter, "pocket", max_new, linear="auto") for _ in range(2))
    begin(chapter, free, STREAMS, max_new)
    begin(chapter, tools, STREAMS, max_new, ignore_eos=False, parts=parts_of(chapter.load().__name__, 8, is_open=True))
    for _ in range(10):
        tools.step()
    timings = interleave({"free": lambda: timed(free.step), "tools": lambda: timed(tools.step)}, repeats)
    assert len(tools.seqs) == STREAMS, "a text has ended"
    end(free)
    end(tools)
    return {name: summary(each)["cpu_ms"] for name, each in timings.items()}


def split_us(package: str) -> dict:
    """Microseconds to take a text apart, for each piece of four characters: what is said, and the arguments of a call."""
    splitter = importlib.import_module(f"{package}.parts").Splitter
    texts = {
        "said": SAID,
        "arguments": '<tool_call>\n{"name": "search_0", "arguments": {"query": "' + SAID + '", "limit": 5}}\n</tool_call>',
    }
    measured = {}
    for name, text in texts.items():
        pieces = [text[start : start + 4] for start in range(0, len(text), 4)]

        def split() -> None:
            reader = splitter(parts_of(package, 1), lambda: "call")
            for number, piece in enumerate(pieces):
                reader.push(piece, last=number + 1 == len(pieces))

        measured[name] = round(statistics.median(timed_us(split)[1] for _ in range(15)) / len(pieces), 2)
    return measured


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench.tools", description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/results/tools.json")
    args = parser.parse_args(argv)
    chapter = first_with("tools")
    package = chapter.load().__name__
    engine = make_engine(chapter, "pocket", 64, linear="plain")
    parts = {
        "compile_ms": lambda: compile_ms(package, engine),
        "step_ms": lambda: step_ms(chapter, repeats=41),
        "split_us": lambda: split_us(package),
    }
    results = {}
    for name in progress(list(parts), "tools"):
        results[name] = parts[name]()
        print(f"{name}: {json.dumps(results[name], indent=1)}")
    if args.write:
        path = write_row("tools", results, "python -m shared.bench.tools --write", [chapter])
        print(f"wrote {path.name}; now `make sync`")
    return 0


if __name__ == "__main__":
    run(main)
