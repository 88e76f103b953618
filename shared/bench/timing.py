"""The timer that the benchmarks share.

Runs are warmed up, then interleaved (A B A B ...), so a machine that slows down affects all contestants alike. A figure
is the median of its runs. Its spread is their interquartile range divided by the median. CPU seconds are measured too,
because on shared cores they vary less than wall time.
"""
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

# Above this spread, the report warns that the median means little.
NOISY = 0.25


@dataclass(frozen=True)
class Timing:
    """One run of one contestant, in seconds."""

    wall_s: float
    cpu_s: float


def timed(run: Callable[[], object]) -> Timing:
    """Run once, and return the time it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def interleave(
    contestants: dict[str, Callable[[], Timing]],
    repeats: int,
    label: str = "",
    warm_up: dict[str, Callable[[], object]] | None = None,
) -> dict[str, list[Timing]]:
    """Warm each contestant up, by its `warm_up` or an unmeasured run, then run all of them in turn, `repeats` times.

    A contestant returns the Timing of the part to be measured, which leaves out its preparation.
    """
    timings = {name: [] for name in contestants}
    for run in (warm_up or contestants).values():
        run()
    for round_id in progress(range(repeats), label):
        for name, run in contestants.items():
            timings[name].append(run())
    return timings


def progress(items: Iterable, label: str) -> Iterator[int]:
    """The items, with a progress bar if stderr is a terminal."""
    from tqdm import tqdm

    return iter(tqdm(items, desc=label, leave=False, disable=not sys.stderr.isatty()))


def summary(timings: list[Timing], units: int = 1) -> dict[str, float]:
    """Medians and spread of repeated runs; the times are per unit of work, of which each run has `units`.

    >>> summary([Timing(2.0, 1.0), Timing(1.0, 1.0), Timing(4.0, 1.5)], units=2)
    {'wall_ms': 1000.0, 'cpu_ms': 500.0, 'spread': 0.75, 'repeats': 3}
    """
    wall = [timing.wall_s for timing in timings]
    median = statistics.median(wall)
    fast, _, slow = statistics.quantiles(wall, n=4, method="inclusive") if len(wall) > 1 else (median,) * 3
    return {
        "wall_ms": round(1e3 * median / units, 4),
        "cpu_ms": round(1e3 * statistics.median(timing.cpu_s for timing in timings) / units, 4),
        "spread": round((slow - fast) / median, 3),
        "repeats": len(timings),
    }


def weight_bytes(model) -> int:
    """Bytes of weights that one forward pass reads: all but the embedding, which is left out unless the head shares it."""
    linears = sum(module.nbytes for module in model.modules() if hasattr(module, "nbytes"))
    norms = sum(parameter.nbytes for name, parameter in model.named_parameters() if "norm" in name)
    return linears + norms
