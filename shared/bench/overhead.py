"""Where the time of a decode step goes: the model's work and the engine's own.

    python -m shared.bench overhead v04 v07       # pocket, one thread

The parts of a step are timed by wrapping the functions that `Engine.step` calls, so chapters need no code for it.
Everything outside the model and its head is the engine's own time: scheduling, building the batch, choosing tokens,
and appending, decoding and reporting them.

Reads: the chapters. Writes: docs/results/overhead.json, through `python -m shared.bench`.
"""
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType

from shared.bench.timing import progress
from shared.chapters import Chapter

SIZES = (1, 16, 64)
WAYS = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.9}}
STEPS, PROMPT = 16, (16, 128)
MODEL = ("model", "head")  # the rest of a step is the engine's own
# Each part of a step, and its functions, as (owner, name); `parts_timed` says what the owners are, of which a chapter may lack one.
PARTS = {
    "schedule": (("scheduler", "schedule"),),
    "build": (("module", "build_batch"), ("runner", "accepts"), ("runner", "build")),
    "model": (("model", "forward"),),
    "head": (("model", "compute_logits"),),
    "choose": (("module", "sample"), ("module", "top_logprobs")),
    "report": (("engine", "commit"),),
}


def overhead(chapters: list[Chapter], repeats: int) -> dict:
    """Microseconds for each part of a decode step of 1, 16 and 64 sequences; medians over all steps of all runs."""
    import torch

    from shared.checkpoints import POCKET

    torch.set_num_threads(1)
    results = {chapter.id: {} for chapter in chapters}
    for chapter in progress(chapters, "overhead"):
        package = chapter.load()
        together = "max_num_seqs" in chapter.capabilities
        limits = {"device": "cpu", "max_model_len": PROMPT[1] + STEPS + 1} | ({"max_num_seqs": max(SIZES)} if together else {})
        if "chunked_prefill" in chapter.capabilities:
            limits["max_num_batched_tokens"] = max(SIZES) * PROMPT[1]  # all prompts in one step, as in earlier chapters
        engine = package.Engine(POCKET, **limits)
        for size in SIZES if together else SIZES[:1]:
            for way, settings in WAYS.items():
                steps = [step for _ in range(repeats) for step in decode_steps(package, engine, size, settings)]
                row = {part: round(1e6 * statistics.median(step[part] for step in steps), 1) for part in (*PARTS, "step")}
                row["own"] = round(row["step"] - sum(row[part] for part in MODEL), 1)
                row["own_share"] = round(row["own"] / row["step"], 3)
                results[chapter.id][f"{way} {size}"] = row
    return results


def decode_steps(package: ModuleType, engine, size: int, settings: dict) -> list[dict[str, float]]:
    """Seconds for each part of STEPS steps, in each of which `size` sequences get a token."""
    rng = random.Random(1)
    params = package.SamplingParams(max_tokens=1 + STEPS, ignore_eos=True, seed=1, **settings)
    for _ in range(size):
        engine.add_request(rng.choices(range(8, engine.config.vocab_size), k=rng.randint(*PROMPT)), params)
    engine.step()
    steps = []
    for _ in range(STEPS):
        with parts_timed(package, engine) as spent:
            start = time.perf_counter()
            engine.step()
            spent["step"] = time.perf_counter() - start
        steps.append(spent)
    if engine.has_unfinished_requests():
        raise AssertionError(f"{package.__name__}: {size} requests have not finished after one step per token")
    return steps


@contextmanager
def parts_timed(package: ModuleType, engine) -> Iterator[dict[str, float]]:
    """Yields the seconds spent in each part so far; leaving restores the functions."""
    owners = {
        "module": sys.modules[f"{package.__name__}.engine"],
        "engine": engine,
        "scheduler": engine.scheduler,
        "model": engine.model,
        "runner": getattr(engine, "runner", None),
    }
    spent = dict.fromkeys(PARTS, 0.0)
    with ExitStack() as undo:
        for part, functions in PARTS.items():
            for owner, name in functions:
                if owners[owner] is not None:
                    undo.callback(restore(owners[owner], name))
                    setattr(owners[owner], name, clocked(getattr(owners[owner], name), spent, part))
        yield spent


def restore(owner: object, name: str):
    """A function that restores the attribute to what it is now; one that the owner only inherits is deleted."""
    if name in vars(owner):
        value = vars(owner)[name]
        return lambda: setattr(owner, name, value)
    return lambda: delattr(owner, name)


def clocked(function, spent: dict[str, float], part: str):
    def run(*args):
        start = time.perf_counter()
        result = function(*args)
        spent[part] += time.perf_counter() - start
        return result

    return run


def print_overhead(results: dict) -> None:
    columns = (*PARTS, "step", "own")
    print(f"{'microseconds per step':24}" + "".join(f"{column:>10}" for column in columns) + f"{'own share':>11}")
    for name, rows in results.items():
        for case, row in rows.items():
            print(f"{name + '  ' + case:24}" + "".join(f"{row[each]:10,.0f}" for each in columns) + f"{row['own_share']:11.1%}")
