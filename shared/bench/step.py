"""Where the time of a step goes, part by part, beside the least that the machine could take.

    python -m shared.bench.step                # before weights had other forms, and after: two minutes
    python -m shared.bench.step v11 v14        # any chapters whose engine has a backend for attention
    python -m shared.bench.step --write

One step of 1, 16 and 64 streams with contexts of about 100 tokens, all different, and one of a prompt of 512 tokens.
The chapters take turns, step by step, on one thread, in float32. The parts:

    products     the linear layers of all decoder layers
    attention    keys and values stored and gathered, and attention itself
    between      everything else in the decoder layers: norms, rotation, the gate, residuals
    embedding    the embedding and the head
    own          the engine's own: scheduling, building the batch, sampling, appending and decoding tokens

All times are CPU time of the one thread that computes, which other programs disturb less than wall time. A step's figure
is the median, with the best beside it. Parts are timed by wrapping functions, which adds one or two microseconds per call;
torch.profiler would add more than that to every operation. Each step is timed twice, in turns: whole, and in parts. The
parts are averages over the fastest third of the latter, so they add up to about the best step. `disturbed` says how much
longer the best step takes with its functions wrapped.

The bound is the time to read all weights once, in the bytes in which the chapter stores them, or the time to do all
multiplications, whichever is longer. Both rates are measured in the same run. Attention is left out of it.

Streams begin without computing their prompts: the cache is filled with random numbers, which take as long to attend to
as any others.

Reads: the chapters. Writes: docs/results/step.json.
"""
import argparse
import contextlib
import io
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from shared.bench.overhead import restore
from shared.bench.suite import bandwidth, multiplications, operations
from shared.bench.timing import NOISY, Timing, interleave, summary, timed, weight_bytes
from shared.chapters import Chapter, find, first_with
from shared.programs import run
from shared.results import write_row
from shared.workloads import random_ids

MODELS = ("pocket", "smollm2-135m-shape")
STREAMS, CONTEXT = (1, 16, 64), (25, 175)  # how many run together; tokens of each, both ends included
PROMPT = 512
BLOCK = 16
# How often a step of few tokens is timed, compared with one of many.
OFTEN = 2
PARTS = ("products", "attention", "between", "embedding", "own")


# ---- engines, and streams that begin without computing their prompts


