"""What it is worth to reserve less than the worst case, and what a preemption costs.

    python -m shared.bench.admission              # pocket, one thread
    python -m shared.bench.admission --write

The workload: 96 requests whose max_tokens is four to eight times what they generate, on a cache that holds few worst
cases. Steps, preemptions and positions are counted, and repeat exactly; tokens per CPU second are the median of
interleaved runs. Then one preemption of a sequence, by its length: computed again, or swapped out and in.

Reads: the chapters. Writes: docs/results/admission.json.
"""
import argparse
import contextlib
import io
import random
import statistics
import time
from collections.abc import Callable, Iterator

from shared import results
from shared.bench.timing import Timing, interleave, summary, timed
from shared.chapters import Chapter, first_with
from shared.programs import run

NUM_REQUESTS, NUM_BLOCKS, MAX_NUM_SEQS = 96, 192, 64
PROMPT, OUTPUT, TIMES = (8, 120), (16, 96), (4, 8)
RESERVES = (0, 8, 16, 32, 64, 128, 256, 10**6)
WATERMARK = 0.01  # of the blocks
CONTEXTS = (8, 64, 256, 1024, 2000)
COMMAND = "python -m shared.bench.admission --write"


def make_engine(chapter: Chapter, **options):
    from shared.checkpoints import POCKET

    with contextlib.redirect_stderr(io.StringIO()):
        return chapter.load().Engine(POCKET, device="cpu", dtype="float32", **options)


def generous_requests(chapter: Chapter) -> list[tuple[list[int], dict]]:
    """Prompts, and parameters by name: each request ends by a stop token long before its max_tokens.

    What a seeded request generates does not depend on the engine, so a first run says which token ends it where.
    """
    rng = random.Random(1)
    engine = make_engine(chapter)
    prompts, lengths, limits = [], [], []
    for _ in range(NUM_REQUESTS):
        length = rng.randint(*OUTPUT)
        prompts.append([rng.randrange(8, engine.config.vocab_size) for _ in range(rng.randint(*PROMPT))])
        lengths.append(length)
        limits.append(min(1900, length * rng.randint(*TIMES)))
    params = [dict(temperature=1.0, seed=index, ignore_eos=True) for index in range(NUM_REQUESTS)]
    Params = chapter.load().SamplingParams
    outputs = engine.generate(prompts, [Params(max_tokens=2 * OUTPUT[1], **options) for options in params])
    requests = []
    for prompt, length, limit, options, output in zip(prompts, lengths, limits, params, outputs, strict=True):
        end = next(i for i in range(length - 1, len(output.token_ids)) if output.token_ids[i] not in output.token_ids[:i])
        requests.append((prompt, options | dict(max_tokens=limit, stop_token_ids=(output.token_ids[end],))))
    return requests


def serve_all(chapter: Chapter, engine, requests: list[tuple[list[int], dict]]) -> dict:
    """Run them all; how many steps, positions, sequences per step and preemptions it took."""
    Params = chapter.load().SamplingParams
    before = engine.num_steps, engine.num_positions, preemptions(engine)
    for prompt, options in requests:
        engine.add_request(prompt, Params(**options))
    num_tokens = num_members = 0
    while engine.has_unfinished_requests():
        num_tokens += len(engine.step())
        num_members += len(engine.in_step)
    steps, positions = engine.num_steps - before[0], engine.num_positions - before[1]
    needed = sum(len(prompt) for prompt, _ in requests) + num_tokens - len(requests)
    return {
        "steps": steps,
        "tokens": num_tokens,
        "mean_batch": round(num_members / steps, 1),
        "preemptions": preemptions(engine) - before[2],
        "positions": positions,
        "useful_share": round(needed / positions, 4),
    }


def preemptions(engine) -> int:
    return getattr(engine.scheduler, "num_preemptions", 0)


# ---- other rules of admission, put over the chapter's own from outside


def as_vllm_does(scheduler) -> None:
    """Admit nobody in a step that preempted somebody."""
    schedule, admit = scheduler.schedule, scheduler.admit
    before = [0]

    def remembering():
        before[0] = scheduler.num_preemptions
        return schedule()

    scheduler.schedule = remembering
    scheduler.admit = lambda seq: scheduler.num_preemptions == before[0] and admit(seq)


