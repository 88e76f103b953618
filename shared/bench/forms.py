"""What each lever of a faster step is worth: the form in which weights are stored, joined products, fewer padded keys.

    python -m shared.bench.forms               # six minutes
    python -m shared.bench.forms --write

First all products of one forward pass of SmolLM2-135M's shape, by the number of rows, in each form that this machine has,
layer by layer and joined: q, k and v as one product, and gate and up as one. Every row has a head, as in a step in which
each sequence generates a token. Two more forms were tried, and no chapter has them:

    transposed   the weight as a contiguous [in, out] matrix
    packed       MKL's own order, made for one number of rows

Then whole steps of the chapter that stores weights in such forms, with one form or one lever changed at a time:

    apart        the same form, with nothing joined
    padded       one rectangle for all sequences that feed the same number of tokens, however long they are
    gathered     queries are gathered and scattered even if one rectangle holds all of them

All contestants take turns, on one thread, in float32, beside the chapter before. A figure is the median CPU time, which
other programs disturb less than wall time, with the best beside it; `ratio` is the median over the turns of a
contestant's time, divided by that of the chapter before in the same turn, with its quartiles.

Reads: the chapters. Writes: docs/results/forms.json.
"""
import argparse
import importlib
import random
import statistics
from collections.abc import Callable
from functools import partial

from shared.bench.step import PROMPT, STREAMS, begin, end, make_engine, words_of
from shared.bench.suite import RAGGED_MANY, bandwidth, multiplications, serve
from shared.bench.timing import Timing, interleave, progress, summary, timed, weight_bytes
from shared.chapters import Chapter, first_with
from shared.programs import run
from shared.results import write_row
from shared.workloads import random_ids

MODEL = "smollm2-135m-shape"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
# From this many rows on, and in whole runs, a turn takes seconds, and there are fewer of them.
MANY_ROWS, SELDOM = 128, 3
MOST_NEW = 48  # more tokens of a stream than any measurement generates


# ---- products by the number of rows


class Transposed:
    """The weight as a contiguous [in, out] matrix."""

    def __init__(self, weight, bias):
        self.weight = weight.t().contiguous()

    def __call__(self, x):
        return x @ self.weight


class Packed:
    """The weight in MKL's own order. MKL makes it for one number of rows, and accepts others."""

    ROWS = 16

    def __init__(self, weight, bias):
        import torch

        self.weight, self.packed = weight, torch.ops.mkl._mkl_reorder_linear_weight(weight, self.ROWS)

    def __call__(self, x):
        import torch

        # The last argument is compared with the number of rows; where they differ, the packed weight would not be used.
        return torch.ops.mkl._mkl_linear(x, self.packed, self.weight, None, len(x))


def extra_forms() -> dict[str, Callable]:
    """The forms that no chapter has, as far as this PyTorch has what they need."""
    import torch

    forms = {"transposed": Transposed}
    if torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear"):
        forms["packed"] = Packed
    return forms


def allowed(storage, model) -> dict[str, Callable]:
    """The chapter's forms that this machine and these weights allow."""
    forms = {}
    for name, form in storage.FORMS.items():
        try:
            storage.check_form(model, name)
        except ValueError:
            continue
        forms[name] = form
    return forms


Products = list[tuple[Callable, int]]  # each with the size of its input


def products_of(storage, model) -> dict[str, Products]:
    """All products of a forward pass, in each form, apart and joined."""
    groups = list(storage.groups_of(model))
    alone = [[layer] for group in groups for layer in group]

    def stored(form: Callable, parts: list[list]) -> Products:
        return [(form(*storage.join(part)), part[0].in_features) for part in parts]

    found = {"plain": [(layer, layer.in_features) for [layer] in alone]}
    for name, form in allowed(storage, model).items():
        found[name] = stored(form, groups)
        if name != "joined":  # which is the name of joined plain weights; apart, they are plain
            found[f"{name}_apart"] = stored(form, alone)
    return found | {name: stored(form, groups) for name, form in extra_forms().items()}