def make_engine(chapter: Chapter, model_name: str, max_new: int, **options):
    """An engine with room for all streams and max_new more tokens of each, without a prefix cache or a budget that matters."""
    import torch

    from shared.checkpoints import checkpoint

    longest = max(CONTEXT[1], PROMPT) + max_new
    num_blocks = max(STREAMS) * -(-(CONTEXT[1] + max_new) // BLOCK) + -(-longest // BLOCK)
    options |= {"device": "cpu", "dtype": "float32", "max_model_len": longest, "max_num_seqs": max(STREAMS)}
    options |= {"num_blocks": num_blocks, "block_size": BLOCK}
    if "prefix_cache" in chapter.capabilities:
        options["enable_prefix_caching"] = False
    if "chunked_prefill" in chapter.capabilities:
        options["max_num_batched_tokens"] = max(STREAMS) * CONTEXT[1]
    with contextlib.redirect_stderr(io.StringIO()):
        engine = chapter.load().Engine(checkpoint(model_name), **options)
    # Memory that was never written would be read from one page, and so from the processor's cache.
    for number, tensor in enumerate((engine.cache.k, engine.cache.v)):
        tensor.uniform_(-1, 1, generator=torch.Generator().manual_seed(number))
    return engine


class NoModel:
    """In place of an engine's model: computes nothing, and predicts token 0."""

    def __init__(self, config):
        self.config = config

    def __call__(self, batch):
        import torch

        return torch.zeros(len(batch.draws), 1)

    def compute_logits(self, hidden):
        import torch

        return torch.zeros(len(hidden), self.config.vocab_size)


def contexts(count: int) -> list[int]:
    """The number of tokens of each stream; the same for every chapter."""
    rng = random.Random(count)
    return [rng.randint(*CONTEXT) for _ in range(count)]


def begin(chapter: Chapter, engine, count: int, max_new: int, **options) -> None:
    """Let `count` streams run that have a prompt in the cache and their first token, and will generate up to max_new more.

    options: further arguments of their SamplingParams.
    """
    rng = random.Random(1)
    params = chapter.load().SamplingParams(**{"max_tokens": max_new, "ignore_eos": True} | options)
    for length in contexts(count):
        engine.add_request(random_ids(length - 1, engine.config.vocab_size, rng), params)
    model, engine.model = engine.model, NoModel(engine.config)
    try:
        while any(not seq.num_output for seq in engine.seqs.values()):
            engine.step()
    finally:
        engine.model = model


def end(engine) -> None:
    """Abort all streams."""
    for request_id in list(engine.seqs):
        engine.abort_request(request_id)


# ---- the parts of a step


class Clock:
    """Adds up the seconds spent in each part; the time of a part that another one calls counts for the inner one only."""

    def __init__(self):
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.part, self.since = None, 0.0

    def switch(self, part: str | None) -> str | None:
        """Count the time since the last call, and begin a part; returns the one that ends, None before the first."""
        now = time.thread_time()
        ended = self.part
        if ended is not None:
            self.spent[ended] += now - self.since
        self.part, self.since = part, now
        return ended

    def wrap(self, part: str, function: Callable) -> Callable:
        def wrapped(*args):
            outer = self.switch(part)
            try:
                return function(*args)
            finally:
                self.switch(outer)

        return wrapped


def parts_of(engine) -> Iterator[tuple[object, str, str]]:
    """The methods that bound the parts, as owner, name and part. What the model computes outside of them is `between`."""
    from torch import nn

    model = engine.model
    yield engine, "step", "own"
    yield model, "forward", "between"
    yield model.model.embed_tokens, "forward", "embedding"
    yield model, "compute_logits", "embedding"
    yield engine.cache, "write", "attention"
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            # Weights that are in a form are multiplied by it, whether or not the layer itself is called.
            yield module, "forward" if getattr(module, "form", None) is None else "form", "products"


@contextmanager
def parts_timed(engine) -> Iterator[Clock]:
    """Yields a clock that counts the seconds in each part; leaving restores what was wrapped."""
    clock = Clock()
    with ExitStack() as undo:
        for owner, name, part in list(parts_of(engine)):
            undo.callback(restore(owner, name))
            setattr(owner, name, clock.wrap(part, getattr(owner, name)))
        # An engine with a runner gives it the backend too.
        for owner in (engine, getattr(engine, "runner", None)):
            if owner is not None:
                undo.callback(setattr, owner, "backend", owner.backend)
                owner.backend = owner.backend._replace(attend=clock.wrap("attention", owner.backend.attend))
        yield clock


# ---- the measurement


def measure(chapters: list[Chapter], model_name: str, repeats: int, limits: dict[str, float]) -> dict:
    """By number of streams, and for the prompt: each chapter's figures for one step."""
    max_new = 4 * OFTEN * repeats + 8
    engines = {chapter.id: make_engine(chapter, model_name, max_new) for chapter in chapters}
    packages = {chapter.id: chapter.load() for chapter in chapters}
    found = {}
    for count in STREAMS:
        for chapter in chapters:
            begin(chapter, engines[chapter.id], count, max_new)
        times = OFTEN * repeats if count < max(STREAMS) else repeats
        found[str(count)] = turns(engines, lambda name: None, times, count, count, limits, f"{model_name}, {words_of(count)}")
        for engine in engines.values():
            end(engine)
    rng = random.Random(2)

    def arrive(name: str) -> None:
        prompt_ids = random_ids(PROMPT, engines[name].config.vocab_size, rng)
        engines[name].add_request(prompt_ids, packages[name].SamplingParams(max_tokens=1, ignore_eos=True))

    found["prompt"] = turns(engines, arrive, repeats, PROMPT, 1, limits, f"{model_name}, {words_of('prompt')}")
    return found


def words_of(work: str | int) -> str:
    """What a table calls a step, given by its number of streams, or as `prompt`.

    >>> words_of(1), words_of("16"), words_of("prompt")
    ('1 stream', '16 streams', 'prompt of 512')
    """
    return f"prompt of {PROMPT}" if work == "prompt" else f"{work} stream{'s' if str(work) != '1' else ''}"


def turns(engines: dict, prepare: Callable, repeats: int, positions: int, draws: int, limits: dict, label: str) -> dict:
    """Time steps of all engines, whole and in parts; each chapter's row.

    Args:
        prepare: called with a chapter's name before each of its steps.
        positions, draws: how many tokens a step feeds, and how many it generates.
    """
    clocks = {name: [] for name in engines}

    def whole(name: str) -> Timing:
        prepare(name)
        return timed(engines[name].step)

    def in_parts(name: str) -> Timing:
        prepare(name)
        with parts_timed(engines[name]) as clock:
            timing = timed(engines[name].step)
        clocks[name].append(clock.spent)
        return timing

    contestants = {name: lambda name=name: whole(name) for name in engines}
    contestants |= {f"{name}, in parts": lambda name=name: in_parts(name) for name in engines}
    timings = interleave(contestants, repeats, label)
    return {
        # The first step was the warm-up.
        name: row_of(engine, timings[name], timings[f"{name}, in parts"], clocks[name][1:], positions, draws, limits)
        for name, engine in engines.items()
    }


def row_of(engine, whole: list[Timing], in_parts: list[Timing], clocks: list[dict], positions: int, draws: int, limits: dict) -> dict:
    """A chapter's figures: the step, its parts and their shares, the bound, and what is left between them."""
    step = summary(whole)
    fastest = sorted(clocks, key=lambda spent: sum(spent.values()))[: max(1, len(clocks) // 3)]
    parts = {part: 1e3 * statistics.mean(spent[part] for spent in fastest) for part in PARTS}
    read_ms = 1e3 * weight_bytes(engine.model) / limits["bytes_per_s"]
    multiply_ms = 1e3 * operations(engine.model, positions, draws) / limits["operations_per_s"]
    bound_ms = max(read_ms, multiply_ms)
    return {
        "step_ms": step["cpu_ms"],
        "best_ms": round(1e3 * min(timing.cpu_s for timing in whole), 4),
        "wall_ms": step["wall_ms"],
        "spread": step["spread"],
        "repeats": step["repeats"],
        "disturbed": round(min(timing.cpu_s for timing in in_parts) / min(timing.cpu_s for timing in whole) - 1, 3),
        **{f"{part}_ms": round(ms, 4) for part, ms in parts.items()},
        "shares": {part: round(ms / sum(parts.values()), 4) for part, ms in parts.items()},
        "read_ms": round(read_ms, 4),
        "multiply_ms": round(multiply_ms, 4),
        "bound_ms": round(bound_ms, 4),
        "left_ms": round(step["cpu_ms"] - bound_ms, 4),
        "share_of_limit": round(bound_ms / step["cpu_ms"], 3),
        "linear": getattr(engine, "linear", "plain"),
        "weight_bytes": weight_bytes(engine.model),
    }


def measure_all(chapters: list[Chapter], repeats: int) -> dict:
    import torch

    torch.set_num_threads(1)
    limits = {"bytes_per_s": bandwidth(), "operations_per_s": multiplications()}
    results = {"limits": {"gb_per_s": round(limits["bytes_per_s"] / 1e9, 2), "gflops": round(limits["operations_per_s"] / 1e9, 1)}}
    for model_name in MODELS:
        results[model_name] = measure(chapters, model_name, repeats, limits)
    return results


def show(results: dict) -> None:
    limits = results["limits"]
    print(f"one thread reads {limits['gb_per_s']} GB/s and does {limits['gflops']} GFLOPS")
    for model_name in MODELS:
        print(f"\n{model_name + ', ms per step':40}" + "".join(f"{part:>11}" for part in PARTS) + f"{'step':>10}{'best':>10}{'bound':>10}{'left':>10}")
        for what, rows in results[model_name].items():
            for name, row in rows.items():
                cells = "".join(f"{row[f'{part}_ms']:11.2f}" for part in PARTS)
                cells += "".join(f"{row[key]:10.2f}" for key in ("step_ms", "best_ms", "bound_ms", "left_ms"))
                noise = "  noisy" if row["spread"] > NOISY else ""
                label = f"{words_of(what)}: {name}, {row['linear']}"
                print(f"{label:40}{cells}  in parts {row['disturbed']:+.1%}{noise}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench.step", description=__doc__.partition("\n")[0])
    parser.add_argument("chapters", nargs="*", metavar="vNN", help="default: the chapter that stores weights in other forms, and the one before")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="write docs/results/step.json")
    args = parser.parse_args(argv)
    try:
        chapters = [find(text) for text in args.chapters] or [first_with("linear").previous, first_with("linear")]
    except ValueError as error:
        parser.error(str(error))
    unable = [each.id for each in chapters if "attention" not in each.capabilities]
    if unable:
        parser.error(f"this times a backend's attention, and {', '.join(unable)} has no backend; name later chapters")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    if args.write and args.chapters:
        parser.error("--write always measures the same two chapters, since the text shows one beside the other; name none")
    results = measure_all(chapters, args.repeats)
    show(results)
    if args.write:
        path = write_row("step", results, " ".join(["python -m shared.bench.step", *argv]), chapters)
        print(f"wrote {path.name}; now `make sync`")
    return 0


if __name__ == "__main__":
    run(main)
