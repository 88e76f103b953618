"""Compare all chapters on a GPU, on a published workload, with Hugging Face and the memory bandwidth's limit.

    make bench-gpu                                  # on a GPU: checks, then measures; at most about four minutes
    make bench-gpu ARGS=--write                     # also writes the result, after each measurement
    make bench-gpu ARGS="--shape llama-3.2-1b-shape --minutes 10"
    make bench-gpu ARGS=--dry-run                   # anywhere: the same on the CPU with a tiny model, to check that it runs

The workload is nano-vllm's published one: 256 requests with prompts and outputs of 100 to 1,024 tokens, all added at the
start, in bfloat16. The last chapter runs all of them. The other chapters run only the first few, depending on what they can
do; their rows say how many, and are comparable only with rows of the same number. The last chapter is measured first, then
Hugging Face, then the last chapter's decode steps, with recorded passes and without, then the other chapters from newest to
oldest while time remains. Of those, the last one without recordings, and the last one without fused kernels, show their decode
steps too. A decode step is compared with the time to read all weights, and all keys and values of its sequences, at the
bandwidth of a large copy. What comes before the first request, such as compiling and recording, is timed apart.

Reads: the chapters. Writes: docs/results/gpu.json.
"""
import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from shared.bench.suite import num_tokens, serve
from shared.bench.timing import weight_bytes
from shared.chapters import CHAPTERS, Chapter
from shared.programs import run
from shared.results import write_row
from shared.workloads import Request, fixed, ragged


@dataclass(frozen=True)
class Setting:
    """The parameters of a measurement: the full one, or the dry run."""

    device: str
    dtype: str
    shape: str
    requests: int
    prompt_len: tuple[int, int]
    output_len: tuple[int, int]
    shares: tuple[tuple[str, int], ...]  # how many requests a chapter runs: the first capability here that it has decides
    places: int  # max_num_seqs from v05 on
    slab_places: int  # max_num_seqs in v03 and v04, which reserve a row of memory for each
    decode: tuple[tuple[int, int], ...]  # number and context length of the sequences whose decode step is timed
    decode_steps: int
    repeats: int


GPU = Setting(
    device="cuda",
    dtype="bfloat16",
    shape="qwen3-0.6b-shape",
    requests=256,
    prompt_len=(100, 1024),
    output_len=(100, 1024),
    shares=(("kv_bytes", 64), ("max_num_seqs", 16), ("generate", 1)),
    places=256,
    slab_places=16,
    decode=((1, 512), (64, 512), (256, 512), (64, 2048)),
    decode_steps=16,
    repeats=1,
)
DRY_RUN = Setting(
    device="cpu",
    dtype="float32",
    shape="llama",
    requests=5,
    prompt_len=(3, 9),
    output_len=(2, 6),
    shares=(("kv_bytes", 4), ("max_num_seqs", 3), ("generate", 1)),
    places=4,
    slab_places=2,
    decode=((1, 5), (3, 8)),
    decode_steps=2,
    repeats=1,
)


# Of chapters before the last, decode steps are timed for the newest without each of these.
COMPARED = ("graphs", "linear")


def decoders(chapter: Chapter) -> dict[str, dict]:
    """The engines of a chapter whose decode steps are timed: by name, their options."""
    if chapter is CHAPTERS[-1]:
        return {chapter.id: {}} | ({f"{chapter.id}_eager": {"graphs": False}} if "graphs" in chapter.capabilities else {})
    without = [[each for each in CHAPTERS if capability not in each.capabilities] for capability in COMPARED]
    return {chapter.id: {}} if any(chapter is chapters[-1] for chapters in without if chapters) else {}


def engine_of(chapter: Chapter, path: Path, setting: Setting, max_model_len: int, **options):
    """The chapter's engine with the setting's limits."""
    limits = {"device": setting.device, "dtype": setting.dtype, "max_model_len": max_model_len} | options
    if "max_num_seqs" in chapter.capabilities:
        limits["max_num_seqs"] = setting.places if "kv_bytes" in chapter.capabilities else setting.slab_places
    return chapter.load().Engine(path, **limits)


