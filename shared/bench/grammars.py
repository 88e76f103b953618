"""What grammars cost: to compile, and in each step of each request that has one; and how many answers are valid without.

    python -m shared.bench.grammars            # two minutes on an idle machine
    python -m shared.bench.grammars --write

Compiling: in this process, in one of its own as a server does, and by llguidance. Masks: by the chapter's own automaton for a
state that is new and for one that it has seen, and by llguidance, for pocket's vocabulary and for a synthetic one of
128,000 tokens; each along the same texts. Applying masks to logits, and whole steps of requests with and without a
grammar. Valid answers: of prompts that ask for a record, how many are valid JSON, and how many follow the schema.

Reads: the chapter. Writes: docs/results/grammars.json.
"""
import argparse
import importlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from shared.bench.step import begin, end, make_engine
from shared.bench.timing import interleave, progress, summary, timed
from shared.chapters import Chapter, first_with
from shared.checkpoints import checkpoint
from shared.programs import run
from shared.results import write_row

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS = {
    "regex": ("regex", r"[A-Z][a-z]{2,12}, \d{1,3} years old"),
    "choice": ("choice", tuple(f"answer {number}" for number in range(100))),
    "schema": ("json_schema", json.dumps(SCHEMA)),
}
LARGE = 128_000  # tokens of the synthetic vocabulary, besides the 256 of single bytes
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
MARKS = ('"', "{", "}", "[", "]", ":", ",", "\n", "0", "1")
NUM_TEXTS, MOST_TOKENS = 20, 60
STREAMS = 16
PROMPTS = ("A record: ", 'This is JSON: {"name": ', "The answer as JSON: ", "Once upon a time there was ")


def synthetic(rng: random.Random, count: int) -> list[bytes]:
    """All single bytes and count words, half of them with a space before, some with a mark of JSON."""
    weights = [1 / (rank + 1) for rank in range(len(LETTERS))]
    tokens = {bytes([byte]): None for byte in range(256)}
    while len(tokens) < count + 256:
        word = "".join(rng.choices(LETTERS, weights, k=min(20, max(2, int(rng.gammavariate(4, 1.6))))))
        word = word.title() if rng.random() < 0.1 else word
        mark = rng.choice(MARKS) if rng.random() < 0.03 else " " if rng.random() < 0.5 else ""
        tokens[(mark + word).encode()] = None
    return list(tokens)


class Words:
    """The synthetic vocabulary, as llguidance reads a tokenizer: the last id ends a text."""

    def __init__(self, tokens: list[bytes]):
        self.tokens = [*tokens, b"<end>"]
        self.eos_token_id = len(tokens)
        self.bos_token_id = None
        self.special_token_ids = [len(tokens)]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)  # the first ids are single bytes


def grammars_of(package: str, words: Words | None, engine, backend: str):
    """A chapter's Grammars for pocket or for the synthetic vocabulary."""
    grammars = importlib.import_module(f"{package}.grammars")
    if words is None:
        return grammars.Grammars(engine.tokenizer, engine.config.vocab_size, engine.config.end_ids, backend, lambda _: None)
    from llguidance import LLTokenizer, TokenizerWrapper

    made = grammars.Grammars(engine.tokenizer, len(words.tokens), (words.eos_token_id,), "own", lambda _: None)
    # What it would read from a tokenizer.
    made.backend = backend
    made.vocabulary = made.first_vocabulary = grammars.Vocabulary(words.tokens, {words.eos_token_id}, len(words.tokens))
    library = grammars.Guidance.__new__(grammars.Guidance)
    library.vocab_size = library.num_ids = len(words.tokens)
    library.first_mask, library.last_byte = None, 0xFF >> -len(words.tokens) % 8
    library.tokenizer = LLTokenizer(TokenizerWrapper(words))
    made.guidance = library
    return made


def timed_us(call: Callable) -> tuple[object, float]:
    start = time.perf_counter()
    result = call()
    return result, 1e6 * (time.perf_counter() - start)


def by(library):
    """Compile a grammar by the library, once it is known that this comes to an end."""
    most_properties = sys.modules[type(library).__module__].most_properties
    return lambda kind, source: library.compile(library.text(kind, source), kind, most_properties(kind, source))


def compile_ms(package: str, engine) -> dict:
    """Milliseconds to compile each grammar: here, in a process of its own, and by the library."""
    compiler = importlib.import_module(f"{package}.compiler")
    library = grammars_of(package, None, engine, "llguidance").guidance
    ways = {"here": compiler.compile_here, "apart": compiler.compile_apart, "llguidance": by(library)}
    measured = {}
    for name, constraint in GRAMMARS.items():
        times = {way: statistics.median(timed_us(lambda: compile_it(*constraint))[1] for _ in range(3)) for way, compile_it in ways.items()}
        states = len(compiler.compile_here(*constraint).table)
        measured[name] = {"states": states} | {way: round(us / 1e3, 2) for way, us in times.items()}
    return measured


