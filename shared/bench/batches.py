"""Requests that share a forward pass: tokens per second by their number, and a decode step of different lengths.

Reads: the chapters. Writes: docs/results/{batch, decode}.json, through `python -m shared.bench`.
"""
import random

from shared.bench.timing import NOISY, Timing, interleave, summary, timed, weight_bytes
from shared.chapters import Chapter

BATCH_SIZES = (1, 2, 4, 8, 16)
BATCH_MODELS = ("pocket", "smollm2-135m-shape")
BATCH_PROMPT, BATCH_TOKENS = 16, 8


def batch(chapters: list[Chapter], repeats: int) -> dict:
    """Tokens per second by the number of requests per forward pass: decode steps after short prompts, one thread.

    A chapter that runs one request at a time is measured with one request only.
    """
    import torch

    from shared.checkpoints import checkpoint

    torch.set_num_threads(1)
    results = {}
    for chapter in chapters:
        package, results[chapter.id] = chapter.load(), {}
        together = "max_num_seqs" in chapter.capabilities
        sizes_here = BATCH_SIZES if together else BATCH_SIZES[:1]
        limits = {"max_model_len": 64} if "max_model_len" in chapter.capabilities else {}
        limits |= {"max_num_seqs": max(BATCH_SIZES)} if together else {}
        for model in BATCH_MODELS:
            engine = package.Engine(checkpoint(model), device="cpu", **limits)
            contestants = {str(size): lambda size=size: time_batch(package, engine, size) for size in sizes_here}
            sizes = {}
            for size, timings in interleave(contestants, repeats, f"{chapter.id}, {model}").items():
                sizes[size] = summary(timings, BATCH_TOKENS)
                sizes[size]["tokens_per_s"] = round(1e3 * int(size) / sizes[size]["wall_ms"], 1)
            sizes["weight_bytes"] = weight_bytes(engine.model)
            sizes["worst_spread"] = max(sizes[str(size)]["spread"] for size in sizes_here)
            results[chapter.id][model] = sizes
    return results


def time_batch(package, engine, size: int) -> Timing:
    """The time of BATCH_TOKENS steps in which each of `size` requests gets a token."""
    params = package.SamplingParams(max_tokens=1 + BATCH_TOKENS, ignore_eos=True)
    for number in range(size):
        engine.add_request(random.Random(number).choices(range(8, 400), k=BATCH_PROMPT), params)
    engine.step()
    return timed(lambda: [engine.step() for _ in range(BATCH_TOKENS)])


def print_batch(results: dict) -> None:
    print(f"{'tokens/s by requests per forward pass':38}" + "".join(f"{size:>10}" for size in BATCH_SIZES))
    for name, models in results.items():
        for model, sizes in models.items():
            rates = [sizes[str(size)]["tokens_per_s"] for size in BATCH_SIZES if str(size) in sizes]
            print(f"{name + '  ' + model:38}" + "".join(f"{rate:10,.0f}" for rate in rates))
            if sizes["worst_spread"] > NOISY:
                print(f"noisy: runs differ by up to {sizes['worst_spread']:.0%}; run it again on an idle machine")


DECODE_SEQS, DECODE_STEPS, DECODE_CONTEXTS, DECODE_MAX_LEN = 16, 8, (40, 300), 512


def decode(chapters: list[Chapter], repeats: int) -> dict:
    """Milliseconds per decode step of 16 sequences with prompts of 40 to 300 tokens; equal cache memory, one thread."""
    import torch

    from shared.checkpoints import checkpoint

    torch.set_num_threads(1)
    results = {chapter.id: {} for chapter in chapters}
    for model in BATCH_MODELS:
        contestants = {}
        for chapter in chapters:
            limits = {"max_num_seqs": DECODE_SEQS, "max_model_len": DECODE_MAX_LEN}
            limits |= {"num_blocks": DECODE_SEQS * DECODE_MAX_LEN // 16} if "num_blocks" in chapter.capabilities else {}
            engine = chapter.load().Engine(checkpoint(model), device="cpu", **limits)
            contestants[chapter.id] = lambda chapter=chapter, engine=engine: time_decode(chapter.load(), engine)
        for name, timings in interleave(contestants, repeats, model).items():
            results[name][model] = summary(timings, DECODE_STEPS)
    return results


def time_decode(package, engine) -> Timing:
    """The time of DECODE_STEPS steps in which each sequence gets a token."""
    rng = random.Random(1)
    for _ in range(DECODE_SEQS):
        prompt_ids = rng.choices(range(8, 400), k=rng.randint(*DECODE_CONTEXTS))
        engine.add_request(prompt_ids, package.SamplingParams(max_tokens=1 + DECODE_STEPS, ignore_eos=True))
    engine.step()
    return timed(lambda: [engine.step() for _ in range(DECODE_STEPS)])


def print_decode(results: dict) -> None:
    print(f"{'ms per step of 16 sequences':28}" + "".join(f"{model:>24}" for model in BATCH_MODELS))
    for name, models in results.items():
        cells = (f"{models[model]['wall_ms']:.2f} (spread {models[model]['spread']:.0%})" for model in BATCH_MODELS)
        print(f"{name:28}" + "".join(f"{cell:>24}" for cell in cells))