def finished(device: str) -> float:
    """The time once the device has finished all its work."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def warmed_up(engine, device: str) -> dict:
    """Do what an engine can do before its first request; the seconds and the device's memory that it took."""
    if not hasattr(engine, "warm_up"):
        return {}
    free, start = free_bytes(device), finished(device)
    engine.warm_up()
    seconds = finished(device) - start
    return {"warm_up_s": round(seconds, 2), "warm_up_mib": round((free - free_bytes(device)) / 2**20, 1)}


def free_bytes(device: str) -> int:
    """A GPU's free memory; 0 on a CPU, where nothing is recorded."""
    import torch

    return torch.cuda.mem_get_info()[0] if device == "cuda" else 0


def emptied(device: str) -> None:
    """Free the memory of engines that are no longer referenced."""
    import gc

    import torch

    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def check(setting: Setting) -> None:
    """AssertionError if a chapter generates other tokens than v01, in float32 on this device."""
    from shared.checkpoints import checkpoint

    requests = ragged(4, 400, prompt_len=(3, 40), output_len=(3, 12), seed=1)
    expected = None
    for chapter in CHAPTERS:
        engine = chapter.load().Engine(checkpoint("llama"), device=setting.device, dtype="float32")
        outputs = serve(engine, chapter.load(), requests)
        expected = expected or outputs
        if outputs != expected:
            raise AssertionError(f"{chapter.id} on {setting.device} generates {outputs}, {CHAPTERS[0].id} generates {expected}")


def share(chapter: Chapter, setting: Setting) -> int:
    """How many of the requests a chapter runs."""
    if chapter is CHAPTERS[-1]:
        return setting.requests
    return next(number for capability, number in setting.shares if capability in chapter.capabilities)


def throughput(chapter: Chapter, path: Path, requests: list[Request], setting: Setting) -> dict:
    """A chapter's row, or the error that stopped it."""
    longest = max(len(each.prompt_ids) + each.max_tokens for each in requests)
    emptied(setting.device)
    try:
        engine = engine_of(chapter, path, setting, longest)
        start = warmed_up(engine, setting.device)
        return measure(partial(serve, engine, chapter.load()), requests[: share(chapter, setting)], setting) | start
    except REFUSED as error:
        return {"error": " ".join(str(error).split())[:200]}
    finally:
        engine = None
        emptied(setting.device)


def peer(path: Path, requests: list[Request], setting: Setting) -> dict:
    """The row of Hugging Face's continuous batching, with as many requests as an earlier chapter with blocks."""
    from shared.bench.peers import ContinuousBatching

    requests = requests[: setting.shares[0][1]]
    emptied(setting.device)
    try:
        # A cache for all requests at once, so that none has to wait for memory.
        positions = sum(len(each.prompt_ids) + each.max_tokens for each in requests) + 256 * setting.places
        batching = ContinuousBatching(path, positions, setting.device, setting.dtype, setting.places)
        try:
            return measure(partial(batching.generate, seconds=PEER_S), requests, setting)
        finally:
            batching.stop()
    except REFUSED as error:
        return {"error": " ".join(str(error).split())[:200]}
    finally:
        batching = None
        emptied(setting.device)


PEER_S = 40.0  # the time limit for Hugging Face

# If the machine is too small for one contestant, the others are still measured.
REFUSED = (ValueError, MemoryError, RuntimeError)  # torch.OutOfMemoryError is a RuntimeError