def mask_us(package: str, engine, words: Words | None) -> dict:
    """Microseconds of a mask, along random texts that the schema allows: by a new state, by a state seen before, by the library."""
    own, library = (grammars_of(package, words, engine, backend) for backend in ("own", "llguidance"))
    own_grammar, library_grammar = own.get(GRAMMARS["schema"]), library.get(GRAMMARS["schema"])._replace(guard=None)
    vocab_size, rng = own.vocab_size, random.Random(1)
    ends = set(own.end_ids)
    spent = {"new": [], "seen": [], "llguidance": []}
    library_grammar.start(True).mask()  # the library prepares something at its first mask
    for _ in range(NUM_TEXTS):
        one, other = own_grammar.start(True), library_grammar.start(True)
        for _ in range(MOST_TOKENS):
            before = len(own.masks.kept)
            mask, us = timed_us(one.mask)
            spent["new" if len(own.masks.kept) > before else "seen"].append(us)
            other_mask, us = timed_us(other.mask)
            spent["llguidance"].append(us)
            # The library may allow fewer tokens, where only one text can follow.
            allowed = np.flatnonzero(np.unpackbits(mask & other_mask, bitorder="little")[:vocab_size])
            token_id = int(rng.choice(allowed))
            if token_id in ends or not one.advance(token_id):
                break
            other.advance(token_id)
    return {name: {"median": round(statistics.median(each), 1), "worst": round(max(each), 1), "count": len(each)} for name, each in spent.items()}


def apply_us(package: str, vocab_size: int) -> float:
    """Microseconds to apply a mask that is at hand to the logits of one row."""
    import torch

    torch.set_num_threads(1)
    logits = importlib.import_module(f"{package}.logits")
    bits = np.random.default_rng(0).integers(0, 256, -(-vocab_size // 8), dtype=np.uint8)
    row = SimpleNamespace(matcher=SimpleNamespace(mask=lambda: bits))
    scores = torch.randn(1, vocab_size)
    return round(statistics.median(timed_us(lambda: logits.mask(scores, {0: row}))[1] for _ in range(50)), 1)


def step_ms(chapter: Chapter, repeats: int) -> dict:
    """Milliseconds of CPU time of a step of 16 streams on pocket, without a grammar and with one whose masks were seen before."""
    import torch

    torch.set_num_threads(1)
    max_new = 2 * repeats + 40
    free, masked = (make_engine(chapter, "pocket", max_new, linear="auto") for _ in range(2))
    begin(chapter, free, STREAMS, max_new)
    # No text ends: none of these models writes the last character.
    begin(chapter, masked, STREAMS, max_new, ignore_eos=False, regex="[a-z ,.]*\x01")
    for _ in range(10):
        masked.step()
    timings = interleave({"free": lambda: timed(free.step), "masked": lambda: timed(masked.step)}, repeats)
    assert len(masked.seqs) == STREAMS, "a text has ended"
    end(free)
    end(masked)
    return {name: summary(each)["cpu_ms"] for name, each in timings.items()}


def valid_shares(chapter: Chapter, count: int) -> dict:
    """Of count answers to each prompt, sampled: how many are JSON, and how many follow the schema; without a grammar and with it."""
    import jsonschema

    sampling, engine = chapter.load().SamplingParams, make_engine(chapter, "pocket", 64, linear="auto")
    shares = {}
    for name, grammar in {"free": {}, "json_object": {"json_object": True}, "json_schema": {"json_schema": SCHEMA}}.items():
        prompts = [prompt for prompt in PROMPTS for _ in range(count)]
        params = [sampling(max_tokens=64, temperature=1.0, seed=seed, new_text=True, **grammar) for seed in range(len(prompts))]
        numbers = {"answers": len(prompts), "finished": 0, "json": 0, "valid": 0}
        for output in engine.generate(prompts, params):
            numbers["finished"] += output.finish_reason == "stop"
            try:
                value = json.loads(output.text)
            except ValueError:
                continue
            numbers["json"] += isinstance(value, dict)
            numbers["valid"] += jsonschema.Draft202012Validator(SCHEMA).is_valid(value)
        shares[name] = numbers
    return shares


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench.grammars", description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/results/grammars.json")
    args = parser.parse_args(argv)
    chapter = first_with("grammars")
    package = chapter.load().__name__
    checkpoint("pocket")
    engine = make_engine(chapter, "pocket", 64, linear="plain")
    words = Words(synthetic(random.Random(0), LARGE))
    parts = {
        "compile_ms": lambda: compile_ms(package, engine),
        "mask_us": lambda: {name: mask_us(package, engine, each) for name, each in (("pocket", None), ("128,000 tokens", words))},
        "apply_us": lambda: {"pocket": apply_us(package, engine.config.vocab_size), "128,000 tokens": apply_us(package, len(words.tokens))},
        "step_ms": lambda: step_ms(chapter, repeats=41),
        "valid": lambda: valid_shares(chapter, count=15),
    }
    results = {}
    for name in progress(list(parts), "grammars"):
        results[name] = parts[name]()
        print(f"{name}: {json.dumps(results[name], indent=1)}")
    if args.write:
        path = write_row("grammars", results, "python -m shared.bench.grammars --write", [chapter])
        print(f"wrote {path.name}; now `make sync`")
    return 0


if __name__ == "__main__":
    run(main)
