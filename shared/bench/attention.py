"""Attention of one decode step on a GPU: the kernel, what it replaces, and the memory bandwidth's limit.

    python -m shared.bench.attention              # on a GPU: minutes
    python -m shared.bench.attention --write      # also writes the result
    python -m shared.bench.attention --dry-run    # anywhere: one small shape, to check that it runs and that all agree

There are four columns over the same keys and values. `kernel` follows the block tables. `torch` gathers the blocks and
calls scaled_dot_product_attention with a mask, as on a CPU. `contiguous` is the same call on keys and values already in
order, without tables or mask, as if nothing were paged. `bound` is the time to read every key and value once, at the
bandwidth of a 2 GiB copy on this machine. All sequences of a batch have the same length, so nothing is padded.

Launching from Python takes longer than a small kernel runs. So the launches of many layers, each with its own keys and
values, are recorded in a CUDA graph, and its replay is timed. Together the layers are larger than the GPU's cache, because
in a model the next layer's keys and values would not be in the cache either.

Reads: the kernel's chapter. Writes: docs/results/attention.json.
"""
import argparse
import importlib
import os
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

from shared.chapters import first_with
from shared.programs import run
from shared.results import write_row

CHAPTER = first_with("attention")


class Heads(NamedTuple):
    """The shape of one layer's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = {"llama-3.2-1b": Heads(32, 8, 64), "qwen3-0.6b": Heads(16, 8, 128)}
CONTEXTS = (128, 512, 2048, 8192, 32768)
BATCHES = (1, 4, 16, 64, 256)
WAYS = ("kernel", "torch", "contiguous")
BLOCK_SIZE = 16
DRY_RUN = {"tiny": Heads(6, 2, 16)}, (40,), (1, 3)


def ways(heads: Heads, context: int, batch_size: int, device, dtype, num_layers: int = 1) -> dict[str, Callable]:
    """The functions to time, by name; each takes a layer's index and returns [S, H, D]."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    attention, batch, cache_module, kernels = (
        importlib.import_module(f"milestones.{CHAPTER.name}.{name}")
        for name in ("attention", "batch", "cache", "kernels.paged_attention")
    )
    blocks_each = -(-context // BLOCK_SIZE)
    num_blocks = batch_size * blocks_each
    config = SimpleNamespace(num_layers=num_layers, num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim)
    cache = cache_module.KVCache(config, num_blocks, BLOCK_SIZE, device, dtype)
    cache.k.normal_()
    cache.v.normal_()
    tables = torch.randperm(num_blocks, device=device, dtype=torch.int32).view(batch_size, blocks_each)
    rectangle = batch.Rectangle(
        tokens=torch.arange(batch_size),
        block_tables=tables,
        context_len=context,
        mask=batch.causal_mask(torch.full((batch_size,), context - 1), context),
    ).to(device)
    q = torch.randn(batch_size, heads.num_heads, heads.head_dim, device=device, dtype=dtype)
    starts = torch.arange(batch_size + 1, device=device, dtype=torch.int32)
    contexts = torch.full((batch_size,), context, device=device, dtype=torch.int32)
    in_order = [[kv.transpose(1, 2).contiguous() for kv in cache.read(i, rectangle)] for i in range(num_layers)]

    def kernel(layer: int):
        return kernels.paged_attention(q, cache.k[layer], cache.v[layer], tables, starts, contexts, 1, context)

    def contiguous(layer: int):
        k, v = in_order[layer]  # [S, KV, n, D]
        return scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)

    return {
        "kernel": kernel,
        "torch": lambda layer: attention.attend(q, *cache.read(layer, rectangle), rectangle.mask),
        "contiguous": contiguous,
    }


def kv_bytes(heads: Heads, context: int, batch_size: int, itemsize: int) -> int:
    """Bytes of one layer's keys and values."""
    return 2 * heads.num_kv_heads * heads.head_dim * itemsize * context * batch_size


MAX_LAYERS = 1024
BEYOND_CACHE = 3  # all layers' keys and values together are at least this many times as large as the GPU's cache