def with_a_watermark(scheduler) -> None:
    """Keep 1 % of the blocks free when a request is admitted, unless nothing runs."""
    admit, pool = scheduler.admit, scheduler.pool

    def is_above(seq) -> bool:
        return pool.num_free - pool.blocks_for(seq.num_tokens) >= WATERMARK * pool.num_blocks

    scheduler.admit = lambda seq: (not scheduler.running or is_above(seq)) and admit(seq)


def contestants_of(chapter: Chapter) -> Iterator[tuple[str, Chapter, dict, Callable | None]]:
    """The name of each way, its chapter, its engine's options, and a rule to put over it."""
    yield chapter.previous.id, chapter.previous, {}, None
    for reserve in RESERVES:
        yield f"reserve {reserve}", chapter, {"reserve_tokens": reserve}, None
    yield "reserve 0, as vLLM", chapter, {"reserve_tokens": 0}, as_vllm_does
    yield "reserve 0, watermark", chapter, {"reserve_tokens": 0}, with_a_watermark


def admission(chapter: Chapter, repeats: int) -> dict:
    """Each way's counts, and its tokens per CPU second."""
    requests = generous_requests(chapter.previous)
    counts, runs = {}, {}
    for name, runner, options, rule in contestants_of(chapter):
        engine = make_engine(runner, num_blocks=NUM_BLOCKS, max_num_seqs=MAX_NUM_SEQS, **options)
        if rule:
            rule(engine.scheduler)
        counts[name] = serve_all(runner, engine, requests)
        runs[name] = lambda runner=runner, engine=engine: timed(lambda: serve_all(runner, engine, requests))
    timings = interleave(runs, repeats, "admission", warm_up={"": lambda: None})
    for name, row in counts.items():
        row |= summary(timings[name])
        row["tokens_per_cpu_s"] = round(1e3 * row["tokens"] / row["cpu_ms"], 1)
    return counts


# ---- one preemption


def comebacks(chapter: Chapter, repeats: int) -> dict:
    """By the length of a sequence, milliseconds to compute its keys and values again, and to copy them out and in."""
    engine = make_engine(chapter, max_num_seqs=4, max_model_len=2048, swap_bytes=2**27)
    Params = chapter.load().SamplingParams
    rng = random.Random(2)
    found = {}
    for length in CONTEXTS:
        prompt = [rng.randrange(8, engine.config.vocab_size) for _ in range(length)]

        def computed() -> Timing:
            """A request of this length to its first token."""
            return timed(lambda: engine.generate([prompt], Params(max_tokens=1)))

        def swapped() -> Timing:
            """A running sequence out and in again, by the scheduler's own methods."""
            request_id = engine.add_request(prompt, Params(max_tokens=8, ignore_eos=True))
            engine.step()
            [seq] = engine.scheduler.running

            def out_and_in() -> None:
                engine.scheduler.preempt(seq)
                assert engine.scheduler.schedule() == [seq] and seq.num_computed == length

            timing = timed(out_and_in)
            engine.abort_request(request_id)
            return timing

        timings = interleave({"computed": computed, "swapped": swapped}, repeats, f"{length} tokens")
        found[str(length)] = {name: round(1e3 * statistics.median(one.wall_s for one in all_of), 3) for name, all_of in timings.items()}
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench.admission", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write docs/results/admission.json")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    import torch

    torch.set_num_threads(1)
    chapter = first_with("preemption")
    start = time.perf_counter()
    figures = {"requests": NUM_REQUESTS, "blocks": NUM_BLOCKS, "ways": admission(chapter, args.repeats), "comebacks": comebacks(chapter, args.repeats)}
    for name, row in figures["ways"].items():
        print(
            f"{name:22} {row['steps']:5} steps of {row['mean_batch']:4.1f}  {row['preemptions']:3} preemptions  "
            f"{row['positions']:6} positions, {row['useful_share']:.1%} useful  {row['tokens_per_cpu_s']:7.1f} tokens per CPU second"
        )
    for length, row in figures["comebacks"].items():
        print(f"{length:>6} tokens: computed again in {row['computed']:.2f} ms, swapped out and in in {row['swapped']:.2f} ms")
    print(f"{time.perf_counter() - start:.0f} s")
    if args.write:
        print(results.write_row("admission", figures, COMMAND, [chapter.previous, chapter]))
    return 0


if __name__ == "__main__":
    run(main)
