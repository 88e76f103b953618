"""Every chapter on the same 32 requests of different lengths: tokens per second, and what was computed, read and reserved.

And chapters that manage a full cache in different ways, on chats with one system prompt in a cache that is too small for all.

Reads: shared/workloads.py, the chapters. Writes: docs/results/{staircase, crowded}.json, through `python -m shared.bench`.
"""
import os
import statistics
import time
from itertools import accumulate

from shared.bench.recorder import empty_prefix_cache, record, run
from shared.bench.timing import NOISY, Timing, interleave, summary, timed, weight_bytes
from shared.chapters import Chapter


def staircase(chapters: list[Chapter], repeats: int) -> dict:
    """The chapters' speed and cost on one workload: pocket, one thread, float32.

    Tokens per second come from runs without the recorder. Interleaved with them are recorded runs, which show when each
    request was served; the one of median time is kept.

    Raises:
        AssertionError: if two chapters generate different tokens.
    """
    import torch

    from shared.workloads import staircase

    torch.set_num_threads(1)
    engines = {chapter.id: staircase_engine(chapter) for chapter in chapters}
    requests = staircase(engines[chapters[0].id].config.vocab_size)
    traces, outputs = {chapter.id: [] for chapter in chapters}, {}

    def traced(chapter: Chapter) -> Timing:
        trace, outputs[chapter.id] = record(chapter, engines[chapter.id], requests)
        traces[chapter.id].append(trace)
        return Timing(sum(each.wall_s for each in trace.passes), 0.0)

    contestants = {
        chapter.id: lambda chapter=chapter: timed(lambda: run(engines[chapter.id], chapter.load(), requests))
        for chapter in chapters
    }
    contestants |= {f"{chapter.id}, traced": lambda chapter=chapter: traced(chapter) for chapter in chapters}
    # One at a time, to tell what batching gains apart from the chapter's other changes.
    lonely = [chapter for chapter in chapters if "max_num_seqs" in chapter.adds]
    for chapter in lonely:
        engine = staircase_engine(chapter, max_num_seqs=1)
        contestants[f"{chapter.id}, one place"] = lambda chapter=chapter, engine=engine: timed(
            lambda: run(engine, chapter.load(), requests)
        )
    timings = interleave(contestants, repeats, "staircase")
    results = {}
    for chapter in chapters:
        if outputs[chapter.id] != outputs[chapters[0].id]:
            raise AssertionError(f"{chapter.id} generates other tokens than {chapters[0].id}")
        # The first run was the warm-up.
        by_length = sorted(traces[chapter.id][1:], key=lambda trace: sum(each.wall_s for each in trace.passes))
        results[chapter.id] = row = counts(engines[chapter.id], by_length[len(by_length) // 2])
        row |= summary(timings[chapter.id])
        row["tokens_per_s"] = round(1e3 * row["tokens"] / row["wall_ms"], 1)
    for chapter in lonely:
        row = results[chapter.id]
        row["one_place"] = summary(timings[f"{chapter.id}, one place"])
        row["one_place"]["tokens_per_s"] = round(1e3 * row["tokens"] / row["one_place"]["wall_ms"], 1)
    return results


# The bytes of v04's slab: 8 rows of 2,048 positions of pocket.
STAIRCASE_KV_BYTES = 40 * 2**20


def staircase_engine(chapter: Chapter, **limits):
    """The chapter's engine with its default limits; with blocks, as much cache memory as v04's slab."""
    from shared.checkpoints import POCKET

    if "kv_bytes" in chapter.capabilities:
        limits = {"kv_bytes": STAIRCASE_KV_BYTES, "max_num_seqs": 32} | limits
    return chapter.load().Engine(POCKET, device="cpu", **limits)


def counts(engine, trace) -> dict:
    """What a recorded run computed, read and reserved, and how long the short requests and the watched one took."""
    watched = watched_request(trace.lengths)
    life = {}
    for what, seconds in trace.life(watched):
        life[what] = round(life.get(what, 0) + 1e3 * seconds, 2)
    ended = [trace.ends()[number] for number, (_, output) in enumerate(trace.lengths) if output <= SHORT_OUTPUT]
    seconds = list(accumulate(each.wall_s for each in trace.passes))
    return {
        "requests": len(trace.lengths),
        "places": trace.places,
        "tokens": trace.num_tokens,
        "passes": len(trace.passes),
        "tokens_per_pass": round(trace.num_tokens / len(trace.passes), 2),
        "positions": trace.num_positions,
        "needed": trace.num_needed,
        "needed_share": round(trace.num_needed / trace.num_positions, 4),
        "useful_share": round(trace.useful_share(), 4),
        "kv_bytes": trace.kv_bytes,
        "kv_read_bytes": trace.kv_read_bytes,
        "weight_read_bytes": weight_bytes(engine.model) * len(trace.passes),
        "linear": getattr(engine, "linear", "plain"),
        "late_ttft_ms": round(1e3 * trace.seconds_to_first(watched), 1),
        "short": {
            "requests": len(ended),
            "passes": statistics.median(ended),
            "ms": round(1e3 * statistics.median(seconds[number - 1] for number in ended), 1),
        },
        "watched": {"request": watched, "lengths": trace.lengths[watched], "life_ms": life},
    }


# Requests with at most this many output tokens count as short.
SHORT_OUTPUT = 20


def watched_request(lengths: list[tuple[int, int]]) -> int:
    """The request that is followed through all chapters: a short one, late in the queue."""
    return min(range(len(lengths) // 2, len(lengths)), key=lambda number: abs(lengths[number][1] - 12))


def print_staircase(results: dict) -> None:
    columns = ("forward passes", "tokens/pass", "positions", "needed", "KV MiB", "tokens/s")
    print(f"{'':8}" + "".join(f"{column:>16}" for column in columns))
    for name, row in results.items():
        cells = (
            f"{row['passes']:,}",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['positions']:,}",
            f"{row['needed_share']:.0%}",
            f"{row['kv_bytes'] / 2**20:.1f}",
            f"{row['tokens_per_s']:,.0f}",
        )
        print(f"{name:8}" + "".join(f"{cell:>16}" for cell in cells))
        if row["spread"] > NOISY:
            print(f"{'':8}noisy: runs differ by {row['spread']:.0%}; run it again on an idle machine")


# ---- in a full cache


def that_differ_when_full(chapters: list[Chapter]) -> list[Chapter]:
    """The chapters that run many requests differently when the cache is full, and the one before the first of them."""
    differ = [chapter for chapter in chapters if chapter.races_when_full]
    return [differ[0].previous, *differ]


def crowded(chapters: list[Chapter], repeats: int) -> dict:
    """The chapters' steps, positions and speed on the chats of `workloads.CROWD`: pocket, one thread, float32.

    A prefix cache is emptied before each run.

    Raises:
        AssertionError: if two chapters generate different tokens.
    """
    import torch

    from shared.checkpoints import POCKET
    from shared.workloads import CROWD, CROWD_BLOCKS, SYSTEM_PROMPT, chat_ids

    torch.set_num_threads(1)
    engines = {chapter.id: chapter.load().Engine(POCKET, device="cpu", num_blocks=CROWD_BLOCKS) for chapter in chapters}
    tokenizer = engines[chapters[0].id].tokenizer
    prompts = [chat_ids(tokenizer, question, SYSTEM_PROMPT) for question in CROWD]
    runs = {chapter.id: [] for chapter in chapters}

    def served(chapter: Chapter) -> Timing:
        empty_prefix_cache(engines[chapter.id])
        return timed(lambda: runs[chapter.id].append(serve(chapter, engines[chapter.id], prompts)))

    timings = interleave({chapter.id: lambda chapter=chapter: served(chapter) for chapter in chapters}, repeats, "crowded")
    results = {}
    for chapter in chapters:
        first, *measured = runs[chapter.id]
        if first["token_ids"] != runs[chapters[0].id][0]["token_ids"]:
            raise AssertionError(f"{chapter.id} generates other tokens than {chapters[0].id}")
        tokens = sum(map(len, first["token_ids"]))
        results[chapter.id] = row = {
            "requests": len(prompts),
            "prompt_len": [min(map(len, prompts)), max(map(len, prompts))],
            "shared": len(os.path.commonprefix(prompts)),
            "tokens": tokens,
            "passes": first["passes"],
            "tokens_per_pass": round(tokens / first["passes"], 2),
            "preemptions": first["preemptions"],
            "positions": first["positions"],
            "ttft_ms": round(1e3 * statistics.median(statistics.median(run["ttft_s"]) for run in measured), 1),
        }
        row |= summary(timings[chapter.id])
        row["tokens_per_s"] = round(1e3 * tokens / row["wall_ms"], 1)
    return results


def serve(chapter: Chapter, engine, prompts: list[list[int]]) -> dict:
    """Run all chats, queued at once, to their end tokens: tokens and time to first token of each, and counts."""
    from shared.workloads import CROWD_MAX_TOKENS

    scheduler = engine.scheduler
    before = engine.num_steps, engine.num_positions, getattr(scheduler, "num_preemptions", 0)
    start = time.perf_counter()
    params = chapter.load().SamplingParams(max_tokens=CROWD_MAX_TOKENS)
    token_ids = {engine.add_request(prompt_ids, params): [] for prompt_ids in prompts}
    ttft_s = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            token_ids[output.request_id].append(output.token_id)
            ttft_s.setdefault(output.request_id, time.perf_counter() - start)
    return {
        "token_ids": list(token_ids.values()),
        "ttft_s": list(ttft_s.values()),
        "passes": engine.num_steps - before[0],
        "positions": engine.num_positions - before[1],
        "preemptions": getattr(scheduler, "num_preemptions", 0) - before[2],
    }


def print_crowded(results: dict) -> None:
    columns = ("forward passes", "tokens/pass", "preemptions", "positions", "ms to first", "tokens/s")
    print(f"{'':8}" + "".join(f"{column:>16}" for column in columns))
    for name, row in results.items():
        cells = [f"{row['passes']:,}", f"{row['tokens_per_pass']:.2f}", f"{row['preemptions']:,}", f"{row['positions']:,}"]
        cells += [f"{row['ttft_ms']:,.0f}", f"{row['tokens_per_s']:,.0f}"]
        print(f"{name:8}" + "".join(f"{cell:>16}" for cell in cells))
        if row["spread"] > NOISY:
            print(f"{'':8}noisy: runs differ by {row['spread']:.0%}; run it again on an idle machine")