def layers_recorded(bytes_each: int, cache_bytes: int) -> int:
    """How many layers' launches to record, so that a layer has left the GPU's cache before it is read again.

    >>> layers_recorded(10 * 2**20, 50 * 2**20), layers_recorded(2**30, 50 * 2**20), layers_recorded(1, 50 * 2**20)
    (15, 1, 1024)
    """
    return max(1, min(MAX_LAYERS, -(-BEYOND_CACHE * cache_bytes // bytes_each)))


def measure(name: str, heads: Heads, context: int, batch_size: int, bandwidth: float) -> dict:
    """One row: microseconds per layer of each column; None for what does not fit into memory."""
    import torch

    torch.cuda.empty_cache()  # memory cached for an earlier shape would count as used
    device, dtype = torch.device("cuda"), torch.bfloat16
    bytes_each = kv_bytes(heads, context, batch_size, dtype.itemsize)
    num_layers = layers_recorded(bytes_each, torch.cuda.get_device_properties(device).L2_cache_size)
    row = {"shape": name, "context": context, "batch": batch_size, "layers": num_layers}
    row["bound_us"] = round(1e6 * bytes_each / bandwidth, 2)
    row |= {f"{way}_us": None for way in WAYS}
    try:
        contestants = ways(heads, context, batch_size, device, dtype, num_layers)
        row["kernel_us"] = round(time_recorded(contestants["kernel"], num_layers), 2)
        check(contestants, atol=2e-2)
        for way in WAYS[1:]:
            row[f"{way}_us"] = round(time_recorded(contestants[way], num_layers), 2)
    # The cache raises ValueError if it does not fit into free memory.
    except (torch.OutOfMemoryError, ValueError) as error:
        row["error"] = str(error).split(";")[0].split(". ")[0]
    if row["kernel_us"]:
        row["kernel_share"] = round(row["bound_us"] / row["kernel_us"], 3)
    return row


RUNS, RUN_MS = 5, 10.0


def time_recorded(run: Callable[[int], object], num_layers: int) -> float:
    """Microseconds per layer when the launches of all layers are replayed; the median of RUNS runs of about RUN_MS each."""
    import torch

    warm_up_stream = torch.cuda.Stream()
    warm_up_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up_stream):  # compilation and tuning at the first call must not be recorded
        for layer in range(num_layers):
            run(layer)
    torch.cuda.current_stream().wait_stream(warm_up_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(num_layers):
            run(layer)

    def replay(count: int) -> float:
        """Milliseconds for `count` replays."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    replay(2)
    count = max(1, round(RUN_MS / max(replay(1), 1e-3)))
    return 1e3 * statistics.median(replay(count) for _ in range(RUNS)) / (count * num_layers)


def check(contestants: dict, atol: float) -> None:
    """AssertionError if the functions' results differ."""
    import torch

    outputs = {way: run(0).float() for way, run in contestants.items()}
    for way in WAYS[1:]:
        torch.testing.assert_close(outputs[way], outputs["kernel"], rtol=0, atol=atol, msg=lambda m: f"{way}: {m}")


def copy_bandwidth() -> float:
    """Bytes per second that the GPU reads and writes while it copies 2 GiB."""
    import torch
    from triton.testing import do_bench

    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * do_bench(lambda: target.copy_(source), return_mode="median"))


def dry_run() -> None:
    """Check one small shape on the CPU, with Triton's interpreter; nothing is timed."""
    import torch

    shapes, contexts, batches = DRY_RUN
    for name, heads in shapes.items():
        for context in contexts:
            for batch_size in batches:
                check(ways(heads, context, batch_size, torch.device("cpu"), torch.float32), atol=1e-5)
                print(f"{name}, context {context}, batch {batch_size}: {', '.join(WAYS)} agree")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench.attention", description="Measure the paged attention kernel.")
    parser.add_argument("--dry-run", action="store_true", help="check that it runs, without a GPU; nothing is timed")
    parser.add_argument("--write", action="store_true", help="write the result under docs/results/")
    args = parser.parse_args(argv)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        dry_run()
        return 0
    import torch

    if not torch.cuda.is_available():
        parser.error("this requires a GPU, and torch finds none; --dry-run checks the command without one")
    bandwidth = copy_bandwidth()
    print(f"a copy moves {bandwidth / 1e9:,.0f} GB/s")
    columns = ("shape", "context", "batch", "kernel_us", "torch_us", "contiguous_us", "bound_us", "kernel_share")
    print("".join(f"{column:>15}" for column in columns))
    rows = []
    for name, heads in SHAPES.items():
        for context in CONTEXTS:
            for batch_size in BATCHES:
                rows.append(measure(name, heads, context, batch_size, bandwidth))
                print("".join(f"{str(rows[-1].get(column, '')):>15}" for column in columns), rows[-1].get("error", ""), flush=True)
    if args.write:
        longest = {
            name: max(timed, key=lambda row: row["bound_us"])
            for name in SHAPES
            if (timed := [row for row in rows if row["shape"] == name and row["contiguous_us"]])
        }
        results = {"bandwidth_gb_s": round(bandwidth / 1e9, 1), "longest": longest, "rows": rows}
        write_row("attention", results, "python -m shared.bench.attention --write", [CHAPTER], gpu=True)
    return 0


if __name__ == "__main__":
    run(main)
