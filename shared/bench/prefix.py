"""What a prefix cache saves, what it costs where nothing is shared, and how large it must be.

    python -m shared.bench.prefix              # pocket, one thread
    python -m shared.bench.prefix --write

Four workloads:

    chats      NUM_CHATS chats with one system prompt of 200 tokens, one after another and all at once
    turns      a conversation of NUM_TURNS turns; each prompt repeats all earlier turns
    unshared   NUM_UNSHARED random prompts: every look-up is in vain
    hits       NUM_REQUESTS requests, each with one of NUM_SYSTEMS system prompts, some of which are far more popular than
               others, on caches of different sizes, with other orders in which free blocks are reused

Positions, steps and cached tokens are counted, and repeat exactly; "by arithmetic" they are computed from the prompts
alone. Times are medians of interleaved runs, and the cost where nothing is shared is a ratio of neighboring runs.

Reads: the chapters. Writes: docs/results/prefix.json.
"""
import argparse
import importlib
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator

from shared import results
from shared.bench.admission import make_engine
from shared.bench.recorder import empty_prefix_cache
from shared.bench.timing import Timing, interleave, progress, summary, timed
from shared.chapters import Chapter, first_with
from shared.programs import run
from shared.workloads import QUESTIONS, RACE, SYSTEM_PROMPT, chat_ids, random_ids

NUM_CHATS, CHAT_TOKENS = 32, 16
ANIMALS = ("cat", "dog", "horse", "goose", "wolf", "mouse", "frog", "snail", "bee")
NUM_TURNS, TURN_TOKENS = 8, 48
NUM_UNSHARED, UNSHARED_PROMPT, UNSHARED_OUTPUT, UNSHARED_SEQS = 48, (16, 400), (4, 32), 16
NUM_REQUESTS, NUM_SYSTEMS, MAX_NUM_SEQS = 200, 8, 4
SYSTEM_LEN, USER_LEN, OUTPUT_LEN = (64, 160), (8, 40), (4, 12)
SIZES = (14, 20, 28, 40, 56, 80, 112, 160, 1000)
HASHED_TOKENS = 2048
COMMAND = "python -m shared.bench.prefix --write"


Way = tuple[str, Chapter, dict, Callable | None]


def ways_of(chapter: Chapter) -> Iterator[Way]:
    """The name of each way, its chapter, its engine's options, and a change made to its scheduler from outside."""
    yield chapter.previous.id, chapter.previous, {}, None
    yield "off", chapter, {"enable_prefix_caching": False}, None
    yield "on", chapter, {}, None


def without_waiting(scheduler) -> None:
    """Admit a request even if its next block is being computed in this step."""
    scheduler.awaits = lambda *arguments: False


# ---- chats with one system prompt


def chat_prompts(tokenizer) -> list[list[int]]:
    """NUM_CHATS different questions after the system prompt."""
    questions = [*dict.fromkeys(RACE), *(f"Tell me a story about a {animal}." for animal in ANIMALS)]
    return [chat_ids(tokenizer, question, SYSTEM_PROMPT) for question in questions[:NUM_CHATS]]


def serve(chapter: Chapter, engine, prompts: list[list[int]], together: bool) -> dict:
    """Run all prompts, queued at once or one after another: positions, tokens of the outputs, seconds to each first token."""
    params = chapter.load().SamplingParams(max_tokens=CHAT_TOKENS)
    empty_prefix_cache(engine)
    positions, steps = engine.num_positions, engine.num_steps
    lengths, ttft_s = [], []
    for group in [prompts] if together else [[prompt] for prompt in prompts]:
        start = time.perf_counter()
        num_tokens = {engine.add_request(prompt, params): 0 for prompt in group}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not num_tokens[output.request_id]:
                    ttft_s.append(time.perf_counter() - start)
                num_tokens[output.request_id] += 1
        lengths += num_tokens.values()
    return {
        "positions": engine.num_positions - positions,
        "steps": engine.num_steps - steps,
        "lengths": lengths,
        "ttft_s": statistics.median(ttft_s),
    }