def measure(run, requests: list[Request], setting: Setting) -> dict:
    """One contestant's row: its fastest run, after a warm-up with two tokens per request, which compiles the kernels."""
    run([Request(each.prompt_ids, 2) for each in requests])
    seconds = []
    for _ in range(setting.repeats):
        start = finished(setting.device)
        run(requests)
        seconds.append(finished(setting.device) - start)
    return {
        "requests": len(requests),
        "tokens": num_tokens(requests),
        "seconds": [round(each, 4) for each in seconds],
        "tokens_per_s": round(num_tokens(requests) / min(seconds), 1),
    }


def decode_steps(chapter: Chapter, options: dict, path: Path, setting: Setting, bytes_per_s: float) -> list[dict]:
    """An engine's decode steps, each with its floor: the time to read every weight, key and value once."""
    emptied(setting.device)
    longest = max(context for _, context in setting.decode) + setting.decode_steps + 2
    if "chunked_prefill" in chapter.capabilities:
        # All prompts in one step, so that the next steps have no piece of one.
        options = options | {"max_num_batched_tokens": max(size * context for size, context in setting.decode)}
    engine = engine_of(chapter, path, setting, longest, **options)
    warmed_up(engine, setting.device)
    rows = []
    for size, context in setting.decode:
        row = {"sequences": size, "context": context}
        try:
            row |= decode_step(engine, chapter.load(), size, context, setting, bytes_per_s)
        except REFUSED as error:
            row["error"] = " ".join(str(error).split())[:200]
            for request_id in list(engine.seqs):
                engine.abort_request(request_id)
        rows.append(row)
    return rows


def decode_step(engine, package, size: int, context: int, setting: Setting, bytes_per_s: float) -> dict:
    """The time of a step in which each of `size` sequences of this length gets a token, and its floor."""
    params = package.SamplingParams(max_tokens=setting.decode_steps + 2, ignore_eos=True)
    for request in fixed([(context, 0)] * size, engine.config.vocab_size):
        engine.add_request(request.prompt_ids, params)
    # The first step computes the prompts; the second, a decode step like the timed ones, is the warm-up.
    engine.step()
    engine.step()
    running = engine.stats().running
    fed = engine.num_positions
    start = finished(setting.device)
    for _ in range(setting.decode_steps):
        engine.step()
    step_s = (finished(setting.device) - start) / setting.decode_steps
    fed = engine.num_positions - fed
    while engine.has_unfinished_requests():
        engine.step()
    if running < size:
        return {"error": f"only {running} sequences fit into the cache"}
    if fed != size * setting.decode_steps:
        raise AssertionError(f"{setting.decode_steps} decode steps of {size} sequences fed {fed} tokens")
    # The positions of each sequence that a timed step reads, on average over the steps.
    mean_context = context + 2 + (setting.decode_steps - 1) / 2
    token_bytes = engine.cache.kv_bytes // (engine.pool.num_blocks * engine.pool.block_size)
    floor_s = (weight_bytes(engine.model) + size * mean_context * token_bytes) / bytes_per_s
    return {"step_ms": round(1e3 * step_s, 4), "floor_ms": round(1e3 * floor_s, 4), "share": round(floor_s / step_s, 3)}


