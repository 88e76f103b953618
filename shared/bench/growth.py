"""Time per token as the sequence grows.

Reads: the chapters. Writes: docs/results/growth.json, through `python -m shared.bench`.
"""
import random

from shared.bench.timing import NOISY, Timing, interleave, summary, timed
from shared.chapters import Chapter

GROWTH_LENGTHS = (64, 128, 256, 512, 1024)
GROWTH_TOKENS = 4


def growth(chapters: list[Chapter], repeats: int) -> dict:
    """Milliseconds per generated token at each sequence length: pocket, one request, one thread."""
    import torch

    from shared.checkpoints import POCKET

    torch.set_num_threads(1)
    engines = {chapter.id: (chapter.load(), chapter.load().Engine(POCKET, device="cpu")) for chapter in chapters}
    results = {chapter.id: {} for chapter in chapters}
    for length in GROWTH_LENGTHS:
        contestants = {
            name: lambda package=package, engine=engine: time_tokens(package, engine, length)
            for name, (package, engine) in engines.items()
        }
        for name, timings in interleave(contestants, repeats, f"length {length}").items():
            results[name][str(length)] = summary(timings, GROWTH_TOKENS)
    for chapter in chapters:
        lengths = results[chapter.id]
        first, last = (lengths[str(n)]["wall_ms"] for n in (GROWTH_LENGTHS[0], GROWTH_LENGTHS[-1]))
        lengths["worst_spread"] = max(lengths[str(n)]["spread"] for n in GROWTH_LENGTHS)
        lengths["ratio"] = round(last / first, 2)
    return results


def time_tokens(package, engine, length: int) -> Timing:
    """The time of GROWTH_TOKENS steps after a prompt of this length and its first token."""
    ids = random.Random(length).choices(range(8, engine.config.vocab_size), k=length)
    engine.add_request(ids, package.SamplingParams(max_tokens=1 + GROWTH_TOKENS, ignore_eos=True))
    engine.step()
    return timed(lambda: [engine.step() for _ in range(GROWTH_TOKENS)])


def print_growth(results: dict) -> None:
    print(f"{'ms per token at length':24}" + "".join(f"{n:>10}" for n in GROWTH_LENGTHS) + "     longest/shortest")
    for name, lengths in results.items():
        row = "".join(f"{lengths[str(n)]['wall_ms']:10.2f}" for n in GROWTH_LENGTHS)
        print(f"{name:24}{row}{lengths['ratio']:14.1f} x")
        if lengths["worst_spread"] > NOISY:
            print(f"{'':24}noisy: runs differ by up to {lengths['worst_spread']:.0%}; run it again on an idle machine")