def by_arithmetic(prompts: list[list[int]], lengths: list[int], block_size: int) -> int:
    """The positions that must be computed if every request finds all full blocks that an earlier one has in common with it.

    At least one position of a prompt is computed, and that of an output's last token never is.

    >>> by_arithmetic([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 4]], [1, 3, 1], block_size=2)
    10
    """
    total = 0
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        common = max((len(os.path.commonprefix([prompt, other])) for other in prompts[:number]), default=0)
        found = min(common, len(prompt) - 1) // block_size * block_size
        total += len(prompt) - found + length - 1
    return total


def chats(chapter: Chapter, repeats: int) -> dict:
    """For both arrivals and each way: positions, and by arithmetic; median time to first token, CPU time."""
    engines = {name: make_engine(runner, **options) for name, runner, options, _ in ways_of(chapter)}
    runners = {name: runner for name, runner, *_ in ways_of(chapter)}
    engines["on, no waiting"], runners["on, no waiting"] = make_engine(chapter), chapter
    without_waiting(engines["on, no waiting"].scheduler)
    prompts = chat_prompts(engines["on"].tokenizer)
    block_size = engines["on"].cache.block_size
    shared = len(os.path.commonprefix(prompts))
    found = {"requests": len(prompts), "shared": shared, "shared_blocks": shared // block_size}
    for arrival, together in (("one after another", False), ("all at once", True)):
        runs = {name: [] for name in engines}

        def once(name: str) -> Timing:
            return timed(lambda: runs[name].append(serve(runners[name], engines[name], prompts, together)))

        timings = interleave({name: lambda name=name: once(name) for name in engines}, repeats, arrival)
        found[arrival] = {}
        for name, (first, *measured) in runs.items():
            nothing_shared = sum(len(prompt) + length - 1 for prompt, length in zip(prompts, first["lengths"], strict=True))
            found[arrival][name] = {
                "positions": first["positions"],
                "arithmetic": by_arithmetic(prompts, first["lengths"], block_size) if name.startswith("on") else nothing_shared,
                "passes": first["steps"],
                "tokens": sum(first["lengths"]),
                "ttft_ms": round(1e3 * statistics.median(each["ttft_s"] for each in measured), 1),
                **summary(timings[name]),
            }
    return found


# ---- a conversation


def turns(chapter: Chapter) -> list[dict]:
    """For each turn of a conversation: tokens of the prompt, how many were found, and positions computed with and without."""
    Params = chapter.load().SamplingParams
    engines = {name: make_engine(chapter, enable_prefix_caching=name == "on") for name in ("on", "off")}
    tokenizer = engines["on"].tokenizer
    messages, found = [], []
    for question in QUESTIONS[:NUM_TURNS]:
        messages.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        positions, outputs = {}, {}
        for name, engine in engines.items():
            before = engine.num_positions
            [outputs[name]] = engine.generate([prompt], Params(max_tokens=TURN_TOKENS))
            positions[name] = engine.num_positions - before
        assert outputs["on"].token_ids == outputs["off"].token_ids, f"other tokens than without a prefix cache after {question!r}"
        messages.append({"role": "assistant", "content": outputs["on"].text})
        row = {"prompt": len(prompt), "cached": outputs["on"].num_cached, "output": len(outputs["on"].token_ids)}
        found.append(row | {"positions": positions["on"], "positions_without": positions["off"]})
    return found


# ---- nothing is shared


def unshared(chapter: Chapter, repeats: int) -> dict:
    """CPU time of random requests by way, as ratios of neighboring runs, and the time to hash a token."""
    rng = random.Random(3)
    engines = {name: make_engine(runner, max_num_seqs=UNSHARED_SEQS, **options) for name, runner, options, _ in ways_of(chapter)}
    runners = {name: runner for name, runner, *_ in ways_of(chapter)}
    vocab_size = engines["on"].config.vocab_size
    prompts = [random_ids(rng.randint(*UNSHARED_PROMPT), vocab_size, rng) for _ in range(NUM_UNSHARED)]
    limits = [rng.randint(*UNSHARED_OUTPUT) for _ in range(NUM_UNSHARED)]
    positions = {}

    def once(name: str) -> Timing:
        engine, Params = engines[name], runners[name].load().SamplingParams
        empty_prefix_cache(engine)
        before = engine.num_positions
        timing = timed(lambda: engine.generate(prompts, [Params(max_tokens=limit, ignore_eos=True) for limit in limits]))
        positions[name] = engine.num_positions - before
        return timing

    timings = interleave({name: lambda name=name: once(name) for name in engines}, repeats, "unshared")
    [count] = set(positions.values())
    found = {"requests": NUM_UNSHARED, "positions": count, **{name: summary(timings[name]) for name in engines}}
    for name, base in (("on", "off"), ("off", chapter.previous.id)):
        ratios = [one.cpu_s / other.cpu_s for one, other in zip(timings[name], timings[base], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        found[f"{name}_to_{'off' if base == 'off' else 'before'}"] = {
            "median": round(median, 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }
    return found | {"hash_ns_per_token": hash_ns_per_token(chapter, engines["on"].cache.block_size, vocab_size)}


def hash_ns_per_token(chapter: Chapter, block_size: int, vocab_size: int) -> float:
    """Nanoseconds that the keys of a long prompt's blocks take per token, the fastest of several runs."""
    prefix = importlib.import_module(f"{chapter.load().__name__}.prefix")
    token_ids = random_ids(HASHED_TOKENS, vocab_size, random.Random(4))

    def keys() -> None:
        key = prefix.root_key(None)
        for start in range(0, HASHED_TOKENS, block_size):
            key = prefix.block_key(key, token_ids[start : start + block_size])

    return round(1e9 * min(timed(keys).wall_s for _ in range(50)) / HASHED_TOKENS, 1)


# ---- hits by the size of the cache


def popular_requests(vocab_size: int) -> list[tuple[list[int], int]]:
    """Prompts and output lengths; the system prompt number n is requested in proportion to 1 / n."""
    rng = random.Random(5)
    systems = [random_ids(rng.randint(*SYSTEM_LEN), vocab_size, rng) for _ in range(NUM_SYSTEMS)]
    popularity = [1 / (n + 1) for n in range(NUM_SYSTEMS)]
    return [
        (rng.choices(systems, popularity)[0] + random_ids(rng.randint(*USER_LEN), vocab_size, rng), rng.randint(*OUTPUT_LEN))
        for _ in range(NUM_REQUESTS)
    ]


def pools_of(chapter: Chapter) -> dict[str, type]:
    """Other orders in which free blocks are reused, as subclasses of the chapter's own BlockPool, which is the first."""
    BlockPool = importlib.import_module(f"{chapter.load().__name__}.cache").BlockPool

    class HeadFirst(BlockPool):
        """A table's first block is freed first, so it is reused before the blocks that cannot be found without it."""

        def free(self, block_ids):
            super().free(block_ids[::-1])

    class NewestFirst(BlockPool):
        """The block freed last is reused first."""

        def allocate(self, num_blocks):
            self.free_ids = type(self.free_ids)(reversed(self.free_ids.items()))
            block_ids = super().allocate(num_blocks)
            self.free_ids = type(self.free_ids)(reversed(self.free_ids.items()))
            return block_ids

    class AtRandom(BlockPool):
        """Of the free blocks that can be found, any is reused, after those that cannot."""

        def __init__(self, num_blocks, block_size):
            super().__init__(num_blocks, block_size)
            self.rng = random.Random(6)

        def allocate(self, num_blocks):
            block_ids = list(self.free_ids)
            self.rng.shuffle(block_ids)
            self.free_ids = type(self.free_ids).fromkeys(sorted(block_ids, key=self.key_of.__contains__))
            return super().allocate(num_blocks)

    class OnlyRunning(BlockPool):
        """A block can be found only as long as a running request holds it."""

        def free(self, block_ids):
            self.forget([block_id for block_id in block_ids if self.num_owners[block_id] == 1])
            super().free(block_ids)

    return {"own": BlockPool, "head first": HeadFirst, "at random": AtRandom, "newest first": NewestFirst, "only running": OnlyRunning}


def hits_of(chapter: Chapter, num_blocks: int, pool: type, **options) -> dict:
    """Serve the popular requests; the share of their prompts' tokens found, and what it took."""
    engine = make_engine(chapter, num_blocks=num_blocks, max_num_seqs=MAX_NUM_SEQS, **options)
    engine.pool = engine.scheduler.pool = pool(num_blocks, engine.pool.block_size)
    requests = popular_requests(engine.config.vocab_size)
    Params = chapter.load().SamplingParams
    engine.generate([prompt for prompt, _ in requests], [Params(max_tokens=length, ignore_eos=True) for _, length in requests])
    stats = engine.stats()
    return {
        "hit_share": round(stats.cached_tokens / stats.prompt_tokens, 4),
        "cached": stats.cached_tokens,
        "positions": engine.num_positions,
        "passes": engine.num_steps,
        "preemptions": stats.preemptions,
    }


def hits(chapter: Chapter) -> dict:
    """For each size of the cache and order of reuse, and without a prefix cache: hit rate, positions, steps, preemptions."""
    engine = make_engine(chapter, num_blocks=max(SIZES))
    requests = popular_requests(engine.config.vocab_size)
    block_size = engine.cache.block_size
    largest = max(-(-(len(prompt) + length - 1) // block_size) for prompt, length in requests)
    prompts = [prompt for prompt, _ in requests]
    tokens = sum(map(len, prompts))
    most = tokens - by_arithmetic(prompts, [1] * len(prompts), block_size)
    found = {"requests": len(requests), "systems": NUM_SYSTEMS, "tokens": tokens, "most_blocks_of_one": largest}
    found["most_hit_share"] = round(most / tokens, 4)  # if an earlier request is found as soon as it has arrived
    pools = pools_of(chapter)
    found["sizes"] = {}
    for size in progress(SIZES, "hits"):
        row = {name: hits_of(chapter, size, pool) for name, pool in pools.items()}
        found["sizes"][str(size)] = row | {"off": hits_of(chapter, size, pools["own"], enable_prefix_caching=False)}
    return found


# ---- the program


def show(figures: dict) -> None:
    for arrival in ("one after another", "all at once"):
        print(f"{figures['chats']['requests']} chats with one system prompt of {figures['chats']['shared']} tokens, {arrival}:")
        for name, row in figures["chats"][arrival].items():
            print(
                f"  {name:16} {row['positions']:6,} positions ({row['arithmetic']:,} by arithmetic) in {row['passes']:4} steps, "
                f"first token after {row['ttft_ms']:6.1f} ms (median), {row['cpu_ms'] / 1e3:.2f} s of CPU time"
            )
    print("a conversation:")
    for number, row in enumerate(figures["turns"], 1):
        print(f"  turn {number}: {row['prompt']:4} tokens, {row['cached']:4} found; {row['positions']:4} positions, {row['positions_without']:4} without")
    unshared = figures["unshared"]
    for name, words in (("on_to_off", "on / off"), ("off_to_before", "off / the chapter before")):
        ratio = unshared[name]
        print(f"nothing shared, CPU time {words}: {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
    print(f"hashing takes {unshared['hash_ns_per_token']} ns per token")
    print(f"hit rate, at most {figures['hits']['most_hit_share']:.1%}:")
    for size, ways in figures["hits"]["sizes"].items():
        print(f"  {size:>5} blocks: " + ", ".join(f"{name} {row['hit_share']:.1%}" for name, row in ways.items() if name != "off"))
        print(f"{'':16}" + ", ".join(f"{name} {ways[name]['positions']:,} positions in {ways[name]['passes']:,} steps" for name in ("own", "off")))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench.prefix", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write docs/results/prefix.json")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    import torch

    torch.set_num_threads(1)
    chapter = first_with("prefix_cache")
    start = time.perf_counter()
    figures = {
        "chats": chats(chapter, args.repeats),
        "turns": turns(chapter),
        "unshared": unshared(chapter, args.repeats),
        "hits": hits(chapter),
    }
    show(figures)
    print(f"{time.perf_counter() - start:.0f} s")
    if args.write:
        print(results.write_row("prefix", figures, COMMAND, [chapter.previous, chapter]))
    return 0


if __name__ == "__main__":
    run(main)
