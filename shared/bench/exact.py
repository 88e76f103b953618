"""What it costs that a request's numbers do not depend on its company, and what differs where they do.

    python -m shared.bench.exact               # three minutes on an idle machine
    python -m shared.bench.exact --write

The price: a decode step of 1, 16 and 64 streams with contexts of about 100 tokens, and steps of prompts, on one thread.
The contestants take turns, step by step: the chapter before in the form of weights that it chooses, the chapter with
PyTorch's own products, and the chapter with exact=True.

The differences: requests run one after another, then all together on a cache that is too small for them, with a budget
of tokens per step. Counted are the log-probabilities whose bits differ, and the texts that do.

One request's numbers: its likeliest next tokens alone, and with more and more other requests, for the site's page.

Reads: the chapters. Writes: docs/results/exact.json.
"""
import argparse
import contextlib
import importlib
import io
import random
import struct
import time

from shared.bench.step import MODELS, PROMPT, STREAMS, begin, end, make_engine, words_of
from shared.bench.timing import NOISY, Timing, interleave, progress, summary, timed
from shared.chapters import Chapter, first_with
from shared.checkpoints import checkpoint
from shared.programs import run
from shared.results import write_row
from shared.workloads import random_ids

PROMPTS = 128, PROMPT
SETTINGS = {"plain": {"linear": "plain"}, "fastest": {"linear": "auto"}, "exact": {"exact": True}}
# The checkpoints whose requests are compared, a trained one and a random one, and the dtypes.
COMPARED = {"pocket": ("pocket", "float32"), "qwen3": ("qwen3", "float32"), "pocket-bfloat16": ("pocket", "bfloat16")}
REQUESTS, LENGTHS, MAX_NEW = 48, (3, 60), 60
TIGHT = {"num_blocks": 80, "block_size": 8, "max_num_seqs": 16, "reserve_tokens": 0, "max_num_batched_tokens": 40}
# How many others run beside the request whose numbers the page shows.
COMPANY = 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 63
STORY, PLACE, SHOWN = "Once upon a time", 12, 5


# ---- the price


def price(chapter: Chapter, model_name: str, repeats: int) -> dict:
    """By number of streams and length of prompt: milliseconds of CPU time for a step of each contestant."""
    max_new = 4 * repeats + 8
    before = chapter.previous
    engines = {
        f"{before.id}, fastest": (before, make_engine(before, model_name, max_new, linear="auto")),
        "plain": (chapter, make_engine(chapter, model_name, max_new, linear="plain")),
        "exact": (chapter, make_engine(chapter, model_name, max_new, exact=True)),
    }
    found = {}
    for count in STREAMS:
        for owner, engine in engines.values():
            begin(owner, engine, count, max_new)
        steps = {name: lambda engine=engine: timed(engine.step) for name, (_, engine) in engines.items()}
        found[str(count)] = rows(interleave(steps, repeats * (1 if count == max(STREAMS) else 3), f"{model_name}, {words_of(count)}"))
        for _, engine in engines.values():
            end(engine)
    rng = random.Random(3)
    for length in PROMPTS:

        def prefill(name: str) -> Timing:
            owner, engine = engines[name]
            params = owner.load().SamplingParams(max_tokens=1, ignore_eos=True)
            engine.add_request(random_ids(length, engine.config.vocab_size, rng), params)
            return timed(engine.step)

        prompts = {name: lambda name=name: prefill(name) for name in engines}
        found[f"prompt-{length}"] = rows(interleave(prompts, repeats, f"{model_name}, prompt of {length}"))
    return found


def rows(timings: dict[str, list[Timing]]) -> dict:
    """Each contestant's milliseconds, and the ratios of exact to the others, by medians."""
    table = {"before" if name.endswith("fastest") else name: summary(each) for name, each in timings.items()}
    ratios = {f"exact_to_{name}": round(table["exact"]["cpu_ms"] / table[name]["cpu_ms"], 3) for name in ("before", "plain")}
    return table | ratios


def check_seconds(chapter: Chapter, model_name: str) -> float:
    """How long the experiments at start take."""
    exact = importlib.import_module(f"{chapter.load().__name__}.exact")
    correct, spent = exact.is_exact, []

    def clocked(*args):
        start = time.perf_counter()
        found = correct(*args)
        spent.append(time.perf_counter() - start)
        return found

    exact.is_exact = clocked
    try:
        make_engine(chapter, model_name, 8, exact=True)
    finally:
        exact.is_exact = correct
    return round(sum(spent), 3)


# ---- the differences


def quiet_engine(chapter: Chapter, model_name: str, **options):
    with contextlib.redirect_stderr(io.StringIO()):
        return chapter.load().Engine(checkpoint(model_name), device="cpu", **options)