def time_products(products: Products, rows: int) -> Timing:
    """The time of all products, each with so many rows."""
    import torch

    # In a step there are other operations between products. Without one, what a product leaves in the vector registers
    # can slow down those of another library that follow.
    inputs = {size: torch.randn(rows, size) for size in {size for _, size in products}}

    def multiply() -> None:
        for product, size in products:
            product(inputs[size])

    return timed(multiply)


def by_rows(storage, model, repeats: int) -> dict:
    """By form and number of rows: milliseconds of all products."""
    import torch

    forms = products_of(storage, model)
    found = {name: {} for name in forms}
    with torch.inference_mode():
        for rows in ROWS:
            contestants = {name: partial(time_products, products, rows) for name, products in forms.items()}
            times = SELDOM if rows >= MANY_ROWS else repeats
            for name, timings in interleave(contestants, times, f"{rows} rows").items():
                found[name][str(rows)] = figures(timings)
    return found


def figures(timings: list[Timing]) -> dict:
    """Median and best CPU time, in milliseconds, with the spread of the wall times."""
    row = summary(timings)
    return {"ms": row["cpu_ms"], "best_ms": round(1e3 * min(each.cpu_s for each in timings), 4), "spread": row["spread"]}


# ---- whole steps, a lever at a time


class Apart:
    """The products of layers with the same input, each from its own form, where the chapter expects one of all of them."""

    def __init__(self, forms: list):
        self.forms, self.itemsize = forms, forms[0].itemsize

    def __call__(self, x) -> "Parts":
        return Parts(form(x) for form in self.forms)


class Parts(list):
    """Results that are split already."""

    def split(self, sizes: list[int], dim: int) -> "Parts":
        return self


def store_apart(storage, model, form: str) -> None:
    """Store each layer's weights in a form of its own."""
    for group in storage.groups_of(model):
        parts = [[layer] for layer in group]
        if len(group) == 1:
            storage.store(storage.FORMS[form], group)
            continue
        for part in parts:
            storage.store(storage.FORMS[form], part)
        group[0].form = Apart([layer.form for layer in group])


def pad(engine, chapter: Chapter) -> None:
    """Group sequences into rectangles as the chapter before does."""
    earlier = importlib.import_module(f"milestones.{chapter.previous.name}.batch")
    engine.backend = engine.backend._replace(build_view=earlier.build_rectangles)


def gather(engine, chapter: Chapter) -> None:
    """Gather the queries of each rectangle and scatter its results, also if there is only one."""
    import torch

    attend = importlib.import_module(f"milestones.{chapter.name}.attention").attend

    def attend_gathered(q, layer_id, batch):
        out = torch.empty_like(q)
        for rectangle in batch.view:
            tokens = rectangle.tokens
            keys, values = batch.cache.read(layer_id, rectangle)
            out[tokens] = attend(q[tokens], keys, values, rectangle.mask)
        return out

    engine.backend = engine.backend._replace(attend=attend_gathered)


def engines_of(chapter: Chapter, max_new: int) -> dict[str, tuple[Chapter, object]]:
    """The chapter before; this one in each form; and in the form that it chooses, with a lever taken away. By name."""
    storage = importlib.import_module(f"milestones.{chapter.name}.storage")
    make = partial(make_engine, model_name=MODEL, max_new=max_new)
    engines = {chapter.previous.id: (chapter.previous, make(chapter.previous))}
    plain = make(chapter, linear="plain")
    names = ["plain", *allowed(storage, plain.model)]
    chosen = storage.choose_form(plain.model)
    engines["plain"] = chapter, plain
    for name in names[1:]:
        engines[name] = chapter, make(chapter, linear=name)
    for lever, change in (("padded", pad), ("gathered", gather)):
        engines[f"{chosen}_{lever}"] = chapter, make(chapter, linear=chosen)
        change(engines[f"{chosen}_{lever}"][1], chapter)
    if chosen not in ("plain", "joined"):  # apart, joined weights are plain ones
        apart = make(chapter, linear="plain")
        store_apart(storage, apart.model, chosen)
        apart.linear = chosen
        engines[f"{chosen}_apart"] = chapter, apart
    return engines