def copy_rate(device: str) -> float:
    """Bytes per second that a large copy reads and writes."""
    import torch

    source = torch.ones(2**31 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        start = finished(device)
        target.copy_(source)
        best = min(best, finished(device) - start)
    return 2 * source.nbytes / best


def bench_gpu(setting: Setting, seconds: float, keep: Callable[[dict, list[Chapter]], None]) -> dict:
    """Check, then measure while time remains.

    Args:
        keep: called after each measurement with all results so far and the chapters measured.
    """
    from shared.checkpoints import checkpoint

    deadline = time.monotonic() + seconds
    check(setting)
    bytes_per_s = copy_rate(setting.device)
    print(f"a copy moves {bytes_per_s / 1e9:,.0f} GB/s")
    path = checkpoint(setting.shape)
    vocab_size = json.loads((path / "config.json").read_text())["vocab_size"]
    requests = ragged(setting.requests, vocab_size, prompt_len=setting.prompt_len, output_len=setting.output_len, seed=0)
    rows, decode, measured = {}, {}, []
    found = {"copy_gb_per_s": round(bytes_per_s / 1e9, 1), setting.shape: {"throughput": rows, "decode": decode}}
    newest_first = CHAPTERS[::-1]
    report_head(setting.shape)
    for chapter in newest_first:
        if time.monotonic() > deadline:
            left = [each.id for each in newest_first if each not in measured]
            print(f"time is up; not measured: {', '.join(left)}; allow more with --minutes")
            break
        rows[chapter.id] = throughput(chapter, path, requests, setting)
        measured.append(chapter)
        report_row(chapter.id, rows[chapter.id])
        keep(found, measured)
        if chapter is CHAPTERS[-1]:
            rows["HF continuous"] = peer(path, requests, setting)
            report_row("HF continuous", rows["HF continuous"])
            keep(found, measured)
        for name, options in decoders(chapter).items():
            decode[name] = decode_steps(chapter, options, path, setting, bytes_per_s)
            keep(found, measured)
    report_decode(decode)
    return found


def report_head(shape: str) -> None:
    columns = f"{'requests':>10}{'tokens':>10}{'seconds':>10}{'tokens/s':>12}{'warm-up s':>11}{'MiB':>8}"
    print(f"\n{shape}\n{'':16}{columns}")


def report_row(name: str, row: dict) -> None:
    if "error" in row:
        print(f"{name:16}{row['error']}", flush=True)
        return
    cells = f"{row['requests']:10,}{row['tokens']:10,}{min(row['seconds']):10.2f}{row['tokens_per_s']:12,.0f}"
    start = f"{row['warm_up_s']:11.2f}{row['warm_up_mib']:8,.0f}" if "warm_up_s" in row else ""
    print(f"{name:16}{cells}{start}", flush=True)


def report_decode(decode: dict[str, list[dict]]) -> None:
    print(f"\n{'decode step of':16}{'sequences':>10}{'context':>10}{'ms':>10}{'floor ms':>10}{'share':>8}")
    for name, rows in decode.items():
        for row in rows:
            cells = f"  {row['error']}" if "error" in row else f"{row['step_ms']:10.2f}{row['floor_ms']:10.2f}{row['share']:8.0%}"
            print(f"{name:16}{row['sequences']:10,}{row['context']:10,}{cells}", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench.gpu", description="Measure every chapter on a GPU.")
    parser.add_argument("--dry-run", action="store_true", help="check on the CPU, with a tiny model, that it runs; the figures mean nothing")
    parser.add_argument("--shape", default=GPU.shape, help=f"a checkpoint's name (default: {GPU.shape})")
    parser.add_argument("--minutes", type=float, default=4.0, help="time limit; nothing is started after three quarters of it (default: 4)")
    parser.add_argument("--write", action="store_true", help="write the result under docs/results/, after each measurement")
    args = parser.parse_args(argv)
    if args.dry_run and args.write:
        parser.error("--write is for results from a GPU; leave out --dry-run")
    if args.write and args.shape != GPU.shape:
        parser.error(f"--write is for {GPU.shape}, and another shape would replace its result; leave out --shape")
    if not args.minutes > 0:
        parser.error(f"--minutes must be above 0, got {args.minutes}")
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        parser.error("this requires a GPU, and torch finds none; --dry-run checks the command without one")
    command = " ".join(["python -m shared.bench.gpu", *argv])

    def keep(found: dict, measured: list[Chapter]) -> None:
        if args.write:
            print(f"wrote {write_row('gpu', found, command, measured, gpu=True)}")

    # The rest of the time is for the measurement that is running at the deadline.
    bench_gpu(DRY_RUN if args.dry_run else replace(GPU, shape=args.shape), 60 * args.minutes * 0.75, keep)
    return 0


if __name__ == "__main__":
    run(main)