def differences(chapter: Chapter, model_name: str, dtype: str) -> dict:
    """By setting: of how many log-probabilities and texts the bits and the tokens differ between a request alone and in company."""
    found = {}
    for name, setting in SETTINGS.items():
        roomy = quiet_engine(chapter, model_name, dtype=dtype, enable_prefix_caching=False, **setting)
        tight = quiet_engine(chapter, model_name, dtype=dtype, **TIGHT, **setting)
        rng = random.Random(5)
        shared = random_ids(20, roomy.config.vocab_size, rng)
        prompts = [shared[: rng.randint(0, 20)] + random_ids(rng.randint(*LENGTHS), roomy.config.vocab_size, rng) for _ in range(REQUESTS)]
        params = chapter.load().SamplingParams(max_tokens=MAX_NEW, ignore_eos=True, logprobs=3)
        alone = [roomy.generate([prompt], params)[0] for prompt in prompts]
        together = tight.generate(prompts, params)
        pairs = [pair for mine, its in zip(alone, together) for pair in zip(mine.logprobs, its.logprobs) if same_beginning(mine, its)]
        found[name] = {
            "linear": tight.linear,
            "logprobs": sum(len(one) for one, _ in pairs),
            "logprobs_differ": sum(one.get(key) != other.get(key) for one, other in pairs for key in one),
            "largest": max((abs(one[key] - other[key]) for one, other in pairs for key in one.keys() & other.keys()), default=0.0),
            "texts": len(prompts),
            "texts_differ": sum(mine.token_ids != its.token_ids for mine, its in zip(alone, together)),
            "preemptions": tight.scheduler.num_preemptions,
            "cached_tokens": tight.scheduler.num_cached_tokens,
        }
        found[name]["share"] = round(found[name]["logprobs_differ"] / found[name]["logprobs"], 4)
    return found


def same_beginning(mine, its) -> bool:
    """Whether two answers have the same tokens: after the first other token, their numbers have nothing in common."""
    return mine.token_ids == its.token_ids


# ---- one request's numbers


def bits_of(value: float) -> str:
    """The 32 bits of a float32 number, in hexadecimal.

    >>> bits_of(-1.0)
    'bf800000'
    """
    return struct.pack(">f", value).hex()


def numbers(chapter: Chapter) -> dict:
    """By setting and number of others: the likeliest tokens after PLACE tokens of one request, with their log-probabilities."""
    found = {"prompt": STORY, "place": PLACE}
    for name in ("fastest", "exact"):
        engine = quiet_engine(chapter, "pocket", enable_prefix_caching=False, **SETTINGS[name])
        params = chapter.load().SamplingParams(max_tokens=PLACE, ignore_eos=True, logprobs=SHOWN)
        found[name] = {}
        for count in COMPANY:
            rng = random.Random(count)
            others = [random_ids(rng.randint(2, 60), engine.config.vocab_size, rng) for _ in range(count)]
            mine = engine.generate([STORY, *others], params)[0]
            likeliest = sorted(mine.logprobs[-1].items(), key=lambda pair: -pair[1])[:SHOWN]
            found[name][str(count)] = [
                {"token": engine.tokenizer.decode([token]), "logprob": value, "bits": bits_of(value)} for token, value in likeliest
            ]
        found[f"{name}_linear"] = engine.linear
    return found


def measure_all(chapter: Chapter, repeats: int) -> dict:
    import torch

    torch.set_num_threads(1)
    results = {"price": {}, "check_s": {}, "differences": {}}
    for model_name in MODELS:
        results["check_s"][model_name] = check_seconds(chapter, model_name)
        results["price"][model_name] = price(chapter, model_name, repeats)
    for label, (model_name, dtype) in progress(COMPARED.items(), "differences"):
        results["differences"][label] = differences(chapter, model_name, dtype)
    return results | {"numbers": numbers(chapter)}


def show(results: dict) -> None:
    for model_name, works in results["price"].items():
        print(f"\n{model_name}, ms of CPU time per step; the experiment at start took {results['check_s'][model_name]:.2f} s")
        for what, table in works.items():
            times = "".join(f"  {name} {table[name]['cpu_ms']:9.2f}" for name in ("before", "plain", "exact"))
            noise = "  noisy" if max(table[name]["spread"] for name in ("before", "plain", "exact")) > NOISY else ""
            print(f"{what:12}{times}  exact / before {table['exact_to_before']:.2f}  exact / plain {table['exact_to_plain']:.2f}{noise}")
    for label, settings in results["differences"].items():
        print(f"\n{label}, alone and in company")
        for name, row in settings.items():
            print(
                f"{name:10} {row['linear']:10} {row['logprobs_differ']:5} of {row['logprobs']} log-probabilities differ, by at most {row['largest']:.1e}; "
                f"{row['texts_differ']} of {row['texts']} texts; {row['preemptions']} preemptions, {row['cached_tokens']} cached tokens"
            )
    for name in ("fastest", "exact"):
        kinds = {tuple(each["bits"] for each in rows) for rows in results["numbers"][name].values()}
        print(f"\n{name}: one request beside {COMPANY[0]} to {COMPANY[-1]} others has {len(kinds)} kinds of numbers")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench.exact", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write docs/results/exact.json")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    chapter = first_with("exact")
    results = measure_all(chapter, args.repeats)
    show(results)
    if args.write:
        path = write_row("exact", results, " ".join(["python -m shared.bench.exact", *argv]), [chapter.previous, chapter])
        print(f"wrote {path.name}; now `make sync`")
    return 0


if __name__ == "__main__":
    run(main)