def steps(chapter: Chapter, repeats: int) -> dict:
    """By workload and contestant: the time of a step, or of a whole run, and its ratio to the chapter before's."""
    max_new = max(repeats + 8, MOST_NEW)
    engines = engines_of(chapter, max_new)
    works = {}
    for count in STREAMS:
        for runner, engine in progress(list(engines.values()), f"{words_of(count)} begin"):
            begin(runner, engine, count, max_new)
        contestants = {name: partial(timed, engine.step) for name, (_, engine) in engines.items()}
        works[str(count)] = compared(interleave(contestants, repeats, words_of(count)), chapter)
        for _, engine in engines.values():
            end(engine)
    vocab_size = engines["plain"][1].config.vocab_size
    prompt_ids = random_ids(PROMPT, vocab_size, random.Random(2))

    def first_token(name: str) -> None:
        runner, engine = engines[name]
        engine.generate([prompt_ids], runner.load().SamplingParams(max_tokens=1, ignore_eos=True))

    contestants = {name: partial(timed, partial(first_token, name)) for name in engines}
    works["prompt"] = compared(interleave(contestants, SELDOM, "prompt"), chapter)

    requests = RAGGED_MANY.requests(vocab_size)
    outputs = {}

    def serve_all(name: str) -> None:
        runner, engine = engines[name]
        outputs[name] = serve(engine, runner.load(), requests)

    contestants = {name: partial(timed, partial(serve_all, name)) for name in engines}
    # Everything has run by now, so nothing needs to be warmed up.
    timings = interleave(contestants, SELDOM, "ragged", warm_up={"": lambda: None})
    works["ragged"] = compared(timings, chapter)
    for name, row in works["ragged"].items():
        row["other_answers"] = sum(a != b for a, b in zip(outputs[name], outputs[chapter.previous.id], strict=True))
    return {
        "chosen": next(name.split("_")[0] for name in engines if name.endswith("padded")),
        "works": works,
        "weight_bytes": {name: weight_bytes(engine.model) for name, (_, engine) in engines.items()},
    }


def compared(timings: dict[str, list[Timing]], chapter: Chapter) -> dict:
    """Each contestant's figures, with the ratio to the chapter before."""
    rows = {}
    for name, each in timings.items():
        ratios = [one.cpu_s / other.cpu_s for one, other in zip(each, timings[chapter.previous.id], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        rows[name] = figures(each) | {"ratio": {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}}
    return rows


# ---- the whole


def measure(chapter: Chapter, repeats: int) -> dict:
    import torch

    torch.set_num_threads(1)
    storage = importlib.import_module(f"milestones.{chapter.name}.storage")
    results = {"limits": {"gb_per_s": round(bandwidth() / 1e9, 2), "gflops": round(multiplications() / 1e9, 1)}}
    results["rows"] = by_rows(storage, make_engine(chapter, MODEL, 1, linear="plain").model, repeats)
    return results | {"steps": steps(chapter, repeats)}


def show(results: dict) -> None:
    print(f"{'all products, ms, by rows':28}" + "".join(f"{rows:>10}" for rows in ROWS))
    for name, by_size in results["rows"].items():
        print(f"{name:28}" + "".join(f"{by_size[str(rows)]['ms']:10.1f}" for rows in ROWS))
    works = results["steps"]["works"]
    print(f"\n{'ms (best), ratio':28}" + "".join(f"{work if work == 'ragged' else words_of(work):>26}" for work in works))
    for name in works["ragged"]:
        cells = (f"{rows[name]['ms']:.1f} ({rows[name]['best_ms']:.1f}) {rows[name]['ratio']['median']:.2f}" for rows in works.values())
        print(f"{name:28}" + "".join(f"{cell:>26}" for cell in cells))
    print(f"chosen: {results['steps']['chosen']}")
    for name, row in works["ragged"].items():
        if row["other_answers"]:
            print(f"{name}: {row['other_answers']} of the ragged requests get other tokens")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench.forms", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write docs/results/forms.json")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    chapter = first_with("linear")
    results = measure(chapter, args.repeats)
    show(results)
    if args.write:
        path = write_row("forms", results, " ".join(["python -m shared.bench.forms", *argv]), [chapter.previous, chapter])
        print(f"wrote {path.name}; now `make sync`")
    return 0


if __name__ == "__main__":
    run(main)
